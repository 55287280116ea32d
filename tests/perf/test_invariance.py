"""The price of batch invariance, as the command prints it."""

import pytest

from perf.commands import invariance
from perf.workloads.problems import ChunkProblem, DecodeProblem, LatentDecodeProblem


def price(problem):
    (_, free), (_, fixed) = invariance.prices(problem)
    return fixed / free - 1


def test_the_table_is_predicted_and_has_every_problem(tmp_path, capsys):
    invariance.run(tmp_path)
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert "predicted" in first
    assert len(rows) == len(list(invariance.problems()))


def test_few_sequences_pay_and_full_batches_do_not():
    assert price(DecodeProblem(1, 1024)) > 1
    assert price(LatentDecodeProblem(1, 1024, 16)) > price(LatentDecodeProblem(256, 1024, 16)) == 0
    assert price(DecodeProblem(32, 8192)) == pytest.approx(0)
    # Tiles of a chunk have the rows of every other call.
    assert price(ChunkProblem(4, 1024)) > 0.1


def test_splits_are_those_of_the_sequence():
    counts = {invariance.prices(DecodeProblem(batch, 8192))[1][0].split()[0] for batch in (1, 8, 256)}
    assert counts == {"8"}
