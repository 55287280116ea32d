"""Which head and which tile of queries a program takes."""

import triton
import triton.language as tl


@triton.jit
def assign_tile(pid, num_tiles, num_heads, section_size, LONGEST_FIRST: tl.constexpr):
    """Program -> (tile of queries, head), heads counted over the whole batch.

    Heads are taken in sections of section_size whose keys and values fit in the L2 cache together. Inside a section
    the last tiles of all heads come first: under a causal mask they are the longest, and short ones fill the gaps at
    the end.
    """
    if LONGEST_FIRST:
        section = pid // (section_size * num_tiles)
        first_head = section * section_size
        heads_here = tl.minimum(section_size, num_heads - first_head)
        within = pid - first_head * num_tiles
        return num_tiles - 1 - within // heads_here, first_head + within % heads_here
    else:
        return pid % num_tiles, pid // num_tiles
