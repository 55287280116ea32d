"""Tuned tables: which entry applies to a call, which tables are refused, and that launches use them."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton
from hopper_cases import write_record

import triton_attn
from triton_attn._host import tuned
from triton_attn._host.config import FAMILIES
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash.configs import FlashConfig, HopperConfig
from triton_attn.mla.configs import MlaDecodeConfig, MlaPrefillConfig
from triton_attn.paged.configs import PagedCase, PagedConfig
from triton_attn.toolchain import compile_only

ABOUT = {
    "figure": 1.0,
    "unit": "TFLOP/s",
    "source": "measured",
    "device": "a test",
    "triton": triton.__version__,
    "torch": torch.__version__,
    "commit": None,
}
TILE = {"block_m": 64, "block_n": 16, "num_warps": 4, "num_stages": 1}
FLASH_CASE = {"head_dim": 64, "head_dim_v": 64, "causal": True}


def flash_entry(seqlen_k=4096, **tile):
    config = TILE | {"use_tma": False} | tile
    return {
        "family": "flash",
        "dtype": "bfloat16",
        "case": dict(FLASH_CASE),
        "buckets": {"seqlen_k": seqlen_k},
        "config": config,
    } | ABOUT


def write(path, *entries, arch="sm_90", **fields):
    path.write_text(json.dumps({"format": tuned.FORMAT, "arch": arch, "entries": entries} | fields))
    return path


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    """Neither the package's own tables nor one of another test."""
    monkeypatch.setattr(tuned, "SHIPPED", Path("nowhere"))
    tuned._shipped.cache_clear()
    triton_attn.use_tuned(None)
    yield
    monkeypatch.undo()
    tuned._shipped.cache_clear()
    triton_attn.use_tuned(None)


def flash_case(arch="sm_90", dtype=torch.bfloat16, causal=True, seqlen_k=4096, head_dim=64):
    return FlashCase(arch, dtype, head_dim, head_dim, causal, seqlen_k=seqlen_k)


def flash_config(**case):
    return tuned.find(FlashConfig, flash_case(**case))


@pytest.mark.parametrize("lengths", [[1], [1, 2], [1, 3, 17, 20], [4096, 5000, 2**20], [2**i for i in range(6, 18, 2)]])
def test_the_nearest_length_applies(tmp_path, lengths):
    """On a log2 scale: the boundary between two lengths is their geometric mean, and outer entries apply beyond
    them."""
    entries = [flash_entry(n, num_stages=1 + i) for i, n in enumerate(lengths)]
    triton_attn.use_tuned(write(tmp_path / "t.json", *entries))
    middles = [math.isqrt(lo * hi) for lo, hi in itertools.pairwise(lengths)]
    for seqlen_k in {0, 1, 2**31 - 1, *lengths, *middles, *(n + 1 for n in middles)}:
        nearest = min(range(len(lengths)), key=lambda i: abs(math.log2(max(seqlen_k, 1) / lengths[i])))
        assert flash_config(seqlen_k=seqlen_k).num_stages == 1 + nearest


def test_of_two_equally_near_lengths_the_shorter_applies(tmp_path):
    triton_attn.use_tuned(write(tmp_path / "t.json", flash_entry(4096, num_stages=3), flash_entry(1024, num_stages=2)))
    assert flash_config(seqlen_k=2048).num_stages == 2
    assert flash_config(seqlen_k=2049).num_stages == 3


def test_distances_of_buckets_add_up(tmp_path):
    sizes = [(1024, 16, 4), (8192, 64, 8)]
    case = {"head_dim": 64, "head_dim_v": 64, "tile_rows": 16, "cache_dtype": "bfloat16"}
    entries = [
        flash_entry()
        | {"family": "paged", "case": case, "buckets": {"seqlen_k": keys, "page_size": page, "rows": rows}}
        | {"config": TILE | {"num_stages": stages}}
        for stages, (keys, page, rows) in enumerate(sizes, start=1)
    ]
    triton_attn.use_tuned(write(tmp_path / "t.json", *entries))

    def stages(seqlen_k, page_size, rows):
        sizes = dict(rows=rows, seqlen_k=seqlen_k, page_size=page_size)
        return tuned.find(PagedConfig, PagedCase("sm_90", torch.bfloat16, torch.bfloat16, 64, 64, **sizes)).num_stages

    assert stages(1024, 16, 4) == stages(4096, 16, 4) == stages(1500, 40, 4) == stages(4096, 16, 6) == 1
    assert stages(8192, 64, 8) == stages(4096, 64, 8) == stages(8192, 16, 8) == stages(5000, 16, 8) == 2


