"""The installed package is complete: the emulator's C++ and its stub driver, tuned tables, type markers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALLED = """
import setuptools
distribution = setuptools.Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
distribution.include_package_data = False  # what pyproject.toml says alone, not what git knows
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
print(*command.get_outputs(include_bytecode=False), sep="\\n")
"""


def test_a_wheel_has_every_file_of_the_package():
    pytest.importorskip("setuptools")
    done = subprocess.run([sys.executable, "-c", INSTALLED], cwd=ROOT, capture_output=True, text=True, check=True)
    installed = {line.partition("triton_attn/")[2] for line in done.stdout.splitlines() if "triton_attn/" in line}
    package = ROOT / "triton_attn"
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    assert "toolchain/emulator/core/stub_libcuda.c" in files
    assert files - installed == set()
