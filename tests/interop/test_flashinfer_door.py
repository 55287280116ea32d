"""FlashInfer's names: signatures, its own tests' situations against fp64, page lists, graphs, what is refused."""

import contextlib
import functools
import math

import pytest
import torch
import triton
from host_cost import ELSEWHERE, compare, python_calls
from signatures import without_annotations

from triton_attn import mla_decode, paged_attention, reference
from triton_attn.interop import flashinfer
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import compile_only, guard

INTERPRETED = triton.knobs.runtime.interpret
HEADS, HEADS_KV, DIM, PAGE_SIZE = 4, 2, 32, 4
FP16, FP8 = torch.float16, torch.float8_e4m3fn

# Inputs contain NaN on purpose, and numpy warns about it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAN_OPTIONS = "rope_scale=None, rope_theta=None"
PREFILL_REST = (
    "non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, "
    "max_item_len_ptr=None, "
)
RUN_SCALES = "q_scale=None, k_scale=None, v_scale=None"
RUN_OUT = "out=None, lse=None, return_lse=False, enable_pdl=None"
SIGNATURES = {
    "BatchDecodeWithPagedKVCacheWrapper.run": f"(self, q, paged_kv_cache, *args, {RUN_SCALES}, {RUN_OUT}, "
    "window_left=None, sinks=None, q_len_per_req=None, skip_softmax_threshold_scale_factor=None, kv_cache_sf=None)",
    "BatchDecodeWithPagedKVCacheWrapper.plan": "(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, "
    "head_dim, page_size, pos_encoding_mode='NONE', window_left=-1, logits_soft_cap=None, q_data_type='float16', "
    f"kv_data_type=None, o_data_type=None, data_type=None, sm_scale=None, {PLAN_OPTIONS}, non_blocking=True, "
    "block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False, q_len_per_req=1, *, "
    "window_right=0)",
    "BatchPrefillWithPagedKVCacheWrapper.plan": "(self, qo_indptr, paged_kv_indptr, paged_kv_indices, "
    "paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, "
    "packed_custom_mask=None, causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, "
    f"window_left=-1, logits_soft_cap=None, {PLAN_OPTIONS}, q_data_type='float16', kv_data_type=None, "
    f"o_data_type=None, {PREFILL_REST}seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None, "
    "max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False)",
    "BatchPrefillWithPagedKVCacheWrapper.run": f"(self, q, paged_kv_cache, *args, {RUN_SCALES}, {RUN_OUT}, "
    "window_left=None, sinks=None, kv_cache_sf=None, skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, "
    "uses_spcompress=None)",
    "BatchPrefillWithRaggedKVCacheWrapper.plan": "(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, "
    "head_dim_qk, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, "
    "pos_encoding_mode='NONE', use_fp16_qk_reduction=False, window_left=-1, logits_soft_cap=None, sm_scale=None, "
    f"{PLAN_OPTIONS}, q_data_type='float16', kv_data_type=None, o_data_type=None, {PREFILL_REST}"
    "fixed_split_size=None, disable_split_kv=False, seq_lens=None, seq_lens_q=None, max_token_per_sequence=None, "
    "max_sequence_kv=None, v_indptr=None, o_indptr=None)",
    "BatchPrefillWithRaggedKVCacheWrapper.run": f"(self, q, k, v, *args, {RUN_SCALES}, o_scale=None, {RUN_OUT}, "
    "kv_cache_sf=None)",
    "BatchMLAPagedAttentionWrapper": "(float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, "
    "kv_indices=None, kv_len_arr=None, backend='auto')",
    "BatchMLAPagedAttentionWrapper.plan": "(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, "
    "head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type, use_profiler=False)",
    "BatchMLAPagedAttentionWrapper.run": "(self, q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, "
    "return_lse=False, profiler_buffer=None, kv_len=None, page_table=None, return_lse_base_on_e=False, o_scale=None, "
    "*, ckv_scale=None, ckv_scale_arr=None, kpe_scale=None)",
    "append_paged_mla_kv_cache": "(append_ckv, append_kpe, batch_indices, positions, ckv_cache, kpe_cache, kv_indices, "
    "kv_indptr, kv_last_page_len)",
    "single_decode_with_kv_cache": "(q, k, v, kv_layout='NHD', pos_encoding_mode='NONE', use_tensor_cores=False, "
    f"{RUN_SCALES}, window_left=-1, logits_soft_cap=None, sm_scale=None, {PLAN_OPTIONS}, return_lse=False)",
    "single_prefill_with_kv_cache": "(q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, "
    "custom_mask=None, packed_custom_mask=None, causal=False, kv_layout='NHD', pos_encoding_mode='NONE', "
    f"use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, {PLAN_OPTIONS}, "
    "backend='auto', return_lse=False, kv_cache_sf=None, k_scale=None, v_scale=None)",
    "merge_state": "(v_a, s_a, v_b, s_b)",
    "merge_state_in_place": "(v, s, v_other, s_other, mask=None)",
    "merge_states": "(v, s)",
    "append_paged_kv_cache": "(append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, "
    "kv_indptr, kv_last_page_len, kv_layout='NHD')",
    "get_batch_indices_positions": "(append_indptr, seq_lens, nnz, batch_indices=None, positions=None)",
    "get_seq_lens": "(kv_indptr, kv_last_page_len, page_size)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flashinfers(name):
    function = flashinfer
    for part in name.split("."):
        function = getattr(function, part)
    assert without_annotations(function) == SIGNATURES[name]


class Batch:
    """Keys in shuffled pages of a cache that holds NaN elsewhere, their page lists, and queries; `keys` and `values` of
    each sequence in fp64."""

    def __init__(
        self, device, kv_lens=(9, 0, 4, 13), q_lens=None, kv_dtype=FP16, layout="NHD", is_pair=False, dim_v=DIM
    ):
        torch.manual_seed(0)
        self.q_lens = [1] * len(kv_lens) if q_lens is None else list(q_lens)
        self.kv_lens, self.kv_dtype, self.layout = kv_lens, kv_dtype, layout
        self.q = torch.randn(sum(self.q_lens), HEADS, DIM).to(device, FP16)
        self.qo_indptr = indptr_of(self.q_lens).to(device)
        counts = [-(-n // PAGE_SIZE) for n in kv_lens]
        pages = torch.randperm(sum(counts) + 2)[: sum(counts)]
        self.kv_indptr, self.kv_indices = indptr_of(counts).to(device), pages.int().to(device)
        last = [n - (count - 1) * PAGE_SIZE if n else 0 for n, count in zip(kv_lens, counts)]
        self.last_page_len = torch.tensor(last, dtype=torch.int32, device=device)
        self.keys, self.values, caches = [], [], []
        for dim, rows_of in ((DIM, self.keys), (dim_v, self.values)):
            cache = torch.full((sum(counts) + 2, PAGE_SIZE, HEADS_KV, dim), math.nan)
            for n, own in zip(kv_lens, pages.split(counts)):
                rows, places = torch.randn(n, HEADS_KV, dim).to(self.kv_dtype), torch.arange(n)
                cache[own[places // PAGE_SIZE], places % PAGE_SIZE] = rows.float()
                rows_of.append(rows.double().to(device))
            caches.append((cache if layout == "NHD" else cache.transpose(1, 2)).to(device, self.kv_dtype).contiguous())
        self.cache = tuple(caches) if is_pair else torch.stack(caches, 1)
        self.heads = HEADS, HEADS_KV, DIM

    @property
    def lists(self):
        return self.kv_indptr, self.kv_indices, self.last_page_len

    @property
    def dtypes(self):
        return dict(q_data_type=FP16, kv_data_type=self.kv_dtype)

    def decode(self, run=None, q_len=1, **options):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(self.q), self.layout)
        wrapper.plan(*self.lists, *self.heads, PAGE_SIZE, q_len_per_req=q_len, **self.dtypes, **options)
        return wrapper.run_return_lse(self.q, self.cache, **(run or {}))

    def prefill(self, run=None, dim_v=None, **options):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(self.q), self.layout)
        wrapper.plan(self.qo_indptr, *self.lists, *self.heads, PAGE_SIZE, dim_v, **self.dtypes, **options)
        return wrapper.run(self.q, self.cache, return_lse=True, **(run or {}))

    def ragged(self, run=None, dim_v=None, **options):
        k, v = (torch.cat(rows).to(self.kv_dtype) for rows in (self.keys, self.values))
        if self.layout == "HND":
            k, v = (x.transpose(0, 1).contiguous() for x in (k, v))
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(self.q), self.layout)
        kv_indptr = indptr_of(self.kv_lens).to(self.q.device)
        wrapper.plan(self.qo_indptr, kv_indptr, *self.heads, dim_v, **self.dtypes, **options)
        return wrapper.run(self.q, k, v, return_lse=True, **(run or {}))

    def expected(self, causal, dtype=torch.float64, k_scale=1.0, v_scale=1.0, **options):
        """out and lse (tokens, heads), base 2, of each sequence by itself."""
        outs, lses = [], []
        for q, k, v in zip(self.q.split(self.q_lens), self.keys, self.values):
            tensors = (x[None].to(dtype) for x in (q, k * k_scale, v * v_scale))
            out, lse = reference.flash_attention(*tensors, causal=causal, return_lse=True, **options)
            outs.append(out[0])
            lses.append(lse[0].T / math.log(2))
        return torch.cat(outs), torch.cat(lses)


def indptr_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def workspace(x):
    return torch.empty(0, dtype=torch.uint8, device=x.device)


def check(batch, call, causal, run=None, options=None, **expected):
    """The call is right to what torch loses in the same dtype, writes all of its results and reads nothing dead."""
    with poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext():
        out, lse = call(run=run, **(options or {}))
    assert (out.dtype, lse.dtype, lse.is_contiguous()) == (FP16, torch.float32, True)
    out64, lse64 = batch.expected(causal, **expected)
    assert_close_to_reference(out, out64, torch_out=batch.expected(causal, torch.float32, **expected)[0].to(out.dtype))
    assert_close_to_reference(lse, lse64, torch_error=0, floor=1e-4, name="lse")


@pytest.mark.oldest
@pytest.mark.parametrize("is_pair", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode(device, layout, is_pair):
    batch = Batch(device, layout=layout, is_pair=is_pair)
    check(batch, batch.decode, True)


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_prefill(device, causal, layout):
    """Chunks, a single query, none, more of them than keys; values of a width of their own."""
    batch = Batch(device, (9, 5, 3, 6, 0), (4, 1, 0, 8, 2), layout=layout, is_pair=True, dim_v=24)
    check(batch, batch.prefill, causal, options=dict(dim_v=24, causal=causal))
    check(batch, batch.ragged, causal, options=dict(dim_v=24, causal=causal))


OPTIONS = {
    "window": (dict(window_left=3), dict(window_size=(3, -1))),
    "soft cap": (dict(logits_soft_cap=1.5), dict(softcap=1.5)),
    "scale": (dict(sm_scale=0.3), dict(softmax_scale=0.3)),
    "alibi": (dict(pos_encoding_mode="ALIBI"), dict(alibi_slopes=torch.tensor([2**-2, 2**-4, 2**-6, 2**-8]))),
    "one split": (dict(disable_split_kv=True), {}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(device, option):
    options, expected = OPTIONS[option]
    expected = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in expected.items()}
    batch = Batch(device)
    check(batch, batch.decode, True, options=options, **expected)
    batch = Batch(device, (9, 0, 4, 13), (2, 1, 0, 5))
    for call in (batch.prefill, batch.ragged):
        check(batch, call, True, options=options | dict(causal=True), **expected)


def test_slopes_of_heads_that_are_no_power_of_two(device):
    slopes = flashinfer.arguments._alibi_slopes(6, torch.device(device))
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert slopes.tolist() == expected


def test_sinks(device):
    batch = Batch(device)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device)
    check(batch, batch.decode, True, run=dict(sinks=sinks), sinks=sinks)
    check(batch, batch.prefill, False, run=dict(sinks=sinks), sinks=sinks)


@pytest.mark.parametrize("is_tensor", [False, True], ids=["numbers", "tensors"])
def test_fp8_caches_with_scales(device, is_tensor):
    batch = Batch(device, (9, 0, 4, 13), (2, 1, 0, 5), kv_dtype=FP8, is_pair=True)
    run = dict(q_scale=0.5, k_scale=0.7, v_scale=1.3)
    if is_tensor:
        run = {name: torch.tensor(scale, device=device) for name, scale in run.items()}
    check(batch, batch.prefill, True, run, dict(causal=True), k_scale=0.7, v_scale=1.3, softmax_scale=0.5 * DIM**-0.5)


def test_scales_of_a_cache_in_the_queries_dtype(device):
    batch = Batch(device, (9, 4), (2, 3))
    run, expected = dict(q_scale=2.0, k_scale=0.7, v_scale=1.3), dict(k_scale=1.4, v_scale=1.3)
    check(batch, batch.ragged, False, run, **expected)
    batch = Batch(device)
    check(batch, batch.decode, True, run, **expected)


def test_several_queries_of_each_request(device):
    batch = Batch(device, (9, 3, 13), (3, 3, 3))
    check(batch, batch.decode, True, options=dict(q_len=3))


def test_results_are_written_where_the_caller_says(device):
    batch = Batch(device, (9, 0, 4, 13))
    for call in (batch.decode, batch.prefill, batch.ragged):
        out, lse = torch.full_like(batch.q, math.nan), torch.full(batch.q.shape[:2], math.nan, device=device)
        results = call(run=dict(out=out, lse=lse))
        assert (results[0].data_ptr(), results[1].data_ptr()) == (out.data_ptr(), lse.data_ptr())
        for result, expected in zip((out, lse), call()):
            assert torch.equal(result, expected)


def test_ragged_keys_have_gradients(device):
    batch = Batch(device, (9, 0, 4), (4, 1, 3))
    tensors = batch.q, *(torch.cat(rows) for rows in (batch.keys, batch.values))
    q, k, v = (x.float().requires_grad_() for x in tensors)
    bounds = batch.qo_indptr, indptr_of(batch.kv_lens).to(device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(q))
    wrapper.plan(*bounds, *batch.heads, causal=True, q_data_type="float32")
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, natural = reference.flash_attention_varlen(*doubles, *bounds, 4, 9, causal=True, return_lse=True)
    for out, lse in (wrapper.run(q, k, v, return_lse=True), (expected, natural.T / math.log(2))):
        (out.sum() + lse[lse.isfinite()].square().sum()).backward()
    for x, double in zip((q, k, v), doubles):
        torch.testing.assert_close(x.grad, double.grad.float(), atol=1e-4, rtol=1e-4)


def test_older_names(device):
    batch = Batch(device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(batch.q))
    wrapper.begin_forward(*batch.lists, *batch.heads, PAGE_SIZE, "NONE", -1, None, FP16)
    options = dict(window_left=3, logits_soft_cap=2.0, sm_scale=0.3)
    out, lse = wrapper.forward_return_lse(batch.q, batch.cache, **options)
    wrapper.end_forward()
    for result, expected in zip((out, lse), batch.decode(**options)):
        assert torch.equal(result, expected)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(batch.q))
    prefill.begin_forward(batch.qo_indptr, *batch.lists, *batch.heads, PAGE_SIZE)
    assert torch.equal(prefill.forward(batch.q, batch.cache, True, **options), batch.prefill(causal=True, **options)[0])


def test_shared_prefix(device):
    """Cascade attention: every query over the prefix as one long sequence, over its own keys, and the two merged."""
    prefix, own = Batch(device, (11,), (3,)), Batch(device, (5, 0, 9))
    own.q = prefix.q
    parts = prefix.prefill(), own.decode()
    own.keys = [torch.cat([prefix.keys[0], rows]) for rows in own.keys]
    own.values = [torch.cat([prefix.values[0], rows]) for rows in own.values]
    out64, lse64 = own.expected(False)
    for out, lse in (
        flashinfer.merge_state(*parts[0], *parts[1]),
        flashinfer.merge_states(*(torch.stack(x, 1) for x in zip(*parts))),
    ):
        assert (out.dtype, lse.dtype, lse.is_contiguous()) == (FP16, torch.float32, True)
        assert_close_to_reference(out, out64, torch_error=1e-3)
        assert_close_to_reference(lse, lse64, torch_error=0, floor=1e-4, name="lse")
    merged, mask = [x.clone() for x in parts[0]], torch.tensor([True, False, True], device=device)
    flashinfer.merge_state_in_place(*merged, *parts[1], mask)
    for x, both, before in zip(merged, (out, lse), parts[0]):
        assert torch.equal(x[mask], both[mask])
        assert torch.equal(x[~mask], before[~mask])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("pos_encoding_mode", ["NONE", "ALIBI"])
def test_one_sequence(device, layout, pos_encoding_mode):
    slopes = OPTIONS["alibi"][1] if pos_encoding_mode == "ALIBI" else {}
    expected = {name: x.to(device) for name, x in slopes.items()}
    options = dict(kv_layout=layout, pos_encoding_mode=pos_encoding_mode)

    def keys_and_values():
        k, v = (x[0].to(batch.kv_dtype) for x in (batch.keys, batch.values))
        return (k, v) if layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())

    def decode(run):
        out, lse = flashinfer.single_decode_with_kv_cache(batch.q[0], *keys_and_values(), **options, return_lse=True)
        return out[None], lse[None]

    def prefill(run, **scales):
        tensors = batch.q, *keys_and_values()
        return flashinfer.single_prefill_with_kv_cache(*tensors, causal=True, **options, **scales, return_lse=True)

    batch = Batch(device, (17,))
    check(batch, decode, True, **expected)
    batch = Batch(device, (17,), (5,))
    check(batch, prefill, True, **expected)
    batch = Batch(device, (17,), (5,), kv_dtype=FP8)
    scales = dict(k_scale=0.7, v_scale=1.3)
    check(batch, prefill, True, options=scales, **scales, **expected)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_dtype", [FP16, FP8])
def test_append(device, kv_dtype, layout):
    """New tokens of each sequence at its end, padding after them; nothing else is written."""
    batch = Batch(device, (9, 0, 4, 13), kv_dtype=kv_dtype, layout=layout, is_pair=True)
    counts = (3, 0, 4, 1)
    seqlens = flashinfer.get_seq_lens(batch.kv_indptr, batch.last_page_len, PAGE_SIZE)
    assert seqlens.tolist() == list(batch.kv_lens)
    places = flashinfer.get_batch_indices_positions(indptr_of(counts).to(device), seqlens, sum(counts) + 2)
    assert places[0].tolist() == [0, 0, 0, 2, 2, 2, 2, 3, -1, -1]
    assert places[1].tolist() == [6, 7, 8, 0, 1, 2, 3, 12, 0, 0]
    new = [[rows[len(rows) - n :] for rows, n in zip(own, counts)] for own in (batch.keys, batch.values)]
    cache = tuple(torch.zeros_like(x) for x in batch.cache)
    tokens = [torch.cat([*rows, rows[0][:2]]).to(kv_dtype) for rows in new]
    flashinfer.append_paged_kv_cache(
        *tokens, *places, cache, batch.kv_indices, batch.kv_indptr, batch.last_page_len, layout
    )
    pages_of = batch.kv_indices.long().split(batch.kv_indptr.diff().tolist())
    for x, rows_of in zip(cache, new):
        x = (x if layout == "NHD" else x.transpose(1, 2)).double()
        for pages, rows, n in zip(pages_of, rows_of, batch.kv_lens):
            written = x[pages].flatten(0, 1)[n - len(rows) : n]
            assert torch.equal(written, rows)
        assert x.count_nonzero() == torch.cat(rows_of).count_nonzero()


@pytest.mark.parametrize("append", ["pair", "mla"])
def test_a_token_beyond_the_pages_of_its_sequence_is_written_nowhere(append, device):
    """And one before them. The pages there are those of other sequences."""
    torch.manual_seed(0)
    sequences, positions = (
        torch.tensor(x, dtype=torch.int32, device=device)
        for x in ([0, 0, 1, 1, 2], [PAGE_SIZE - 1, PAGE_SIZE, -1, 0, 0])
    )
    lists = (
        torch.tensor([3, 1, 2], dtype=torch.int32, device=device),
        torch.tensor([0, 1, 2, 2], dtype=torch.int32, device=device),
        None,
    )
    new = torch.randn(5, 2, DIM, device=device)
    caches = [torch.zeros(4, PAGE_SIZE, 2, DIM, device=device) for _ in range(2)]
    if append == "pair":
        flashinfer.append_paged_kv_cache(new, new, sequences, positions, tuple(caches), *lists)
    else:
        flat, views = new.flatten(1), [x.flatten(2) for x in caches]
        flashinfer.append_paged_mla_kv_cache(flat, flat, sequences, positions, *views, *lists)
    for x in caches:
        expected = torch.zeros_like(x)
        expected[3, -1], expected[1, 0] = new[0], new[3]
        assert torch.equal(x, expected)


@pytest.mark.parametrize("has_graph", [False, True])
def test_a_length_beyond_the_pages_of_a_sequence_is_their_end(has_graph, device):
    """The table's entries there are those of no sequence."""
    batch = Batch(device, (9, 4), kv_dtype=torch.float32, layout="NHD", is_pair=True)
    pages = flashinfer.pages.PageLists(torch.device(device), (2, 8) if has_graph else None)
    pages.fill(batch.kv_indptr, batch.kv_indices, torch.tensor([9, 99]), PAGE_SIZE)
    rooms = (batch.kv_indptr.diff() * PAGE_SIZE).tolist()
    assert pages.seqlens.tolist() == [9, rooms[1]]
    given = torch.zeros(2, 4, dtype=torch.int32)
    pages.fill(batch.kv_indptr, batch.kv_indices, torch.tensor([9, 15]), PAGE_SIZE, given)
    assert pages.seqlens.tolist() == [9, 15]


@pytest.mark.parametrize("seed", range(20))
def test_page_lists_become_a_table(device, seed):
    """Random lists, empty ones, those of later sequences alone (indptr from above 0), and entries past the last."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (1 + seed % 7,), generator=generator) * (torch.rand(1, generator=generator) > 0.1)
    first, more = torch.randint(0, 4, (2,), generator=generator).tolist()
    indptr = (indptr_of(counts.tolist()) + first).to(device)
    indices = torch.randperm(first + int(counts.sum()) + more, generator=generator).int().to(device)
    seqlens = torch.zeros(len(counts), dtype=torch.int32, device=device)
    lists = (
        flashinfer.pages.PageLists(torch.device(device)),
        flashinfer.pages.PageLists(torch.device(device), (len(counts), 40)),
    )
    for pages in lists:
        pages.fill(indptr, indices, seqlens, PAGE_SIZE)
        for i, (start, end) in enumerate(zip(indptr.tolist(), indptr[1:].tolist())):
            assert pages.block_table[i, : end - start].tolist() == indices[start:end].tolist()
    if device == "cpu":
        assert lists[0].block_table.shape[1] == max(1, int(counts.max()))


def test_plan_takes_no_sync():
    """Tensors without values stand for those of a device; each of the wrappers, graphs or not."""
    like = dict(dtype=torch.int32, device="meta")
    indptr, indices, last = torch.empty(4, **like), torch.empty(40, **like), torch.empty(3, **like)
    for graph in (False, True):
        lists, buffers = (indptr, indices, last), [torch.empty_like(x) for x in (indptr, indices, last)]
        start, sizes = (torch.empty(0, device="meta"), "NHD", graph), (HEADS, HEADS_KV, DIM, PAGE_SIZE)
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(*start, False, *buffers)
        decode.plan(*lists, *sizes)
        assert decode._pages.block_table.shape == (3, 40)
        prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(*start, indptr, *buffers)
        prefill.plan(indptr, *lists, *sizes)
        ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(*start, indptr, indptr)
        ragged.plan(indptr, indptr, *sizes[:3])
        mla = flashinfer.BatchMLAPagedAttentionWrapper(start[0], graph, indptr, *buffers)
        mla.plan(indptr, *lists, HEADS, 64, 16, PAGE_SIZE, True, 0.2, FP16, FP16)


def test_graphs_find_everything_where_it_was(device):
    """What a captured `run` reads has the same addresses after each `plan`, and `run` follows it."""
    first, second = Batch(device, (9, 0, 4, 13)), Batch(device, (1, 30, 0, 2))
    buffers = first.kv_indptr.clone(), torch.empty(64, dtype=torch.int32, device=device), first.last_page_len.clone()
    decode = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(first.q), *buffers)
    qo_indptr = first.qo_indptr.clone()
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(first.q), "NHD", True, qo_indptr, *buffers)
    kv_indptr = first.qo_indptr.clone()
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(first.q), "NHD", True, qo_indptr, kv_indptr)
    assert decode.is_cuda_graph_enabled
    addresses = []
    for batch in (first, second):
        decode.plan(*batch.lists, *batch.heads, PAGE_SIZE)
        prefill.plan(batch.qo_indptr, *batch.lists, *batch.heads, PAGE_SIZE)
        ragged.plan(batch.qo_indptr, indptr_of(batch.kv_lens), *batch.heads)
        k, v = (torch.cat(rows).half() for rows in (batch.keys, batch.values))
        for out in (decode.run(batch.q, batch.cache), prefill.run(batch.q, batch.cache), ragged.run(batch.q, k, v)):
            assert_close_to_reference(out, batch.expected(False)[0], torch_error=1e-3)
        tensors = (
            *(x for wrapper in (decode, prefill) for x in (wrapper._pages.block_table, wrapper._pages.seqlens)),
            *(bounds.indptr for bounds in (prefill._queries, ragged._queries, ragged._keys)),
        )
        addresses.append([(x.data_ptr(), x.shape) for x in tensors])
    assert addresses[0] == addresses[1]
    with pytest.raises(ValueError, match="indices: expected at most 64 pages"):
        decode.plan(first.kv_indptr, torch.zeros(65, dtype=torch.int32), first.last_page_len, *first.heads, PAGE_SIZE)
    with pytest.raises(ValueError, match=r"indptr: expected shape \(5,\)"):
        decode.plan(first.kv_indptr[:-1], first.kv_indices, first.last_page_len[:-1], *first.heads, PAGE_SIZE)
    with pytest.raises(ValueError, match="q_len_per_req: expected what the graph was planned with, 1, got 2"):
        decode.plan(*first.lists, *first.heads, PAGE_SIZE, q_len_per_req=2)
    with pytest.raises(ValueError, match="longest of qo_indptr: expected what the graph was planned with, None, got 3"):
        prefill.plan(first.qo_indptr, *first.lists, *first.heads, PAGE_SIZE, max_token_per_sequence=3)
    with pytest.raises(NotImplementedError, match="pos_encoding_mode"):
        prefill.plan(first.qo_indptr, *first.lists, *first.heads, PAGE_SIZE, pos_encoding_mode="ALIBI")
    with pytest.raises(ValueError, match=r"block_tables: expected shape \(4, 64 or fewer\)"):
        decode.plan(*first.lists, *first.heads, PAGE_SIZE, block_tables=torch.zeros(4, 65, dtype=torch.int32))
    for wrapper in (decode, prefill):  # a plan that failed has left the one before
        out = wrapper.run(second.q, second.cache)
        assert_close_to_reference(out, second.expected(False)[0], torch_error=1e-3)


def test_tables_and_lengths_that_are_given(device):
    batch = Batch(device)
    pages = flashinfer.pages.PageLists(torch.device(device))
    pages.fill(batch.kv_indptr, batch.kv_indices, torch.tensor(batch.kv_lens), PAGE_SIZE)
    nothing = torch.zeros_like(batch.kv_indices)
    lists = batch.lists
    batch.kv_indices, batch.last_page_len = nothing, torch.zeros_like(batch.last_page_len)
    given = dict(block_tables=pages.block_table.long(), seq_lens=torch.tensor(batch.kv_lens, device=device))
    for call in (batch.decode, batch.prefill):
        check(batch, call, False, options=given)
    batch.kv_indices, batch.last_page_len = lists[1:]


class LatentBatch:
    """Absorbed queries, and caches of latent vectors and rotary keys with NaN where no key is."""

    def __init__(self, device, kv_lens=(9, 0, 4, 13), q_lens=(1, 1, 1, 1), rope=16, one_tensor=False, scales=()):
        """With scales, of latent vectors and of rotary keys, caches are in fp8."""
        torch.manual_seed(0)
        self.dtype, self.scales = FP8 if scales else FP16, dict(zip(("ckv_scale", "kpe_scale"), scales))
        self.widths, self.q_lens, self.heads = (64, rope), list(q_lens), 3
        self.q = torch.randn(sum(q_lens) + 1, self.heads, 64 + rope).to(device, FP16)
        counts = [-(-n // PAGE_SIZE) for n in kv_lens]
        self.pages = torch.randperm(sum(counts) + 2).to(device)[: sum(counts)].split(counts)
        self.indptr, self.kv_indptr = indptr_of(q_lens).to(device), indptr_of(counts).to(device)
        self.kv_indices, self.kv_lens = torch.cat(self.pages).int(), torch.tensor(kv_lens, dtype=torch.int32).to(device)
        cache = torch.full((sum(counts) + 2, PAGE_SIZE, 64 + rope), math.nan, device=device)
        self.rows = [torch.randn(n, 64 + rope).to(self.dtype).to(device) for n in kv_lens]
        for own, rows in zip(self.pages, self.rows):
            places = torch.arange(len(rows), device=device)
            cache[own[places // PAGE_SIZE], places % PAGE_SIZE] = rows.float()
        cache = cache.to(self.dtype)
        caches = cache.split(self.widths, dim=-1)
        self.caches = caches if one_tensor else tuple(x.contiguous() for x in caches)

    @property
    def planned(self):
        places = self.indptr, self.kv_indptr, self.kv_indices, self.kv_lens, self.heads, *self.widths, PAGE_SIZE
        return *places, True, 0.2, FP16, self.dtype

    def run(self, wrapper=None, **options):
        wrapper = wrapper or flashinfer.BatchMLAPagedAttentionWrapper(workspace(self.q))
        wrapper.plan(*self.planned)
        return wrapper.run(*self.q.split(self.widths, dim=-1), *self.caches, **self.scales | options)

    def expected(self, dtype=torch.float64):
        outs, lses = [], []
        factors = [float(scale) for scale in self.scales.values()] or [1.0, 1.0]
        factors = torch.tensor(factors, dtype=dtype).repeat_interleave(torch.tensor(self.widths)).to(self.q.device)
        for q, rows in zip(self.q[:-1].split(self.q_lens), self.rows):
            k = rows[None, :, None].to(dtype) * factors
            tensors = q[None].to(dtype), k, k[..., :64]
            out, lse = reference.flash_attention(*tensors, causal=True, softmax_scale=0.2, return_lse=True)
            outs.append(out[0])
            lses.append(lse[0].T / math.log(2))
        outs.append(torch.zeros_like(self.q[-1:, :, :64], dtype=dtype))  # a row after the last sequence
        lses.append(torch.full_like(outs[-1][..., 0], -math.inf))
        return torch.cat(outs), torch.cat(lses)


FP8_CASES = [{"scales": (0.5, 1.7)}, {"scales": (0.3, 0.3), "rope": 0}, {"scales": (2.0, 0.25), "one_tensor": True}]


@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("case", [{}, {"one_tensor": True}, {"q_lens": (2, 0, 3, 1)}, {"rope": 0}, *FP8_CASES], ids=str)
def test_mla(device, case, as_tensors):
    batch = LatentBatch(device, **case)
    if as_tensors:
        batch.scales = {name: torch.tensor([scale], device=device) for name, scale in batch.scales.items()}
    with poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext():
        out, lse = batch.run(return_lse=True)
    out64, lse64 = batch.expected()
    assert_close_to_reference(out, out64, torch_out=batch.expected(torch.float32)[0].half())
    floor = 1e-3 if batch.scales else 1e-4  # rotary queries times the ratio of the scales are rounded
    assert_close_to_reference(lse, lse64, torch_error=0, floor=floor, name="lse")
    given, natural = torch.empty_like(out), torch.empty_like(lse)
    batch.run(out=given, lse=natural, return_lse=True, return_lse_base_on_e=True)
    assert torch.equal(given, out)
    torch.testing.assert_close(natural / math.log(2), lse)
    strided = torch.empty(*out.shape, 2, dtype=out.dtype, device=device)[..., 0]
    assert batch.run(out=strided) is strided
    assert torch.equal(strided, out)


def test_mla_graphs_and_appending(device):
    first, second = LatentBatch(device, q_lens=(2, 0, 3, 1)), LatentBatch(device, (1, 30, 0, 2), (1, 3, 2, 0))
    buffers = first.indptr.clone(), first.kv_indptr.clone(), torch.empty(64, dtype=torch.int32), first.kv_lens.clone()
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(workspace(first.q), True, *buffers)
    addresses = []
    for batch in (first, second):
        kept = [x.clone() for x in batch.caches]
        lists = batch.kv_indices, batch.kv_indptr, None
        bounds = indptr_of(batch.kv_lens.tolist()).to(device)
        places = flashinfer.get_batch_indices_positions(bounds, batch.kv_lens, int(bounds[-1]))
        batch.caches = tuple(torch.full_like(x, math.nan) for x in kept)
        new = torch.cat(batch.rows).split(batch.widths, dim=-1)
        flashinfer.append_paged_mla_kv_cache(*new, *places, *batch.caches, *lists)
        for x, before in zip(batch.caches, kept):
            assert torch.equal(x.nan_to_num(9.0), before.nan_to_num(9.0))
        assert_close_to_reference(batch.run(wrapper), batch.expected()[0], torch_error=1e-3)
        tensors = wrapper._pages.block_table, wrapper._pages.seqlens, wrapper._queries.indptr
        addresses.append([x.data_ptr() for x in tensors])
    assert addresses[0] == addresses[1]
    start, indptr, _, *rest = first.planned
    failing = {
        r"indices: expected at most 64 pages": (start, indptr, torch.zeros(65, dtype=torch.int32), *rest),
        r"qo_indptr: expected the buffer's shape \(5,\)": (start[:-1], indptr, first.kv_indices, *rest),
        r"kv_len_arr: expected shape \(3,\)": (start, indptr[:-1], first.kv_indices, *rest),
    }
    for message, planned in failing.items():
        with pytest.raises(ValueError, match=message):
            wrapper.plan(*planned)
        out = wrapper.run(*second.q.split(second.widths, dim=-1), *second.caches)  # by the plan before
        assert_close_to_reference(out, second.expected()[0], torch_error=1e-3)
    with pytest.raises(ValueError, match=r"kv_indptr: expected a buffer of shape \(5,\), got \(4,\)"):
        flashinfer.BatchMLAPagedAttentionWrapper(workspace(first.q), True, buffers[0], buffers[1][:-1], *buffers[2:])


def test_scales_of_mla_caches(device):
    """fp8 caches need both, others take none, as in FlashInfer."""
    for name in ("ckv_scale", "kpe_scale"):
        with pytest.raises(ValueError, match=f"^{name}: expected a number or a tensor with fp8 caches, got None"):
            LatentBatch(device, scales=(0.5, 2.0)).run(**{name: None})
        with pytest.raises(ValueError, match=f"^{name}: expected None with caches in torch.float16, got 0.5"):
            LatentBatch(device).run(**{name: 0.5})
        with pytest.raises(ValueError, match=f"^{name}: expected a finite number above 0, got -0.5"):
            LatentBatch(device, scales=(0.5, 2.0)).run(**{name: -0.5})
    out = LatentBatch(device, scales=(0.5, 0.5), rope=0).run(kpe_scale=None)
    assert_close_to_reference(out, LatentBatch(device, scales=(0.5, 0.5), rope=0).expected()[0], torch_error=1e-3)


@pytest.mark.parametrize("cache_dtype", [FP8, torch.float8_e5m2], ids=str)
def test_appending_to_fp8_mla_caches(device, cache_dtype):
    """New rows are rounded once, and saturate."""
    batch = LatentBatch(device, scales=(0.5, 0.5))
    caches = tuple(torch.full(x.shape, math.nan, device=device).to(cache_dtype) for x in batch.caches)
    places = flashinfer.get_batch_indices_positions(
        indptr_of(batch.kv_lens.tolist()).to(device), batch.kv_lens, int(batch.kv_lens.sum())
    )
    new = [torch.randn(len(places[0]), width, device=device) * 1e5 for width in batch.widths]
    flashinfer.append_paged_mla_kv_cache(*new, *places, *caches, batch.kv_indices, batch.kv_indptr, None)
    limit = torch.finfo(cache_dtype).max
    slots = torch.cat([own.repeat_interleave(PAGE_SIZE)[:n] * PAGE_SIZE for own, n in zip(batch.pages, batch.kv_lens)])
    slots = slots + places[1] % PAGE_SIZE
    for cache, rows in zip(caches, new):
        found = cache.view(torch.uint8).flatten(0, 1)[slots].view(cache_dtype)
        assert torch.equal(found.float(), rows.clamp(-limit, limit).to(cache_dtype).float())


@pytest.mark.parametrize("name", ["kv_len", "page_table", "ckv_scale_arr", "o_scale"])
def test_what_of_mla_is_refused_by_name(device, name):
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        LatentBatch(device).run(**{name: MASK})


def test_mla_caches_of_another_kind(device):
    batch = LatentBatch(device)
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(workspace(batch.q))
    with pytest.raises(NotImplementedError, match=r"kv_data_type: q's dtype torch.float16, float8_e4m3fn and"):
        wrapper.plan(*batch.planned[:-1], torch.float32)
    batch.caches = batch.caches[0], batch.caches[1].float()
    with pytest.raises(ValueError, match=r"kpe_cache: expected .* as planned"):
        batch.run(wrapper)


MASK = torch.ones(1, dtype=torch.bool)
REFUSED = {
    "custom_mask": lambda batch: batch.prefill(custom_mask=MASK),
    "packed_custom_mask": lambda batch: batch.ragged(packed_custom_mask=MASK),
    "custom_mask_buf": lambda batch: flashinfer.BatchPrefillWithPagedKVCacheWrapper(batch.q, custom_mask_buf=MASK),
    "mask_indptr_buf": lambda batch: flashinfer.BatchPrefillWithRaggedKVCacheWrapper(batch.q, mask_indptr_buf=MASK),
    "jit_args": lambda batch: flashinfer.BatchDecodeWithPagedKVCacheWrapper(batch.q, jit_args=[1]),
    "jit_kwargs": lambda batch: flashinfer.BatchPrefillWithPagedKVCacheWrapper(batch.q, jit_kwargs={}),
    "pos_encoding_mode: ROPE_LLAMA": lambda batch: batch.decode(pos_encoding_mode="ROPE_LLAMA"),
    "pos_encoding_mode: ALIBI": lambda batch: batch.prefill(pos_encoding_mode="ALIBI"),
    "window_right": lambda batch: batch.decode(window_right=2),
    "fixed_split_size": lambda batch: batch.decode(fixed_split_size=8),
    "o_data_type": lambda batch: batch.prefill(o_data_type=torch.bfloat16),
    "use_fp16_qk_reduction": lambda batch: batch.prefill(use_fp16_qk_reduction=True),
    "prefix_len_ptr": lambda batch: batch.prefill(prefix_len_ptr=MASK),
    "token_pos_in_items_ptr": lambda batch: batch.ragged(token_pos_in_items_ptr=MASK),
    "token_pos_in_items_len": lambda batch: batch.ragged(token_pos_in_items_len=3),
    "max_item_len_ptr": lambda batch: batch.prefill(max_item_len_ptr=MASK),
    "v_indptr": lambda batch: batch.ragged(v_indptr=MASK),
    "o_indptr": lambda batch: batch.ragged(o_indptr=MASK),
    "args": lambda batch: planned(batch).run(batch.q, batch.cache, 1.0),
    "kv_cache_sf": lambda batch: batch.decode(run=dict(kv_cache_sf=MASK)),
    "skip_softmax_threshold_scale_factor": lambda batch: batch.decode(
        run=dict(skip_softmax_threshold_scale_factor=1.0)
    ),
    "use_fp16_softmax": lambda batch: batch.prefill(run=dict(use_fp16_softmax=True)),
    "uses_spcompress": lambda batch: batch.prefill(run=dict(uses_spcompress=True)),
    "o_scale": lambda batch: batch.ragged(run=dict(o_scale=1.0)),
    "k_scale": lambda batch: batch.ragged(run=dict(k_scale=torch.ones(1))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(device, name):
    with pytest.raises(NotImplementedError, match=f"^{name}"):
        REFUSED[name](Batch(device))


@pytest.mark.parametrize("name", ["scale_q", "scale_k", "scale_v", "custom_mask", "packed_custom_mask", "kv_cache_sf"])
def test_what_one_sequence_is_refused(device, name):
    x = torch.zeros(3, 2, 16, device=device)
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        flashinfer.single_prefill_with_kv_cache(x, x, x, **{name: MASK})


def planned(batch):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(batch.q))
    wrapper.plan(*batch.lists, *batch.heads, PAGE_SIZE)
    return wrapper


WRONG = {
    "no plan": (
        lambda batch: flashinfer.BatchDecodeWithPagedKVCacheWrapper(batch.q).run(batch.q, batch.cache),
        RuntimeError,
        "run: expected a call of plan",
    ),
    "layout": (lambda batch: flashinfer.BatchDecodeWithPagedKVCacheWrapper(batch.q, "HDN"), ValueError, "kv_layout"),
    "no buffer": (
        lambda batch: flashinfer.BatchDecodeWithPagedKVCacheWrapper(batch.q, use_cuda_graph=True),
        TypeError,
        "paged_kv_indptr_buffer: expected a tensor with use_cuda_graph=True",
    ),
    "mode": (lambda batch: batch.decode(pos_encoding_mode="ROPE"), ValueError, "pos_encoding_mode: expected NONE"),
    "dtype": (lambda batch: planned(batch).run(batch.q.float(), batch.cache), ValueError, "q: expected .* as planned"),
    "heads": (lambda batch: planned(batch).run(batch.q[:, :2], batch.cache), ValueError, "q: expected .* as planned"),
    "rows": (lambda batch: planned(batch).run(batch.q[:3], batch.cache), ValueError, "q: expected 4 rows"),
    "pages": (
        lambda batch: planned(batch).run(batch.q, batch.cache[:, :, :2]),
        ValueError,
        "paged_kv_cache: expected pages of",
    ),
    "cache": (lambda batch: planned(batch).run(batch.q, batch.cache[:, 0]), ValueError, "paged_kv_cache: expected"),
    "window": (
        lambda batch: planned(batch).run(batch.q, batch.cache, window_left=5),
        ValueError,
        "window_left: expected None or what was planned, -1",
    ),
    "lse": (
        lambda batch: planned(batch).run(batch.q, batch.cache, lse=torch.empty(3, 2), return_lse=True),
        ValueError,
        r"lse: expected shape \(4, 4\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(device, case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=f"^{message}"):
        call(Batch(device))


def calls_of_decode():
    q, cache = torch.empty(8, HEADS, DIM, dtype=FP16), torch.empty(32, 2, 16, HEADS_KV, DIM, dtype=FP16)
    k_cache, v_cache = cache.unbind(1)
    table, seqlens = torch.zeros(8, 4, dtype=torch.int32), torch.full((8,), 64, dtype=torch.int32)
    indptr, indices = torch.arange(0, 33, 4, dtype=torch.int32), torch.arange(32, dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(q))
    wrapper.plan(indptr, indices, torch.full((8,), 16), HEADS, HEADS_KV, DIM, 16)
    return {
        "direct": lambda: paged_attention(q[:, None], k_cache, v_cache, seqlens, table)[:, 0],
        "door": lambda: wrapper.run(q, cache),
    }


def calls_of_mla(scales=()):
    batch = LatentBatch("cpu", kv_lens=(64,) * 8, q_lens=(1,) * 8, scales=scales)
    queries, wrapper = batch.q.split(batch.widths, dim=-1), flashinfer.BatchMLAPagedAttentionWrapper(workspace(batch.q))
    wrapper.plan(*batch.planned)
    where = batch.kv_lens, wrapper._pages.block_table
    packed = {"cu_seqlens_q": batch.indptr, "max_seqlen_q": 1, "rope_cache": batch.caches[1]}
    packed |= dict(zip(("k_scale", "k_pe_scale"), scales))
    return {
        "direct": lambda: mla_decode(*queries, batch.caches[0], *where, softmax_scale=0.2, **packed),
        "door": lambda: wrapper.run(*queries, *batch.caches, **batch.scales),
    }


@pytest.mark.compiled
@pytest.mark.parametrize(
    "calls",
    [calls_of_decode, calls_of_mla, functools.partial(calls_of_mla, (0.5, 0.25))],
    ids=["decode", "MLA", "fp8 MLA"],
)
def test_host_cost(calls, record_property, request):
    """A decode step costs at most 1.3 times the direct call with the block table at hand."""
    calls = calls()
    with compile_only("sm_90", every_launch=False):
        cost, _, ratio = compare(calls["door"], calls["direct"], batches=100)
        extra_calls = python_calls(calls["door"]) - python_calls(calls["direct"])
    figure = f"{cost:.0f} us a run of FlashInfer's {request.node.callspec.id} wrapper, {ratio:.2f} of the direct call, "
    record_property("figure", f"{figure}{extra_calls} more Python calls")
    assert extra_calls <= 6
    assert ratio <= 1.3 * ELSEWHERE
