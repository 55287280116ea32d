import random
import statistics

import pytest

from examples import sharing

SHORT = sharing.Workload("Alpaca-like", 9, 12, 0.5, {("sampling", 2): 50.0})


def simulate(**options):
    return sharing.simulate(SHORT, running=4, requests=12, page_size=4, **options)


def test_one_sequence_per_request_shares_nothing():
    usage = simulate()
    assert usage.pages_held == usage.pages_unshared
    assert usage.tokens == usage.slots_used < usage.reserved_pow2 < usage.reserved_max == 4 * 2048


@pytest.mark.parametrize("method", sharing.METHODS)
def test_more_sequences_share_more(method):
    savings = [simulate(method=method, width=width).saving for width in (1, 2, 4)]
    assert savings[0] == 0 < savings[1] < savings[2] < 75  # at most 1 - 1 / width


def test_beams_share_their_history_and_samples_their_prompt_only():
    assert simulate(method="beam search", width=4).saving > simulate(method="sampling", width=4).saving + 10


def test_a_system_prompt_is_held_once():
    usage = simulate(system_prompt=400)
    assert usage.pages_unshared - usage.pages_held == pytest.approx(3 * 100, abs=4)


def test_the_same_seed_gives_the_same_figures():
    assert simulate(seed=3) == simulate(seed=3) != simulate(seed=4)


@pytest.mark.parametrize("workload", [sharing.ALPACA, sharing.TRANSLATION])
def test_lengths_have_the_stated_means(workload):
    rng = random.Random(0)
    prompts, outputs = zip(*(workload.draw(rng) for _ in range(4000)))
    assert statistics.fmean(prompts) == pytest.approx(workload.mean_prompt, rel=0.1)
    assert statistics.fmean(outputs) == pytest.approx(workload.mean_output, rel=0.1)


def test_lengths_end_at_the_longest_sequence():
    rng = random.Random(0)
    draws = [sharing.SHAREGPT.draw(rng) for _ in range(4000)]
    assert all(prompt >= 1 <= output and prompt + output <= sharing.MAX_LENGTH for prompt, output in draws)
    assert max(map(sum, draws)) == sharing.MAX_LENGTH


def test_it_prints_three_tables(monkeypatch, capsys):
    monkeypatch.setattr(sharing, "WORKLOADS", (SHORT,))
    monkeypatch.setattr(sharing, "SHAREGPT", SHORT)
    monkeypatch.setattr(sharing, "TRANSLATION", SHORT)
    monkeypatch.setattr(sharing, "RUNNING", (1, 2))
    saved, held, waste = sharing.main(requests=2)
    assert [(row["method"], row["width"], row["the paper's, %"]) for row in saved[:2]] == [
        ("sampling", 2, 50.0),
        ("sampling", 4, None),
    ]
    assert all(row["shared pages, GiB"] <= row["pages, GiB"] <= row["2048 tokens reserved, GiB"] for row in held)
    assert [row["page size"] for row in waste] == list(sharing.PAGE_SIZES)
    assert waste[0]["slots without a token, %"] == 0, "a page of one token is never half empty"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(saved) + len(held) + len(waste) + 6
    assert lines[1].split()[:4] == ["Alpaca-like", "sampling", "2", _one_digit(saved[0]["pages without sharing"])]


def _one_digit(figure):
    return f"{figure:.1f}"
