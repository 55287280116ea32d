"""The decode kernel of mla/hopper.py on a GPU with its instructions: ragged caches, splits, and random calls.

Gluon has no interpreter, so these tests need such a GPU.
"""

import hopper_cases
import pytest
import torch
from decode_cases import Case, check
from hopper_cases import LATENT_WIDTHS
from scale import AT_SCALE, DTYPES

from triton_attn import append_latent_cache, mla_decode
from triton_attn.mla import absorbed

IS_HOPPER = AT_SCALE and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.skipif(not IS_HOPPER, reason="needs an H100 or H200"),
    # Inputs contain NaN on purpose, and numpy warns about it.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
of_caches = pytest.mark.parametrize(
    "cache", [*(dict(dtype=dtype) for dtype in DTYPES), dict(dtype=torch.bfloat16, is_fp8=True)], ids=str
)
ABSORBED = dict(with_uk=False, with_uv=False, softmax_scale=0.07)
CONTEXTS = (8191, 1, 4096, 333, 0, 2053)


@pytest.fixture(autouse=True)
def on_hopper():
    """Only this kernel runs."""
    with hopper_cases.launched(absorbed, "launch_mla_decode_hopper"):
        yield


@of_caches
@pytest.mark.parametrize(("num_heads", "page_size"), [(128, 64), (64, 128)])
@pytest.mark.parametrize("num_splits", [0, 1, 3, 7])
def test_what_is_absorbed_already(num_splits, num_heads, page_size, cache):
    """Slots without a key are NaN; one sequence is empty, another has fewer keys than splits."""
    sizes = dict(seqlens_k=CONTEXTS, num_heads=num_heads, page_size=page_size, num_splits=num_splits)
    check(Case(**cache, **sizes, **ABSORBED, **LATENT_WIDTHS))


@of_caches
@pytest.mark.parametrize(("num_heads", "num_splits"), [(64, 0), (128, 1)])
def test_with_weights(num_heads, num_splits, cache):
    sizes = dict(seqlens_k=CONTEXTS, num_heads=num_heads, page_size=64, num_splits=num_splits)
    check(Case(**cache, **sizes, **LATENT_WIDTHS))


@of_caches
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_draft(causal, cache):
    """Several queries per sequence; the first may see nothing."""
    sizes = dict(seqlen_q=3, seqlens_k=(1024, 1, 1027, 333, 0, 65), num_heads=64, page_size=64, num_splits=2)
    check(Case(causal=causal, **cache, **sizes, **LATENT_WIDTHS))


@pytest.mark.parametrize("number", range(32))
def test_random_calls(number):
    check(hopper_cases.decode(number, (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 257, 500, 1000)))


@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.uint8], ids=str)
def test_repeats_bitwise(cache_dtype):
    """A race would show as a difference. There are more programs than resident ones."""
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = torch.bfloat16 if cache_dtype == torch.uint8 else cache_dtype
    shapes = (96, 1, 128, 576), (3072, 64, 576)
    q, cache = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes)
    if cache_dtype == torch.uint8:
        rows = cache.flatten(0, 1).split([512, 64], dim=1)
        cache = torch.zeros(3072, 64, 656, dtype=torch.uint8, device="cuda")
        append_latent_cache(*rows, cache, torch.arange(3072 * 64, device="cuda"))
    block_table = torch.randperm(3072, generator=generator, device="cuda").int().view(96, 32)
    lengths = torch.randint(0, 2049, (96,), generator=generator, device="cuda", dtype=torch.int32)
    for num_splits in (1, 3):
        call = (*q.split([512, 64], dim=3), cache, lengths, block_table)
        options = {"softmax_scale": 0.07, "return_lse": True, "num_splits": num_splits}
        expected = mla_decode(*call, **options)
        for _ in range(20):
            assert all(map(torch.equal, mla_decode(*call, **options), expected))
