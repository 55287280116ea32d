"""Candidates of a sweep: the configs of each kernel family, compiled, and the reason why one is dropped."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from operator import attrgetter
from pathlib import Path

import torch
import triton

import triton_attn
from perf.harness.device import gpu_arch
from perf.harness.machine import copy_bandwidth, matmul_rate
from perf.model import amdgcn, compiled, loop_model
from perf.workloads.models import MODELS
from perf.workloads.problems import (
    HEAD_DIMS,
    HIDDEN,
    LATENT_BATCH,
    TOKENS,
    ChunkProblem,
    DecodeProblem,
    LatentDecodeProblem,
    LatentPrefillProblem,
    Problem,
)
from perf.workloads.providers import LATENT_DECODE_PROVIDERS, PROVIDERS, latent_step, paged_step, peers_of
from triton_attn._host.gpu import gpu_of
from triton_attn._jit.tiles import padded_size
from triton_attn.dense.backward_configs import KERNELS, BackwardConfig, dk_apart_from_dv
from triton_attn.dense.tiles import FlashCase, Tile
from triton_attn.flash.configs import HOPPER_HEAD_DIMS, FlashConfig, HopperConfig
from triton_attn.mla.configs import (
    MlaDecodeCase,
    MlaDecodeConfig,
    MlaHopperConfig,
    MlaPrefillCase,
    MlaPrefillConfig,
)
from triton_attn.paged.configs import PagedCase, PagedConfig

MODEL_COLUMNS = ["registers", "shared B", "spills", "spills in loop", "loop instructions"]
MODEL_COLUMNS += ["bound TFLOP/s", "lock TFLOP/s", "expected TFLOP/s", "useful share"]
PREFILL_CHUNK = 512  # tokens in a chunk of a prompt
CACHED_MODELS = {model.name: model for model in MODELS if model.attention != "MLA"}
WIDEST_HEADS = "16/2/512"  # of no listed model: the widest head dim
LATENT_MODELS = {model.name: model for model in MODELS if model.attention == "MLA"}


@dataclass(frozen=True)
class Family:
    """A kernel family as a sweep needs it.

    Configs are compared within a case, a dict that the functions take as keywords. `cases(dtype, shapes)` gives the
    cases of the shapes that `option` names. `search_space(arch, dtype, **case)` gives the configs, with the default
    first. `compile(arch, dtype, config=config, **case)` gives a `triton_attn.toolchain.Launch` or a list of them. On a
    GPU `problem(seqlen, **case)` is timed at `seqlens` and compared with the `roof()`. `provider(dtype, **case)` gives
    a function from a config to a provider (perf/workloads/providers.py). `folder`, below triton_attn, has the kernels
    and their launchers. `rows(config)` is the number of rows of the largest matmul in the loop. Winners are entries of
    a tuned table for the Config `table`; `case_of(arch, dtype, **case)` says which case they apply to. `portable` is
    the family of the kernel that this one may replace, which is timed beside it, and so are `peers`, providers of
    others.
    """

    config: type
    table: type
    case_of: Callable
    folder: str
    option: str
    shapes: tuple
    cases: Callable
    search_space: Callable
    compile: Callable
    problem: Callable
    provider: Callable
    roof: Callable
    seqlens: tuple
    rows: Callable = attrgetter("block_m")
    portable: str | None = None
    peers: dict = field(default_factory=dict)

    @property
    def config_columns(self):
        return [field.name for field in fields(self.config)]


def _flash_cases(dtype, head_dims):
    return [{"head_dim": head_dim, "causal": causal} for head_dim in head_dims for causal in (False, True)]


def _flash_case(arch, dtype, head_dim, causal, kernel=None):
    return FlashCase(arch, dtype, head_dim, head_dim, causal)


def _flash_space(*args, **case):
    return FlashConfig.search_space(_flash_case(*args, **case))


def _flash_provider(dtype, head_dim, causal):
    return lambda config: lambda problem, device: partial(compiled.launch_config, causal=causal, config=config)


def _flash_problem(seqlen, head_dim, causal, kernel=None):
    direction = "forward" if kernel is None else "backward"
    return Problem(max(1, TOKENS // seqlen), seqlen, HIDDEN // head_dim, head_dim, causal, direction)


def _hopper_cases(dtype, head_dims):
    return [case for case in _flash_cases(dtype, head_dims) if case["head_dim"] in HOPPER_HEAD_DIMS]


def _hopper_case(arch, dtype, head_dim, causal):
    return FlashCase(arch, dtype, head_dim, HOPPER_HEAD_DIMS[head_dim], causal)


def _hopper_space(*args, **case):
    return HopperConfig.search_space(_hopper_case(*args, **case))


def _hopper_problem(seqlen, head_dim, causal):
    return replace(_flash_problem(seqlen, head_dim, causal), value_dim=HOPPER_HEAD_DIMS[head_dim])


def _hopper_provider(dtype, head_dim, causal):
    return lambda config: lambda problem, device: partial(compiled.launch_hopper, causal=causal, config=config)


def _backward_cases(dtype, head_dims):
    return [{"kernel": kernel} | case for case in _flash_cases(dtype, head_dims) for kernel in KERNELS]


def _backward_space(arch, dtype, kernel, head_dim, causal):
    """A pass with a launch for dk and one for dv is never fused."""
    space = BackwardConfig.search_space(_flash_case(arch, dtype, head_dim, causal), kernel)
    return [tile for tile in space if kernel != "fused" or not dk_apart_from_dv(arch, (head_dim, head_dim), tile)]


def _backward_provider(dtype, kernel, head_dim, causal):
    """Time the whole pass, with its other kernels at their defaults."""
    return lambda config: backward_pass(
        causal, compiled.backward_tiles(gpu_arch(), getattr(torch, dtype), head_dim, causal, kernel, config)
    )


def backward_pass(causal, config):
    """A provider with a BackwardConfig."""
    return lambda problem, device: partial(compiled.launch_backward_config, causal=causal, config=config)


def cached_shape(name):
    """(num_heads_q, num_heads_kv, head_dim) of a model's name, or of these numbers, "16/2/512"; None for others."""
    if model := CACHED_MODELS.get(name):
        return model.num_heads_q, model.num_heads_kv, model.head_dim
    return tuple(map(int, name.split("/"))) if re.fullmatch(r"\d+/\d+/\d+", name) else None


