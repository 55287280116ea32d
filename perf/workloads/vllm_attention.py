"""vLLM's Triton attention, imported from where vLLM is installed. This project has no copy of it."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

ENGINES = Path(__file__).parents[2] / ".venv-engines"
MODULE = "vllm/v1/attention/ops/triton_unified_attention.py"


def find(folder=None):
    """The folder that contains the package vllm: `folder`, or else that of an installed vLLM, or else that of the
    environment of `make test-engines`.

    Raises:
        FileNotFoundError: there is no vLLM, or it has no unified_attention.
    """
    if folder is None:
        spec = find_spec("vllm")
        installed = [Path(spec.origin).parents[1]] if spec and spec.origin else []
        folders = installed + sorted(ENGINES.glob("lib/python*/site-packages"))
    else:
        folders = [folder]
    found = next((each for each in folders if (each / MODULE).exists()), None)
    if found is None:
        where = f"in {folders[0]}" if folders else "installed"
        raise FileNotFoundError(
            f"vllm: expected {MODULE} {where}, got none. `make .venv-engines/installed` installs vLLM; --vllm FOLDER "
            "names the folder that contains the package"
        )
    return found.resolve()


def load(folder):
    """(unified_attention, version of vLLM). What vLLM imports and this environment has not comes from `folder` too.

    Raises:
        ValueError: this environment has another vLLM.
    """
    sys.path.append(str(folder))
    # Without visible devices vLLM imports triton where no GPU is.
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", VLLM_LOGGING_LEVEL="ERROR"):
        module = import_module(MODULE.removesuffix(".py").replace("/", "."))
    if not Path(module.__file__).resolve().is_relative_to(folder):
        raise ValueError(f"vllm: expected that of {folder}, got {module.__file__} of this environment")
    return module.unified_attention, import_module("vllm").__version__
