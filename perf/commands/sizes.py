"""KV-cache bytes against context length, from the formulas: no device, no model weights.

Elements cached per token and layer (DeepSeek-V2, arXiv 2405.04434, table 1), with n_h query heads, n_g KV heads, heads
of d_h and, for MLA, a latent of d_c and a shared rotary key of d_h^R:

    MHA  2 n_h d_h        GQA  2 n_g d_h        MQA  2 d_h        MLA  d_c + d_h^R

A layer with a sliding window keeps no more than the window.
"""

from perf import results
from perf.results import plot
from perf.results.tables import print_table
from perf.workloads.models import MODELS

CONTEXTS = tuple(1024 * 2**i for i in range(8))
TABLE_CONTEXTS = (8192, 32768, 131072)
COLUMNS = ["model", "attention", "num_layers", "elements_per_token_and_layer", "bytes_per_element", "context", "bytes"]


def elements_per_token_and_layer(model):
    if model.kv_lora_rank is not None:
        return model.kv_lora_rank + model.qk_rope_head_dim
    return 2 * model.num_heads_kv * model.head_dim


def kv_cache_bytes(model, context, bytes_per_element=2):
    """Bytes that one sequence of `context` tokens needs in all layers; bf16 by default."""
    windowed = model.num_windowed_layers
    cached_tokens = (model.num_layers - windowed) * context
    if windowed:
        cached_tokens += windowed * min(context, model.window)
    return cached_tokens * elements_per_token_and_layer(model) * bytes_per_element


def run(out_dir, bytes_per_element=2):
    """Print the table, write `kv_cache.csv` and plot it."""
    path = out_dir / "kv_cache.csv"
    with results.Table(path, COLUMNS) as table:
        for model in MODELS:
            elements = elements_per_token_and_layer(model)
            shape = [model.name, model.attention, model.num_layers, elements, bytes_per_element]
            for context in CONTEXTS:
                table.append([*shape, context, kv_cache_bytes(model, context, bytes_per_element)])
    print_table([_summary(model, bytes_per_element) for model in MODELS])
    return [path, *plot.draw(path)]


def _summary(model, bytes_per_element):
    """One row of the printed table. Its bytes per token hold until a layer's window is full."""
    elements = elements_per_token_and_layer(model)
    return {
        "model": model.name,
        "attention": model.attention + (f", window {model.window}" if model.window else ""),
        "layers": f"{model.num_layers}" + (f" ({model.num_windowed_layers} windowed)" if model.window else ""),
        "elements/token/layer": elements,
        "bytes/token": elements * bytes_per_element * model.num_layers,
    } | {f"GiB at {c // 1024}k": kv_cache_bytes(model, c, bytes_per_element) / 2**30 for c in TABLE_CONTEXTS}


def add_arguments(parser):
    parser.add_argument("--bytes-per-element", type=int, default=2, help="2: bf16 (default); 1: fp8")