def _paged_cases(dtype, models):
    """The cases of models; models of one shape are one case."""
    columns = "num_heads_q", "num_heads_kv", "head_dim"
    shapes = dict.fromkeys(map(cached_shape, models))
    return [dict(zip(columns, shape)) | {"page_size": DecodeProblem.page_size} for shape in shapes]


def _chunk_cases(dtype, models):
    return [case | {"seqlen_q": PREFILL_CHUNK} for case in _paged_cases(dtype, models)]


def _paged_case(arch, dtype, num_heads_q, num_heads_kv, head_dim, page_size, seqlen_q=1):
    rows = seqlen_q * num_heads_q // num_heads_kv
    return PagedCase(arch, dtype, dtype, head_dim, head_dim, rows, page_size=page_size)


def _paged_space(*args, **case):
    return PagedConfig.search_space(_paged_case(*args, **case))


def _paged_problem(seqlen, **case):
    return DecodeProblem(LATENT_BATCH, seqlen, **case)


def _chunk_problem(seqlen, **case):
    return ChunkProblem(1, seqlen, **case)


def _over_one_cache(make_step, launch):
    """Decode steps that share their tensors, since a GPU has no room for a cache per config. Each step has its
    own output, so that a wrong config does not find the result of another.
    """
    made = cache(make_step)

    def provider(config):
        def step(problem, *tensors):
            shared = made(problem, *tensors)
            own = {"out": torch.full_like(shared.keywords["out"], math.nan)} if "out" in shared.keywords else {}
            return partial(launch, *shared.args, **shared.keywords | own, config=config)

        return step

    return provider


def _paged_provider(dtype, **case):
    return _over_one_cache(paged_step, compiled.launch_paged)


def _latent_cases(dtype, models):
    return [
        {"num_heads": LATENT_MODELS[name].num_heads_q, "cache_dtype": cache_dtype, "page_size": page_size}
        for name in models
        for cache_dtype in (dtype, "float8_e4m3fn")
        for page_size in (LatentDecodeProblem.page_size,)
    ]


def _latent_case(arch, dtype, num_heads, cache_dtype, page_size):
    widths = LatentDecodeProblem.kv_lora_rank, LatentDecodeProblem.qk_rope_head_dim
    return MlaDecodeCase(arch, dtype, *widths, num_heads, cache_dtype == "float8_e4m3fn", page_size=page_size)


def _latent_space(*args, **case):
    return MlaDecodeConfig.search_space(_latent_case(*args, **case))


