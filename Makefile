# `make help` lists the targets. Each does the set-up it needs: .venv holds everything, `rm -rf .venv` resets it.
SHELL := /bin/sh
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

# Any build of torch that satisfies pyproject.toml, with pip's options if it needs some: make generate TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# The interpreter to build .venv with; the first fit one on PATH unless given.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10 python3.14
JOBS ?= 2
RUNS ?= runs
PIP_TOOL := pip==26.3
UV_TOOL := uv==0.13.9

# A prompt may hold any character. `$(value ...)` hands it over unexpanded in P, and only there: make would export PROMPT
# itself expanded, so that a `$(` in a prompt would be run or refused.
export P := $(value PROMPT)
unexport PROMPT
unexport ARGS
export TORCH_SPEC := $(TORCH)

CASCADE = .venv/bin/cascade
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input
# OpenMP threads that spin while they wait take the cores from the other test processes.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PYTEST := $(TEST_ENV) .venv/bin/python -m pytest -n $(JOBS) --dist worksteal

LOCKED := .venv/.locked
READY := .venv/.ready

# Without TORCH on the command line or in the environment, what .venv was built with stays.
ifneq ($(origin TORCH),file)
ifneq ($(TORCH),$(shell cat .venv/.torch 2>/dev/null))
CLEAR := --clear
$(LOCKED): FORCE
endif
endif

define PIN_TORCH
import importlib.metadata, pathlib
pin = pathlib.Path(".venv/torch.txt").absolute()
pin.write_text(f"torch=={importlib.metadata.version('torch')}\n")
pathlib.Path(".venv/pip.conf").write_text(f"[install]\nconstraint = {pin.as_uri()}\n")
endef
export PIN_TORCH

# The first fit interpreter, in $found, or why there is none.
define FIND_PYTHON
found=; for p in $(PYTHON); do \
	if "$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; then found=$$p; break; fi; done; \
if [ -z "$$found" ]; then \
	echo 'error: python: none of "$(PYTHON)" is Python 3.10 to 3.14. Fix: install one, or make PYTHON=/path/to/python3' >&2; exit 4; fi; \
if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	echo "error: python: $$found has no venv or ensurepip. Fix: apt install python3-venv, or make PYTHON=/path/to/python3" >&2; exit 4; fi
endef

# The peers of the benchmark want packages of their own, so they have an environment of their own, with .venv's build of torch.
BENCH := benchmarks/.venv
BENCH_PIP := $(BENCH)/bin/python -m pip --disable-pip-version-check --no-input
ifeq ($(origin TORCH),file)
export BENCH_TORCH := $(or $(shell cat .venv/.torch 2>/dev/null),$(TORCH))
else
export BENCH_TORCH := $(TORCH)
endif
ifneq ($(BENCH_TORCH),$(shell cat $(BENCH)/.torch 2>/dev/null))
$(BENCH)/.ready: FORCE
endif

.PHONY: help setup generate train-tiny assets report test test-fast bench lint types format lock clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## .venv with all that is needed (the other targets do this by themselves)

generate: $(READY)  ## a video from a prompt: make generate PROMPT="..." [ARGS="seed=1 out=DIR"]
	@$(CASCADE) generate $(if $(value PROMPT),prompt="$$P") $(value ARGS)

report: $(READY)  ## docs/results.md from the evaluations below RUNS=runs: make report [RUNS=DIR] [ARGS="out=DIR"]
	@$(CASCADE) report runs='$(RUNS)' cards=checkpoints/tiny $(value ARGS)

train-tiny: $(READY)  ## every shipped weight again, from nothing, into runs/train; give it again to go on: make train-tiny [ARGS="jobs=5 only=[base]"]
	@$(CASCADE) train recipe=tiny $(value ARGS)

assets: $(READY)  ## fetch the networks that FVD, FID and LPIPS of the papers need (150 MB; `make test` then tests them too)
	@$(CASCADE) assets $(value ARGS)

test: $(READY)  ## the whole suite, in JOBS=2 processes
	$(PYTEST) $(value ARGS)

test-fast: $(READY)  ## the suite without the slow tests
	$(PYTEST) -m "not slow" $(value ARGS)

bench: $(BENCH)/.ready  ## our denoiser and cascade beside the peers' (hours; minutes with ARGS="--quick --json FILE")
	@$(BENCH)/bin/python benchmarks/peers.py $(value ARGS)

lint: $(READY)  ## ruff: rules and format
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: $(READY)  ## mypy --strict on cascade and stages
	.venv/bin/mypy

format: $(READY)  ## put every file into ruff's format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

lock: $(READY)  ## rebuild requirements.lock from pyproject.toml with the newest versions
	.venv/bin/python -m venv .venv/lock
	.venv/lock/bin/python -m pip install --quiet --disable-pip-version-check $(UV_TOOL)
	rm -f uv.lock
	.venv/lock/bin/uv export --quiet --format requirements-txt --no-emit-project --no-emit-package torch \
		--python .venv/bin/python --output-file requirements.lock
	rm -rf uv.lock .venv/lock

clean:  ## remove the caches, keep .venv and runs
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name .venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(READY): $(LOCKED) pyproject.toml
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@touch $@

# torch comes first and by itself: its builds differ (CUDA, CPU), so no lock can hold its hash. --no-deps keeps what follows
# from replacing it, and pip.conf does the same for whatever is installed into .venv by hand.
# Bytecode is compiled at the end, by all cores and without what is not used: a third of the time pip takes for it.
$(LOCKED): requirements.lock
	@$(FIND_PYTHON); \
	"$$found" -m venv $(CLEAR) .venv
	@rm -f .venv/pip.conf
	@$(PIP) install -qq --no-compile $(PIP_TOOL)
	@echo "set-up 1/3: $$TORCH_SPEC" >&2
	@set -f; $(PIP) install --no-compile $$TORCH_SPEC
	@echo 'set-up 2/3: requirements.lock' >&2
	@$(PIP) install -qq --no-compile --no-deps --require-hashes --no-build-isolation -r requirements.lock
	@.venv/bin/python -c "$$PIN_TORCH"
	@echo 'set-up 3/3: bytecode' >&2
	@.venv/bin/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/(?!auto/|t5/)|/diffusers/pipelines/' .venv/lib || :
	@printf '%s' "$$TORCH_SPEC" > .venv/.torch
	@touch $@

$(BENCH)/.ready: benchmarks/requirements.txt
	@$(FIND_PYTHON); \
	"$$found" -m venv --clear $(BENCH)
	@$(BENCH_PIP) install -qq $(PIP_TOOL)
	@echo "set-up of the benchmark 1/2: $$BENCH_TORCH" >&2
	@set -f; $(BENCH_PIP) install -qq $$BENCH_TORCH
	@echo 'set-up of the benchmark 2/2: the peers' >&2
	@$(BENCH_PIP) install -qq -r benchmarks/requirements.txt
	@printf '%s' "$$BENCH_TORCH" > $(BENCH)/.torch
	@touch $@
