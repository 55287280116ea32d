"""tree_mask of mla_decode: the drafts of a tree, each of which sees the context and its own path."""

from dataclasses import replace

import pytest
import torch
from decode_cases import DEVICE, Case, Inputs, check
from draft_trees import KINDS, bits_of_tree
from prefix_trees import WHOLE

from triton_attn import mla_decode
from triton_attn.mla.configs import MlaDecodeConfig
from triton_attn.toolchain import compile_only

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TREE = Case(tree="tree", seqlen_q=13, seqlens_k=(77, 13, 100, 4))
OPTIONS = [
    dict(num_splits=3),
    dict(is_fp8=True, kv_lora_rank=128),
    dict(with_uk=False, with_uv=False, softmax_scale=0.1, page_size=64),  # a tile lies in one page
    dict(seqlens_q=(64, 0, 9, 5), config=MlaDecodeConfig(64, 32, 8, 1)),  # programs find their sequence
    dict(seqlen_q=64, num_heads=1, num_splits=2),
    dict(cache_dtype=torch.float8_e5m2, k_scale=0.5, two_tensors=True, qk_rope_head_dim=16),
    dict(key_shard=(1, 2, 1), num_splits=2),
    dict(key_shard=(2, 3, 4), seqlens_q=(64, 0, 9, 5), config=MlaDecodeConfig(64, 32, 8, 1)),
    dict(key_shard=(0, 4, 16), page_size=64, is_fp8=True, kv_lora_rank=128),
]


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option(kind, options):
    check(replace(TREE, tree=kind, **options))


@pytest.mark.emulated
@pytest.mark.parametrize("key_shard", [None, (1, 2, 2)])
def test_a_small_tree(key_shard):
    """In two splits; one sequence has fewer keys than drafts."""
    check(replace(TREE, seqlen_q=5, seqlens_k=(40, 3), num_splits=2, key_shard=key_shard))


SHARED = replace(
    TREE, seqlen_q=7, seqlens_k=(77, 80, 70, 66, 4), forks=(None, (0, 4), (1, 3), (0, 9), None), part=WHOLE
)


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_splits=3, part=1),
        dict(page_size=64, seqlens_k=(270, 270, 200, 66, 4)),
        dict(seqlens_q=(64, 0, 9, 5, 3), config=MlaDecodeConfig(64, 32, 8, 1), num_splits=2),
        dict(forks=(None, *[(0, 9)] * 4), seqlens_k=(77, 77, 70, 60, 77)),  # drafts are on shared pages too
        dict(is_fp8=True, kv_lora_rank=128, with_uk=False, with_uv=False, softmax_scale=0.1),
        # Pages of two ranks are twice as long; drafts begin on them too.
        dict(key_shard=(1, 2, 8), seqlens_k=(135, 134, 133, 70, 4), num_splits=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefixes(kind, options):
    """Nodes have the keys before the drafts for all rows; `check` counts that their pages are read once for these."""
    check(replace(SHARED, tree=kind, **options))


@pytest.mark.emulated
def test_a_small_tree_with_a_shared_prefix():
    check(replace(SHARED, seqlen_q=3, seqlens_k=(40, 37), forks=(None, (0, 2))))


def test_a_chain_is_causal():
    inputs = Inputs(replace(TREE, tree="chain", seqlens_k=(77, 40)))
    out, lse = inputs.call()
    inputs.case = replace(inputs.case, tree=None)
    expected, expected_lse = inputs.call()
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5)


def test_batch_invariant():
    inputs = Inputs(replace(TREE, seqlens_k=(77, 40)))
    out, _ = inputs.call(num_splits=0, batch_invariant=True)
    for i in range(2):
        alone = Inputs(replace(TREE, seqlens_k=(77, 40)))
        one = slice(i, i + 1)
        alone.q_nope, alone.q_pe, alone.bits = alone.q_nope[one], alone.q_pe[one], alone.bits[one]
        alone.block_table = alone.block_table[one]
        alone.case = replace(alone.case, seqlens_k=alone.case.seqlens_k[i : i + 1])
        assert torch.equal(alone.call(num_splits=0, batch_invariant=True)[0], out[one])


def arguments(num_drafts, heads=16, dtype=torch.bfloat16):
    q_nope, q_pe = (torch.zeros(2, num_drafts, heads, dim, dtype=dtype, device=DEVICE) for dim in (512, 64))
    cache = torch.zeros(8, 64, 576, dtype=dtype, device=DEVICE)
    table = torch.arange(8, dtype=torch.int32, device=DEVICE).view(2, 4)
    lengths = torch.tensor([200, 100], dtype=torch.int32, device=DEVICE)
    return q_nope, q_pe, cache, lengths, table


ERRORS = [
    (dict(tree_mask=torch.zeros(2, 8).int()), TypeError, "tree_mask: expected torch.int64, got torch.int32"),
    (dict(tree_mask=torch.zeros(8).long()), ValueError, r"tree_mask: expected shape \(2, 8\), got shape \(8,\)"),
    (
        dict(tree_mask=torch.zeros(2, 8).long(), w_uk=torch.zeros(16, 512, 512).bfloat16())
        | dict(rope_cos=torch.zeros(300, 32), rope_sin=torch.zeros(300, 32)),
        NotImplementedError,
        "rope_cos: not supported with tree_mask",
    ),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="the tensors of the errors are on the CPU")
@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        mla_decode(*arguments(8), **dict(softmax_scale=0.1) | options)


def test_more_than_64_drafts():
    with pytest.raises(ValueError, match="tree_mask: expected at most 64 queries of a sequence, got 65"):
        mla_decode(*arguments(65), softmax_scale=0.1, tree_mask=torch.zeros(2, 65, device=DEVICE).long())


@pytest.mark.compiled
@pytest.mark.oldest
def test_a_tree_takes_the_portable_kernel(monkeypatch):
    """The kernel for Hopper has no bits."""
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "hopper")
    tree_mask = bits_of_tree(range(-1, 3)).expand(2, -1)
    names = []
    for options in ({}, dict(tree_mask=tree_mask)):
        with compile_only("sm_90") as launches:
            mla_decode(*arguments(4, heads=128), softmax_scale=0.1, num_splits=1, **options)
        names += [launch.name for launch in launches]
    assert names == ["_mla_decode_hopper_kernel", "_mla_absorbed_kernel"]