@pytest.mark.parametrize(
    "other",
    [{"arch": "sm_80"}, {"dtype": torch.float16}, {"dtype": torch.float32}, {"causal": False}, {"head_dim": 96}],
)
def test_an_entry_applies_to_its_own_case_only(other, tmp_path):
    triton_attn.use_tuned(write(tmp_path / "t.json", flash_entry()))
    assert flash_config() == FlashConfig(**flash_entry()["config"])
    assert flash_config(**other) is None


def test_entries_of_another_triton_do_not_apply(tmp_path):
    entries = flash_entry(1024), flash_entry(4096) | {"triton": "2.0.0"}
    triton_attn.use_tuned(write(tmp_path / "t.json", *entries))
    assert flash_config(seqlen_k=4096).num_stages == entries[0]["config"]["num_stages"]
    assert len(tuned._added[0][("sm_90", "flash", "bfloat16", (64, 64, True))]) == 1


def test_the_last_table_comes_first_and_the_package_s_last(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path)
    write(tmp_path / "sm_90.json", flash_entry(num_stages=1), flash_entry(1024, num_stages=4))
    assert flash_config(seqlen_k=1024).num_stages == 4
    triton_attn.use_tuned(write(tmp_path / "a.json", flash_entry(num_stages=2)))
    assert flash_config(seqlen_k=1024).num_stages == 2, "only a table that has the case applies"
    triton_attn.use_tuned(str(write(tmp_path / "b.json", flash_entry(num_stages=3))))
    assert flash_config().num_stages == 3
    triton_attn.use_tuned(None)
    assert flash_config().num_stages == 1


H100, PCIE, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200"


def on(monkeypatch, *names, arch="sm_90"):
    """This machine has GPUs of these names."""
    monkeypatch.setattr(tuned, "_gpus_here", lambda: [(arch, name) for name in names])
    triton_attn.use_tuned(None)


def test_entries_of_this_gpu_come_first(tmp_path, monkeypatch):
    """At every length. Those of others serve cases that it has none for."""
    entries = [
        flash_entry(1024, num_stages=2) | {"device": H100},
        flash_entry(4096, num_stages=3) | {"device": H200},
        flash_entry(1024, num_stages=4) | {"device": H200},
    ]
    full = entries[1] | {"case": FLASH_CASE | {"causal": False}}

    def stages(*names, **case):
        on(monkeypatch, *names)
        triton_attn.use_tuned(write(tmp_path / "t.json", *entries, full))
        return flash_config(**case).num_stages

    assert stages(H100, seqlen_k=4096) == stages(H100, seqlen_k=1024) == 2
    assert stages(H200, seqlen_k=4096) == 3
    assert stages(H200, seqlen_k=1024) == 4
    assert stages(H100, causal=False) == stages(H200, causal=False) == stages(PCIE, causal=False) == 3


HOPPER_CASE = {"head_dim": 128, "causal": False}


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        ([H100], True),
        ([H100, H100], True),
        ([], True),  # calls are only compiled
        ([PCIE], False),
        ([H200], False),
        ([H100 + " MIG 1g.10gb"], False),
        ([H100, H200], False),
    ],
    ids=str,
)
def test_a_record_counts_on_the_gpu_that_it_names(names, counts, tmp_path, monkeypatch):
    """Elsewhere it gives the config, and does not make its kernel the default."""
    on(monkeypatch, *names)
    config = {"block_n": 64, "groups": 2, "num_stages": 2, "lazy": True, "tiles": 1}
    entry = {"family": "flash_hopper", "dtype": "bfloat16", "case": HOPPER_CASE, "buckets": {"seqlen_k": 4096}}
    triton_attn.use_tuned(write_record(tmp_path / "t.json", **entry, config=config, device=H100))
    case = FlashCase("sm_90", torch.bfloat16, 128, 128, False, seqlen_k=4096)
    assert tuned.is_chosen(HopperConfig, case) == counts
    assert (HopperConfig.choose(case, "auto") is not None) == counts
    assert HopperConfig.choose(case, "hopper") == HopperConfig(**config)


