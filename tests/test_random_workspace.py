"""Workspaces of random calls of decode."""

from unittest import mock

import decode_cases
import decode_draws
import paged_cases
import paged_draws
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from workspaces import DEVICE, POISON, allocations, poisoned

from triton_attn import mla_decode, paged_attention, workspace_bytes
from triton_attn._host.workspace import Workspace

allocated = pytest.fixture(allocations)


@pytest.mark.random
@pytest.mark.ci(but_each=2)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", paged_cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["paged", "paged, packed", "mla"])
def test_random_calls(name, dtype, allocated):
    """Trees of drafts and of prefixes, shards of keys, caches of 8 bits, splits."""
    if name == "mla":
        of_calls, function, cases = decode_cases, mla_decode, decode_draws.cases(dtype)
    else:
        of_calls, function = paged_cases, paged_attention
        cases = paged_draws.cases(dtype, name == "paged, packed")

    @seed(paged_cases.DTYPES.index(dtype))
    @settings(settings(), print_blob=True)
    @given(cases, st.booleans())
    def run(case, batch_invariant):
        inputs = of_calls.Inputs(case)
        options = dict(batch_invariant=batch_invariant) if case.num_splits == 0 and case.part is None else {}
        with of_calls.using(case.config):
            with mock.patch.object(of_calls, function.__name__, wraps=function) as calls:
                inputs.call(**options)
            check_workspace(function, *calls.call_args, allocated)

    run()


def check_workspace(function, args, options, allocated):
    """So many bytes are enough, all of them are taken, and a byte less is refused before a launch."""
    options = {name: x for name, x in options.items() if name != "out"}
    expected = function(*args, **options)
    needed = workspace_bytes(function, *args, **options)
    memory = torch.full((needed + 512,), POISON, dtype=torch.uint8, device=DEVICE)
    results = dict(zip(("out", "lse"), map(poisoned, expected)))
    if needed:
        with pytest.raises(ValueError, match=f"workspace: expected .* {needed} or more, got {needed - 1}"):
            function(*args, **options, **results, workspace=memory[: needed - 1])
        assert all((x.view(torch.uint8) == POISON).all() for x in (memory, *results.values()) if x.numel())
    room = Workspace(memory[:needed])
    del allocated[:]
    function(*args, **options, **results, workspace=room)
    assert allocated == []
    assert room.used == needed
    assert (memory[needed:] == POISON).all()
    for result, wanted in zip(results.values(), expected, strict=True):
        assert torch.equal(result, wanted)
