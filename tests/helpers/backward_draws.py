"""Random calls of the backward pass."""

import attention_draws
from attention_cases import HEAD_DIMS
from backward_cases import DOUT_LAYOUTS, BackwardCase
from hypothesis import strategies as st

from triton_attn.dense.backward_configs import BackwardConfig
from triton_attn.flash.configs import FlashConfig


@st.composite
def cases(draw, dtype, varlen):
    case = draw(attention_draws.cases(dtype, varlen))
    head_dims = st.sampled_from(HEAD_DIMS) | st.integers(1, 512)

    def tile(use_tma):
        # At least the forward's tiles, by which lengths are drawn: the interpreter is slow with small tiles.
        block_m = draw(st.sampled_from([16, 32, 64, 128]).filter(lambda block: block >= case.config.block_m))
        block_n = draw(st.sampled_from([16, 32, 64, 128]).filter(lambda block: block >= case.config.block_n))
        # Tiles of 64 rows and 8 warps cut the chains of wide heads.
        return FlashConfig(block_m, block_n, draw(st.sampled_from([4, 8])), num_stages=1, use_tma=use_tma)

    tiles = (tile(use_tma) for use_tma in [draw(st.booleans())] * 3)
    return BackwardCase(
        **vars(case) | {"head_dim": draw(head_dims), "head_dim_v": draw(head_dims)},
        tiles=BackwardConfig(*tiles),
        deterministic=draw(st.booleans()),
        dout_layout=draw(st.sampled_from(list(DOUT_LAYOUTS))),
        dlse_layout=draw(st.none() | st.sampled_from(list(DOUT_LAYOUTS))),
    )
