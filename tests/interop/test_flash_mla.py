"""Names of FlashMLA: signatures, its widths and layouts against fp64, hostile caches, errors."""

import contextlib
import inspect
import math

import pytest
import torch
import triton
from signatures import without_annotations

from triton_attn import reference
from triton_attn.interop import flash_mla as interop
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import guard

INTERPRETED = triton.knobs.runtime.interpret
HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, ROW_BYTES = 576, 512, 64, 656
DEAD_ENTRY = 2147480000
BF16, FP16 = torch.bfloat16, torch.float16

# Inputs contain NaN on purpose, and numpy warns about it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_signatures_are_flash_mlas():
    options = (
        "num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, "
        "extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None"
    )
    places = f"(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, {options})"
    assert without_annotations(interop.flash_mla_with_kvcache) == places
    assert without_annotations(interop.get_mla_metadata) == "(*args, **kwargs)"
    lengths, options = "cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv", "dropout_p=0.0, softmax_scale=None"
    options += ", causal=False, deterministic=False, is_varlen=True"
    for name, places in (
        ("flash_attn_varlen_func", f"q, k, v, {lengths}"),
        ("flash_attn_varlen_kvpacked_func", f"q, kv, {lengths}, head_dim_qk"),
        ("flash_attn_varlen_qkvpacked_func", "qkv, cu_seqlens, max_seqlen, head_dim_qk"),
    ):
        assert without_annotations(getattr(interop, name)) == f"({places}, {options})"


