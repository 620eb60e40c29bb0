# `make train` and `make test` need nothing but Python >= 3.11 and make: each sets up .venv where it is missing.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
# what the cards name as `benchmark:`, each once; the scripts for GPUs alone end in _gpu.py
BENCHMARKS = from hasten import registry; print(*dict.fromkeys(script for card in registry.cards().values() \
	for script in card.front.get("benchmark", []) if not script.endswith("_gpu.py")))

.PHONY: train test test-slow lint bench docs pages

train: $(READY)          ## the main job; make train ARGS="experiment=classify_digits"
	$(BIN)/python train.py $(ARGS)

test: $(READY)           ## everything that takes under ten minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(READY)      ## the rest: full digits runs, notebooks, several processes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

lint: $(READY)           ## style, types, and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(READY)          ## the benchmarks that a CPU can run
	scripts=$$($(BIN)/python -c '$(BENCHMARKS)') && for script in $$scripts; do $(BIN)/python $$script $(ARGS) || exit 1; done

pages: $(READY)          ## the table of methods in README.md, and benchmarks/README.md, from cards and results
	$(BIN)/python docs/pages.py

docs: $(READY)           ## the documentation, docs/_build/index.html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