def _hopper_latent_cases(dtype, models):
    def is_supported(num_heads, **case):
        whole = num_heads % MlaHopperConfig.block_m == 0
        return whole and MlaHopperConfig.supports(_latent_case("sm_90", getattr(torch, dtype), num_heads, **case))

    return [case for case in _latent_cases(dtype, models) if is_supported(**case)]


def _hopper_latent_space(*args, **case):
    return MlaHopperConfig.search_space(_latent_case(*args, **case))


def _latent_problem(seqlen, num_heads, cache_dtype, page_size):
    return LatentDecodeProblem(LATENT_BATCH, seqlen, num_heads, cache_dtype, page_size=page_size)


def _latent_provider(dtype, **case):
    return _over_one_cache(latent_step, compiled.launch_latent)


_PREFILL_DIMS = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"


def _prefill_cases(dtype, models):
    dims = {name: getattr(LatentPrefillProblem, name) for name in (*_PREFILL_DIMS, "kv_lora_rank")}
    return [
        {"num_heads": LATENT_MODELS[name].num_heads_q} | dims | {"fused": fused}
        for name in models
        for fused in (False, True)
    ]


def _prefill_case(arch, dtype, fused, **case):
    widths = [case[name] for name in _PREFILL_DIMS]
    return MlaPrefillCase(arch, dtype, fused, *widths, padded_size(max(widths)))


def _prefill_space(*args, **case):
    return MlaPrefillConfig.search_space(_prefill_case(*args, **case))


def _prefill_problem(seqlen, fused, **case):
    return LatentPrefillProblem(seqlen, seqlen, **case)


def _prefill_provider(dtype, fused, **case):
    return lambda config: partial(compiled.launch_prefill, fused=fused, config=config)


_FLASH = Family(
    config=FlashConfig,
    table=FlashConfig,
    case_of=_flash_case,
    folder="flash",
    option="head_dims",
    shapes=HEAD_DIMS,
    cases=_flash_cases,
    search_space=_flash_space,
    compile=compiled.flash_forward,
    problem=_flash_problem,
    provider=_flash_provider,
    roof=matmul_rate,
    seqlens=(1024, 4096, 16384),
)
_PAGED = Family(
    config=PagedConfig,
    table=PagedConfig,
    case_of=_paged_case,
    folder="paged",
    option="models",
    shapes=(*CACHED_MODELS, WIDEST_HEADS),
    cases=_paged_cases,
    search_space=_paged_space,
    compile=compiled.paged_decode,
    problem=_paged_problem,
    provider=_paged_provider,
    roof=copy_bandwidth,
    seqlens=(1024, 8192),
)
_MLA = replace(
    _PAGED,
    config=MlaDecodeConfig,
    table=MlaDecodeConfig,
    case_of=_latent_case,
    folder="mla",
    shapes=tuple(LATENT_MODELS),
    cases=_latent_cases,
    search_space=_latent_space,
    compile=compiled.latent_decode,
    problem=_latent_problem,
    provider=_latent_provider,
)
FAMILIES = {
    "flash": _FLASH,
    "flash_hopper": replace(
        _FLASH,
        config=HopperConfig,
        table=HopperConfig,
        case_of=_hopper_case,
        shapes=tuple(HOPPER_HEAD_DIMS),
        cases=_hopper_cases,
        search_space=_hopper_space,
        compile=compiled.flash_hopper,
        problem=_hopper_problem,
        provider=_hopper_provider,
        portable="flash",
        peers=peers_of(PROVIDERS),
    ),
    "flash_backward": replace(
        _FLASH,
        config=Tile,
        table=BackwardConfig,
        cases=_backward_cases,
        search_space=_backward_space,
        compile=compiled.flash_backward_kernel,
        provider=_backward_provider,
        rows=lambda config: max(config.block_m, config.block_n),
    ),
    "paged": _PAGED,
    "paged_prefill": replace(_PAGED, cases=_chunk_cases, problem=_chunk_problem, roof=matmul_rate),
    "mla": _MLA,
    "mla_hopper": replace(
        _MLA,
        config=MlaHopperConfig,
        table=MlaHopperConfig,
        cases=_hopper_latent_cases,
        search_space=_hopper_latent_space,
        portable="mla",
        peers=peers_of(LATENT_DECODE_PROVIDERS),
    ),
    "mla_prefill": replace(
        _MLA,
        config=MlaPrefillConfig,
        table=MlaPrefillConfig,
        case_of=_prefill_case,
        cases=_prefill_cases,
        search_space=_prefill_space,
        compile=compiled.latent_prefill,
        problem=_prefill_problem,
        provider=_prefill_provider,
        roof=matmul_rate,
    ),
}


