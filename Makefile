# make perf: what the kernels do here.   make test: whether they are right.   make gpu: what only a GPU can tell.
# The first two need python3 (3.10+) with venv, and make what else they need in .venv; make gpu takes the torch, triton
# and pytest that python3 has; OUT=folder is where its results go.

PYTHON ?= python3
GPU := $(wildcard /dev/nvidia0 /dev/kfd)$(shell nvidia-smi -L 2>/dev/null | grep ^GPU)
PYTEST = OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -n logical --dist worksteal

.PHONY: perf gpu test test-full test-oldest test-emulated test-mutants test-mutations lint docs clean

perf: .venv/installed
	.venv/bin/python -m perf

gpu:
	$(PYTHON) -m perf gpu --minutes 9 $(if $(OUT),--out $(OUT))

# Triton interprets or compiles for a whole process, so there are two runs. The second also runs the tests of the first
# on the GPU, where there is one. TRITON_ATTN_TESTS=ci adds what CI runs besides.
test: .venv/installed
	TRITON_INTERPRET=1 $(PYTEST) --nbmake tests notebooks
	$(PYTEST) tests

test-full: export TRITON_ATTN_TESTS = full
test-full: test

test-oldest: .venv-oldest/installed
	TRITON_INTERPRET=1 $(PYTEST) -m oldest tests
	$(PYTEST) -m oldest tests

# As compiled, on CPU tensors: other files than those with the marker need not be collected.
EMULATED = $(shell grep -rl --include='test_*.py' pytest.mark.emulated tests)

test-emulated: .venv/installed .venv-oldest/installed
	for environment in .venv .venv-oldest; do for arch in sm_80 sm_90; do \
	OMP_NUM_THREADS=1 $$environment/bin/python -m pytest -n logical --dist worksteal -m emulated --emulate $$arch $(EMULATED) \
	|| exit; done; done

# Removes a barrier, a wait or a fence at a time.
test-mutations: export TRITON_ATTN_TESTS = full
test-mutations: .venv/installed
	$(PYTEST) tests/toolchain/test_emulator_mutations.py

# Plants a fault at a time; it takes an hour or two. NAMES="F01 PAGED" are some of them.
test-mutants: .venv/installed
	.venv/bin/python tests/mutants/mutants.py $(NAMES)

lint: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/basedpyright --pythonpath .venv/bin/python

# The site, in build/site. A page with a link that leads nowhere fails.
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/installed
	.venv/bin/python -m mkdocs build

clean:
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .ruff_cache .hypothesis
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