class Inputs:
    """Queries, and a cache in shuffled pages with NaN in slots without a key. `rows` are each sequence's keys in
    fp64."""

    def __init__(self, device, dtype=BF16, seqlens=(70, 0, 1), seqlen_q=1, num_heads=16, is_fp8=False):
        torch.manual_seed(0)
        self.q = torch.randn(len(seqlens), seqlen_q, num_heads, HEAD_DIM).to(device, dtype)
        counts = [-(-n // PAGE_SIZE) for n in seqlens]
        pages = torch.randperm(sum(counts) + 2).split([*counts, 2])[:-1]
        table = torch.full((len(seqlens), max(counts) + 2), DEAD_ENTRY, dtype=torch.int32)
        shape = (sum(counts) + 2, PAGE_SIZE, 1, ROW_BYTES if is_fp8 else HEAD_DIM)
        if is_fp8:
            self.cache = torch.full(shape, 0xFF, dtype=torch.uint8)  # NaN in each of the three parts
        else:
            self.cache = torch.full(shape, math.nan, dtype=dtype)
        self.rows = []
        for i, (n, own) in enumerate(zip(seqlens, pages)):
            table[i, : len(own)] = own
            stored, rows = fp8_keys(n) if is_fp8 else plain_keys(n, dtype)
            keys = torch.arange(n)
            self.cache[own[keys // PAGE_SIZE], keys % PAGE_SIZE, 0] = stored
            self.rows.append(rows.to(device))
        self.is_fp8, self.cache, self.table = is_fp8, self.cache.to(device), table.to(device)
        self.seqlens = torch.tensor(seqlens, dtype=torch.int32, device=device)

    @property
    def places(self):
        return self.q, self.cache, self.table, self.seqlens, HEAD_DIM_V

    def call(self, **options):
        metadata = interop.get_mla_metadata()
        return interop.flash_mla_with_kvcache(*self.places, *metadata, is_fp8_kvcache=self.is_fp8, **options)

    def expected(self, causal, softmax_scale, dtype=torch.float64):
        """out and lse of each sequence separately, with lse +inf where a query sees no key."""
        outs, lses = [], []
        for q, rows in zip(self.q.to(dtype), self.rows):
            rows = rows.to(dtype)
            scores = torch.einsum("ihd,jd->hij", q, rows) * softmax_scale
            if causal:
                positions = torch.arange(len(q), device=q.device)[:, None] + len(rows) - len(q)
                scores.masked_fill_(torch.arange(len(rows), device=q.device) > positions, -math.inf)
            weights = scores.softmax(-1).nan_to_num(0.0)
            lse = scores.logsumexp(-1)
            outs.append(torch.einsum("hij,jd->ihd", weights, rows[:, :HEAD_DIM_V]))
            lses.append(lse.masked_fill(lse == -math.inf, math.inf))
        return torch.stack(outs), torch.stack(lses)


def plain_keys(n, dtype):
    keys = torch.randn(n, HEAD_DIM).to(dtype)
    return keys, keys.double()


def fp8_keys(n):
    """n rows as bytes, and their values: 512 e4m3 elements, a scale for every 128, 64 bf16 elements."""
    numbers = (100 * torch.randn(n, HEAD_DIM_V)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = 0.002 + 0.02 * torch.rand(n, 4)
    rotary = torch.randn(n, HEAD_DIM - HEAD_DIM_V).to(BF16)
    stored = torch.cat([part.view(torch.uint8) for part in (numbers, scales, rotary)], dim=-1)
    return stored, torch.cat([numbers.double() * scales.double().repeat_interleave(128, -1), rotary.double()], dim=-1)


def check(inputs, causal=False, softmax_scale=None):
    """The call is right to torch's error in the same dtype, writes all of its results and reads no dead slot."""
    with poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext():
        out, lse = inputs.call(causal=causal, softmax_scale=softmax_scale)
    assert (out.dtype, lse.dtype) == (inputs.q.dtype, torch.float32)
    scale = HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale
    out64, lse64 = inputs.expected(causal, scale)
    torch_out, _ = inputs.expected(causal, scale, inputs.q.dtype)
    assert_close_to_reference(out, out64, torch_out=torch_out)
    # Keys of an fp8 cache are multiplied in q's dtype. Other caches have it already, so only fp32 sums are rounded.
    inputs.rows = [rows.to(inputs.q.dtype).double() for rows in inputs.rows]
    difference = (inputs.expected(causal, scale)[1] - lse64)[lse64.isfinite()]
    assert_close_to_reference(lse, lse64, torch_error=difference.abs().max().item(), floor=1e-5, name="lse")


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("num_heads", [16, 64, 128])
@pytest.mark.parametrize(("dtype", "is_fp8"), [(BF16, False), (FP16, False), (BF16, True)], ids=["bf16", "fp16", "fp8"])
def test_heads(device, dtype, is_fp8, num_heads):
    check(Inputs(device, dtype, num_heads=num_heads, is_fp8=is_fp8))


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 2, 3])
@pytest.mark.parametrize("is_fp8", [False, True], ids=["bf16", "fp8"])
def test_new_tokens(device, is_fp8, seqlen_q, causal):
    check(Inputs(device, seqlen_q=seqlen_q, seqlens=(66, 2, 0), num_heads=5, is_fp8=is_fp8), causal)


def test_a_query_without_keys_has_their_lse(device):
    out, lse = Inputs(device, seqlens=(1, 0), seqlen_q=2).call(causal=True)
    assert not out[0, 0].any()
    assert not out[1].any()
    assert lse[0, :, 0].eq(math.inf).all()
    assert lse[1].eq(math.inf).all()
    assert lse[0, :, 1].isfinite().all()


def test_a_scale_that_is_given(device):
    check(Inputs(device, seqlen_q=2), causal=True, softmax_scale=0.135234)


@pytest.mark.parametrize("length", [1, 64, 65, 128])
def test_lengths_at_the_edge_of_a_page(device, length):
    check(Inputs(device, seqlens=(length,)))


def test_fp8_may_be_the_dtype_of_the_cache(device):
    inputs = Inputs(device, is_fp8=True)
    out, lse = inputs.call()
    inputs.cache = inputs.cache.view(torch.float8_e4m3fn)
    out8, lse8 = inputs.call()
    assert torch.equal(out8, out)
    assert torch.equal(lse8, lse)


@pytest.mark.ci
def test_every_signature_of_the_past(device):
    """Metadata by position and by each of their names, also as tensors, passed on by position with the options."""
    inputs = Inputs(device, seqlen_q=2)
    out, lse = inputs.call(causal=True, softmax_scale=0.1)
    first = interop.get_mla_metadata(inputs.seqlens, num_heads_per_head_k=32, num_heads_k=1)
    second = interop.get_mla_metadata(inputs.seqlens, 32, 1, num_heads_q=16, is_fp8_kvcache=False, topk=None)
    tensors = torch.zeros(8, 8, dtype=torch.int32, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    for metadata in (first, second, interop.get_mla_metadata(), tensors, (None, None)):
        again = interop.flash_mla_with_kvcache(*inputs.places, *metadata, 0.1, True)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)
    other = Inputs(device, seqlens=(5,), num_heads=3)  # one object for calls of any shape
    interop.flash_mla_with_kvcache(*other.places, *first)


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize(
    ("layout", "is_fp8"),
    [("heads inside pages", False), ("heads inside pages", True), ("pages inside heads", True), ("one for all", False)],
)
def test_heads_of_keys(device, layout, is_fp8):
    """Each group of query heads equals a separate call over its own head of the cache."""
    inputs = Inputs(device, seqlens=(66, 0), seqlen_q=2, num_heads=6, is_fp8=is_fp8)
    if layout == "one for all":
        inputs.cache = inputs.cache.expand(-1, -1, 3, -1)
    else:
        inputs.cache = inputs.cache.repeat(1, 1, 3, 1)
        for head in range(3):
            numbers = inputs.cache[:, :, head]
            (numbers[..., 512:528].view(torch.float32) if is_fp8 else numbers).mul_(1 - head / 3)
    if layout == "pages inside heads":
        inputs.cache = inputs.cache.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    q, cache = inputs.q, inputs.cache
    out, lse = inputs.call(causal=True)
    assert out.shape == (2, 2, 6, HEAD_DIM_V)
    assert lse.shape == (2, 6, 2)
    for head in range(3):
        group = slice(2 * head, 2 * head + 2)
        inputs.q, inputs.cache = q[:, :, group], cache[:, :, head : head + 1]
        own_out, own_lse = inputs.call(causal=True)
        torch.testing.assert_close(out[:, :, group], own_out, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse[:, group], own_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [None, "kv", "qkv"])
@pytest.mark.parametrize("head_dim", [128, 192])
def test_varlen_with_gradients(device, head_dim, packed):
    """192 and 128 are the widths of DeepSeek's prefill. The gradients of packed tensors are complete."""
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 11, 11, 37], dtype=torch.int32, device=device)
    qkv = torch.randn(37, 2, 2 * head_dim + 128, device=device, requires_grad=True)
    q, k, v = qkv.split([head_dim, head_dim, 128], dim=-1)
    options = dict(softmax_scale=0.1, causal=True)
    if packed == "qkv":
        out, lse = interop.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 26, head_dim, **options)
    elif packed == "kv":
        lengths = (cu_seqlens, cu_seqlens, 26, 26)
        out, lse = interop.flash_attn_varlen_kvpacked_func(q, qkv[:, :, head_dim:], *lengths, head_dim, **options)
    else:
        out, lse = interop.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 26, 26, 0.0, 0.1, True, False, False)
    assert (lse.shape, lse.stride()) == ((37, 2), (1, 37))
    double = qkv.detach().double().requires_grad_()
    parts = double.split([head_dim, head_dim, 128], dim=-1)
    expected = reference.flash_attention_varlen(*parts, cu_seqlens, cu_seqlens, 26, 26, return_lse=True, **options)
    torch.testing.assert_close(out, expected[0].float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected[1].T.float(), atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected[0].backward(dout.double())
    torch.testing.assert_close(qkv.grad, double.grad.float(), atol=2e-5, rtol=2e-5)


def test_varlen_names_what_is_wrong(device):
    qkv = torch.randn(5, 2, 24, device=device)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=device)
    with pytest.raises(
        ValueError, match="head_dim_qk: expected 1 or more that leave room for values in qkv's 24, got 12"
    ):
        interop.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 5, 12)
    with pytest.raises(TypeError, match="head_dim_qk: expected an int, got float"):
        interop.flash_attn_varlen_kvpacked_func(qkv, qkv, cu_seqlens, cu_seqlens, 5, 5, 8.0)
    with pytest.raises(ValueError, match="kv: expected shape"):
        interop.flash_attn_varlen_kvpacked_func(qkv, qkv[0], cu_seqlens, cu_seqlens, 5, 5, 8)