def test_a_gpu_of_another_architecture_does_not_end_a_record(tmp_path, monkeypatch):
    on(monkeypatch, H100)
    here = tuned._gpus_here()
    monkeypatch.setattr(tuned, "_gpus_here", lambda: [*here, ("sm_80", "NVIDIA A100-SXM4-80GB")])
    entry = {"family": "flash_hopper", "dtype": "bfloat16", "case": HOPPER_CASE, "buckets": {"seqlen_k": 4096}}
    config = {"block_n": 64, "groups": 2, "num_stages": 2, "lazy": True, "tiles": 1}
    triton_attn.use_tuned(write_record(tmp_path / "t.json", **entry, config=config, device=H100))
    assert tuned.is_chosen(HopperConfig, FlashCase("sm_90", torch.bfloat16, 128, 128, False, seqlen_k=4096))


def broken(change):
    entry = copy.deepcopy(flash_entry())
    change(entry)
    return entry


BROKEN = {
    "no such family": (lambda e: e.update(family="flashy"), r"entries\[1\], family: expected flash or .*'flashy'"),
    "dtype": (lambda e: e.update(dtype="float32"), r"dtype: expected float16 or bfloat16, got 'float32'"),
    "field missing": (lambda e: e.pop("source"), r"entries\[1\]: expected an object with .*source"),
    "one field too many": (lambda e: e.update(note=""), r"entries\[1\]: expected an object with"),
    "case of another family": (lambda e: e["case"].update(rows=16), r"case: expected an object with head_dim, "),
    "a bool as int": (lambda e: e["case"].update(head_dim=True), r"case, head_dim: expected int, got True"),
    "an int as bool": (lambda e: e["case"].update(causal=1), r"case, causal: expected bool, got 1"),
    "bucket": (lambda e: e["buckets"].update(seqlen_k=0), r"buckets, seqlen_k: expected 1 or more, got 0"),
    "block": (lambda e: e["config"].update(block_m=96), r"config, block_m: expected a power of two"),
    "block too small": (lambda e: e["config"].update(block_n=8), r"config, block_n: expected a power of two"),
    "warps": (lambda e: e["config"].update(num_warps=3), r"config, num_warps: expected 1, 2, 4, 8 or 16, got 3"),
    "stages": (lambda e: e["config"].update(num_stages=0), r"config, num_stages: expected 1 to 8, got 0"),
    "a string as int": (lambda e: e["config"].update(block_m="64"), r"config, block_m: expected int, got '64'"),
    "twice the same": (lambda e: None, r"entries\[1\]: expected an entry of its own"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_is_refused_and_what_was_in_use_stays(name, tmp_path):
    change, said = BROKEN[name]
    triton_attn.use_tuned(write(tmp_path / "good.json", flash_entry(num_stages=3)))
    with pytest.raises(ValueError, match=said):
        triton_attn.use_tuned(write(tmp_path / "t.json", flash_entry(), broken(change)))
    assert flash_config().num_stages == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "t.json: expected JSON"),
        ("[]", "t.json: expected an object with format, arch, entries"),
        ('{"format": 2, "arch": "sm_90", "entries": []}', "format: expected 1, got 2"),
        ('{"format": 1, "arch": "H100", "entries": []}', "arch: expected a name as sm_90 or gfx942, got 'H100'"),
        ('{"format": 1, "arch": "sm_90", "entries": []}', "triton: expected an entry of Triton"),
        ('{"format": 1, "arch": "sm_90", "entries": [3]}', r"entries\[0\]: expected an object with .*got 3"),
    ],
)
def test_what_is_no_table_is_refused(text, said, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        triton_attn.use_tuned(path)


def test_a_foreign_table_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        triton_attn.use_tuned(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"triton: expected an entry of Triton \d.*, got 2\.0\.0"):
        triton_attn.use_tuned(write(tmp_path / "old.json", flash_entry() | {"triton": "2.0.0"}))
    monkeypatch.setattr(tuned, "_gpus_here", lambda: [("sm_90", "NVIDIA H100")])
    with pytest.raises(ValueError, match=r"arch: expected that of a GPU of this machine, sm_90, got sm_80"):
        triton_attn.use_tuned(write(tmp_path / "a100.json", flash_entry(), arch="sm_80"))
    assert flash_config() is None


def test_tma_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="use_tma: expected false, this architecture has no TMA"):
        triton_attn.use_tuned(write(tmp_path / "t.json", flash_entry(use_tma=True), arch="sm_80"))


