"""Write the folder that Hugging Face's `kernels` loads: python packaging/hf_kernels/build.py OUT

OUT/build/ gets a variant for CUDA, ROCm and the CPU, each complete by itself: metadata.json, __init__.py, and the
modules of triton_attn that flash-attn's functions import, which import each other by relative names. A variant that is
there is replaced. Nothing is compiled, and nothing is published.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from perf.model.house import PACKAGE, imports_of, modules_of  # noqa: E402  found by the line above

NAME, VERSION = "triton-flash-attn2", 1
BACKENDS = ("cuda", "rocm", "cpu")
ROOTS = ("triton_attn.interop.flash_attn", "triton_attn.toolchain.interpreter")  # the second is imported by its name
INIT = '''"""The functions of flash-attn 2, written in Triton: MHA, MQA and GQA; dense, varlen and paged."""

from .interop.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
'''


def build(out: Path) -> list[Path]:
    """Write all variants under `out`. Returns their folders."""
    files = sources()
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]
    variants = [out / "build" / f"torch-{backend}" for backend in BACKENDS]
    for variant, backend in zip(variants, BACKENDS):
        identity = f"_{NAME.replace('-', '_')}_{backend}_{digest}"
        metadata = {"id": identity, "name": NAME, "version": VERSION, "license": "Apache-2.0", "python-depends": []}
        shutil.rmtree(variant, ignore_errors=True)
        _write(variant / "metadata.json", json.dumps(metadata | {"backend": {"type": backend}}, indent=2) + "\n")
        for file, text in files.items():
            # Operators are global in torch, and triton_attn or another version of the kernel may be loaded too.
            _write(variant / file, text.replace('"triton_attn::', f'"{identity}::'))
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    shutil.copy(Path(__file__).with_name("README.md"), out / "README.md")
    return variants


def sources() -> dict[str, str]:
    """{path in a variant: text} of the modules that ROOTS import, of their packages, and of the tuned tables."""
    modules = modules_of()
    found, left = set(), list(ROOTS)
    while left:
        module = left.pop()
        if module in found or module not in modules or module == PACKAGE.name:
            continue
        found.add(module)
        left += [module.rpartition(".")[0], *(imported for imported, _ in imports_of(module, modules))]
    paths = [*(modules[module] for module in found), *(PACKAGE / "tuned").glob("*.json")]
    return {"__init__.py": INIT} | {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(paths)}


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    for folder in build(parser.parse_args().out):
        print(folder)
