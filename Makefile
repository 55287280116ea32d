# make perf: errors and speed of the kernels.   make test: the tests.   make gpu: checks and benchmarks that need a GPU.
# perf and test need python3 (3.10+) with venv, and install everything else into .venv. gpu uses the torch, triton and
# pytest of python3, and writes its results to the folder OUT.

PYTHON ?= python3
GPU := $(wildcard /dev/nvidia0 /dev/kfd)$(shell nvidia-smi -L 2>/dev/null | grep ^GPU)
PYTEST = OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -n logical --dist worksteal

.PHONY: perf gpu test test-full test-oldest test-emulated test-engines test-draws test-mutants test-mutations lint docs clean

perf: .venv/installed
	.venv/bin/python -m perf

gpu:
	$(PYTHON) -m perf gpu --minutes 9 $(if $(OUT),--out $(OUT))

# Triton interprets or compiles for a whole process, so there are two runs. On a machine with a GPU, the second one also
# runs the tests of the first on it. TRITON_ATTN_TESTS=ci adds the other tests of CI.
test: .venv/installed
	TRITON_INTERPRET=1 $(PYTEST) --nbmake tests notebooks
	$(PYTEST) tests

test-full: export TRITON_ATTN_TESTS = full
test-full: test

test-oldest: .venv-oldest/installed
	TRITON_INTERPRET=1 $(PYTEST) -m oldest tests
	$(PYTEST) -m oldest tests

# Tests on compiled code and CPU tensors, which tests make where no GPU is visible. Only files with the marker are
# collected.
EMULATED = $(shell grep -rl --include='test_*.py' pytest.mark.emulated tests)

test-emulated: .venv/installed .venv-oldest/installed
	for environment in .venv .venv-oldest; do for arch in sm_80 sm_90; do \
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $$environment/bin/python -m pytest -n logical --dist worksteal -m emulated --emulate $$arch $(EMULATED) \
	|| exit; done; done

# vLLM's own classes and diffusers' back ends on a CPU, in an environment of their own: 340 MB, Python 3.11 or newer.
# Without visible devices vLLM imports triton where no GPU is.
test-engines: .venv-engines/installed
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(PYTEST) tests/engines

# All random calls of the kernels of hopper.py, each in 20 schedules, which takes hours.
test-draws: export TRITON_ATTN_TESTS = full
test-draws: .venv/installed .venv-oldest/installed
	for environment in .venv .venv-oldest; do \
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $$environment/bin/python -m pytest -n logical --dist worksteal --emulate sm_90 \
	--emulate-schedules 20 tests/flash/test_random.py tests/mla/test_random.py -k "kernel_of_hopper or several_tiles" || exit; done

# Removes one barrier, wait or fence at a time.
test-mutations: export TRITON_ATTN_TESTS = full
test-mutations: .venv/installed .venv-oldest/installed
	for environment in .venv .venv-oldest; do \
	OMP_NUM_THREADS=1 $$environment/bin/python -m pytest -n logical --dist worksteal tests/toolchain/test_emulator_mutations.py \
	|| exit; done

# Plants one fault at a time, which takes an hour or two. NAMES="F01 PAGED" selects some.
test-mutants: .venv/installed
	.venv/bin/python tests/mutants/mutants.py $(NAMES)

lint: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/basedpyright --pythonpath .venv/bin/python

# The site, in build/site. A broken link is an error.
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/installed
	.venv/bin/python -m mkdocs build

clean:
	rm -rf .venv .venv-engines .venv-oldest build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: pyproject.toml
	$(install)
	touch $@

# The last step is one of its own, since torch may pin another triton.
.venv-oldest/installed: EXTRAS = perf,test
.venv-oldest/installed: pyproject.toml
	$(install)
	$(PIP) triton==3.6.0 'numpy<2.4'
	touch $@

# vLLM without what it needs a GPU for, and what its attention layers import.
.venv-engines/installed: EXTRAS = test
.venv-engines/installed: pyproject.toml
	$(install)
	$(PIP) --no-deps vllm==0.33.0 xgrammar==0.2.8 llguidance depyf gguf openai-harmony diffusers==0.42.1
	$(PIP) aiohttp apache-tvm-ffi==0.1.11 blake3 cachetools cbor2 cloudpickle einops fastapi importlib_metadata lark msgspec openai \
	opentelemetry-sdk partial-json-parser pillow prometheus_client psutil py-cpuinfo pybase64 pydantic \
	pydantic-settings python-json-logger pyzmq regex requests sentencepiece setproctitle uvloop watchfiles
	touch $@

PIP = $(@D)/bin/python -m pip install
EXTRAS = dev

# The project, editable; nothing is downloaded if all it needs is there. PIP_EXTRA_INDEX_URL and the like are heeded.
define install
	$(PYTHON) -m venv $(@D)
	$(if $(GPU),$(share_torch),$(PIP) torch==2.13.0)
	$(PIP) --no-index --no-build-isolation -e '.[$(EXTRAS)]' 2>/dev/null || $(PIP) -e '.[$(EXTRAS)]'
endef

# On a GPU the torch that python3 has is the right one: the environment sees python3's packages, also where python3 lives
# in an environment itself. Without a GPU torch comes first, pinned: the newest may be a GPU build of several GB.
define share_torch
	! $(PYTHON) -c 'import torch' 2>/dev/null || \
	$(PYTHON) -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' > \
	"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/python3.pth"
endef
