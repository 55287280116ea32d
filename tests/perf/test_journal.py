import pytest

from perf.harness.journal import Journal

KEY = {"family": "flash", "config": {"block_m": 128}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "sweep.jsonl"


def test_results_are_known_to_the_next_run(path):
    with Journal(path) as journal:
        assert journal.get(KEY) is None
        journal.add(KEY, {"lock": 1.5, "dropped": ""})
        assert len(path.read_text().splitlines()) == 1, "on the disk before the next one"
    with Journal(path) as journal:
        assert journal.get(dict(reversed(KEY.items()))) == {"lock": 1.5, "dropped": ""}
        assert journal.get(KEY | {"triton": "other"}) is None
        assert journal.items() == [(KEY, {"lock": 1.5, "dropped": ""})]


@pytest.mark.parametrize("torn", ['{"key": {"fam', '{"key": {"family": "paged"}}', "\0\0\0", "17"])
def test_a_torn_last_line_is_passed_over(path, torn):
    with Journal(path) as journal:
        journal.add(KEY, 1)
    with path.open("a") as file:
        file.write(torn)
    other = KEY | {"family": "paged"}
    with Journal(path) as journal:
        assert journal.get(KEY) == 1
        assert journal.get(other) is None
        journal.add(other, 2)
    with Journal(path) as journal:
        assert (journal.get(KEY), journal.get(other)) == (1, 2)
