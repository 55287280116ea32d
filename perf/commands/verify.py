"""Errors of every public function at the shapes of real models, beside their bounds.

The error is the largest absolute error against fp64. The bound is twice the error that torch makes in the same dtype
(three times for gradients), plus a floor of one rounding (`triton_attn.testing.assert_close_to_reference`). Writes to a
cache must be exact. Without a GPU the kernels run in Triton's interpreter on short sequences, and windows that would
exceed them are cut to a quarter of the sequence.
"""

import sys
from itertools import accumulate

import torch

import triton_attn
from perf import results
from perf.harness.checks import by_torch, latent_by_torch
from perf.harness.device import has_gpu, provenance
from perf.harness.parallel import map_in_processes
from perf.harness.progress import tqdm
from perf.results.tables import print_table
from perf.workloads.models import DEEPSEEK_V3, FALCON_7B, GEMMA_3_12B, GPT_OSS_120B, LLAMA_3_8B, QWEN3_32B
from triton_attn._host.latent import latent_row, latent_storage, read_latent_cache
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash.configs import FlashConfig
from triton_attn.mla.schedule import MODES
from triton_attn.testing import assert_close_to_reference

MODELS = LLAMA_3_8B, QWEN3_32B, GEMMA_3_12B, FALCON_7B, GPT_OSS_120B, DEEPSEEK_V3
COLUMNS = ["model", "function", "heads", "head_dim", "seqlens", "window", "sinks", "dtype", "output"]
COLUMNS += ["error", "torch_error", "bound", "verdict", "device", "driver", "torch", "triton", "commit"]
ABOUT = "model", "heads", "head_dim", "window", "sinks"  # printed columns of a call
PAGE_SIZE = 16


def add_arguments(parser):
    where = "1536 on a GPU, one and a half tiles in the interpreter, so that both of a kernel's loops run"
    parser.add_argument("--seqlen", type=int, help=f"longest sequence (default: {where})")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


def run(out_dir, seqlen=None, dtype="bfloat16", models=MODELS):
    """Write `errors-<dtype>.csv` row by row and print it. Exits with an error if a bound is exceeded."""
    dtype = getattr(torch, dtype)
    calls = [
        (model, function, seqlen or _default_seqlen(model, dtype), dtype)
        for model in models
        for function in functions_of(model)
    ]
    path = out_dir / f"errors-{_name(dtype)}.csv"
    rows, failures = [], []
    with results.Table(path, COLUMNS) as table:
        outcomes = map(verify, calls) if has_gpu() else map_in_processes(verify, calls)
        for outcome in tqdm(outcomes, total=len(calls), desc="verifying", unit="call"):
            for row, failure in outcome:
                table.append((row | provenance()).values())
                rows.append(row)
                failures += failure
    _print(rows)
    if failures:
        sys.exit("\n".join([*failures, f"{len(failures)} of {len(rows)} results are outside their bounds"]))
    print(f"all {len(rows)} results are within their bounds")
    return [path]


def functions_of(model):
    """The names of the functions that this model uses."""
    others = PER_HEAD_CACHES if model.attention == "MLA" else LATENT
    return [function for function in CALLS if function not in others]


def verify(call):
    """[(row, [errors])] for each output of one call (model, function, seqlen, dtype)."""
    model, function, seqlen, dtype = call
    seqlens, outputs = CALLS[function](model, seqlen, dtype)
    left, _ = _options(model, seqlen)["window_size"]
    about = {
        "model": model.name,
        "function": function,
        "heads": f"{model.num_heads_q}/{model.num_heads_kv}",
        "head_dim": f"{model.head_dim}/{model.head_dim_v}" if model.head_dim_v else str(model.head_dim),
        "seqlens": seqlens,
        "window": left + 1 if left >= 0 and function not in NO_MASK else None,
        "sinks": "yes" if model.sinks and function not in NO_MASK else None,
        "dtype": _name(dtype),
    }
    outcome = []
    for output, (ours, exact, rule) in outputs.items():
        try:
            closeness = assert_close_to_reference(ours, exact, name=output, **rule)._asdict()
            verdict, wrong = "ok", []
        except AssertionError as error:
            closeness = dict.fromkeys(("error", "torch_error", "bound"))
            verdict, wrong = "WRONG", [f"{model.name}, {function}: {error}"]
        outcome.append((about | {"output": output} | closeness | {"verdict": verdict}, wrong))
    return outcome


