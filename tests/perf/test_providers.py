"""Peers from other packages: each is called as its stand-in expects, which has the real signature."""

import sys
from types import ModuleType

import pytest
import torch
from small_problems import DECODE, PROBLEM

from perf.workloads import providers
from perf.workloads.problems import LatentDecodeProblem
from triton_attn import reference

LATENT = LatentDecodeProblem(batch=3, seqlen_k=37, num_heads_q=4, page_size=8)


@pytest.fixture
def install(monkeypatch):
    def install(name, **functions):
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return install


def sequences(cache, bounds, pages, lengths):
    """For each sequence the first `length` rows of its pages, which `bounds` selects from `pages`."""
    for i, length in enumerate(lengths.tolist()):
        yield cache[pages[bounds[i] : bounds[i + 1]].long()].flatten(0, 1)[:length]


class Wrapper:
    """The common interface of FlashInfer's wrappers: a plan, then runs."""

    def __init__(self, workspace, kv_layout="NHD", use_tensor_cores=False):
        assert workspace.numel() == providers.WORKSPACE_BYTES


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, causal, q_data_type):
        self.bounds = qo_indptr, kv_indptr
        self.causal = causal

    def run(self, q, k, v):
        bounds = [x.tolist() for x in self.bounds]
        longest = [bound[1] for bound in bounds]
        return reference.flash_attention_varlen(q, k, v, *self.bounds, *longest, causal=self.causal)


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **dtypes):
        self.pages = indptr, indices, (indptr.diff() - 1) * page_size + last_page_len

    def run(self, q, kv_cache):
        keys_and_values = zip(*(sequences(cache, *self.pages) for cache in kv_cache))
        outs = [
            reference.flash_attention(q[None, None, i], k[None], v[None]) for i, (k, v) in enumerate(keys_and_values)
        ]
        return torch.cat(outs).squeeze(1)


class BatchMLAPagedAttentionWrapper(Wrapper):
    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, ckv, kpe, page_size, causal, sm_scale, *dtypes
    ):
        self.pages, self.scale = (kv_indptr, kv_indices, kv_len_arr), sm_scale

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
        q, cache = torch.cat([q_nope, q_pe], dim=2), torch.cat([ckv_cache, kpe_cache], dim=2)
        outs = []
        for i, rows in enumerate(sequences(cache, *self.pages)):
            k, v = rows[None, :, None], rows[None, :, None, : q_nope.shape[2]]
            outs.append(reference.flash_attention(q[None, None, i], k, v, softmax_scale=self.scale))
        return torch.cat(outs).squeeze(1)


def vllm_attention(q, k, v, *, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, block_table, causal, **options):
    given = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q, "causal": causal}
    result = reference.paged_attention(q, k, v, seqused_k, block_table, **given)
    return result if options.get("out") is None else options["out"].copy_(result)


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, causal):
    return reference.paged_attention(q, k_cache, v_cache, cache_seqlens, causal=causal)


@pytest.mark.parametrize("gives_lse", [False, True])
def test_flash_attention_of_any_version(install, gives_lse):
    def flash_attn_func(q, k, v, *, causal):
        return reference.flash_attention(q, k, v, causal=causal, return_lse=gives_lse)

    install("flash_attn", flash_attn_func=flash_attn_func)
    check_pass(providers._flash_attn("flash_attn"))


def test_flashinfer(install):
    install("flashinfer", BatchPrefillWithRaggedKVCacheWrapper=BatchPrefillWithRaggedKVCacheWrapper)
    check_pass(providers._flashinfer)


def check_pass(provider):
    q, k, v = (torch.randn(shape) for shape in PROBLEM.shapes)
    out = provider(PROBLEM, "cpu")(q, k, v)
    torch.testing.assert_close(out, reference.flash_attention(q, k, v, causal=PROBLEM.causal))


@pytest.mark.parametrize(
    "provider",
    [
        providers._flash_attn_decode("flash_attn"),
        providers._flashinfer_decode,
        providers._vllm_flash,
        providers._vllm_triton,
    ],
)
def test_decode(install, provider):
    install("flash_attn", flash_attn_with_kvcache=flash_attn_with_kvcache)
    install("flashinfer", BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper)
    install("vllm.vllm_flash_attn", flash_attn_varlen_func=vllm_attention)
    install("vllm.v1.attention.ops.triton_unified_attention", unified_attention=vllm_attention)
    for package in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.ops"):
        install(package)
    q, k, v = (torch.randn(shape) for shape in DECODE.shapes)
    torch.testing.assert_close(provider(DECODE, q, k, v)(), reference.flash_attention(q, k, v))


def test_latent_decode(install):
    install("flashinfer.mla", BatchMLAPagedAttentionWrapper=BatchMLAPagedAttentionWrapper)
    install("flashinfer")
    q, rows = (torch.randn(shape) for shape in LATENT.shapes)
    expected = providers.latent_step(LATENT, q, rows)()
    torch.testing.assert_close(providers._flashinfer_mla(LATENT, q, rows)(), expected, atol=1e-4, rtol=1e-4)


def test_what_is_not_installed_is_not_listed():
    listed = providers._installed(
        {"here": ("perf.results.tables", 1), "no part": ("perf.no", 2), "no package": ("no.part", 3)}
    )
    assert listed == {"here": 1}
