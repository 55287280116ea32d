import pytest
import torch

from perf.harness.checks import SAMPLED_ROWS, check_gradients, check_sample
from perf.workloads.problems import Problem
from perf.workloads.providers import PROVIDERS
from triton_attn import reference


@pytest.fixture(params=[False, True], ids=["full", "causal"])
def problem(request):
    return Problem(batch=2, seqlen=SAMPLED_ROWS + 40, num_heads=3, head_dim=16, causal=request.param)


@pytest.fixture
def qkv(problem):
    torch.manual_seed(0)
    shape = problem.batch, problem.seqlen, problem.num_heads, problem.head_dim
    return [torch.randn(shape, dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["naive torch", "SDPA flash", "FlexAttention"])
def test_peers_pass_the_check(problem, qkv, name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    out = PROVIDERS[name](problem, "cpu")(*qkv)
    assert out.shape == qkv[0].shape
    check_sample(out, *qkv, problem.causal)


@pytest.mark.parametrize("row", [0, SAMPLED_ROWS - 1, 40, -1])
def test_a_wrong_row_is_found(problem, qkv, row):
    out = reference.flash_attention(*qkv, causal=problem.causal)
    check_sample(out, *qkv, problem.causal)
    entry = -1 if row == -1 else 0
    out[entry, row, entry, 3] += 0.5
    with pytest.raises(AssertionError, match="above"):
        check_sample(out, *qkv, problem.causal)


def test_the_other_mask_is_found(problem, qkv):
    out = reference.flash_attention(*qkv, causal=not problem.causal)
    with pytest.raises(AssertionError, match="above"):
        check_sample(out, *qkv, problem.causal)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["triton_attn", "naive torch", "SDPA flash"])
def test_gradients_pass_the_check(name):
    problem = Problem(batch=1, seqlen=70, num_heads=2, head_dim=16, causal=True)
    check_gradients(PROVIDERS[name](problem, "cpu"), problem, torch.bfloat16, "cpu")


def test_a_gradient_that_misses_the_mask_is_found():
    full, causal = (Problem(1, 70, 2, 16, mask) for mask in (False, True))
    with pytest.raises(AssertionError, match="above"):
        check_gradients(PROVIDERS["naive torch"](full, "cpu"), causal, torch.bfloat16, "cpu")
