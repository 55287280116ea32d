"""A small Llama trains on several ranks as on one."""

import pytest
from parallel_ranks import run
from training_ranks import Run, check_losses

RUNS = [
    pytest.param([Run(mesh_shape=(1, 2), steps=4, method="ring")], 2, id="two ranks"),
    pytest.param([Run(method=method) for method in ("all_gather", "ring")], 4, id="four ranks", marks=pytest.mark.ci),
    pytest.param([Run(mesh_shape=(2, 2), method="ulysses", load_balance=None)], 4, id="both", marks=pytest.mark.ci),
    pytest.param([Run(mesh_shape=(2, 2), fsdp=True)], 4, id="FSDP2", marks=pytest.mark.ci),
    pytest.param(
        [
            Run(mesh_shape=(2, 2), steps=8, method="ring", micro_batches=3, checkpointing=True),
            Run(mesh_shape=(2, 2), steps=8, fsdp=True, micro_batches=2, checkpointing=True, method="all_gather"),
        ],
        4,
        id="accumulation and checkpointing",
        marks=pytest.mark.ci,
    ),
]


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=pytest.mark.full)])
@pytest.mark.parametrize(("runs", "num_ranks"), RUNS)
def test_losses_are_those_of_one_process(runs, num_ranks, backend, tmp_path, monkeypatch):
    """By the reference, and in all tests by interpreted kernels, which take minutes."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    assert run(check_losses, runs, num_ranks, tmp_path / "store") == []