@dataclass(frozen=True)
class Candidate:
    """One config for one case."""

    family: str
    arch: str
    dtype: str
    case: dict
    config: object

    @property
    def columns(self):
        """The columns of a row that identify it."""
        return {"family": self.family, "arch": self.arch, "dtype": self.dtype} | self.case | asdict(self.config)

    @property
    def key(self):
        """Everything that its compiled code and the figures derived from it depend on."""
        return self.columns | {"triton": triton.__version__, "source": source_hash(FAMILIES[self.family].folder)}

    def compile(self):
        """Its row: figures of the compiled code, and the reason if it is dropped."""
        made_of = {}
        try:
            compile_config = FAMILIES[self.family].compile
            launches = compile_config(self.arch, getattr(torch, self.dtype), config=self.config, **self.case)
        except triton.runtime.errors.OutOfResources as error:
            dropped = str(error)
        except (OSError, MemoryError):  # not an error of the config
            raise
        except Exception as error:  # the compiler can raise any exception, and the next config may compile
            dropped = f"{type(error).__name__}: {error}".split("\n")[0]
        else:
            launches = launches if isinstance(launches, list) else [launches]
            reports = [loop_model.analyze(launch.kernel) for launch in launches]
            made_of = reports[0].row() if len(reports) == 1 else _of_both(*[report.row() for report in reports])
            dropped = next(filter(None, map(self._why_dropped, launches, reports)), "")
        return self.columns | {name: made_of.get(name) for name in MODEL_COLUMNS} | {"dropped": dropped}

    @property
    def _needs_async_copies(self):
        """Not if the default has no pipeline either, for which there are too few registers or too little memory."""
        kind, dtype = FAMILIES[self.family], getattr(torch, self.dtype)
        return kind.search_space(self.arch, dtype, **self.case)[0].num_stages > 1

    def _why_dropped(self, launch, report):
        if isinstance(report, amdgcn.Report):
            return f"{report.vgpr_spills} registers spilled" if report.vgpr_spills else ""
        hot = report.hot
        if hot is None:  # fp32 without tensor cores
            return f"{report.static_spills} spills" if report.static_spills else ""
        if hot.spills:
            return f"{hot.spills} spills in the hot loop"
        if getattr(self.config, "use_tma", False) and not launch.uses_tma:
            return "no TMA"
        if not hot.async_copies and not isinstance(self.config, compiled.HOPPER_CONFIGS) and self._needs_async_copies:
            return "no asynchronous copies in the hot loop"
        # A tile with fewer rows cannot use wgmma: mma.sync is right for a decode step with few heads.
        if gpu_of(report.arch).wgmma and FAMILIES[self.family].rows(self.config) >= 64 and not launch.uses_wgmma:
            return "no wgmma"
        return ""


def _of_both(dk, dv):
    """The row of a kernel that is launched for dk and for dv, from the rows of the launches. Its TFLOP/s are those of
    the four matmuls that one launch would do, where these two do three and two."""
    rules = dict.fromkeys(("registers", "shared B"), max)
    rules |= dict.fromkeys(("spills", "spills in loop", "loop instructions"), lambda *pair: sum(pair))
    rules |= dict.fromkeys(("bound TFLOP/s", "lock TFLOP/s", "expected TFLOP/s"), lambda dk, dv: 4 / (3 / dk + 2 / dv))
    rules["useful share"] = lambda dk, dv: 5 / (3 / dk + 2 / dv)
    pairs = {name: (dk.get(name), dv.get(name)) for name in rules}
    return {name: None if None in pair else rules[name](*pair) for name, pair in pairs.items()}


@cache
def source_hash(folder):
    """A hash of the family's kernels and launchers, of shared code, and of the code that analyses compiled kernels."""
    package, perf = Path(triton_attn.__file__).parent, Path(__file__).parents[1]
    files = [
        file for part in (folder, "dense", "merge", "_jit", "_host") for file in sorted(package.glob(f"{part}/*.py"))
    ]
    read_by = ("amdgcn", "candidates", "compiled", "gpus", "loop_model", "sass", "timeline")
    files += [perf / "workloads/calls.py", *(perf / f"model/{name}.py" for name in read_by)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
