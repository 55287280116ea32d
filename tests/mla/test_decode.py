"""mla_decode: one readable example for each convention."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from decode_cases import DEVICE, DTYPES, INTERPRETED, PAGE_SIZES, TILES, Case, Inputs, cache_bytes, check, using

from triton_attn import mla_decode, reference
from triton_attn.mla import absorbed
from triton_attn.mla.configs import MlaDecodeConfig
from triton_attn.toolchain import guard

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.ci(but_each=5)
@pytest.mark.oldest
@pytest.mark.parametrize("num_heads", [1, 3, 9, 63, 64, 126, 128])
def test_every_number_of_heads(num_heads):
    check(Case(num_heads=num_heads, seqlens_k=(40,), config=MlaDecodeConfig(64, 32, 4, 1)))


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("is_fp8", [False, True], ids=["half", "fp8"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_page_size(page_size, is_fp8):
    check(Case(page_size=page_size, is_fp8=is_fp8, kv_lora_rank=128, num_splits=2))


@pytest.mark.ci(but_each=5)
@pytest.mark.oldest
@pytest.mark.parametrize("is_fp8", [False, True], ids=["half", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_widths_of_deepseek(dtype, is_fp8):
    widths = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, kv_lora_rank=512, v_head_dim=128, rotary_dim=64)
    check(Case(dtype=dtype, is_fp8=is_fp8, seqlen_q=2, seqlens_k=(70, 33), num_heads=16, num_splits=2, **widths))


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize(
    "options",
    [
        dict(seqlen_q=3, num_splits=3, rotary_dim=8),
        dict(seqlen_q=3, causal=False, with_uk=False, with_uv=False, softmax_scale=0.1),
        dict(seqlens_q=(5, 0, 33), seqlens_k=(40, 3, 37)),
        dict(is_fp8=True, kv_lora_rank=128, seqlens_k=(300, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("key_shard", [(0, 2, 1), (1, 2, 4), (2, 3, 1), (3, 4, 16), (0, 1, 1)], ids=str)
def test_keys_of_one_rank(key_shard, options):
    """Of several queries each sees another number of the rank's keys. Rotary angles are those of all keys."""
    check(Case(key_shard=key_shard, **options))


SCALES = {
    "none": {},
    "one": dict(k_scale=0.3),
    "two": dict(k_scale=0.3, k_pe_scale=1.7),
    "rotary": dict(k_pe_scale=1.7),
}


@pytest.mark.ci(but_each=5)
@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, None], ids=str)
@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("scales", SCALES)
def test_scales_of_the_whole_cache(scales, as_tensors, cache_dtype, dtype):
    """fp8 latent vectors and rotary keys with a factor of each; a cache in q's dtype may have them too."""
    options = dict(dtype=dtype, cache_dtype=cache_dtype, scale_tensors=as_tensors, kv_lora_rank=100)
    check(Case(**options, **SCALES[scales], num_splits=2, two_tensors=as_tensors))
    check(Case(**options, **SCALES[scales], with_uk=False, with_uv=False, softmax_scale=0.2))


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("rope_dim", [64, 0])
@pytest.mark.parametrize("config", [TILES, MlaDecodeConfig(64, 64, 8, 1)], ids=["16 rows", "64 rows"])
def test_plain_fp8_at_the_widths_of_deepseek(config, rope_dim):
    widths = dict(qk_nope_head_dim=128, qk_rope_head_dim=rope_dim, kv_lora_rank=512, v_head_dim=128)
    cache = dict(cache_dtype=torch.float8_e4m3fn, k_scale=0.125, page_size=64)
    check(Case(**cache, **widths, seqlens_k=(70, 33), num_heads=16, seqlens_q=(3, 1), config=config))


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [16, 64], ids=["halves", "one piece"])
@pytest.mark.parametrize("kv_lora_rank", [64, 512])
def test_the_form_of_sm_90(kv_lora_rank, page_size, causal):
    """Each matmul of the scores is in a branch of its own: masked and full tiles, splits that begin in the middle."""
    sizes = dict(seqlen_q=3, seqlens_k=(150, 64, 2), num_heads=9, num_splits=2)
    tiles = MlaDecodeConfig(64, 64, 8, 1)
    check(Case(kv_lora_rank=kv_lora_rank, page_size=page_size, causal=causal, config=tiles, **sizes))


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("seqlen_q", range(9))
@pytest.mark.parametrize("causal", [True, False])
def test_several_new_tokens(seqlen_q, causal):
    check(Case(seqlen_q=seqlen_q, causal=causal, seqlens_k=(40, seqlen_q, 3, 0), num_splits=2))


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("max_seqlen_q", [None, 11], ids=["longest known", "found by bisection"])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize("is_fp8", [False, True], ids=["half", "fp8"])
def test_packed_queries(is_fp8, with_weights, num_splits, max_seqlen_q):
    """Ragged, none of a sequence, more queries than keys, rows after the last sequence."""
    lengths = dict(seqlens_q=(2, 0, 5, 1, 1), seqlens_k=(40, 9, 3, 33, 0), max_seqlen_q=max_seqlen_q)
    options = dict(with_uk=with_weights, with_uv=with_weights, num_splits=num_splits, is_fp8=is_fp8, num_heads=5)
    check(Case(**lengths, **options, kv_lora_rank=128, softmax_scale=0.2))


