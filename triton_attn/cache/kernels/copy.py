"""Kernel that copies pages inside a cache or to another, of all layers, keys and values in one launch; its launcher."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._host.checks import FLOAT8_MANTISSA_BITS
from ..._host.device import hold_pinned, launch
from ..._host.tuned import remember

TILE_ELEMENTS = 4096


class Layout(NamedTuple):
    """Strides of a cache in elements, and the length of a row."""

    layer: int
    page: int
    slot: int
    head: int
    head_dim: int


class Pages(NamedTuple):
    """Pages of all layers."""

    ptr: object
    layout: Layout


_new_pages = functools.partial(tuple.__new__, Pages)  # Pages._make, in C alone


class Tile(NamedTuple):
    """What the kernel is compiled for: BLOCK_ROWS rows of BLOCK_D elements at a time, of the rows of a page."""

    BLOCK_ROWS: int
    BLOCK_D: int
    PAGE_SIZE: int
    NUM_HEADS: int


@triton.jit
def _choose(condition, one, other):
    """Of two Pages the first where the condition holds; strides in 64 bits."""
    return Pages(
        tl.where(condition, one.ptr, other.ptr),
        Layout(
            tl.where(condition, one.layout.layer, tl.cast(other.layout.layer, tl.int64)),
            tl.where(condition, one.layout.page, tl.cast(other.layout.page, tl.int64)),
            tl.where(condition, one.layout.slot, tl.cast(other.layout.slot, tl.int64)),
            tl.where(condition, one.layout.head, tl.cast(other.layout.head, tl.int64)),
            tl.where(condition, one.layout.head_dim, tl.cast(other.layout.head_dim, tl.int32)),
        ),
    )


@triton.jit
def _choose_one(caches, index):
    """The Pages of a tuple at an index that a program computes."""
    chosen = caches[0]
    for i in tl.static_range(len(caches)):
        chosen = _choose(index == i, caches[i], chosen)
    return chosen


@triton.jit(do_not_specialize=["num_layers", "src_pages_ptr", "dst_pages_ptr"])
def _copy_kv_pages_kernel(src_pages_ptr, dst_pages_ptr, caches, targets, num_layers, TILE: tl.constexpr):
    """One program copies one page of one layer of one cache.

    Grid: pairs of pages * num_layers * caches, a tuple of Pages. targets is such a tuple, or None for the same caches.
    """
    num_pairs = tl.num_programs(0) // (len(caches) * num_layers)
    pair = tl.program_id(0) % num_pairs
    layer = (tl.program_id(0) // num_pairs % num_layers).to(tl.int64)
    index = tl.program_id(0) // num_pairs // num_layers
    cache = _choose_one(caches, index)
    target = cache if targets is None else _choose_one(targets, index)

    of_src, of_dst = cache.layout, target.layout
    src = cache.ptr + layer * of_src.layer + tl.load(src_pages_ptr + pair).to(tl.int64) * of_src.page
    dst = target.ptr + layer * of_dst.layer + tl.load(dst_pages_ptr + pair).to(tl.int64) * of_dst.page
    offs_d = tl.arange(0, TILE.BLOCK_D)[None, :]
    for start in tl.range(0, TILE.PAGE_SIZE * TILE.NUM_HEADS, TILE.BLOCK_ROWS):
        rows = start + tl.arange(0, TILE.BLOCK_ROWS)[:, None]
        slots, heads = rows // TILE.NUM_HEADS, rows % TILE.NUM_HEADS
        mask = (rows < TILE.PAGE_SIZE * TILE.NUM_HEADS) & (offs_d < of_src.head_dim)  # (BLOCK_ROWS, BLOCK_D)
        x = tl.load(src + slots * of_src.slot + heads * of_src.head + offs_d, mask=mask)
        tl.store(dst + slots * of_dst.slot + heads * of_dst.head + offs_d, x, mask=mask)


class Plan(NamedTuple):
    """A launch but for its tensors."""

    num_programs: int
    layouts: tuple  # of the caches
    layouts_of_targets: tuple  # empty: the pages are copied inside the caches
    is_float8: bool  # bytes: not every GPU has the dtypes of fp8
    has_host_memory: bool
    num_layers: int
    constants: dict

    def launch(self, caches, src_pages, dst_pages, targets, alike=None):
        """One launch, no device-to-host sync. Arguments as `copy_kv_pages`, checked; no targets are an empty tuple.
        alike: as in `launch`."""
        if self.num_programs == 0:
            return
        if self.is_float8:
            caches, targets = ([x.view(torch.uint8) for x in side] for side in (caches, targets))
        pages = tuple(map(_new_pages, zip(caches, self.layouts)))
        pages_of_targets = tuple(map(_new_pages, zip(targets, self.layouts_of_targets))) if targets else None
        args = src_pages, dst_pages, pages, pages_of_targets, self.num_layers
        launch(_copy_kv_pages_kernel, (self.num_programs,), src_pages.device, args, self.constants, alike)
        if self.has_host_memory:
            hold_pinned((*caches, *targets), src_pages.device)


def plan_copy_kv_pages(caches, src_pages, targets):
    """The Plan of a launch.

    caches are tensors (num_layers, num_pages, page_size, num_heads, head_dim) of one dtype, equal in all but head_dim.
    targets are as many, equal in all but num_pages and strides; none copy inside the caches. Host memory is pinned, so
    that the GPU of src_pages reads and writes it.
    """
    sides = caches, targets
    layouts = [tuple([(x.shape, x.stride()) for x in side]) for side in sides]
    has_host_memory = any(x.device != src_pages.device for side in sides for x in side)
    return _plan(*layouts, src_pages.shape[0], caches[0].dtype, has_host_memory)


@remember
def _plan(caches, targets, num_pairs, dtype, has_host_memory):
    """The Plan; caches and targets are (shape, strides) of each."""
    layouts, layouts_of_targets = (
        tuple([Layout(*strides[:-1], shape[-1]) for shape, strides in side]) for side in (caches, targets)
    )
    num_layers, _, page_size, num_heads, _ = caches[0][0]
    block_d = triton.next_power_of_2(max(shape[-1] for shape, _ in caches))
    block_rows = min(max(1, TILE_ELEMENTS // block_d), triton.next_power_of_2(page_size * num_heads))
    tile = Tile(BLOCK_ROWS=block_rows, BLOCK_D=block_d, PAGE_SIZE=page_size, NUM_HEADS=num_heads)
    return Plan(
        num_programs=num_pairs * num_layers * len(caches),
        layouts=layouts,
        layouts_of_targets=layouts_of_targets,
        is_float8=dtype in FLOAT8_MANTISSA_BITS,
        has_host_memory=has_host_memory,
        num_layers=num_layers,
        constants=dict(TILE=tile, num_warps=4),
    )
