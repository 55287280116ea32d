"""Kernel that copies pages inside a cache or to another, of all layers, keys and values in one launch; its launcher."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._host.device import hold_pinned, launch
from ..._host.tuned import remember

TILE_ELEMENTS = 4096


class Pages(NamedTuple):
    """Pages of all layers: strides in elements, and the length of a row."""

    ptr: object
    layer_stride: int
    page_stride: int
    slot_stride: int
    head_stride: int
    head_dim: int


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
        tl.where(condition, one.layer_stride, tl.cast(other.layer_stride, tl.int64)),
        tl.where(condition, one.page_stride, tl.cast(other.page_stride, tl.int64)),
        tl.where(condition, one.slot_stride, tl.cast(other.slot_stride, tl.int64)),
        tl.where(condition, one.head_stride, tl.cast(other.head_stride, tl.int64)),
        tl.where(condition, one.head_dim, tl.cast(other.head_dim, tl.int32)),
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

    src = cache.ptr + layer * cache.layer_stride + tl.load(src_pages_ptr + pair).to(tl.int64) * cache.page_stride
    dst = target.ptr + layer * target.layer_stride + tl.load(dst_pages_ptr + pair).to(tl.int64) * target.page_stride
    offs_d = tl.arange(0, TILE.BLOCK_D)[None, :]
    for start in tl.range(0, TILE.PAGE_SIZE * TILE.NUM_HEADS, TILE.BLOCK_ROWS):
        rows = start + tl.arange(0, TILE.BLOCK_ROWS)[:, None]
        slots, heads = rows // TILE.NUM_HEADS, rows % TILE.NUM_HEADS
        mask = (rows < TILE.PAGE_SIZE * TILE.NUM_HEADS) & (offs_d < cache.head_dim)  # (BLOCK_ROWS, BLOCK_D)
        x = tl.load(src + slots * cache.slot_stride + heads * cache.head_stride + offs_d, mask=mask)
        tl.store(dst + slots * target.slot_stride + heads * target.head_stride + offs_d, x, mask=mask)


def launch_copy_kv_pages(caches, src_pages, dst_pages, targets=None):
    """Launch the copy kernel: one launch, no device-to-host sync.

    caches are tensors (num_layers, num_pages, page_size, num_heads, head_dim) of one dtype, equal in all but head_dim.
    targets are as many, equal in all but num_pages and strides; None copies inside the caches. Host memory is pinned,
    so that the GPU of src_pages reads and writes it.
    """
    plan = _plan(tuple([cache.shape for cache in caches]))
    num_programs = src_pages.shape[0] * plan.programs_per_pair
    if num_programs == 0:
        return
    if caches[0].itemsize == 1:  # bytes: not every GPU has the dtypes of fp8
        caches = [cache.view(torch.uint8) for cache in caches]
        targets = None if targets is None else [target.view(torch.uint8) for target in targets]
    pages = tuple([Pages(cache, *cache.stride()[:-1], cache.shape[-1]) for cache in caches])
    views = None
    if targets is not None:
        views = tuple([Pages(target, *target.stride()[:-1], target.shape[-1]) for target in targets])
    args = src_pages, dst_pages, pages, views, plan.num_layers
    launch(_copy_kv_pages_kernel, (num_programs,), src_pages.device, args, plan.constants)
    if targets is not None:
        hold_pinned((*caches, *targets), src_pages.device)


class Plan(NamedTuple):
    """A launch but for its tensors and the number of pairs."""

    programs_per_pair: int
    num_layers: int
    constants: dict


@remember
def _plan(shapes):
    """The Plan of a launch; shapes are those of the caches."""
    num_layers, _, page_size, num_heads, _ = shapes[0]
    block_d = triton.next_power_of_2(max(shape[-1] for shape in shapes))
    block_rows = min(max(1, TILE_ELEMENTS // block_d), triton.next_power_of_2(page_size * num_heads))
    tile = Tile(BLOCK_ROWS=block_rows, BLOCK_D=block_d, PAGE_SIZE=page_size, NUM_HEADS=num_heads)
    return Plan(num_layers * len(shapes), num_layers, dict(TILE=tile, num_warps=4))
