# make demo    convert a real model to INT8, load it back, compare
# make digits  quantize a small diffusion model by every recipe, draw, compare
# make journey take that model from a Hub, make INT8 of it, judge it, publish it, use it elsewhere
# make test    the test suite
# make lint    ruff (lint and format) and mypy --strict
# make fix     let ruff repair and format what it can
# make clean   remove what the above made, the environment included

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TORCH  := $(shell grep '^torch==' constraints.txt)

# Two processes share the machine's cores in `make test`; more threads would only fight. Tests that
# share a cluster (`xdist_group`) go to the same process.
TEST_PROCESSES ?= 2
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo digits journey test lint fix clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fast,ray,dask,evaluate,plot,test,models,oracles,dev,demo]'
	@touch $@

demo: $(READY)
	@$(OFFLINE) $(BIN)/python examples/minilm/demo.py

digits: $(READY)
	$(OFFLINE) $(BIN)/python examples/digits/ablation.py
	$(OFFLINE) $(BIN)/python examples/digits/ablation.py --draw-only examples/digits/results

journey: $(READY)
	$(BIN)/python examples/digits/journey.py

test: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
