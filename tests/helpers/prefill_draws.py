"""Random calls of mla_prefill."""

from hypothesis import strategies as st
from prefill_cases import LAYOUTS, Case

from triton_attn.mla.configs import MlaPrefillConfig


@st.composite
def cases(draw, mode, dtype):
    config = MlaPrefillConfig(draw(st.sampled_from([16, 64, 32])), draw(st.sampled_from([32, 64, 16])), 4, 1, 32)
    packed = draw(st.booleans())
    batch = draw(st.sampled_from([1, 2, 3, 0]))
    lengths_q = st.sampled_from([1, 0, config.block_m, config.block_m + 1]) | st.integers(0, 2 * config.block_m)
    lengths_k = st.sampled_from([1, 0, config.block_n, config.block_n + 1]) | st.integers(0, 2 * config.block_n)
    if packed:
        seqlens_q, seqlens_k = (draw(st.tuples(*[lengths] * batch)) for lengths in (lengths_q, lengths_k))
    else:
        seqlens_q, seqlens_k = ((draw(lengths),) * batch for lengths in (lengths_q, lengths_k))
    nope, v, num_heads = (draw(st.sampled_from(x)) for x in ([32, 16, 1, 71, 128], [32, 16, 1, 71, 128], [1, 2, 3, 5]))
    spare_rows = draw(st.sampled_from([0, 5])) if packed else 0
    # All heads in a chunk, or one or two, or splits of the keys of one head.
    rows_q, rows_k = sum(seqlens_q) + spare_rows, sum(seqlens_k) + spare_rows
    per_head = rows_k * (nope + v) * dtype.itemsize
    sums = rows_q * (v + num_heads) * 4 + 128 * (nope + v) * dtype.itemsize
    bounds = [2**28, per_head, 2 * per_head, sums, sums + per_head // 3]
    bounds = [max(bound, min(per_head, sums)) for bound in bounds]
    return Case(
        mode=mode,
        dtype=dtype,
        packed=packed,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        num_heads=num_heads,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=draw(st.sampled_from([16, 64, 1, 24, 8])),
        kv_lora_rank=draw(st.sampled_from([64, 16, 40, 100])),
        v_head_dim=v,
        causal=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from([None, None, 1e-9, 0.07, 0.2])),
        max_workspace_bytes=draw(st.sampled_from(bounds)) if mode == "materialized" else 2**28,
        q_layout=draw(st.sampled_from(list(LAYOUTS))),
        one_projection=draw(st.booleans()),
        spare_rows=spare_rows,
        config=config,
        seed=draw(st.integers(0, 2**16)),
    )
