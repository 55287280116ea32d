import subprocess
from pathlib import Path

import pytest
import triton

STUB = Path(__file__).parents[2] / "triton_attn/toolchain/emulator/core/stub_libcuda.c"


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """The folder with libcuda.so.1 in it."""
    folder = tmp_path_factory.mktemp("stub")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", STUB, "-o", library], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return folder
