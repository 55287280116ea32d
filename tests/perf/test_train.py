"""A real training run: our attention and torch's give the same curve."""

import csv

import pytest

from perf.commands import train
from triton_attn.flash import forward


@pytest.mark.ci
def test_a_decoder_learns_the_text_as_it_does_with_torchs_attention(tmp_path, monkeypatch, record_property):
    launches = []
    launch = forward.launch_packed
    monkeypatch.setattr(forward, "launch_packed", lambda *args: (launches.append(args), launch(*args)))
    steps = 40
    csv_path, picture = train.run(tmp_path, steps=steps)
    assert len(launches) == 2 * steps  # two layers: the kernel ran, not the reference
    assert picture.exists()

    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    curves = {name: [float(row["loss"]) for row in rows if row["provider"] == name] for name in train.ATTENTIONS}
    ours, theirs = curves.values()
    apart = max(abs(a - b) for a, b in zip(ours, theirs))
    entropy = float(rows[0]["unigram_entropy"])
    assert rows[0]["device"]
    assert rows[0]["triton"]
    last = sum(ours[-10:]) / 10
    figure = f"training: loss {ours[0]:.3f} -> {last:.3f}, unigram entropy {entropy:.3f}, "
    record_property("figure", f"{figure}ours and torch's {apart:.1e} apart in {steps} steps")
    assert len(ours) == len(theirs) == steps
    assert apart < 1e-2
    assert last < 0.95 * entropy
