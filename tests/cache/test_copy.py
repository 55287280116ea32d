"""copy_kv_pages on every layout of a cache, and its errors. test_random_copy.py has random calls."""

import pytest
import torch
from append_cases import DEVICE

from triton_attn import copy_kv_pages
from triton_attn.toolchain import compile_only


@pytest.mark.parametrize("backend", [pytest.param(None, marks=pytest.mark.emulated, id="kernel"), "reference"])
def test_layouts(backend, monkeypatch):
    if backend:
        monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    pages = torch.tensor([0], device=DEVICE), torch.tensor([2], device=DEVICE)
    one_layer = torch.arange(3.0, device=DEVICE).view(3, 1, 1, 1).expand(3, 4, 2, 8).clone()
    copy_kv_pages(one_layer, *pages)
    assert one_layer[:, 0, 0, 0].tolist() == [0, 1, 0]
    latent = torch.arange(3.0, device=DEVICE).view(3, 1, 1).expand(3, 4, 576).clone()
    copy_kv_pages(latent, *pages)
    assert latent[:, 3, 575].tolist() == [0, 1, 0]
    layered_latent = torch.arange(6.0, device=DEVICE).view(2, 3, 1, 1).expand(2, 3, 4, 576).clone()
    copy_kv_pages(layered_latent.unsqueeze(3), *pages)
    assert layered_latent[:, :, 3, 575].tolist() == [[0, 1, 0], [3, 4, 3]]
    layered = torch.arange(6.0, device=DEVICE).view(2, 3, 1, 1, 1).expand(2, 3, 4, 2, 8).clone()
    copy_kv_pages(layered, *pages)
    assert layered[:, :, 3, 1, 7].tolist() == [[0, 1, 0], [3, 4, 3]]
    per_layer = [*layered.clone(), *layered.clone()]
    copy_kv_pages(per_layer, pages[0] + 1, pages[0])
    assert [cache[:, 3, 1, 7].tolist() for cache in per_layer] == [[1, 1, 0], [4, 4, 3]] * 2


@pytest.mark.parametrize("backend", [pytest.param(None, marks=pytest.mark.emulated, id="kernel"), "reference"])
def test_both_sides_have_strides_of_their_own(backend, monkeypatch):
    if backend:
        monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    source = torch.randn(2, 3, 4, 2, 8, device=DEVICE)
    target = torch.zeros(5, 2, 6, 3, 16, device=DEVICE).transpose(0, 1)[:, :, :4, :2, :8]
    pages = torch.tensor([0, 2], device=DEVICE), torch.tensor([4, 1], device=DEVICE)
    for caches, to in ((source, target), (target, source.clone())):
        copy_kv_pages(caches, *pages, to=to)
        assert torch.equal(to[:, pages[1]], caches[:, pages[0]])
        pages = pages[::-1]


CACHE = torch.zeros(5, 4, 2, 8)
ONE, TWO = torch.tensor([1]), torch.tensor([2])
WRONG = [
    (("cache", ONE, TWO), TypeError, "caches: expected a tensor, or a tuple or list"),
    (((), ONE, TWO), TypeError, "caches: expected a tensor, or a tuple or list"),
    (((CACHE, 1), ONE, TWO), TypeError, r"caches\[1\]: expected a tensor"),
    ((torch.zeros(5, 4), ONE, TWO), ValueError, r"caches\[0\]: expected 3, 4 or 5 dimensions"),
    (((CACHE, torch.zeros(4, 4, 2, 8)), ONE, TWO), ValueError, r"caches\[1\]: expected shape"),
    (((CACHE, CACHE.half()), ONE, TWO), TypeError, r"caches\[1\]: expected torch.float32"),
    ((torch.zeros(5, 4, 2, 8)[..., ::2], ONE, TWO), ValueError, r"caches\[0\]: expected a contiguous last"),
    ((CACHE, 1, TWO), TypeError, "src_pages: expected a tensor"),
    ((CACHE, ONE.float(), TWO), TypeError, "src_pages: expected torch.int32"),
    ((CACHE, ONE, TWO[None]), ValueError, "dst_pages: expected shape"),
    ((CACHE, ONE, torch.tensor([2, 3])), ValueError, "dst_pages: expected src_pages' shape"),
    ((CACHE, ONE, torch.arange(2)[::2].expand(2)), ValueError, "dst_pages: expected a contiguous tensor"),
]


@pytest.mark.parametrize(("args", "error", "message"), WRONG)
def test_wrong_arguments(args, error, message):
    with pytest.raises(error, match=message):
        copy_kv_pages(*args)


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        (1, TypeError, "to: expected a tensor, or a tuple or list"),
        ([CACHE, CACHE], ValueError, "to: expected 1 tensors, one for each of caches, got 2"),
        (torch.zeros(7, 4, 2, 9), ValueError, r"to\[0\]: expected shape \(1, num_pages, 4, 2, 8\)"),
        (CACHE.half(), TypeError, r"to\[0\]: expected torch.float32"),
        (CACHE.to("meta"), ValueError, r"to\[0\]: expected a tensor on cpu or in pinned host memory, got one on meta"),
    ],
)
def test_wrong_destinations(to, error, message):
    with pytest.raises(error, match=message):
        copy_kv_pages(CACHE, ONE, TWO, to=to)


@pytest.mark.parametrize(
    ("sources", "destinations", "message"),
    [
        ([0, 5], [1, 2], r"src_pages\[1\]: expected a page of 0 to 4, got 5"),
        ([0], [-1], r"dst_pages\[0\]: expected a page of 0 to 4, got -1"),
        ([0, 1], [1, 2], r"dst_pages\[0\]: expected a page that is no source"),
        ([0, 1], [2, 2], r"dst_pages\[1\]: expected a page that is no source and no other destination, got 2"),
    ],
)
def test_values_are_checked_when_asked(sources, destinations, message):
    with pytest.raises(ValueError, match=message):
        copy_kv_pages(CACHE, torch.tensor(sources), torch.tensor(destinations), check_values=True)


@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(arch):
    caches = [torch.zeros(4, 8, 16, 8, dim, dtype=torch.bfloat16) for dim in (128, 64)]
    latent_cache = torch.zeros(4, 8, 64, 1, 656, dtype=torch.uint8)
    with compile_only(arch) as launches:
        copy_kv_pages(caches, ONE, TWO)
        copy_kv_pages(caches[0], ONE, TWO)
        copy_kv_pages(latent_cache, ONE, TWO)
        copy_kv_pages([cache.to(torch.float8_e4m3fn) for cache in caches], ONE, TWO)
        copy_kv_pages(caches, ONE, TWO, to=[cache[:, :3].clone() for cache in caches])
        copy_kv_pages(latent_cache, ONE, TWO, to=latent_cache.clone())
    assert [launch.spill_bytes for launch in launches] == [0] * 6
    assert launches[0].grid == (8, 1, 1)  # layers of two caches, page by page
    if not arch.startswith("gfx"):
        assert all("ld.global.v4.b32" in launch.kernel.asm["ptx"] for launch in launches)
