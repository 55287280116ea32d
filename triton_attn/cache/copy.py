"""`copy_kv_pages`: argument checks, then the kernel or the reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._host.backend import should_check_values, use_kernel
from .._host.checks import (
    check_last_contiguous,
    check_tensor,
    fail,
)
from .._host.known import Known
from .._host.observers import is_observed
from . import reference
from .writes import check_index, refuse_transforms


def copy_kv_pages(
    caches: Tensor | Sequence[Tensor],
    src_pages: Tensor,
    dst_pages: Tensor,
    *,
    to: Tensor | Sequence[Tensor] | None = None,
    check_values: bool | None = None,
) -> None:
    """Copy whole pages inside a paged cache or to another one: page dst_pages[i] becomes page src_pages[i]. One launch.

    The order of the copies is undefined. A page may be the source of several copies, but not the destination of two,
    nor, inside one cache, both source and destination.

    Args:
        caches: a tensor, or a tuple or list of tensors: keys and values, one or all layers. Each is (num_pages,
            page_size, num_heads_kv, head_dim), (num_layers, num_pages, page_size, num_heads_kv, head_dim), or, of a
            latent cache, (num_pages, page_size, width); of all its layers, cache.unsqueeze(3). All have one dtype and
            equal shapes except for the last dimension, which is contiguous. The packed keys that
            `paged_attention` reads have five dimensions too, but are no layers: they are not for this function.
        src_pages, dst_pages: (num_pairs,) int32 or int64, on the device that copies: the caches', or that of either
            side.
        to: the caches that are written, which share no memory with those that are read: as many, of the same dtype and
            shapes except for num_pages. None writes to `caches` themselves. One side may be in pinned host memory,
            which the GPU then reads or writes in the order of the current stream: pages that were copied to the host
            are there once the stream got so far.
        check_values: check the pages, which costs a device-to-host sync. None follows TRITON_ATTN_CHECK=1.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was written. With values checked also: a page outside of
            the cache, or in a place that the rule above excludes.
        NotImplementedError: as `append_kv_cache`.

    One operator that writes to the caches under torch.compile and export.

    Example:
        >>> k_cache, v_cache = torch.randn(2, 3, 8, 16, 2, 64)  # three layers of eight pages
        >>> src_pages, dst_pages = torch.tensor([[0, 1], [6, 7]], dtype=torch.int32)
        >>> triton_attn.copy_kv_pages((k_cache, v_cache), src_pages, dst_pages)
        >>> torch.equal(v_cache[:, 6:], v_cache[:, :2])
        True
        >>> triton_attn.copy_kv_pages(k_cache, dst_pages, src_pages, to=(host := torch.zeros(3, 2, 16, 2, 64)))
        >>> torch.equal(host, k_cache[:, 6:])
        True
    """
    caches = _as_tuple("caches", caches)
    written = () if to is None else to if isinstance(to, (tuple, list)) else (to,)
    given = *caches, None, src_pages, dst_pages, to is None, *written
    key, known = _plans.find_launch(given, src_pages, check_values)
    if known is not None:
        plan, alike = known
        plan.launch(caches, src_pages, dst_pages, written, alike)
        return
    caches = _as_layered("caches", caches)
    device, targets = caches[0].device, ()
    if to is not None:
        targets = _as_layered("to", _as_tuple("to", to))
        device = _check_targets(caches, targets)
    for name, pages in (("src_pages", src_pages), ("dst_pages", dst_pages)):
        check_index(name, pages, ("num_pairs",), (torch.int32, torch.int64), device)
    if src_pages.shape != dst_pages.shape:
        fail("dst_pages", f"src_pages' shape {tuple(src_pages.shape)}", tuple(dst_pages.shape))
    check_values = should_check_values(check_values)
    if not is_observed(*caches, *targets, src_pages, dst_pages):
        _plans.keep_plan(key, _copy(caches, src_pages, dst_pages, targets, check_values))
        return
    names = [f"{side}[{i}]" for side, tensors in (("caches", caches), ("to", targets)) for i in range(len(tensors))]
    refuse_transforms([*names, "src_pages", "dst_pages"], [*caches, *targets, src_pages, dst_pages])
    if to is None:
        _copy_kv_pages_operator(caches, src_pages, dst_pages, check_values)
    else:
        _copy_kv_pages_to_operator(caches, src_pages, dst_pages, targets, check_values)


_plans = Known()


def _copy(caches, src_pages, dst_pages, targets, check_values):
    """`copy_kv_pages` with checked arguments, to no targets inside the caches; the plan of its launch, None of the
    reference."""
    if check_values:
        _check_page_pairs(src_pages.tolist(), dst_pages.tolist(), caches, targets)
    if not use_kernel(src_pages):
        reference.copy_kv_pages(caches, src_pages, dst_pages, to=targets or None)
        return None
    from .kernels.copy import plan_copy_kv_pages

    plan = plan_copy_kv_pages(caches, src_pages, targets)
    plan.launch(caches, src_pages, dst_pages, targets)
    return plan


def _copy_kv_pages(caches: Sequence[Tensor], src_pages: Tensor, dst_pages: Tensor, check_values: bool) -> None:
    _copy(caches, src_pages, dst_pages, (), check_values)


def _copy_kv_pages_to(
    caches: Sequence[Tensor], src_pages: Tensor, dst_pages: Tensor, targets: Sequence[Tensor], check_values: bool
) -> None:
    _copy(caches, src_pages, dst_pages, targets, check_values)


_copy_kv_pages_operator = torch.library.custom_op(
    "triton_attn::copy_kv_pages", _copy_kv_pages, mutates_args=("caches",)
)
_copy_kv_pages_to_operator = torch.library.custom_op(
    "triton_attn::copy_kv_pages_to", _copy_kv_pages_to, mutates_args=("targets",)
)


@_copy_kv_pages_to_operator.register_fake
@_copy_kv_pages_operator.register_fake
def _(*args):
    pass


def _as_tuple(side, caches):
    caches = (caches,) if isinstance(caches, Tensor) else caches
    if not isinstance(caches, (tuple, list)) or not caches:
        fail(side, "a tensor, or a tuple or list of them", type(caches).__name__, TypeError)
    return caches


def _as_layered(side, caches):
    """The caches as tensors (num_layers, num_pages, page_size, num_heads, head_dim)."""
    layered = tuple(_as_layered_one(f"{side}[{i}]", cache) for i, cache in enumerate(caches))
    first = layered[0]
    for i, cache in enumerate(layered):
        check_tensor(f"{side}[{i}]", cache, (*first.shape[:4], "head_dim"), (first.dtype,), first.device)
        check_last_contiguous(f"{side}[{i}]", cache)
    return layered


def _check_targets(caches, targets):
    """Check the caches that are written against those that are read; the device that copies."""
    if len(targets) != len(caches):
        fail("to", f"{len(caches)} tensors, one for each of caches", len(targets))
    for i, (cache, target) in enumerate(zip(caches, targets)):
        num_layers, _, *rest = cache.shape
        check_tensor(f"to[{i}]", target, (num_layers, "num_pages", *rest), (cache.dtype,), target.device)
    sides = {"caches": caches, "to": targets}
    device = next((x[0].device for x in sides.values() if x[0].is_cuda), caches[0].device)
    for side, tensors in sides.items():
        for i, x in enumerate(tensors):
            if x.device != device and not (x.device.type == "cpu" and x.is_pinned()):
                fail(f"{side}[{i}]", f"a tensor on {device} or in pinned host memory", f"one on {x.device}")
    return device


def _as_layered_one(name, cache):
    if not isinstance(cache, torch.Tensor):
        fail(name, "a tensor", type(cache).__name__, TypeError)
    if cache.ndim == 3:
        return cache[None, :, :, None]
    if cache.ndim == 4:
        return cache[None]
    if cache.ndim != 5:
        fail(name, "3, 4 or 5 dimensions", f"shape {tuple(cache.shape)}")
    return cache


def _check_page_pairs(src_pages, dst_pages, caches, targets):
    read, written = caches[0].shape[1], (targets or caches)[0].shape[1]
    for name, pages, num_pages in (("src_pages", src_pages, read), ("dst_pages", dst_pages, written)):
        for i, page in enumerate(pages):
            if not 0 <= page < num_pages:
                fail(f"{name}[{i}]", f"a page of 0 to {num_pages - 1}", page)
    seen = set(() if targets else src_pages)
    for i, page in enumerate(dst_pages):
        if page in seen:
            fail(f"dst_pages[{i}]", "a page that is no source and no other destination", page)
        seen.add(page)
