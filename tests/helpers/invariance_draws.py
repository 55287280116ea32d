"""Draws of batches for tests of batch invariance."""

from hypothesis import strategies as st


@st.composite
def batches(draw, lengths):
    """[(sequence, first query, end of its keys)], and how many entries its table has to spare."""
    chosen = draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, max_size=4))
    parts = []
    for sequence in chosen:
        end = draw(st.integers(1, lengths[sequence]))
        count = draw(st.sampled_from([0, 1, 1, 2, 17, 70]))
        parts.append((sequence, max(0, end - count), end))
    return parts, draw(st.sampled_from([0, 1, 40]))


@st.composite
def chunks(draw, lengths_q, lengths_k, *, causal, whole):
    """(sequence, first query, end): a chunk, whose last key is that of its last query. whole: it has all queries."""
    i = draw(st.integers(0, len(lengths_q) - 1))
    num_queries = lengths_q[i]
    if whole:
        return i, 0, num_queries
    without_key = min(max(num_queries - lengths_k[i], 0), num_queries)
    end = draw(st.integers(without_key, num_queries)) if causal else num_queries
    return i, draw(st.integers(0, end)), end
