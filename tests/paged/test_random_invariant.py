"""batch_invariant: a query's bits do not depend on what else is in the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invariance import KEYS, packed, short_splits
from invariance_draws import batches
from paged_cases import DEVICE, pack

from triton_attn import paged_attention, reference
from triton_attn.paged import forward

LENGTHS = 3 * KEYS + 21, KEYS, 40
OPTIONS = {
    "plain": {},
    "window": dict(window_size=(50, 0)),
    "not causal": dict(causal=False, window_size=(90, 30)),
    "softcap": dict(softcap=10.0),
    "sinks": dict(sinks=True),
    "sinks and a window": dict(sinks=True, window_size=(150, 0)),
    "alibi": dict(alibi_slopes=True),
    "packed": dict(layout="packed", window_size=(150, 0)),
    "fp8": dict(cache_dtype=torch.float8_e4m3fn, k_scale=0.5, v_scale=1.5),
    "scales of tokens, int8": dict(cache_dtype=torch.int8, token_scales=True),
    "scales of tokens, fp8": dict(cache_dtype=torch.float8_e5m2, token_scales=True, sinks=True, window_size=(150, 0)),
}


class Pool:
    """Queries and cached keys of whole prompts. Pages before a window, and slots after the keys, are NaN."""

    def __init__(
        self,
        page_size=16,
        heads=(4, 2),
        head_dim=64,
        cache_dtype=torch.float16,
        layout="usual",
        token_scales=False,
        **options,
    ):
        generator = torch.Generator().manual_seed(page_size)
        self.options = {
            name: torch.rand(heads[0], generator=generator).to(DEVICE) if x is True and name != "causal" else x
            for name, x in options.items()
        }
        self.q = torch.randn(3, max(LENGTHS), heads[0], head_dim, generator=generator).half().to(DEVICE)
        counts = [-(-n // page_size) for n in LENGTHS]
        pages = torch.randperm(sum(counts) + 1, generator=generator, dtype=torch.int32)
        self.tables = torch.full((3, max(counts)), 2**31 - 1, dtype=torch.int32)
        for row, own in zip(self.tables, pages.split([*counts, 1])):
            row[: len(own)] = own
        self.tables = self.tables.to(DEVICE)
        shape = sum(counts) + 1, page_size, heads[1], head_dim
        caches = [torch.randn(shape, generator=generator) for _ in range(2)]
        for cache in caches:
            cache[pages[-1]] = float("nan")
        if token_scales:
            for name, cache in zip(("k_scale", "v_scale"), caches):
                cache *= 20
                scales = (torch.rand(shape[0], heads[1], page_size, generator=generator) + 0.1) / 20
                scales[pages[-1]] = float("nan")
                self.options[name] = scales.to(DEVICE).transpose(1, 2)  # as in `PagedKVCache`
        self.caches = [cache.to(cache_dtype).to(DEVICE) for cache in caches]
        if layout == "packed":
            self.caches = [pack(self.caches[0], 8), pack(self.caches[1])]

    def attend(self, parts, spare=0):
        (q,), cu_seqlens, longest, lengths, table = packed(parts, self.tables, [self.q], DEVICE, spare)
        return paged_attention(
            q,
            *self.caches,
            lengths,
            table,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=longest,
            batch_invariant=True,
            return_lse=True,
            **self.options,
        )

    def whole(self):
        """out and lse of every query of the whole prompts, one prompt a call."""
        results = [self.attend([(i, 0, n)]) for i, n in enumerate(LENGTHS)]
        return [out for out, _ in results], [lse for _, lse in results]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.random
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("name", OPTIONS)
@settings(deadline=None, max_examples=4, derandomize=True)
@given(data=st.data())
def test_bits_do_not_depend_on_the_batch(name, data):
    pool = whole_prompts(name)
    parts, spare = data.draw(batches(LENGTHS))
    if pool.options.get("causal") is False:  # later keys are seen: chunks are not parts of the prompt
        parts = [(i, first - end + LENGTHS[i], LENGTHS[i]) for i, first, end in parts]
    with short_splits(forward, data.draw(st.booleans())):
        out, lse = pool.attend(parts, spare)
    expected_out = torch.cat([pool.outs[i][first:end] for i, first, end in parts])
    expected_lse = torch.cat([pool.lses[i][:, first:end] for i, first, end in parts], 1)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


POOLS = {}


def whole_prompts(name):
    """Pages of 16, of 64, which one tile divides, or of 80."""
    if name not in POOLS:
        pool = POOLS[name] = Pool((16, 64, 80)[list(OPTIONS).index(name) % 3], **OPTIONS[name])
        with short_splits(forward, None):
            pool.outs, pool.lses = pool.whole()
    return POOLS[name]


@pytest.mark.ci(but_each=3)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_attention(name):
    pool = whole_prompts(name)
    parts = [(i, 0, n) for i, n in enumerate(LENGTHS)]
    (q,), cu_seqlens, longest, lengths, table = packed(parts, pool.tables, [pool.q], DEVICE, 0)
    options = dict(cu_seqlens_q=cu_seqlens, max_seqlen_q=longest, return_lse=True, **pool.options)
    out, lse = reference.paged_attention(q, *pool.caches, lengths, table, **options)
    torch.testing.assert_close(torch.cat(pool.outs), out, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(torch.cat(pool.lses, 1), lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_without_pages(packed):
    """Whose sequences have no key."""
    q, cache = torch.randn(2, 3, 4, 64, device=DEVICE), torch.randn(5, 16, 2, 64, device=DEVICE)
    lengths, table = (
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, 0, dtype=torch.int32, device=DEVICE),
    )
    queries = {}
    if packed:
        starts = torch.tensor([0, 3, 6], dtype=torch.int32, device=DEVICE)
        q, queries = q.flatten(0, 1), dict(cu_seqlens_q=starts, max_seqlen_q=3)
    out, lse = paged_attention(q, cache, cache, lengths, table, batch_invariant=True, return_lse=True, **queries)
    assert not out.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("columns", [0, 1, 600])
@pytest.mark.parametrize("window_size", [(-1, -1), (5, 17)], ids=str)
def test_sinks_of_rows_without_keys(columns, window_size):
    """One program folds the splits of a window: it has a split to fold where there is no key."""
    q, cache = torch.randn(2, 3, 4, 64, device=DEVICE), torch.randn(5, 16, 2, 64, device=DEVICE)
    lengths, table = torch.zeros(2, dtype=torch.int32), torch.full((2, columns), 2**31 - 1, dtype=torch.int32)
    where, sinks = (lengths.to(DEVICE), table.to(DEVICE)), torch.randn(4, device=DEVICE)
    options = dict(causal=True, window_size=window_size, sinks=sinks, batch_invariant=True, return_lse=True)
    out, lse = paged_attention(q, cache, cache, *where, **options)
    assert not out.any()
    torch.testing.assert_close(lse, sinks[:, None].expand_as(lse))
