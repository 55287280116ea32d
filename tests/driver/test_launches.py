"""Every public function through Triton's real launcher, over a stub of libcuda. compile_only cannot test this.

The launcher's own C code is built and called, tensor descriptors are expanded and encoded, grids are checked. A launch
that fails here fails on every GPU.
"""

import shutil

import pytest
from hopper_cases import write_record
from stub_driver import launches_of, run_python

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as Triton's launcher does on a GPU"),
]


# One call per kernel, since most of the time is compilation.
EVERY_KERNEL = "flash 128, det|backward alone|paged chunk|append|mla decode, fp8|mla prefill, abs|mla prefill, mat"


@pytest.mark.parametrize(
    ("arch", "pattern"),
    [
        ("sm_90", EVERY_KERNEL),
        pytest.param("sm_80", EVERY_KERNEL, marks=pytest.mark.ci),
        pytest.param("sm_100", EVERY_KERNEL, marks=pytest.mark.ci),
        pytest.param("sm_90", "", marks=[pytest.mark.oldest, pytest.mark.ci]),
        pytest.param("sm_80", "", marks=pytest.mark.full),
        pytest.param("sm_100", "", marks=pytest.mark.full),
    ],
)
def test_every_public_function_launches(stub, arch, pattern, record_property):
    """The parameters are the arguments in the order and types of the PTX."""
    launches = launches_of(stub, arch, pattern, TRITON_ATTN_KERNELS="portable")
    kernels = {kernel for of_call in launches.values() for kernel in of_call}
    assert all(launches.values()), launches
    record_property("figure", f"{arch}: {len(launches)} calls, {sum(map(len, launches.values()))} launches")
    assert kernels >= {"_flash_fwd_kernel", "_flash_bwd_delta_kernel", "_flash_bwd_dkdv_kernel", "_flash_bwd_dq_kernel"}
    assert kernels >= {"_paged_fwd_kernel", "_mla_absorbed_kernel", "_mla_prefill_kernel", "_copy_kv_pages_kernel"}
    assert kernels >= {"_append_kv_cache_kernel", "_append_latent_cache_kernel"}


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("word", "kernel"),
    [
        pytest.param("64, packed", "_flash_fwd_hopper_kernel", marks=pytest.mark.ci),
        ("128 heads", "_mla_decode_hopper_kernel"),
        ("64 heads, fp8 rows", "_mla_decode_hopper_kernel"),
    ],
)
def test_the_kernels_of_hopper_launch(word, kernel, stub):
    (of_call,) = launches_of(stub, "sm_90", word, TRITON_ATTN_KERNELS="hopper").values()
    assert kernel in of_call


@pytest.mark.parametrize(("figure", "kernel"), [(500, "_flash_fwd_hopper_kernel"), (499, "_flash_fwd_kernel")])
def test_a_record_decides_which_kernel_launches(figure, kernel, stub, tmp_path):
    """Of a run in which the portable kernel had 500 TFLOP/s."""
    table = write_record(
        tmp_path / "sm_90.json",
        family="flash_hopper",
        dtype="bfloat16",
        case={"head_dim": 64, "causal": True},
        buckets={"seqlen_k": 1024},
        config={"block_n": 128, "groups": 2, "num_stages": 2, "lazy": False, "tiles": 1},
        figure=figure,
        portable=500,
    )
    (of_call,) = launches_of(stub, "sm_90", "64, packed", TRITON_ATTN_TUNED=str(table)).values()
    assert kernel in of_call


WARMED_UP = """
from unittest import mock
import public_calls, triton_attn
from triton.runtime import build

public_calls.use_stub("sm_90")
triton_attn.warmup(num_heads_q=1, head_dim=16, functions=["copy_kv_pages"], arch="sm_90")
with mock.patch.object(build, "_build", side_effect=AssertionError("the C compiler was called")):
    caches = [public_calls.torch.zeros(2, 16, 1, 16, dtype=public_calls.BF16) for _ in range(2)]
    triton_attn.copy_kv_pages(caches, public_calls.int32(0), public_calls.int32(1))
"""


@pytest.mark.oldest
def test_a_warmup_leaves_nothing_to_a_c_compiler(stub, tmp_path):
    done = run_python(stub, "sm_90", "-c", WARMED_UP, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "launch _copy_kv_pages_kernel" in done.stdout


@pytest.mark.ci
def test_every_launch_goes_to_the_device_of_its_tensors(stub):
    """Two devices: the first is current, and the tensors are on the second."""
    calls = "64, packed|backward alone|paged decode, four|append|merge|mla decode, fp8|mla prefill, mat"
    launches = launches_of(stub, "sm_90", calls, TRITON_ATTN_KERNELS="portable", STUB_DEVICE="1")
    assert len(launches) == 13
    assert all(launches.values()), launches
