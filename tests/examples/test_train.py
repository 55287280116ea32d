"""A real training run: our attention and torch's give the same curve."""

import pytest

from examples import train
from triton_attn.flash import forward


@pytest.mark.ci
def test_a_decoder_learns_the_text_as_it_does_with_torchs_attention(monkeypatch, capsys, record_property):
    launches = []
    launch = forward.launch
    monkeypatch.setattr(forward, "launch", lambda *args: (launches.append(args), launch(*args)))
    steps = 40
    ours, theirs = train.main(steps).values()
    assert len(launches) == 2 * steps  # two layers: the kernel ran, not the reference
    assert "triton_attn, step 40: loss" in capsys.readouterr().out

    apart = max(abs(a - b) for a, b in zip(ours, theirs))
    entropy = train.unigram_entropy(train.read_text("cpu")[0])
    last = sum(ours[-10:]) / 10
    figure = f"training: loss {ours[0]:.3f} -> {last:.3f}, unigram entropy {entropy:.3f}, "
    record_property("figure", f"{figure}ours and torch's {apart:.1e} apart in {steps} steps")
    assert len(ours) == len(theirs) == steps
    assert apart < 1e-2
    assert last < 0.95 * entropy


def test_curves_that_part_are_an_error(monkeypatch):
    monkeypatch.setattr(train, "train", lambda attention, *_: iter([1.0 if attention is train._ours else 1.1]))
    with pytest.raises(SystemExit, match=r"differ by more than 0\.01 nats"):
        train.main(steps=1)
