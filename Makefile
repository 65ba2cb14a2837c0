# The two commands a newcomer needs: make demo, make test.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out

.PHONY: help demo test test-all test-serve test-ray lint format bench figures operators lock clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Everything is pinned with hashes; pip checks them. --no-compile keeps the environment under 300 MB: Python compiles
# what it imports when it first does. The package itself is installed from this folder, editable.
$(VENV)/.installed: pyproject.toml hatch_build.py $(wildcard src/onnx_refit/moves/*.[ch]) constraints/base.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r constraints/base.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed constraints/lint.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints/lint.txt
	@touch $@

# PyTorch's builds differ by platform, so it is pinned by version only.
$(VENV)/.installed-all: $(VENV)/.installed constraints/all.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints/torch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints/all.txt
	@touch $@

demo: $(VENV)/.installed  ## Run the main job: BiDAF prepared, built, refitted and answering
	@mkdir -p $(OUT)
	@$(BIN)/onnx-refit bidaf demo --bundled --output $(OUT)

test: $(VENV)/.installed  ## Run the default tests
	$(BIN)/python -m pytest -n auto

# The server's tests have an environment of their own: see constraints/serve.in.
$(VENV)-serve/.installed: pyproject.toml hatch_build.py $(wildcard src/onnx_refit/moves/*.[ch]) constraints/serve.txt
	$(PYTHON) -m venv $(VENV)-serve
	$(VENV)-serve/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints/serve.txt
	$(VENV)-serve/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

test-serve: $(VENV)-serve/.installed  ## Run the server's tests, with the clients of others and a browser if there is one
	$(VENV)-serve/bin/python -m pytest tests/serve -m "serve or not serve"

# So do those of the deployment across machines: see constraints/ray.in.
$(VENV)-ray/.installed: pyproject.toml hatch_build.py $(wildcard src/onnx_refit/moves/*.[ch]) constraints/ray.txt
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints/ray.txt
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

test-ray: $(VENV)-ray/.installed  ## Run the tests of a Ray cluster of several nodes, on this machine
	$(VENV)-ray/bin/python -m pytest tests/serve/ray -m ray

test-all: test-serve test-ray $(VENV)/.installed-all  ## Run every test that needs no GPU: PyTorch, slow ones too
	$(BIN)/python -m pytest -n 2 -m "not gpu"
	ONNX_REFIT_PORTABLE=1 $(BIN)/python -m pytest -n 2 tests/engine tests/refit

lint: $(VENV)/.installed-lint  ## Lint, check the format, the types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-lint  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-all  ## Measure, write benchmarks/results, and the README's tables and plots from them
	$(BIN)/python -m benchmarks.run

figures: $(VENV)/.installed-all  ## Write the tables and plots of README and docs from the committed results
	$(BIN)/python -m benchmarks.render

operators: $(VENV)/.installed-all  ## Run ONNX's tests of every operator through the engine and write docs/operators.md
	$(BIN)/python -m tests.operators.page

lock:  ## Pin the newest versions of all dependencies, with hashes (needs uv)
	sh constraints/lock.sh

clean:  ## Remove the environment and what was built
	rm -rf $(VENV) $(VENV)-serve $(VENV)-ray $(OUT) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
