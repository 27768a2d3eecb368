# hforce: `make help` lists what there is.

VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# glibc otherwise gives memory back between steps and faults it in again: 2.5 times slower training.
MALLOC := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 OMP_WAIT_POLICY=PASSIVE
DEMO   := outputs/demo
GPU    := outputs/gpu
WAN     = $(VENV)/bin/hforce bench -m wan2.1-t2v-1.3b --random-weights --set bench.prompts=docs/h200/prompt.txt

.DEFAULT_GOAL := help
.PHONY: help install test test-gpu lint fmt types check tiny tiny-judge demo bench bench-gpu wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## a virtual environment with hforce and its tools

$(STAMP): pyproject.toml constraints.txt
	@found=; for name in python3.13 python3.12 python3.11 python3; do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then found=$$name; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "hforce needs Python 3.11 or newer with venv; none of python3.13, python3.12, python3.11, python3 is that." >&2; \
	  echo "Install one (for example: apt install python3.11-venv, or brew install python) and run make again." >&2; \
	  exit 1; fi; \
	$(PYTHON) -c '' 2>/dev/null || $$found -m venv $(VENV)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

test: $(STAMP) ## the tests that need no GPU, one thread on every core
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto

test-gpu: $(STAMP) ## the tests that need a GPU
	@$(PYTHON) -m pytest -m gpu

lint: $(STAMP) ## ruff check
	@$(PYTHON) -m ruff check .

fmt: $(STAMP) ## ruff format
	@$(PYTHON) -m ruff format .

types: $(STAMP) ## mypy
	@$(PYTHON) -m mypy

check: lint types test ## all of these

tiny: $(STAMP) ## train the tiny model again
	@$(MALLOC) $(PYTHON) -m hforce.toy.train

tiny-judge: $(STAMP) ## try the judge of the tiny world on true and corrupted videos
	@$(PYTHON) -m hforce.toy.judge

demo: $(STAMP) ## a one-minute video from the tiny model
	@$(VENV)/bin/hforce generate --prompt-file prompts/demo.txt --duration 60s -o $(DEMO)

bench: $(STAMP) ## compare caches on the tiny model
	@$(VENV)/bin/hforce bench

bench-gpu: $(STAMP) ## what docs/performance.md tells of an H200, on the GPU that is here
	@mkdir -p $(GPU)
	@$(WAN) --setups window,hf-10,hf-11,reference-eager -d 30s --set 'bench.decoders=[taehv,wan-vae]' \
	  --json $(GPU)/bench.json --plot $(GPU)/bench.png
	@$(WAN) --setups hf-10 -d 10m --set 'bench.decoders=[taehv]' --json $(GPU)/hf-10.json --plot $(GPU)/hf-10.png
	@$(WAN) --setups hf-11 -d 10m --set 'bench.decoders=[taehv]' --json $(GPU)/hf-11.json --plot $(GPU)/hf-11.png
	@$(WAN) --kernels --set cache.setup=hf-11 --json $(GPU)/kernels.json

wheel: $(STAMP) ## dist/hforce-*.whl
	@$(PYTHON) -m build --wheel

clean: ## remove what tools left, but neither .venv nor outputs
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
