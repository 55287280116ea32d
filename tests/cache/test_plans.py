"""Plans of the launches that write to caches. Strides and shapes are tested with the results; here is what those tests
would not see: a plan that is used again for other options, and what a call costs the host.
"""

import functools
import gc
import itertools
import operator
import shutil
import weakref
from unittest import mock

import pytest
import torch
from alike import checked_alike
from host_cost import ELSEWHERE, bare_launches, compare, python_calls, real_launcher
from plans import check_neighbour, launches_of, unaligned
from triton.runtime.jit import JITFunction

from triton_attn import append_kv_cache, append_latent_cache, copy_kv_pages, gather_kv_cache, gather_latent_cache
from triton_attn._host.tuned import forget_plans
from triton_attn.cache.kernels import append, append_latent, copy, gather
from triton_attn.toolchain import compile_only

pytestmark = pytest.mark.compiled

TOKENS = 8
MODULES = append, append_latent, copy, gather
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def append_with(is_latent, rotary_dim=0, cache_dtype=torch.bfloat16, interleaved=False):
    rope = {}
    if rotary_dim:
        table, positions = torch.empty(64, rotary_dim // 2), torch.zeros(TOKENS, dtype=torch.int64)
        rope = dict(rope_cos=table, rope_sin=table, positions=positions, rope_interleaved=interleaved)
    if is_latent:
        kv_latent, k_pe = (torch.empty(TOKENS, dim, dtype=torch.bfloat16) for dim in (512, 64))
        cache = torch.empty(8, 16, 656 if cache_dtype == torch.uint8 else 576, dtype=cache_dtype)
        append_latent_cache(kv_latent, k_pe, cache, torch.arange(TOKENS), **rope)
    else:
        k = torch.empty(TOKENS, 4, 64, dtype=torch.bfloat16)
        cache = torch.empty(8, 16, 4, 64, dtype=cache_dtype)
        append_kv_cache(k, k, cache, cache, torch.arange(TOKENS), **rope)


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ({}, dict(rotary_dim=64)),
        (dict(rotary_dim=64), dict(rotary_dim=32)),
        (dict(rotary_dim=64), dict(interleaved=True)),
        ({}, dict(cache_dtype=E4M3)),
        (dict(cache_dtype=E4M3), dict(cache_dtype=E5M2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_latent", [False, True], ids=["keys", "latents"])
def test_options(is_latent, base, more):
    def launches(**arguments):
        return launches_of(append_with, MODULES, is_latent=is_latent, **arguments)

    check_neighbour(launches, base, more)


def calls_by_form():
    """{form: a call}: the calling forms of the functions that launch a kernel on a cache."""
    k, cache, slots = torch.empty(8, 8, 128), torch.empty(64, 16, 8, 128), torch.arange(8)
    v, table, bounds = torch.empty_like(k), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    kv_latent, k_pe, latent_cache = torch.empty(8, 512), torch.empty(8, 64), torch.empty(64, 64, 576)
    k16, kv16, pe16 = k.bfloat16(), kv_latent.bfloat16(), k_pe.bfloat16()
    fp8, rows, scales = cache.to(E4M3), torch.empty(64, 64, 656, dtype=torch.uint8), torch.empty(64, 16, 8)
    rope, rope_pe = (dict(rope_cos=x, rope_sin=x, positions=slots) for x in (torch.empty(64, 64), torch.empty(64, 32)))
    layers, sources, targets = cache.expand(2, *cache.shape).clone(), slots[:2], slots[2:4]
    others, sizes = layers.clone(), dict(kv_lora_rank=512, qk_rope_head_dim=64)
    latents = table, bounds
    return {
        "keys": lambda: append_kv_cache(k, k, cache, cache, slots),
        "keys, rope": lambda: append_kv_cache(k, k, cache, cache, slots, **rope),
        "keys, fp8": lambda: append_kv_cache(k16, k16, fp8, fp8, slots, k_scale=0.5, v_scale=0.5),
        "keys, token scales": lambda: append_kv_cache(k16, k16, fp8, fp8, slots, k_scale=scales, v_scale=scales),
        "latents": lambda: append_latent_cache(kv_latent, k_pe, latent_cache, slots),
        "latents, rope": lambda: append_latent_cache(kv_latent, k_pe, latent_cache, slots, **rope_pe),
        "latents, fp8 rows": lambda: append_latent_cache(kv16, pe16, rows, slots),
        "pages": lambda: copy_kv_pages((cache, cache), sources, targets),
        "pages of layers": lambda: copy_kv_pages((layers, layers), sources, targets),
        "pages to another cache": lambda: copy_kv_pages((layers, layers), sources, targets, to=(others, others)),
        "gathered keys": lambda: gather_kv_cache(cache, cache, table, bounds, out=(k, v)),
        "gathered keys, new": lambda: gather_kv_cache(cache, cache, table, bounds, 8),
        "gathered keys, fp8": lambda: gather_kv_cache(fp8, fp8, table, bounds, out=(k, v), k_scale=0.5, v_scale=0.5),
        "gathered latents": lambda: gather_latent_cache(latent_cache, *latents, out=(kv_latent, k_pe), **sizes),
        "gathered latents, fp8 rows": lambda: gather_latent_cache(rows, *latents, out=(kv16, pe16), **sizes),
    }


@pytest.mark.oldest
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as Triton's launcher does on a GPU")
@pytest.mark.parametrize(
    ("form", "most"),
    [
        ("keys", 7),
        ("keys, rope", 6),
        ("keys, fp8", 10),
        ("keys, token scales", 6),
        ("latents", 13),
        ("latents, rope", 12),
        ("latents, fp8 rows", 18),
        ("pages", 11),
        ("pages of layers", 11),
        ("pages to another cache", 3),
        ("gathered keys", -28),
        ("gathered keys, new", -24),
        ("gathered keys, fp8", -25),
        ("gathered latents", -26),
        ("gathered latents, fp8 rows", -21),
    ],
)
def test_host_cost(form, most, record_property):
    """A known call beside its bare launch, through Triton's own launcher: at most 1.5 times as long.

    Python calls besides those of the launch repeat exactly; those of the bare launch are the JIT's, which a known call
    does not ask.
    """
    call = calls_by_form()[form]
    with real_launcher("sm_90"):
        launch = bare_launches(call, MODULES)
        *_, ratio = compare(call, launch)
        extra_calls = python_calls(call) - python_calls(launch)
    record_property("figure", f"{form}: {ratio:.2f} times its bare launch, {extra_calls} more Python calls")
    assert extra_calls <= most
    assert ratio <= 1.5 * ELSEWHERE


def forms_of_writes_and_reads():
    """{function: (arguments, [other ones])}."""
    k, slots = torch.empty(8, 4, 64, dtype=torch.bfloat16), torch.arange(8)
    cache, table = torch.empty(8, 16, 4, 64, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.int32)
    kv_latent, k_pe = torch.empty(8, 512, dtype=torch.bfloat16), torch.empty(8, 64, dtype=torch.bfloat16)
    latents, rows = torch.empty(4, 16, 576, dtype=torch.bfloat16), torch.empty(4, 16, 656, dtype=torch.uint8)
    fp8_latents = latents.to(E4M3)
    sides, two = torch.empty(64, 32), slots[:2]
    rope = dict(rope_cos=sides, rope_sin=sides.clone(), positions=slots)
    ropes = rope, rope | dict(positions=slots.int()), rope | dict(rope_interleaved=True)
    ropes += (rope | dict(rope_cos=sides.bfloat16(), rope_sin=sides.bfloat16()),)
    factors = 0.5, 2, torch.ones(1), torch.ones(4), torch.ones(8, 16, 4)
    quantized = [{name: cache.to(dtype) for name in ("k_cache", "v_cache")} for dtype in (E4M3, E5M2, torch.int8)]
    scaled = [dict(k_scale=x, v_scale=y) for x, y in itertools.product(factors, factors)]
    read = dict(block_table=table, cu_seqlens_k=torch.zeros(3, dtype=torch.int32))
    sizes, starts = dict(kv_lora_rank=512, qk_rope_head_dim=64), torch.zeros(2, dtype=torch.int32)
    results = [dict(num_tokens=n) for n in (8, 1, 16)] + [dict(num_tokens=8, dtype=torch.float32)]
    results += [dict(num_tokens=8, seq_starts=starts), dict(out=(k, k.clone()))]
    latent_results = [*results[:-1], dict(out=(kv_latent, k_pe))]
    return {
        append_kv_cache: (
            dict(k=k, v=k.clone(), k_cache=cache, v_cache=cache.clone(), slot_mapping=slots),
            [{}, *ropes, *map(operator.or_, quantized, scaled), *(quantized[0] | x for x in scaled)],
        ),
        append_latent_cache: (
            dict(kv_latent=kv_latent, k_pe=k_pe, latent_cache=latents, slot_mapping=slots),
            [{}, *ropes, *({"latent_cache": x} for x in (rows, fp8_latents))]
            + [dict(latent_cache=fp8_latents, k_scale=x) for x in factors[:3]],
        ),
        copy_kv_pages: (
            dict(caches=cache, src_pages=two, dst_pages=two + 2),
            [{}, dict(src_pages=two.int()), dict(caches=(cache, cache.clone())), dict(to=cache.clone())],
        ),
        gather_kv_cache: (
            read | dict(k_cache=cache, v_cache=cache.clone()),
            [*results, *(quantized[0] | x | results[0] for x in scaled)],
        ),
        gather_latent_cache: (
            read | sizes | dict(latent_cache=latents),
            [*latent_results, *(x | dict(latent_cache=rows) for x in latent_results)],
        ),
    }


@pytest.mark.parametrize("function", forms_of_writes_and_reads(), ids=lambda function: function.__name__)
def test_launches_that_say_they_are_alike_are_alike(function):
    """Known calls in every form, with tensors at any address. Nothing is compiled: keys alone are compared."""
    base, forms = forms_of_writes_and_reads()[function]
    forget_plans()
    without_jit = mock.patch.object(JITFunction, "run")
    with compile_only("sm_90"), without_jit, checked_alike() as seen:
        for more in forms:
            arguments = base | more
            tensors = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)]
            if arguments.get("latent_cache") is not None and arguments["latent_cache"].dtype == torch.uint8:
                tensors.remove("latent_cache")  # its rows are aligned
            for name in (None, *tensors):
                moved = {} if name is None else {name: unaligned(arguments[name])}
                for _ in range(3):  # the first is not known, and the second not the second of its kind
                    function(**arguments | moved)
    assert len(seen) > len(forms)


class Own(torch.Tensor):
    """A subclass that sees no calls: its tensors are taken as plain ones."""


def wrong_calls():
    """{what: (a call, a call like it that is wrong)}."""
    k, cache, slots = torch.zeros(8, 4, 64), torch.zeros(8, 16, 4, 64), torch.arange(8)
    k16, fp8, tables = k.bfloat16(), cache.to(E4M3), torch.zeros(64, 32)
    rope, near = dict(rope_cos=tables, rope_sin=tables), slots[:4]
    kv_latent, k_pe = torch.zeros(8, 512, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    rows = torch.zeros(4, 16, 656, dtype=torch.uint8)
    unaligned_rows = torch.zeros(rows.numel() + 1, dtype=torch.uint8)[1:].view(rows.shape)
    table, bounds = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    latents, sizes = torch.zeros(4, 16, 576), dict(kv_lora_rank=512, qk_rope_head_dim=64)
    append = functools.partial(append_kv_cache, k, k, cache, cache)
    scaled = functools.partial(append_kv_cache, k16, k16, fp8, fp8, slots)
    rotate = functools.partial(append, slots, **rope)
    copy_pages = functools.partial(copy_kv_pages, (cache, cache))
    read = functools.partial(gather_kv_cache, cache, cache, table, bounds)
    read_latents = functools.partial(gather_latent_cache, latents, table, bounds, 8)
    own, spread = cache.as_subclass(Own), torch.zeros(8, 16, 4, 128)[..., ::2]
    return {
        "stride": (lambda: append(slots), lambda: append_kv_cache(k, k, cache, spread, slots)),
        "dtype": (lambda: append(slots), lambda: append(slots.int())),
        "shape": (lambda: append(slots), lambda: append(slots[1:])),
        "list": (lambda: append(slots), lambda: append([*range(8)])),
        "gradient": (
            lambda: append(slots),
            lambda: append_kv_cache(k.clone().requires_grad_(), k, cache, cache, slots),
        ),
        "vmap": (
            lambda: append(slots),
            lambda: torch.vmap(lambda x: append_kv_cache(x, k, cache, cache, slots))(k[None]),
        ),
        "subclass": (
            lambda: append_kv_cache(k, k, own, own, slots),
            lambda: append_kv_cache(k, k, own, own[..., :32], slots),
        ),
        "value": (lambda: append(slots), lambda: append(slots + 1000, check_values=True)),
        "check_values": (lambda: append(slots), lambda: append(slots, check_values=1)),
        "number": (lambda: scaled(k_scale=0.5), lambda: scaled(k_scale=-0.5)),
        "bool for a number": (lambda: scaled(k_scale=1), lambda: scaled(k_scale=True)),
        "scale of a plain cache": (lambda: append(slots), lambda: append(slots, k_scale=torch.ones(8, 16, 4))),
        "int for a bool": (
            lambda: rotate(positions=slots, rope_interleaved=True),
            lambda: rotate(positions=slots, rope_interleaved=1),
        ),
        "positions": (lambda: rotate(positions=slots), lambda: rotate(positions=slots.float())),
        "no positions": (lambda: append(slots), lambda: rotate()),
        "address": (
            lambda: append_latent_cache(kv_latent, k_pe, rows, slots),
            lambda: append_latent_cache(kv_latent, k_pe, unaligned_rows, slots),
        ),
        "no cache": (lambda: copy_pages(near, near), lambda: copy_pages(near, near, to=())),
        "number of caches": (
            lambda: copy_pages(near, near, to=(spread.clone(),) * 2),
            lambda: copy_pages(near, near, to=cache),
        ),
        "layers": (lambda: copy_pages(near, near), lambda: copy_kv_pages((cache, cache[:, None]), near, near)),
        "num_tokens": (lambda: read(out=(k, k)), lambda: read(7, out=(k, k))),
        "negative num_tokens": (lambda: read(8), lambda: read(-1)),
        "out": (lambda: read(out=(k, k)), lambda: read(out=(k, k[:, :2]))),
        "no out": (lambda: read(8), lambda: read(out=(None,))),
        "dtype of out": (lambda: read(8, dtype=torch.float16), lambda: read(8, dtype=torch.int8)),
        "sizes": (
            lambda: read_latents(**sizes),
            lambda: read_latents(kv_lora_rank=512, qk_rope_head_dim=32),
        ),
    }


@pytest.mark.oldest
@pytest.mark.parametrize("what", wrong_calls())
def test_a_known_call_hides_no_error(what):
    """A wrong call says the same, and launches nothing, whether calls like it are known or not."""
    right, wrong = wrong_calls()[what]
    said = []
    for is_known in (False, True):
        forget_plans()
        if is_known:
            assert len(launches_of(right, MODULES)) == len(launches_of(right, MODULES)) == 1
        with compile_only("sm_90") as launches, pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
            wrong()
        assert not launches
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def test_a_known_call_follows_the_environment(monkeypatch):
    k, cache, slots = torch.ones(8, 4, 64), torch.zeros(8, 16, 4, 64), torch.arange(8)
    with compile_only("sm_90", every_launch=True) as launches:
        for _ in range(2):
            append_kv_cache(k, k, cache, cache, slots)
        assert len(launches) == 2
        with monkeypatch.context() as patch:  # undone within compile_only, which sets one of them itself
            patch.setenv("TRITON_ATTN_BACKEND", "reference")
            append_kv_cache(k, k, cache, cache, slots)
            assert len(launches) == 2
            assert cache.sum() == k.sum()
            patch.setenv("TRITON_ATTN_CHECK", "1")
            with pytest.raises(ValueError, match="slot_mapping"):
                append_kv_cache(k, k, cache, cache, slots + 1000)


def test_a_known_call_follows_the_gpu():
    """CPU tensors stand for those of two GPUs, of which one converts fp8."""
    cache, table = torch.empty(8, 16, 4, 64, dtype=E4M3), torch.zeros(1, 4, dtype=torch.int32)

    def launches(arch):
        bounds = torch.zeros(2, dtype=torch.int32)
        return launches_of(lambda: gather_kv_cache(cache, cache, table, bounds, 8), MODULES, arch)

    forget_plans()
    expected = launches("sm_80")
    forget_plans()
    assert launches("sm_90") != expected
    assert launches("sm_80") == expected


def test_a_known_call_holds_no_tensor():
    calls = calls_by_form()
    given = [cell.cell_contents for call in calls.values() for cell in call.__closure__]
    held = [weakref.ref(x) for x in given if isinstance(x, torch.Tensor)]
    with compile_only("sm_90"):
        for call in calls.values():
            call()
            call()
    del calls, call, given
    gc.collect()
    assert held
    assert not any(ref() is not None for ref in held)