@pytest.mark.ci(but_each=2)
@pytest.mark.oldest
@pytest.mark.parametrize("seqlens_q", [None, (2, 0, 3)], ids=["batch", "packed"])
@pytest.mark.parametrize("page_size", [5, 32])
def test_rotary_keys_in_a_cache_of_their_own(page_size, seqlens_q):
    check(Case(two_tensors=True, page_size=page_size, seqlens_q=seqlens_q, seqlen_q=2, num_splits=2))
    check(Case(two_tensors=True, page_size=page_size, seqlens_q=seqlens_q, with_uv=False, rotary_dim=0))


@pytest.mark.ci(but_each=2)
@pytest.mark.oldest
@pytest.mark.parametrize("config", [TILES, MlaDecodeConfig(64, 64, 8, 1)], ids=["16 rows", "64 rows"])
@pytest.mark.parametrize("layout", ["one tensor", "two tensors"])
def test_no_rotary_part(layout, config):
    cache = dict(two_tensors=layout == "two tensors", kv_lora_rank=128, page_size=64)
    check(Case(**cache, qk_rope_head_dim=0, seqlen_q=2, num_heads=9, config=config))
    check(Case(**cache, qk_rope_head_dim=0, with_uk=False, with_uv=False, softmax_scale=0.2, num_splits=2))


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("with_uv", [True, False])
@pytest.mark.parametrize("seqlens_k", [(), (0,), (0, 0, 5)])
def test_sizes_at_the_edge(seqlens_k, with_uv, num_splits):
    check(Case(seqlens_k=seqlens_k, with_uv=with_uv, num_splits=num_splits))


@pytest.mark.parametrize("num_splits", [7, 40])
def test_more_splits_than_are_merged_at_once(num_splits):
    """Four of up to eight are merged at once, else up to 32. Scores rise by 16, so that earlier sums shrink."""
    num_pages, page_size, rank, rope_dim = 160, 16, 64, 16
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(num_pages, page_size, rank + rope_dim, generator=generator)
    cache[..., rank:] = torch.linspace(0, 1, num_pages * page_size).view(num_pages, page_size, 1)
    q_nope, q_pe = torch.randn(1, 1, 2, rank, generator=generator) / rank**0.5, torch.ones(1, 1, 2, rope_dim)
    w_uv = torch.randn(2, 24, rank, generator=generator)
    where = torch.tensor([2550], dtype=torch.int32), torch.arange(num_pages, dtype=torch.int32)[None]
    tensors = [x.to(DEVICE) for x in (q_nope, q_pe, cache, *where)]
    options = dict(w_uv=w_uv.to(DEVICE), softmax_scale=1.0, return_lse=True)
    results = mla_decode(*tensors, num_splits=num_splits, **options)
    for result, expected in zip(results, reference.mla_decode(*tensors, **options)):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.emulated
