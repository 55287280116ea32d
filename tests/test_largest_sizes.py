"""The largest sizes: integers in kernels stay within 32 bits, and nothing divides by zero.

`guard` raises otherwise. Of large grids only some programs run: the first, the last, and some between.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import triton_attn
from triton_attn._host.call import call_of
from triton_attn._host.checks import MAX_ROWS
from triton_attn._host.layout import heads_in_l2, tiles_each
from triton_attn._host.options import AttentionOptions
from triton_attn._jit.blocks import visible_range
from triton_attn._jit.heads import assign_tile, slots_left_over, spare_rows
from triton_attn._jit.masks import add_alibi, mask_scores
from triton_attn.dense.backward import launch_flash_bwd
from triton_attn.toolchain import guard

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="checks the integers of interpreted kernels"),
]
HALF = torch.float16
CAUSAL = AttentionOptions(0.25, (None, 0), None, None, None)


@pytest.fixture
def few_programs(monkeypatch):
    def few(*bounds):
        if len(bounds) > 1 or bounds[0] < 16:
            return range(*bounds)
        end = bounds[0]
        return sorted({0, 1, end // 3, end // 2, end - 2, end - 1})

    def within_limits(builder, x, y, z):
        assert x < 2**31
        assert max(y, z) < 2**16
        set_grid_dim(builder, x, y, z)

    set_grid_dim = interpreter.InterpreterBuilder.set_grid_dim
    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_dim", within_limits)
    monkeypatch.setattr(interpreter, "range", few, raising=False)  # the interpreter's loop over programs


@pytest.fixture
def guarded(few_programs):
    with guard() as accesses:
        yield
    assert accesses.launches > 0


def zeros(*shape):
    return torch.zeros(shape, dtype=HALF)


def many(*shape):
    """One element, expanded to a tensor of this shape."""
    return zeros(1).expand(shape)


def test_flash_attention_without_keys(guarded):
    q, k = zeros(1, 2048, 32, 64), zeros(1, 0, 4, 64)
    out, lse = triton_attn.flash_attention(q, k, k, causal=True, return_lse=True)
    for row, head in ((2047, 0), (0, 31)):  # rows of the first program and of the last
        assert not out[0, row, head].any()
        assert lse[0, head, row] == float("-inf")


def test_keys_that_no_query_sees_have_gradient_0(guarded):
    q, k = zeros(1, 0, 32, 64), zeros(1, 16384, 4, 64)
    lse = torch.zeros(1, 32, 0)
    _, dk, dv, _ = launch_flash_bwd(call_of(q, k, k, CAUSAL), q, None, q, lse)
    for row, head in ((0, 0), (16383, 3)):
        assert not dk[0, row, head].any()
        assert not dv[0, row, head].any()


@pytest.mark.parametrize(
    ("mode", "rows", "heads"), [("fused", 8192, 2), ("materialized", 8192, 2), ("absorbed", 40, 2)]
)
def test_mla_prefill_without_keys(mode, rows, heads, guarded):
    q, w = zeros(1, rows, heads, 16), zeros(heads, 16, 32)
    out = triton_attn.mla_prefill(q, q, zeros(1, 0, 32), zeros(1, 0, 16), w, w, causal=True, mode=mode)
    for row, head in ((rows - 1, 0), (0, heads - 1)):
        assert not out[0, row, head].any()


def test_more_heads_than_a_second_dimension_of_a_grid_has(guarded):
    q = zeros(1, 65, 65536, 1)
    out, lse = triton_attn.flash_attention(q, q, q, causal=True, return_lse=True)
    launch_flash_bwd(call_of(q, q, q, CAUSAL._replace(sinks=torch.zeros(65536))), out, None, out, lse)
    triton_attn.paged_attention(q, q, q, torch.tensor([65], dtype=torch.int32))


def test_the_longest_sequences(guarded):
    q = many(1, MAX_ROWS, 1, 1)
    triton_attn.flash_attention(q, q, q, causal=True, window_size=(100, 0), sinks=torch.zeros(1))
    triton_attn.flash_attention(q, q[:, :70], q[:, :70], window_size=(2**31 - 1, 2**31 - 1))


def test_more_tokens_of_mla_than_a_second_dimension_of_a_grid_has(guarded):
    tokens = 65536 * 64 + 1
    q, latents, w = many(1, tokens, 1, 1), zeros(1, 1, 1), zeros(1, 1, 1)
    triton_attn.mla_prefill(q, q, latents, latents, w, w, causal=False, mode="absorbed")


def test_more_rows_of_new_tokens_than_32_bits_count(guarded):
    """A row is one head of one token. The last program writes the last heads of the last token."""
    num_tokens, num_heads = 2**15 + 1, 2**16
    new = (zeros(1, 1, 1) + 1).expand(num_tokens, num_heads, 1)
    k_cache, v_cache = zeros(1, 1, num_heads, 1), zeros(1, 1, num_heads, 1)
    slots = torch.full((num_tokens,), -1)
    slots[-1] = 0
    triton_attn.append_kv_cache(new, new, k_cache, v_cache, slots)
    assert k_cache[0, 0, -1] == v_cache[0, 0, -1] == 1


def test_more_layers_than_a_second_dimension_of_a_grid_has(guarded):
    caches = zeros(40000, 2, 1, 1, 1), zeros(40000, 2, 1, 1, 1)
    caches[1][:, 0] = 1.0
    triton_attn.copy_kv_pages(caches, torch.tensor([0]), torch.tensor([1]))
    assert caches[1][-1, 1] == 1


@pytest.mark.parametrize("rows", [MAX_ROWS + 1, 2**31 - 1, 2**31])
def test_more_rows_than_kernels_can_count(rows):
    q, k = many(1, rows, 1, 1), many(1, 1, 1, 1)
    for args, name in (((q, k, k), "q"), ((k, q, q), "k")):
        with pytest.raises(ValueError, match=rf"^{name}: expected at most 10\*\*9 rows, got {rows}"):
            triton_attn.flash_attention(*args)
    w = zeros(1, 1, 1)
    latents = many(1, rows, 1), many(1, 1, 1)
    for args, name in (((q, q, latents[1], latents[1]), "q_nope"), ((k, k, latents[0], latents[0]), "kv_latent")):
        with pytest.raises(ValueError, match=rf"^{name}: expected at most 10\*\*9 rows, got {rows}"):
            triton_attn.mla_prefill(*args, w, w)
    with pytest.raises(ValueError, match=r"^q: expected at most 10\*\*9 rows"):
        triton_attn.paged_attention(q, k, k, torch.ones(1, dtype=torch.int32), out=q)


def test_more_programs_than_a_grid_has():
    q, k = many(2**14, 1, 2**17, 1), many(2**14, 1, 1, 1)
    with pytest.raises(ValueError, match="the call's tiles: expected fewer than"):
        triton_attn.flash_attention(q, k, k)


@triton.jit
def _assign_tile_kernel(out, pid, num_tiles, num_heads, section_size, LAST_FIRST: tl.constexpr):
    tile, head = assign_tile(pid, num_tiles, num_heads, section_size, LAST_FIRST)
    tl.store(out, tile)
    tl.store(out + 1, head)


@pytest.mark.parametrize("bytes_per_head", [0, 2**15, 2**62])
@pytest.mark.parametrize(("num_tiles", "num_heads"), [(1, 2**31 - 1), (2**31 - 1, 1), (46337, 46341), (65536, 32767)])
def test_tiles_and_heads_of_the_largest_grids(num_tiles, num_heads, bytes_per_head):
    section_size = heads_in_l2(bytes_per_head, 1, num_heads)
    programs = num_tiles * num_heads
    for pid, last_first in itertools.product((0, 1, programs // 2, programs - 1), (False, True)):
        out = torch.full((2,), -7, dtype=torch.int32)
        with guard():
            _assign_tile_kernel[(1,)](out, pid, num_tiles, num_heads, section_size, LAST_FIRST=last_first)
        first_head = pid // (section_size * num_tiles) * section_size
        within = pid - first_head * num_tiles
        tile, head = divmod(within, min(section_size, num_heads - first_head))
        assert out.tolist() == [num_tiles - 1 - tile if last_first else tile, first_head + head]


@triton.jit
def _visible_kernel(out, scores, start_row, num_rows, num_columns, start_column, window, BLOCK: tl.constexpr):
    offset = num_columns - num_rows
    end_row = tl.minimum(start_row + BLOCK, num_rows)
    lo, full_lo, full_hi, hi = visible_range(start_row + offset, end_row + offset, num_columns, window, BLOCK)
    tl.store(out, lo)
    tl.store(out + 1, full_lo)
    tl.store(out + 2, full_hi)
    tl.store(out + 3, hi)
    rows = start_row + tl.arange(0, BLOCK)
    s = add_alibi(tl.zeros([BLOCK, BLOCK], tl.float32), rows, start_column, offset, 1.0)
    s = mask_scores(s, rows, start_column, num_columns, offset, window)
    places = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(scores + places, s)


LAST = MAX_ROWS - 1
FARTHEST = 2**30  # the limit of a window's side, see `attention_options`


@pytest.mark.parametrize("window", list(itertools.product((None, 0, FARTHEST), repeat=2)), ids=str)
@pytest.mark.parametrize(
    ("start_row", "num_rows", "num_columns", "start_column"),
    [
        (LAST // 16 * 16, MAX_ROWS, MAX_ROWS, LAST // 16 * 16),
        (LAST // 16 * 16, MAX_ROWS, MAX_ROWS, 0),
        (0, MAX_ROWS, MAX_ROWS, LAST // 16 * 16),
        (0, MAX_ROWS, 1, 0),
        (LAST // 16 * 16, MAX_ROWS, 0, 0),
        (0, 1, MAX_ROWS, LAST // 16 * 16),
        (0, 1, MAX_ROWS, 0),
    ],
)
def test_what_the_farthest_rows_see(start_row, num_rows, num_columns, start_column, window):
    block = 16
    out, scores = torch.full((4,), -7, dtype=torch.int32), torch.zeros(block, block)
    with guard():
        _visible_kernel[(1,)](out, scores, start_row, num_rows, num_columns, start_column, window, BLOCK=block)
    position = torch.arange(start_row, start_row + block)[:, None] + num_columns - num_rows
    column = torch.arange(start_column, start_column + block)[None, :]
    visible = column < num_columns
    left, right = window
    if left is not None:
        visible = visible & (column >= position - left)
    if right is not None:
        visible = visible & (column <= position + right)
    assert torch.equal(scores > float("-inf"), visible.expand(block, block))
    lo, full_lo, full_hi, hi = out.tolist()
    assert 0 <= lo <= full_lo <= hi
    assert full_lo <= full_hi <= max(hi, full_lo)
    in_range = (column >= lo) & (column < hi)
    rows_that_exist = torch.arange(start_row, start_row + block)[:, None] < num_rows
    assert not (visible & rows_that_exist & ~in_range).any()


@triton.jit
def _spare_rows_kernel(out, cu_seqlens, num_rows, program, end, num_own, ROWS_EACH: tl.constexpr):
    left_over = slots_left_over(program, end, 128, ROWS_EACH)
    rows, mask, _ = spare_rows(cu_seqlens, 1, num_rows, left_over, num_own, 128, ROWS_EACH)
    tl.store(out + tl.arange(0, 128), tl.where(mask, rows, -1))


@pytest.mark.parametrize("rows_each", [1, 128])
def test_spare_rows_of_the_largest_batches(rows_each):
    used = MAX_ROWS - 3
    tiles = tiles_each(used, MAX_ROWS, 1, 128) * rows_each
    out = torch.full((128,), -7, dtype=torch.int64)
    with guard():
        cu_seqlens = torch.tensor([0, used], dtype=torch.int32)
        num_own = used * rows_each - (tiles - 1) * 128
        _spare_rows_kernel[(1,)](out, cu_seqlens, MAX_ROWS, tiles - 1, used, num_own, ROWS_EACH=rows_each)
    assert out[out >= 0].max() == MAX_ROWS * rows_each - 1
