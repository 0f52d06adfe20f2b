# The two commands: `make demo` and `make test`. Both install what is missing into .venv, once.
PYTHON ?= python3
export PYTHON
BIN := .venv/bin
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test verify book record lint readme serving clean

help:     ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=/path/to/python3.11 picks the interpreter for a new .venv; PYTEST_ARGS='-k ring' narrows the tests"

demo:     ## install the core and race the all-reduce algorithms of Section 4.4
	@tools/bootstrap.sh core
	@$(BIN)/scalable run 4.4

test:     ## install what the tests need (torch, mpi4py, ...) and run them all
	@tools/bootstrap.sh test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

verify:   ## check every claim of every section on this machine
	@tools/bootstrap.sh test
	@$(BIN)/scalable verify

book:     ## render the book from the repository and the recorded results
	@tools/bootstrap.sh book
	@$(BIN)/scalable book

record:   ## run what has no current record in the laptop preset and keep the results (minutes)
	@tools/bootstrap.sh test
	@$(BIN)/scalable record

lint:     ## ruff
	@tools/bootstrap.sh test
	@$(BIN)/ruff check .

readme:   ## write the generated pages anew (part READMEs, the table in README.md)
	@tools/bootstrap.sh core
	@$(BIN)/python tools/readme.py

serving:  ## make .venv-serving, where vLLM runs on the CPU (2.6 GB)
	@tools/bootstrap.sh serving

clean:    ## remove caches and build results; the environments stay (rm -r .venv .venv-serving)
	@rm -rf build dist book/_build .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