@pytest.mark.parametrize("is_fp8", [False, True], ids=["half", "fp8"])
def test_the_kernel_of_hopper(is_fp8, monkeypatch, request):
    """Gluon has no interpreter. Slots without a key are NaN; one sequence is empty, one has fewer keys than splits."""
    if request.config.getoption("--emulate") != "sm_90":
        pytest.skip("needs --emulate sm_90")
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "hopper")
    launch = mock.Mock(wraps=absorbed.launch_mla_decode_hopper)
    monkeypatch.setattr(absorbed, "launch_mla_decode_hopper", launch)
    widths = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, kv_lora_rank=512, v_head_dim=128)
    absorbed_already = dict(with_uk=False, with_uv=False, softmax_scale=0.07)
    sizes = dict(seqlens_k=(333, 1, 0), num_heads=64, page_size=64, num_splits=3)
    check(Case(dtype=torch.bfloat16, is_fp8=is_fp8, **sizes, **absorbed_already, **widths))
    assert launch.called


@pytest.mark.oldest
@pytest.mark.emulated
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("kv_lora_rank", [300, 512])
def test_fp32_latents_in_chunks(kv_lora_rank, precision):
    """The last chunk of 300 columns is not full."""
    torch.set_float32_matmul_precision(precision)
    try:
        check(Case(dtype=torch.float32, seqlens_k=(70, 1), kv_lora_rank=kv_lora_rank, num_splits=2))
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.emulated
def test_a_query_without_keys():
    inputs = Inputs(Case(seqlen_q=3, seqlens_k=(1, 0)))
    out, lse = inputs.call()
    for empty, empty_lse in ((out[0, :2], lse[0, :, :2]), (out[1], lse[1])):
        assert not empty.any()
        assert (empty_lse == float("-inf")).all()
    assert out[0, 2].any()
    assert lse[0, :, 2].isfinite().all()


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_sequence_is_the_same_in_any_batch(num_splits):
    """Bitwise, if the number of splits is given."""
    inputs = Inputs(Case(seqlen_q=2, num_heads=20))
    seqlens = torch.tensor(inputs.case.seqlens_k, dtype=torch.int32, device=DEVICE)

    def attend(rows):
        queries, cache = (
            (inputs.q_nope[rows], inputs.q_pe[rows]),
            (inputs.cache, seqlens[rows], inputs.block_table[rows]),
        )
        return mla_decode(*queries, *cache, inputs.w_uk, inputs.w_uv, num_splits=num_splits)

    together = attend([0, 1, 2])
    for i in range(3):
        assert torch.equal(attend([i])[0], together[i])


def test_without_weights_it_is_the_middle_of_the_call_with_them():
    inputs = Inputs(Case(dtype=torch.float32))
    seqlens = torch.tensor(inputs.case.seqlens_k, dtype=torch.int32, device=DEVICE)
    absorbed = torch.einsum("bihn,hnc->bihc", inputs.q_nope, inputs.w_uk)
    arguments = inputs.q_pe, inputs.cache, seqlens, inputs.block_table
    latents = mla_decode(absorbed, *arguments, softmax_scale=inputs.softmax_scale)
    out = torch.einsum("bihc,hvc->bihv", latents, inputs.w_uv)
    torch.testing.assert_close(mla_decode(inputs.q_nope, *arguments, inputs.w_uk, inputs.w_uv), out)