@pytest.mark.ci
def test_the_environment_names_a_table(tmp_path):
    source = """
        import torch
        from triton_attn._host import tuned
        from triton_attn.dense.tiles import FlashCase
        from triton_attn.flash.configs import FlashConfig
        print(tuned.find(FlashConfig, FlashCase("sm_90", torch.bfloat16, 64, 64, True, seqlen_k=4096)))
    """
    source = "\n".join(line.strip() for line in source.splitlines())

    def run(path):
        env = os.environ | {"TRITON_ATTN_TUNED": str(path)}
        root = Path(triton_attn.__file__).parent.parent
        return subprocess.run([sys.executable, "-c", source], cwd=root, env=env, capture_output=True, text=True)

    assert run(write(tmp_path / "t.json", flash_entry())).stdout.strip() == str(FlashConfig(**flash_entry()["config"]))
    assert "ValueError: TRITON_ATTN_TUNED: " in run(write(tmp_path / "t.json", format=7)).stderr
    assert "ValueError: TRITON_ATTN_TUNED: " in run(tmp_path / "missing.json").stderr


SHIPPED = sorted((Path(triton_attn.__file__).parent / "tuned").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_package_s_tables_are_whole_and_measured(path):
    """A predicted entry would repeat the default, which the same model chooses, or hide a newer one."""
    table = tuned.read_table(path)
    assert table["arch"] == path.stem
    assert {entry["source"] for entry in table["entries"]} == {"measured"}


def half(*shape, **options):
    return torch.empty(shape, dtype=torch.bfloat16, **options)


def flash(**options):
    return triton_attn.flash_attention(half(1, 128, 2, 64), half(1, 128, 2, 64), half(1, 128, 2, 64), **options)


def flash_gradients():
    inputs = [half(1, 128, 2, 64, requires_grad=True) for _ in range(3)]
    torch.autograd.grad(triton_attn.flash_attention(*inputs, causal=True), inputs, half(1, 128, 2, 64))


def decode():
    lengths, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32)
    triton_attn.paged_attention(half(1, 1, 8, 64), half(8, 16, 2, 64), half(8, 16, 2, 64), lengths, table)


def latent_decode():
    lengths, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32)
    triton_attn.mla_decode(half(1, 1, 8, 512), half(1, 1, 8, 64), half(8, 64, 576), lengths, table, softmax_scale=1.0)


def latent_prefill():
    queries, latents = (half(1, 128, 2, 64), half(1, 128, 2, 32)), (half(1, 128, 128), half(1, 128, 32))
    triton_attn.mla_prefill(*queries, *latents, half(2, 64, 128), half(2, 64, 128), mode="fused")


SPLIT = {"dkdv": TILE | {"use_tma": False}, "dq": TILE | {"use_tma": False}, "fused": None}
LATENT_DIMS = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
# {family: (call, case, config, the config in its launches)}
SERVED = {
    "flash": (lambda: flash(causal=True), FLASH_CASE, TILE | {"use_tma": False}, FlashConfig(**TILE)),
    "flash_backward": (flash_gradients, FLASH_CASE, SPLIT, FlashConfig(**TILE)),
    "paged": (
        decode,
        {"head_dim": 64, "head_dim_v": 64, "tile_rows": 16, "cache_dtype": "bfloat16"},
        TILE | {"block_m": 16},
        PagedConfig(**TILE | {"block_m": 16}),
    ),
    "mla": (
        latent_decode,
        {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "tile_rows": 16, "cache_dtype": "bfloat16"},
        TILE | {"block_m": 16},
        MlaDecodeConfig(**TILE | {"block_m": 16}),
    ),
    "mla_prefill": (
        latent_prefill,
        {"fused": True} | LATENT_DIMS,
        TILE | {"block_c": 32},
        MlaPrefillConfig(**TILE | {"block_c": 32}),
    ),
}


def launched(call):
    """Tiles in the launches of attention kernels."""
    with compile_only("sm_90") as launches:
        call()
    return [
        {"block_m": x.constexprs["BLOCK_M"], "block_n": x.constexprs["BLOCK_N"]}
        | {"num_warps": x.num_warps, "num_stages": x.num_stages}
        | ({"use_tma": x.constexprs["USE_TMA"]} if "USE_TMA" in x.constexprs else {})
        | ({"block_c": x.constexprs["BLOCK_C"]} if x.constexprs.get("BLOCK_C") else {})
        for x in launches
        if "BLOCK_N" in x.constexprs
    ]


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=3)
@pytest.mark.compiled
@pytest.mark.parametrize("family", SERVED)
def test_calls_heed_tables(family, tmp_path):
    call, case, config, tile = SERVED[family]
    before = launched(call)
    buckets = dict.fromkeys(FAMILIES[family].buckets, 64)
    entry = flash_entry() | {"family": family, "case": case, "buckets": buckets, "config": config}
    triton_attn.use_tuned(write(tmp_path / "t.json", entry))
    here = launched(call)
    first = 1 if family == "flash_backward" else 0
    assert len(here) == (3 if family == "flash_backward" else 1)
    assert here[first:] == [asdict(tile)] * len(here[first:])
    assert here[:first] == before[:first], "the forward pass has its own"
    assert asdict(tile) not in before
    triton_attn.use_tuned(None)
    assert launched(call) == before


