"""Plans of merge_attention, as tests/paged/test_plans.py; paged attention's have its other arguments."""

import functools

import pytest
import torch
from plans import check_neighbour, launches_of

from triton_attn import merge_attention
from triton_attn.merge import kernel

pytestmark = pytest.mark.compiled


def call(shape=(3, 2, 5, 4, 64), spread=1):
    """Outputs of splits whose heads are spread times their distance apart."""
    splits, batch, seqlen_q, heads, head_dim = shape
    outs = torch.empty(splits, batch, seqlen_q, spread * heads, head_dim)[:, :, :, ::spread]
    merge_attention(outs, torch.empty(splits, batch, heads, seqlen_q))


NEIGHBOURS = {
    "splits": {"shape": (4, 2, 5, 4, 64)},
    "batch": {"shape": (3, 3, 5, 4, 64)},
    "seqlen_q": {"shape": (3, 2, 6, 4, 64)},
    "heads": {"shape": (3, 2, 5, 2, 64)},
    "head_dim": {"shape": (3, 2, 5, 4, 80)},
    "strides of outs": {"spread": 2},
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_plan_is_not_that_of_a_neighbour(name):
    check_neighbour(functools.partial(launches_of, call, (kernel,)), {}, NEIGHBOURS[name])
