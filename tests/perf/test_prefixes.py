"""What prefix trees save, as the command prints it."""

from perf.commands import prefixes


def test_the_table_is_predicted_and_has_every_case(tmp_path, capsys):
    prefixes.run(tmp_path)
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert "predicted" in first
    assert len(rows) == len(list(prefixes.cases()))


def test_no_tree_for_two_short_sequences_or_where_heads_fill_tiles():
    assert not prefixes.predict(prefixes.Case("two", 2, 1024, 256)).is_made
    assert prefixes.predict(prefixes.Case("beams", 128, 4096, 16, model="DeepSeek-V3, a GPU of 8")).is_made
    assert not prefixes.predict(prefixes.Case("beams", 128, 4096, 16, model="DeepSeek-V3")).is_made