def backward(q, k, v, dout, **options):
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(triton_attn.flash_attention(*leaves, causal=True, **options), leaves, dout)


def paged(q, k_cache, v_cache, is_paged=True, **options):
    table = torch.zeros(1, 1, dtype=torch.int32, device=q.device) if is_paged else None
    lengths = torch.ones(1, dtype=torch.int32, device=q.device)
    triton_attn.paged_attention(q, k_cache, v_cache, lengths, table, **options)


SMALL = (1, 16, 2, 16)
# {family: (call, how many tensors it takes)}
ASKING = {
    "flash": (lambda *qkv, **options: triton_attn.flash_attention(*qkv, causal=True, **options), 3),
    "flash_backward": (backward, 4),
    "paged": (paged, 3),
}
# Tensors whose rows are not loaded 16 bytes at a time.
SLOW = {
    "misaligned": lambda device: half(513, device=device)[1:].view(SMALL),
    "odd strides": lambda device: half(*SMALL[:-1], 17, device=device)[..., :16],
}
DROPOUT = {"dropout_p": 0.5, "dropout_seed": 1}


def untimed():
    """Calls that no sweep times: (family, number and kind of the slow tensor if any, options)."""
    for family, (_, count) in ASKING.items():
        in_loops = range(count) if family == "flash_backward" else range(1, count)
        for slow in itertools.product(in_loops, SLOW):
            yield pytest.param(family, slow, {}, id=f"{family}, tensor {slow[0]} {slow[1]}")
        # A contiguous cache needs more shared memory than pages do.
        rest = {"is_paged": False} if family == "paged" else DROPOUT
        for options in ({"softcap": 20.0}, {"alibi_slopes": [0.5, 0.1]}, rest):
            yield pytest.param(family, None, options, id=f"{family}, {next(iter(options))}")


@pytest.mark.parametrize(("family", "slow", "options"), list(untimed()))
def test_tables_are_not_asked_for_what_no_sweep_times(family, slow, options, monkeypatch, device):
    asked = []
    monkeypatch.setattr(tuned, "find", lambda config, case: asked.append(config.family))
    call, count = ASKING[family]
    tensors = [half(*SMALL, device=device).zero_() for _ in range(count)]
    call(*tensors)
    assert family in asked
    asked.clear()
    triton_attn.use_tuned(None)  # forgets what was chosen
    if slow is not None:
        which, kind = slow
        tensors[which] = SLOW[kind](device).zero_()
    if slopes := options.get("alibi_slopes"):
        options = {"alibi_slopes": torch.tensor(slopes, device=device)}
    call(*tensors, **options)
    assert family not in asked


def test_equal_calls_look_up_once(tmp_path, monkeypatch):
    looked_up = []
    monkeypatch.setattr(tuned, "find", lambda *args: looked_up.append(args))
    for _ in range(3):
        assert tuned.choose(FlashConfig, flash_case(seqlen_k=77)) == FlashConfig.default(flash_case())
    assert len(looked_up) == 1
    triton_attn.use_tuned(None)
    tuned.choose(FlashConfig, flash_case(seqlen_k=77))
    assert len(looked_up) == 2, "another table may say otherwise"


def test_what_another_thread_s_change_of_tables_overtakes_is_not_kept():
    """The table changes while a config is chosen: the earlier choice is not cached."""
    tables = iter(["old", "new", "newer"])

    @tuned.remember
    def chosen(call):
        table = next(tables)
        if table == "old":
            triton_attn.use_tuned(None)  # by another thread
        return table

    try:
        assert chosen(1) == "new"
        assert chosen(1) == "new"
        triton_attn.use_tuned(None)
        assert chosen(1) == "newer"
    finally:
        tuned._plans.pop()