def _print(rows):
    """A table per function, with a row per model: error/bound of each output."""
    for function in dict.fromkeys(row["function"] for row in rows):
        of_function = [row for row in rows if row["function"] == function]
        about = [name for name in ABOUT if any(row[name] for row in of_function)]
        lines = {}
        for row in of_function:
            cell = f"{row['error']:.2g}/{row['bound']:.2g}" if row["verdict"] == "ok" else row["verdict"]
            lines.setdefault(row["model"], {name: row[name] for name in about})[row["output"]] = cell
        lengths = "; ".join(dict.fromkeys(row["seqlens"] for row in of_function))
        print(f"{function}, {of_function[0]['dtype']}, {lengths}: largest error/bound")
        print_table(list(lines.values()))
        print()


def _dense(model, seqlen, dtype):
    """A prompt."""
    q, k, v = (x[None].requires_grad_() for x in _tensors(model, seqlen, seqlen, dtype))
    options = _options(model, seqlen)
    torch_results = by_torch(q, k, v, **options)
    return f"{seqlen} tokens", _attention("flash_attention", (q, k, v), options, torch_results)


def _varlen(model, seqlen, dtype):
    """The second half of a prompt, a shorter prompt, and one token after a long context."""
    lengths = ((seqlen // 2, seqlen), (seqlen // 3, seqlen // 3), (1, seqlen - 1))
    lengths_q, lengths_k = zip(*lengths)
    q, k, v = (x.requires_grad_() for x in _tensors(model, sum(lengths_q), sum(lengths_k), dtype))
    options = _options(model, seqlen)
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    outs, lses = zip(*(by_torch(*(x[None] for x in sequence), **options) for sequence in sequences))
    torch_results = torch.cat(outs, dim=1)[0], torch.cat(lses, dim=2)[0]
    cu_seqlens = (torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=q.device) for x in (lengths_q, lengths_k))
    args = q, k, v, *cu_seqlens, max(lengths_q), max(lengths_k)
    about = f"queries x keys {', '.join(f'{a}x{b}' for a, b in lengths)}"
    return about, _attention("flash_attention_varlen", args, options, torch_results)


def _attention(function, args, options, torch_results):
    """{output: (ours, exact, options of the check)} of a call and of its gradients."""
    out = torch_results[0]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    ours = _results(getattr(triton_attn, function), args, options, dout)
    exact_args, exact_options = [_double(x) for x in args], {name: _double(x) for name, x in options.items()}
    exact = _results(getattr(triton_attn.reference, function), exact_args, exact_options, dout.double())
    torchs = [*torch_results, *torch.autograd.grad(torch_results[0], _inputs(args, options), dout)]
    names = "out", "lse", "dq", "dk", "dv", "dsinks"
    return {
        name: (mine, right, {"torch_out": theirs, "factor": 3.0 if name.startswith("d") else 2.0})
        for name, mine, right, theirs in zip(names, ours, exact, torchs)
    }


def _results(function, args, options, dout):
    """[out, lse, dq, dk, dv], and the gradient of the sinks if there are any."""
    out, lse = function(*args, return_lse=True, **options)
    return [out, lse, *torch.autograd.grad(out, _inputs(args, options), dout)]


def _inputs(args, options):
    return [x for x in (*args, *options.values()) if torch.is_tensor(x) and x.requires_grad]


def _append(model, seqlen, dtype):
    """Append the tokens of a prompt to pages in random order. Every seventh token is skipped."""
    _, k, v = _tensors(model, 1, seqlen, dtype)
    num_pages, slots = _slots(seqlen, k.device)
    caches = {name: x.new_zeros(num_pages, PAGE_SIZE, *x.shape[1:]) for name, x in (("k_cache", k), ("v_cache", v))}
    return f"{seqlen} tokens", _written(
        "append_kv_cache", caches, lambda append, k_cache, v_cache: append(k, v, k_cache, v_cache, slots)
    )


def _append_latent(model, seqlen, dtype):
    """The same for an MLA model, in a cache of the dtype and in an fp8 cache, whose bytes are compared as integers."""
    widths = model.kv_lora_rank, model.qk_rope_head_dim
    x = torch.randn(seqlen, sum(widths), generator=torch.Generator().manual_seed(0))
    x = x.to(_device(), dtype)
    kv_latent, k_pe = x.split(widths, dim=1)
    num_pages, slots = _slots(seqlen, x.device)
    caches = {
        "latent_cache": x.new_zeros(num_pages, PAGE_SIZE, sum(widths)),
        "latent_cache_fp8": x.new_zeros(num_pages, PAGE_SIZE, latent_row(*widths)[-1], dtype=torch.uint8),
    }

    def append_to_both(append, *caches):
        for cache in caches:
            append(kv_latent, k_pe, cache, slots)

    return f"{seqlen} tokens", _written("append_latent_cache", caches, append_to_both)


def _slots(seqlen, device):
    num_pages = 2 * -(-seqlen // PAGE_SIZE)
    slots = torch.randperm(num_pages * PAGE_SIZE, generator=torch.Generator().manual_seed(0))[:seqlen]
    slots[::7] = -1
    return num_pages, slots.to(device)


def _copy(model, seqlen, dtype):
    """Copy half of a prompt's pages to the other half."""
    pages = -(-seqlen // PAGE_SIZE)
    _, k, v = _tensors(model, 1, 2 * pages * PAGE_SIZE, dtype)
    caches = {name: x.unflatten(0, (2 * pages, PAGE_SIZE)) for name, x in (("k_cache", k), ("v_cache", v))}
    src, dst = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(0)).to(k.device).split(pages)
    return f"{pages} pages of {PAGE_SIZE} tokens", _written(
        "copy_kv_pages", caches, lambda copy, *caches: copy(caches, src, dst)
    )


def _paged_lengths(seqlen):
    """(block_table, cu_seqlens_k, tokens) of a prompt, a shorter one, and none, on pages in random order."""
    lengths = torch.tensor([seqlen, seqlen // 3, 0])
    width = -(-seqlen // PAGE_SIZE)
    pages = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return pages.view(len(lengths), width).to(_device()), ends.to(_device()), int(ends[-1])


def _gather(model, seqlen, dtype):
    """Read the keys and values of a ragged batch."""
    table, ends, total = _paged_lengths(seqlen)
    _, *rows = _tensors(model, 1, table.numel() * PAGE_SIZE, dtype)
    caches = [x.unflatten(0, (-1, PAGE_SIZE)) for x in rows]
    return f"{total} tokens", _read("gather_kv_cache", ("k", "v"), (*caches, table, ends, total), {})


def _gather_latent(model, seqlen, dtype):
    """The same for an MLA model."""
    widths = dict(kv_lora_rank=model.kv_lora_rank, qk_rope_head_dim=model.qk_rope_head_dim)
    table, ends, total = _paged_lengths(seqlen)
    shape = table.numel(), PAGE_SIZE, sum(widths.values())
    cache = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_device(), dtype)
    names = "kv_latent", "k_pe"
    return f"{total} tokens", _read("gather_latent_cache", names, (cache, table, ends, total), widths)


def _read(function, names, args, options):
    """{output: (ours, exact, options of the check: no error)} of a copy."""
    ours, exact = (getattr(room, function)(*args, **options) for room in (triton_attn, triton_attn.reference))
    return {name: (mine, right.double(), {"floor": 0.0}) for name, mine, right in zip(names, ours, exact)}


def _written(function, caches, call):
    """{cache: (ours, exact, options of the check: no error)} after `call(function, *caches)`."""
    ours, exact = ([x.clone() for x in caches.values()] for _ in range(2))
    call(getattr(triton_attn, function), *ours)
    call(getattr(triton_attn.reference, function), *exact)
    return {name: (mine, right.double(), {"floor": 0.0}) for name, mine, right in zip(caches, ours, exact)}


def _paged(model, seqlen, dtype):
    """One new token after a long, a short and an empty context. Pages are in random order, keys in two splits."""
    lengths = (seqlen, seqlen // 3, 1)
    q, k, v = _tensors(model, len(lengths), sum(lengths), dtype)
    options = {name: _detach(x) for name, x in _options(model, seqlen).items()}
    sequences = zip(q.split(1), k.split(lengths), v.split(lengths))
    outs, lses = zip(*(by_torch(*(x[None] for x in sequence), **options) for sequence in sequences))
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    pages = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).to(q.device, torch.int32)
    tables = torch.nn.utils.rnn.pad_sequence(pages.split(counts), batch_first=True)
    caches = [x.new_zeros(sum(counts), PAGE_SIZE, *x.shape[1:]) for x in (k, v)]
    for cache, x in zip(caches, (k, v)):
        for i, rows in enumerate(x.split(lengths)):
            keys = torch.arange(len(rows), device=x.device)
            cache[tables[i, keys // PAGE_SIZE].long(), keys % PAGE_SIZE] = rows
    args = q[:, None], *caches, torch.tensor(lengths, dtype=torch.int32, device=q.device), tables
    ours = triton_attn.paged_attention(*args, num_splits=2, return_lse=True, **options)
    exact_options = {name: _double(x) for name, x in options.items()}
    exact = triton_attn.reference.paged_attention(*map(_double, args), return_lse=True, **exact_options)
    torchs = torch.cat(outs), torch.cat(lses)
    about = f"1 query x {', '.join(map(str, lengths))} keys"
    return about, {
        name: (mine, right, {"torch_out": theirs})
        for name, mine, right, theirs in zip(("out", "lse"), ours, exact, torchs)
    }


def _latents(model, seqlen_q, seqlen_k, dtype):
    """Seeded tensors of `mla_prefill` without a batch dimension. The weights give keys and values of size 1."""
    generator = torch.Generator().manual_seed(0)
    rank, rope = model.kv_lora_rank, model.qk_rope_head_dim
    nope, heads = model.head_dim - rope, model.num_heads_q
    shapes = (seqlen_q, heads, nope), (seqlen_q, heads, rope), (seqlen_k, rank), (seqlen_k, rope)
    weights = (heads, nope, rank), (heads, model.head_dim_v, rank)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors += [torch.randn(shape, generator=generator) * rank**-0.5 for shape in weights]
    return [x.to(_device(), dtype) for x in tensors]


def _mla_decode(model, seqlen, dtype):
    """`_paged` for an MLA model with absorption and projection, from a cache of the dtype and from an fp8 cache."""
    lengths = (seqlen, seqlen // 3, 1)
    q_nope, q_pe, kv_latent, k_pe, *weights = _latents(model, len(lengths), sum(lengths), dtype)
    widths = model.kv_lora_rank, model.qk_rope_head_dim
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    pages = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).to(q_pe.device)
    tables = torch.nn.utils.rnn.pad_sequence(pages.split(counts), batch_first=True)
    keys = [torch.arange(length, device=q_pe.device) for length in lengths]
    slots = torch.cat([tables[i, x // PAGE_SIZE] * PAGE_SIZE + x % PAGE_SIZE for i, x in enumerate(keys)])
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=q_pe.device)
    outputs = {}
    for suffix, cache_dtype in (("", dtype), (", fp8 cache", torch.float8_e4m3fn)):
        stored, width = latent_storage(*widths, cache_dtype)
        cache = q_pe.new_zeros(sum(counts), PAGE_SIZE, width, dtype=stored)
        triton_attn.reference.append_latent_cache(kv_latent, k_pe, cache, slots)
        args = q_nope[:, None], q_pe[:, None], cache, seqlens, tables.int(), *weights
        ours = triton_attn.mla_decode(*args, num_splits=2, return_lse=True)
        exact = triton_attn.reference.mla_decode(*map(_double, args), return_lse=True)
        held = read_latent_cache(cache, *widths).flatten(0, 1)[slots].to(dtype).split(lengths)
        parts = [
            latent_by_torch(
                q_nope[i, None, None], q_pe[i, None, None], *x[None].split(widths, 2), *weights, absorbed=True
            )
            for i, x in enumerate(held)
        ]
        torchs = map(torch.cat, zip(*parts))
        for name, mine, right, theirs in zip(("out", "lse"), ours, exact, torchs):
            outputs[name + suffix] = mine, right, {"torch_out": theirs}
    return f"1 query x {', '.join(map(str, lengths))} keys", outputs


def _mla_prefill(model, seqlen, dtype):
    """The second half of a prompt in every schedule, and the gradients, which all schedules share."""
    args = [x if i > 3 else x[None] for i, x in enumerate(_latents(model, seqlen // 2, seqlen, dtype))]
    outputs = {}
    exact = triton_attn.reference.mla_prefill(*map(_double, args), return_lse=True)
    for mode in MODES:
        ours = triton_attn.mla_prefill(*args, mode=mode, return_lse=True)
        torchs = latent_by_torch(*args, absorbed=mode == "absorbed")
        for name, mine, right, theirs in zip(("out", "lse"), ours, exact, torchs):
            outputs[f"{name}, {mode}"] = mine, right, {"torch_out": theirs}
    dout = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(1)).to(args[0])

    def gradients(function, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*inputs), inputs, dout.to(inputs[0].dtype))

    names = "dq_nope", "dq_pe", "dkv_latent", "dk_pe", "dw_uk", "dw_uv"
    ours = gradients(triton_attn.mla_prefill, args)
    exact = gradients(triton_attn.reference.mla_prefill, map(_double, args))
    torchs = gradients(lambda *inputs: latent_by_torch(*inputs)[0], args)
    for name, mine, right, theirs in zip(names, ours, exact, torchs):
        outputs[name] = mine, right, {"torch_out": theirs, "factor": 3.0}
    return f"queries x keys {seqlen // 2}x{seqlen}", outputs


def _merge(model, seqlen, dtype):
    """Three splits of a prompt's keys, merged: one as large as the others together, and one without visible keys."""
    v = _tensors(model, seqlen, seqlen, dtype)[0]
    generator = torch.Generator().manual_seed(1)
    outs = torch.randn(3, 1, *v.shape, generator=generator).to(v)
    lses = torch.randn(3, 1, *v.shape[1::-1], generator=generator).to(v.device)
    lses[2] = float("-inf")
    ours = triton_attn.merge_attention(outs, lses)
    exact = triton_attn.reference.merge_attention(outs.double(), lses.double())
    weights = torch.softmax(lses.to(dtype), 0).transpose(2, 3)[..., None]
    torchs = (outs * weights).sum(0), torch.logsumexp(lses, 0)
    return f"3 splits of {seqlen} tokens", {
        name: (mine, right, {"torch_out": theirs})
        for name, mine, right, theirs in zip(("out", "lse"), ours, exact, torchs)
    }


CALLS = {
    "flash_attention": _dense,
    "flash_attention_varlen": _varlen,
    "paged_attention": _paged,
    "merge_attention": _merge,
    "append_kv_cache": _append,
    "append_latent_cache": _append_latent,
    "copy_kv_pages": _copy,
    "gather_kv_cache": _gather,
    "gather_latent_cache": _gather_latent,
    "mla_decode": _mla_decode,
    "mla_prefill": _mla_prefill,
}
PER_HEAD_CACHES = "append_kv_cache", "copy_kv_pages", "gather_kv_cache"
LATENT = "append_latent_cache", "gather_latent_cache", "mla_decode", "mla_prefill"
NO_MASK = *PER_HEAD_CACHES, *LATENT, "merge_attention"


def _default_seqlen(model, dtype):
    if has_gpu():
        return 1536
    head_dim_v = model.head_dim_v or model.head_dim
    case = FlashCase("interpreter", dtype, model.head_dim, head_dim_v, causal=True)
    return FlashConfig.default(case).block_m * 3 // 2


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _tensors(model, seqlen_q, seqlen_k, dtype):
    """Seeded q (seqlen_q, num_heads_q, head_dim), k and v (seqlen_k, num_heads_kv, head_dim and head_dim_v)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (seqlen_q, model.num_heads_q, model.head_dim),
        (seqlen_k, model.num_heads_kv, model.head_dim),
        (seqlen_k, model.num_heads_kv, model.head_dim_v or model.head_dim),
    )
    return [torch.randn(shape, generator=generator).to(_device(), dtype) for shape in shapes]


def _options(model, seqlen):
    left = -1
    if model.window:
        left = (model.window if model.window < seqlen else seqlen // 4) - 1
    sinks = torch.linspace(-1, 1, model.num_heads_q, device=_device()) if model.sinks else None
    if sinks is not None:
        sinks.requires_grad_()
    return {"causal": True, "window_size": (left, -1), "sinks": sinks}


def _detach(value):
    return value.detach() if torch.is_tensor(value) else value


def _double(value):
    """Floating-point tensors in fp64, as leaves."""
    if torch.is_tensor(value) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _device():
    return "cuda" if has_gpu() else "cpu"