@pytest.mark.oldest
def test_the_reference_has_the_same_arguments_and_result():
    inputs = Inputs(Case(dtype=torch.float32, rotary_dim=8))
    seqlens = torch.tensor(inputs.case.seqlens_k, dtype=torch.int32, device=DEVICE)
    arguments = inputs.q_nope, inputs.q_pe, inputs.cache, seqlens, inputs.block_table, inputs.w_uk, inputs.w_uv
    expected = reference.mla_decode(*arguments, return_lse=True, **inputs.rope)
    for result, ref in zip(inputs.call(), expected):
        assert (result.shape, result.dtype) == (ref.shape, ref.dtype)
        torch.testing.assert_close(result, ref, atol=1e-5, rtol=1e-5)


@pytest.mark.ci(but_each=5)
@pytest.mark.skipif(not INTERPRETED, reason="counts the accesses of interpreted kernels")
@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize("is_fp8", [False, True], ids=["half", "fp8"])
def test_a_key_is_loaded_once_for_the_heads_of_a_tile(num_splits, is_fp8, record_property):
    """As key and as value at once, for 64 heads. The last tile is padded with the last key."""
    seqlens_k = (569, 315)
    config = MlaDecodeConfig(64, 64, 8, 1)
    case = Case(
        num_heads=128, seqlens_k=seqlens_k, num_splits=num_splits, is_fp8=is_fp8, kv_lora_rank=128, page_size=64
    )
    inputs = Inputs(case)
    with using(config), guard() as accesses:
        inputs.call()
    seen = sum(seqlens_k) * inputs.cache.shape[2] * inputs.cache.element_size() * 2  # blocks of heads
    loaded = cache_bytes(accesses)
    record_property("figure", f"MLA decode, {num_splits} splits: {loaded} bytes loaded, {seen} seen")
    assert seen <= loaded <= 1.05 * seen


@pytest.mark.oldest
@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize("part", [pytest.param(1, marks=pytest.mark.emulated), 2**31 - 1])
@pytest.mark.parametrize(
    "options",
    [dict(causal=False), dict(is_fp8=True, kv_lora_rank=128), dict(cache_dtype=torch.float8_e5m2, k_scale=0.5)],
    ids=str,
)
def test_prefix_trees(options, part):
    """Every format of the cache, in a packed batch whose sequences end inside nodes."""
    forks = None, (0, 4), (1, 2), None, (1, 9)
    case = Case(seqlens_q=(2, 1, 0, 5, 3), seqlens_k=(77, 70, 33, 40, 61), forks=forks, part=part, num_splits=2)
    check(replace(case, **options))


@pytest.mark.oldest
@pytest.mark.emulated
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_fp8_number(dtype, cache_dtype):
    """Over two equal keys, a pair of an operand, the output is their latent vector, exactly; a NaN makes it NaN."""
    codes = torch.arange(512).to(torch.uint8).view(cache_dtype)
    finite = codes.float().isfinite()
    rows = torch.where(finite, codes.float(), 0.0).to(cache_dtype), codes
    latents = torch.stack(rows)[:, None].repeat(1, 2, 1)
    cache = torch.cat([latents.float(), torch.ones(2, 2, 64)], -1).to(cache_dtype).to(DEVICE)
    queries = (torch.ones(2, 1, 16, dim, dtype=dtype, device=DEVICE) for dim in (512, 64))
    table = torch.arange(2, dtype=torch.int32, device=DEVICE)
    out = mla_decode(*queries, cache, torch.full_like(table, 2), table[:, None], softmax_scale=1e-3).cpu()
    for head in range(16):
        torch.testing.assert_close(out[0, 0, head].float(), latents[0, 0].float(), atol=0, rtol=0)
    assert out[1].isnan().all()


