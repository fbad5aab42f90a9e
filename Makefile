# Two commands do everything: `make demo` and `make test`. Both set up what is missing first.
.PHONY: help setup image demo check test bench docs clean
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: ## system packages, .venv, Apptainer (needs root and Debian)
	@.ci/setup

image: setup ## the CPU training image
	@.ci/image

demo: image ## the main job on a two-node Slurm cluster on this machine
	@.ci/demo

check: setup ## lint, types, unit and property tests: under two minutes
	@.ci/check

test: image check ## the whole test suite: real Slurm, Apptainer, MPI
	@.ci/test

bench: image ## every benchmark beside its peers
	@.ci/bench

docs: setup ## regenerate docs/reference from the code
	@$(PYTHON) docs/generate.py

clean: ## remove .venv and caches of this checkout
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
