import csv

from perf.commands import embed

MARKDOWN = """# Heading.

A paragraph
of two lines.

- a list.

```python
Code = 1.
```

    Indented code.

| A | table. |

`Code` begins a paragraph.
"""


def test_prose_is_paragraphs_of_sentences():
    assert embed.prose(MARKDOWN) == ["A paragraph of two lines.", "`Code` begins a paragraph."]


def test_run_writes_differences_and_similarities(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "README", tmp_path / "README.md")
    embed.README.write_text(MARKDOWN)
    (path,) = embed.run(tmp_path)
    first, second = csv.DictReader(path.open())
    assert 0 < float(first["difference"]) < embed.BOUND
    assert first["device"]
    assert first["triton"]
    assert first["similarity to 2"] == second["similarity to 1"]
    assert abs(float(second["similarity to 2"]) - 1) < 1e-5
