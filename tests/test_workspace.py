"""Memory of the caller's: out, lse and workspace of decode. With all three nothing is allocated."""

import functools
import os
import re

import pytest
import torch
from prefix_trees import tree_of_all
from workspaces import DEVICE, POISON, allocations, poisoned

from triton_attn import mla_decode, paged_attention, workspace_bytes

pytestmark = pytest.mark.oldest
LENGTHS = 37, 0, 21
allocated = pytest.fixture(allocations)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def table_of(width):
    table = torch.arange(9, dtype=torch.int32, device=DEVICE).view(3, 3)
    return torch.nn.functional.pad(table, (0, width - 3), value=2**31 - 1)


def paged(width=3, **options):
    seqlens, table = int32(*LENGTHS), table_of(width)
    q, cache = torch.randn(3, 2, 4, 24, device=DEVICE), torch.randn(9, 16, 2, 24, device=DEVICE)
    if "cu_seqlens_q" in options:
        q = q.flatten(0, 1)
    return paged_attention, (q, cache, cache, seqlens, table), options


def latent(weights=(True, True), width=3, **options):
    seqlens, table = int32(*LENGTHS), table_of(width)
    has_w_uk, has_w_uv = weights
    q_nope, q_pe = torch.randn(3, 1, 4, 20 if has_w_uk else 32, device=DEVICE), torch.randn(3, 1, 4, 8, device=DEVICE)
    if "cu_seqlens_q" in options:
        q_nope, q_pe = q_nope.flatten(0, 1), q_pe.flatten(0, 1)
    w_uk = torch.randn(4, 20, 32, device=DEVICE) if has_w_uk else None
    w_uv = torch.randn(4, 12, 32, device=DEVICE) if has_w_uv else None
    arguments = q_nope, q_pe, torch.randn(9, 16, 40, device=DEVICE), seqlens, table, w_uk, w_uv
    return mla_decode, arguments, {"softmax_scale": 0.2} | options


PACKED = {"cu_seqlens_q": int32(0, 1, 1, 2), "max_seqlen_q": 2}
CALLS = {
    "paged": lambda: paged(num_splits=1),
    "paged, splits": lambda: paged(num_splits=3),
    "paged, prefix": lambda: paged(prefix_tree=tree_of_all(3, 1, 2, DEVICE), num_splits=2),
    "paged, packed": lambda: paged(**PACKED, num_splits=2),
    "paged, splits that it chooses": lambda: paged(),
    "mla": lambda: latent(num_splits=1),
    "mla, splits": lambda: latent(num_splits=3),
    "mla, splits, latent": lambda: latent((False, False), num_splits=3),
    "mla, latent": lambda: latent((False, False), num_splits=1),
    "mla, absorbed alone": lambda: latent((True, False), num_splits=2),
    "mla, packed": lambda: latent(**PACKED, num_splits=2),
    "paged, batch-invariant": lambda: paged(130, batch_invariant=True),
    "mla, batch-invariant": lambda: latent(width=130, batch_invariant=True),
    "mla, batch-invariant, latent": lambda: latent((False, False), width=130, batch_invariant=True),
}
OF_CALLS = pytest.mark.parametrize("name", CALLS)


@OF_CALLS
def test_nothing_is_allocated_and_nothing_else_is_written(name, allocated):
    function, args, options = CALLS[name]()
    expected = function(*args, **options, return_lse=True)
    needed = workspace_bytes(function, *args, **options, return_lse=True)
    out, lse = (poisoned(x) for x in expected)
    memory = torch.full((needed + 512,), POISON, dtype=torch.uint8, device=DEVICE)
    assert memory.data_ptr() % 16 == 0
    del allocated[:]
    results = function(*args, **options, out=out, lse=lse, workspace=memory[:needed], return_lse=True)
    assert allocated == []
    assert results[0] is out
    assert results[1] is lse
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
    assert (memory[needed:] == POISON).all()
    assert needed == 0 or (memory[max(0, needed - 512) : needed] != POISON).any()


@OF_CALLS
def test_a_known_call_takes_memory_at_any_place(name, allocated):
    """Workspaces of one size, which begin at other bytes of a larger one, and do not end where a number does."""
    function, args, options = CALLS[name]()
    expected = function(*args, **options)
    needed = workspace_bytes(function, *args, **options) + 3
    out, memory = poisoned(expected), torch.full((needed + 512,), POISON, dtype=torch.uint8, device=DEVICE)
    for first in (0, 16, 48):
        memory.fill_(POISON)
        del allocated[:]
        function(*args, **options, out=out.fill_(0), workspace=memory[first : first + needed])
        assert allocated == []
        assert torch.equal(out, expected)
        assert (memory[:first] == POISON).all()
        assert (memory[first + needed :] == POISON).all()