def scaled_cache(scales):
    """A cache of 64 slots whose fp8 rows have these scales (64, 4), and its rows in fp64."""
    latents = torch.randn(64, 4, 128).clamp(-4, 4).to(torch.float8_e4m3fn)
    rope_keys = torch.randn(64, 64).to(torch.bfloat16)
    parts = latents.view(torch.uint8).flatten(1), scales.view(torch.uint8), rope_keys.view(torch.uint8)
    rows = (latents.double() * scales.double()[..., None]).flatten(1)
    return torch.cat(parts, 1)[None].contiguous(), rows, rope_keys.double()


@pytest.mark.oldest
@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["small", "large", "mixed", "zero", "not powers of two"])
def test_scales_of_rows_of_any_size(kind, dtype):
    """fp16 has no number for most of these scales; each group of columns is compared by its own size."""
    exponents = {"small": -40.0, "large": 40.0}.get(kind, 0.0) + torch.zeros(64, 4)
    if kind == "mixed":
        exponents = torch.tensor([-12.0, 0.0, 3.0, 9.0]).expand(64, 4) + torch.randint(-3, 4, (64, 4))
    scales = 2.0**exponents
    if kind == "zero":
        scales[::3], scales[1] = 0.0, torch.tensor([0.0, 1.0, 0.0, 2.0])
    if kind == "not powers of two":
        scales = torch.rand(64, 4) + 0.01
    cache, latents, rope_keys = scaled_cache(scales)
    q_nope, q_pe = (torch.randn(1, 1, 16, dim).to(dtype) for dim in (512, 64))
    softmax_scale = 0.05 / max(1.0, scales.max().item())
    where = torch.tensor([50], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    tensors = [x.to(DEVICE) for x in (q_nope, q_pe, cache, *where)]
    with using(TILES):
        out, lse = (x.cpu() for x in mla_decode(*tensors, softmax_scale=softmax_scale, return_lse=True))
    s = (q_nope[0, 0].double() @ latents[:50].T + q_pe[0, 0].double() @ rope_keys[:50].T) * softmax_scale
    torch.testing.assert_close(lse[0, :, 0].double(), s.logsumexp(-1), atol=1e-4, rtol=1e-4)
    expected, error = s.softmax(-1) @ latents[:50], torch.finfo(dtype).eps
    groups = range(4) if dtype == torch.bfloat16 else [i for i in range(4) if 1e-3 < scales[:, i].max() < 1e3]
    for group in groups:
        columns = slice(128 * group, 128 * group + 128)
        largest = latents[:50, columns].abs().max().item()
        torch.testing.assert_close(
            out[0, 0, :, columns].double(), expected[:, columns], atol=error * largest, rtol=error
        )


@pytest.mark.oldest
@pytest.mark.emulated
@pytest.mark.parametrize("cache_dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_queries_of_any_size_over_fp8_keys(cache_dtype):
    """fp16 has no number for most of these, and rows of a tile differ as much."""
    magnitudes = (2.0 ** torch.linspace(-40, 40, 16))[:, None]
    q_nope, q_pe = (torch.randn(1, 1, 16, dim) * magnitudes for dim in (512, 64))
    cache, latents, rope_keys = scaled_cache(torch.ones(64, 4))
    if cache_dtype != torch.uint8:
        rope_keys = rope_keys.to(cache_dtype)
        cache = torch.cat([latents, rope_keys.double()], 1).to(cache_dtype)[None]
    where = torch.tensor([50], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    tensors = [x.to(DEVICE) for x in (q_nope.bfloat16(), q_pe.bfloat16(), cache, *where)]
    for head in range(16):  # so that the scores of one row are of order 1
        softmax_scale = 0.05 / magnitudes[head].item()
        with using(TILES):
            _, lse = mla_decode(*tensors, softmax_scale=softmax_scale, return_lse=True)
        s = q_nope[0, 0, head].bfloat16().double() @ latents[:50].T
        s = (s + q_pe[0, 0, head].bfloat16().double() @ rope_keys.double()[:50].T) * softmax_scale
        torch.testing.assert_close(lse[0, head, 0].cpu().double(), s.logsumexp(-1), atol=1e-4, rtol=1e-4)
