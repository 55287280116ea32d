"""Kernel that copies pages, of all layers and of keys and values in one launch, and its launcher."""

import torch
import triton
import triton.language as tl

from ..._host.device import launch

TILE_ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_layers", "src_pages_ptr", "dst_pages_ptr"])
def _copy_kv_pages_kernel(
    src_pages_ptr,
    dst_pages_ptr,
    caches,
    strides,
    head_dims,
    num_layers,
    PAGE_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program copies one page of one layer of one cache.

    Grid: pairs of pages * num_layers * caches. caches is a tuple of pointers; strides, for each of them, are (layer,
    page, offset, head), and head_dims the lengths of their rows.
    """
    num_pairs = tl.num_programs(0) // (len(caches) * num_layers)
    pair = tl.program_id(0) % num_pairs
    layer = (tl.program_id(0) // num_pairs % num_layers).to(tl.int64)
    cache = tl.program_id(0) // num_pairs // num_layers
    ptr = caches[0]
    layer_stride = tl.cast(strides[0][0], tl.int64)
    page_stride = tl.cast(strides[0][1], tl.int64)
    offset_stride = tl.cast(strides[0][2], tl.int64)
    head_stride = tl.cast(strides[0][3], tl.int64)
    head_dim = tl.cast(head_dims[0], tl.int32)
    for i in tl.static_range(1, len(caches)):
        ptr = tl.where(cache == i, caches[i], ptr)
        layer_stride = tl.where(cache == i, strides[i][0], layer_stride)
        page_stride = tl.where(cache == i, strides[i][1], page_stride)
        offset_stride = tl.where(cache == i, strides[i][2], offset_stride)
        head_stride = tl.where(cache == i, strides[i][3], head_stride)
        head_dim = tl.where(cache == i, head_dims[i], head_dim)

    src = ptr + layer * layer_stride + tl.load(src_pages_ptr + pair).to(tl.int64) * page_stride
    dst = ptr + layer * layer_stride + tl.load(dst_pages_ptr + pair).to(tl.int64) * page_stride
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for start in tl.range(0, PAGE_SIZE * NUM_HEADS, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        offsets = rows // NUM_HEADS * offset_stride + rows % NUM_HEADS * head_stride + offs_d
        mask = (rows < PAGE_SIZE * NUM_HEADS) & (offs_d < head_dim)
        tl.store(dst + offsets, tl.load(src + offsets, mask=mask), mask=mask)


def launch_copy_kv_pages(caches, src_pages, dst_pages):
    """Launch the copy kernel: one launch, nothing read back.

    caches are tensors (num_layers, num_pages, page_size, num_heads, head_dim) of one dtype, equal in all but head_dim.
    """
    num_layers, _, page_size, num_heads, _ = caches[0].shape
    head_dims = tuple(cache.shape[-1] for cache in caches)
    block_d = triton.next_power_of_2(max(head_dims))
    block_rows = min(max(1, TILE_ELEMENTS // block_d), triton.next_power_of_2(page_size * num_heads))
    num_programs = src_pages.numel() * num_layers * len(caches)
    if num_programs == 0:
        return
    if caches[0].itemsize == 1:  # bytes: not every GPU has the dtypes of fp8
        caches = tuple(cache.view(torch.uint8) for cache in caches)
    launch(
        _copy_kv_pages_kernel,
        (num_programs,),
        src_pages.device,
        src_pages,
        dst_pages,
        caches,
        tuple(cache.stride()[:-1] for cache in caches),
        head_dims,
        num_layers,
        PAGE_SIZE=page_size,
        NUM_HEADS=num_heads,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=4,
    )