@OF_CALLS
def test_too_small_a_workspace_raises_before_anything_is_written(name):
    function, args, options = CALLS[name]()
    needed = workspace_bytes(function, *args, **options)
    if needed == 0:
        pytest.skip("it needs none")
    out = poisoned(function(*args, **options))
    memory = torch.full((needed - 1,), POISON, dtype=torch.uint8, device=DEVICE)
    message = f"workspace: expected the bytes that workspace_bytes returns for this call, {needed} or more, got "
    with pytest.raises(ValueError, match=f"{message}{needed - 1}"):
        function(*args, **options, out=out, workspace=memory)
    assert (memory == POISON).all()
    assert (out.view(torch.uint8) == POISON).all()


@OF_CALLS
def test_asking_for_its_size_writes_nothing(name):
    function, args, options = CALLS[name]()
    out = poisoned(function(*args, **options))
    workspace_bytes(function, *args, **options, out=out)
    assert (out.view(torch.uint8) == POISON).all()


def test_sizes():
    """The splits of paged attention and their lse; MLA's absorbed queries besides."""

    def aligned(*sizes):
        return sum(-(-size // 256) * 256 for size in sizes[:-1]) + sizes[-1]

    splits = 4 * 3 * 3 * 2 * 4
    assert workspace_bytes(*flat("paged, splits")) == (aligned(24 * splits, splits) if runs_kernels() else 0)
    assert workspace_bytes(*flat("paged")) == 0
    rows = 4 * 3 * 4
    sizes = 40 * rows, 32 * 3 * rows, 3 * rows
    assert workspace_bytes(*flat("mla, splits")) == (aligned(*sizes) if runs_kernels() else 0)


def flat(name):
    function, args, options = CALLS[name]()
    return functools.partial(function, **options), *args


def runs_kernels():
    return DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


WRONG = [
    ({"workspace": torch.zeros(9)}, TypeError, "workspace: expected torch.uint8, got torch.float32"),
    ({"workspace": torch.zeros(9, 9, dtype=torch.uint8)}, ValueError, "workspace: expected shape (bytes)"),
    ({"workspace": torch.zeros(99, dtype=torch.uint8)[::2]}, ValueError, "workspace: expected a contiguous tensor"),
    ({"workspace": torch.zeros(99, dtype=torch.uint8)[1:]}, ValueError, "workspace: expected an address that is a mul"),
    ({"workspace": 99}, TypeError, "workspace: expected a tensor, got int"),
    ({"lse": torch.zeros(3, 4, 1)}, ValueError, "lse: expected None without return_lse, got a tensor"),
    ({"lse": torch.zeros(3, 4, 9), "return_lse": True}, ValueError, "lse: expected shape (3, 4, "),
    ({"lse": torch.zeros(3, 4, 1).half(), "return_lse": True}, TypeError, "lse: expected torch.float32"),
    ({"out": torch.zeros(3, 1, 4, 13)}, ValueError, "out: expected shape (3, "),
]


@pytest.mark.parametrize("name", ["paged", "mla"])
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_wrong_memory(name, wrong, error, message):
    function, args, options = CALLS[name]()
    if name == "paged" and "lse" in wrong:
        wrong = wrong | {"lse": wrong["lse"].repeat(1, 1, 2)}
    wrong = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) and key != "workspace" else x for key, x in wrong.items()}
    with pytest.raises(error, match=re.escape(message)):
        function(*args, **options, **wrong)


def test_outputs_of_mla_are_contiguous():
    function, args, options = CALLS["mla"]()
    out = torch.zeros(3, 1, 12, 4, device=DEVICE).mT
    with pytest.raises(ValueError, match="out: expected a contiguous tensor, got strides"):
        function(*args, **options, out=out)


@pytest.mark.parametrize("name", ["paged, splits", "mla, splits"])
def test_memory_of_the_callers_under_a_tracer(name):
    function, args, options = CALLS[name]()
    expected = function(*args, **options, return_lse=True)
    out, lse = (poisoned(x) for x in expected)
    workspace = torch.empty(2**16, dtype=torch.uint8, device=DEVICE)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    compiled(*args, **options, out=out, lse=lse, workspace=workspace, return_lse=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
