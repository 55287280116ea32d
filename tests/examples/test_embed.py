import pytest

from examples import embed

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


def test_embeddings_with_our_attention_are_those_with_torchs(tmp_path, capsys):
    (tmp_path / "page.md").write_text(MARKDOWN)
    differences, similarities = embed.main(text=tmp_path / "page.md")
    assert (differences > 0).all()  # the kernel ran
    assert (differences < embed.BOUND).all()
    assert similarities[0, 1] == similarities[1, 0] < 1
    assert abs(similarities[1, 1] - 1) < 1e-5
    assert "largest difference between triton_attn and sdpa" in capsys.readouterr().out


def test_a_difference_past_the_bound_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(MARKDOWN)
    monkeypatch.setattr(embed, "BOUND", 0.0)
    with pytest.raises(SystemExit, match="differ by more than 0"):
        embed.main(text=tmp_path / "page.md")
