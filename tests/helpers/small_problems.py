"""Problems with a few tokens, and invented times, for tests of measurements without a GPU."""

from perf.harness.timing import Percentiles
from perf.workloads.problems import DecodeProblem, Problem

PROBLEM = Problem(batch=1, seqlen=64, num_heads=2, head_dim=16, causal=True)
DECODE = DecodeProblem(batch=3, seqlen_k=37, num_heads_q=4, num_heads_kv=2, head_dim=16, page_size=8)


def fake_times(functions):
    for function in functions.values():
        function()
    return {name: Percentiles(1.0, 2.0, 4.0) for name in functions}