@pytest.mark.parametrize(
    "name",
    ["indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length"],
)
def test_unsupported_arguments_are_named(device, name):
    with pytest.raises(NotImplementedError, match=f"^{name}: expected None, since sparse attention"):
        Inputs(device).call(**{name: torch.zeros(3, 1, 4, dtype=torch.int32, device=device)})


def test_sparse_metadata_are_refused(device):
    seqlens = torch.ones(3, dtype=torch.int32, device=device)
    for call in (
        lambda: interop.get_mla_metadata(seqlens, 16, 1, 16, True, 2048),
        lambda: interop.get_mla_metadata(cache_seqlens=seqlens, num_q_tokens_per_head_k=16, num_heads_k=1, topk=2048),
    ):
        with pytest.raises(NotImplementedError, match=r"^topk: expected None"):
            call()


def strided(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


WRONG = {
    "q no tensor": (dict(q=lambda x: 1.0), TypeError, "q: expected a tensor, got float"),
    "q packed": (dict(q=lambda x: x[0]), ValueError, "q: expected shape"),
    "q strided": (dict(q=strided), ValueError, "q: expected a contiguous last dimension"),
    "values as wide": (dict(head_dim_v=lambda _: 576), NotImplementedError, "head_dim_v: expected less than"),
    "values wider": (dict(head_dim_v=lambda _: 577), ValueError, "head_dim_v: expected 1 to 575"),
    "no values": (dict(head_dim_v=lambda _: 0), ValueError, "head_dim_v: expected 1 to 575"),
    "width no int": (dict(head_dim_v=lambda _: 512.0), TypeError, "head_dim_v: expected an int, got float"),
    "cache of another dtype": (dict(k_cache=lambda x: x.half()), TypeError, "k_cache: expected q's dtype"),
    "bytes": (dict(k_cache=lambda x: x.view(torch.uint8)), TypeError, "k_cache: expected q's dtype"),
    "no bytes": (dict(is_fp8_kvcache=lambda _: True), TypeError, "k_cache: expected uint8 or float8_e4m3fn"),
    "rows of another width": (
        dict(k_cache=lambda x: x.view(torch.uint8), is_fp8_kvcache=lambda _: True),
        ValueError,
        "k_cache: expected shape .*656",
    ),
    "cache without heads": (dict(k_cache=lambda x: x[:, :, 0]), ValueError, "k_cache: expected shape"),
    "narrow cache": (dict(k_cache=lambda x: x[..., :512]), ValueError, "k_cache: expected shape"),
    "heads of keys": (
        dict(k_cache=lambda x: x.expand(-1, -1, 3, -1)),
        ValueError,
        "k_cache: expected a number of heads that divides q's 16, got 3",
    ),
    "table of another batch": (
        dict(k_cache=lambda x: x.expand(-1, -1, 2, -1), block_table=lambda x: x[:1]),
        ValueError,
        r"block_table: expected shape \(3, max_blocks\)",
    ),
    "no table": (dict(block_table=lambda _: None), TypeError, "block_table: expected a tensor"),
    "lengths": (dict(cache_seqlens=lambda x: x.long()), TypeError, "cache_seqlens: expected torch.int32"),
    "scale for metadata": (dict(tile_scheduler_metadata=lambda _: 0.1), TypeError, "tile_scheduler_metadata: expected"),
    "causal for splits": (dict(num_splits=lambda _: True), TypeError, "num_splits: expected .* got bool"),
    "scale": (dict(softmax_scale=lambda _: math.nan), ValueError, "softmax_scale: expected a finite number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(device, case):
    changes, error, message = WRONG[case]
    places = dict(zip(inspect.signature(interop.flash_mla_with_kvcache).parameters, Inputs(device).places))
    arguments = places | {"tile_scheduler_metadata": None}
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name))
    with pytest.raises(error, match=f"^{message}"):
        interop.flash_mla_with_kvcache(**arguments)
