# Every target sets up what it needs: a virtual environment with the tested versions.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
NEWEST := .venv-newest/bin
# The Python of the newest JAX: by default, the newest that is found.
NEWEST_PYTHON ?=
# Tests are mostly compilation, which takes one core each; those of a file share what is compiled.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
# Compiled programs are stored, for tests that compile the same ones and for the next run.
CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/build/compiled \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# Less work for XLA's compiler, which most of a test's time is: fewer passes, and the older emitters,
# which take a third of the time. `make test-newest` does without: it compiles as a user's program does.
COMPILE_FAST := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=1 \
	--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
PIP := -m pip --disable-pip-version-check install --quiet
# Only its data files are read, so its many requirements are left out.
RECBOLE := recbole==1.2.1
VERSIONS := -c 'import jax, platform; print(f"JAX {jax.__version__}, Python {platform.python_version()}")'

.PHONY: help train test test-quick test-newest test-oldest test-tpu test-gpu lint types bench bench-quality bench-tpu bench-gpu \
	readme docs clean

help:
	@echo "make train        train the model on real text (ARGS='--help' for its options)"
	@echo "make test         run the tests, with the versions in constraints.txt"
	@echo "make test-quick   run a sample of them, before a commit"
	@echo "make test-newest  run them with the newest JAX, on the newest Python (NEWEST_PYTHON=)"
	@echo "make test-oldest  run them with the oldest supported JAX"
	@echo "make test-tpu     compile for a TPU, with its own compiler and without one"
	@echo "make test-gpu     compile for a GPU, without one"
	@echo "make lint types   check style and types"
	@echo "make bench        measure everything against optax, Keras and torch, and write a report of it"
	@echo "make bench-quality  train models exactly and lazily: does it matter? (an hour; it goes on after Ctrl-C)"
	@echo "make bench-tpu    what the TPU's compiler reports for steps, without a TPU"
	@echo "make bench-gpu    what the GPU's compiler reports for them, without a GPU"
	@echo "make docs         build the pages and the API reference in build/docs"
	@echo "make readme       write measured tables and numbers into README.md and docs/"
	@echo "make clean        remove what these made"

# Huge pages, where glibc can give them: XLA's buffers are mapped anew at every step.
train: .venv/.bench
	@GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m benchmarks train $(ARGS)

test: .venv/.test
	@$(BIN)/python $(VERSIONS)
	$(CACHE) $(COMPILE_FAST) $(BIN)/python -m pytest $(PARALLEL) --durations=10 $(ARGS)

test-quick: .venv/.test
	$(CACHE) $(COMPILE_FAST) $(BIN)/python -m pytest $(PARALLEL) --quick $(ARGS)

# As a user gets it: without constraints, and whatever is the newest today. Only programs that take
# long to compile are stored: in JAX 0.12.0.1, one read of tens of thousands crashed the process.
test-newest: .venv-newest/.made
	$(NEWEST)/python $(PIP) --upgrade --upgrade-strategy eager -e '.[test,test-models,bench]'
	@$(NEWEST)/python $(VERSIONS)
	$(CACHE) JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2 \
		$(NEWEST)/python -m pytest $(PARALLEL) $(ARGS)

test-oldest: .venv-oldest/.test
	@$(OLDEST)/python $(VERSIONS)
	$(CACHE) $(COMPILE_FAST) $(OLDEST)/python -m pytest $(PARALLEL) $(ARGS)

test-tpu: .venv-tpu/.test
	.venv-tpu/bin/python -m pytest tests/test_tpu.py $(ARGS)

test-gpu: .venv-gpu/.test
	.venv-gpu/bin/python -m pytest tests/test_gpu.py $(ARGS)

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test
	$(BIN)/mypy

bench: .venv/.contenders
	$(BIN)/python -m benchmarks all $(ARGS)

bench-quality: .venv/.quality
	$(BIN)/python -m benchmarks quality $(ARGS)

bench-tpu: .venv-tpu/.test
	.venv-tpu/bin/python -m benchmarks tpu $(ARGS)

bench-gpu: .venv-gpu/.test
	.venv-gpu/bin/python -m benchmarks gpu $(ARGS)

readme: .venv/.test
	$(BIN)/python -m benchmarks readme

docs: .venv/.docs
	$(BIN)/python -m sphinx --fresh-env --write-all --fail-on-warning --keep-going -b html docs build/docs

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.bench: .venv/.made pyproject.toml constraints.txt
	$(BIN)/python $(PIP) -c constraints.txt -e '.[bench]'
	@touch $@

.venv/.test: .venv/.made pyproject.toml constraints.txt
	$(BIN)/python $(PIP) -c constraints.txt -e '.[test,test-models,bench,bench-contenders,bench-quality,notebooks,docs]'
	$(BIN)/python $(PIP) --no-deps $(RECBOLE)
	@touch $@

.venv/.docs: .venv/.made pyproject.toml constraints.txt
	$(BIN)/python $(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

.venv/.contenders: .venv/.made pyproject.toml constraints.txt
	$(BIN)/python $(PIP) -c constraints.txt -e '.[bench,bench-contenders]'
	@touch $@

.venv/.quality: .venv/.made pyproject.toml constraints.txt
	$(BIN)/python $(PIP) -c constraints.txt -e '.[bench,bench-quality]'
	$(BIN)/python $(PIP) --no-deps $(RECBOLE)
	@touch $@

.venv-newest/.made:
	@python=$$($(PYTHON) .ci/newest_python.py $(NEWEST_PYTHON)) && "$$python" -m venv .venv-newest
	@touch $@

.venv-oldest/.test: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python $(PIP) -c constraints-oldest.txt -e '.[test,bench]'
	@touch $@

.venv-tpu/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python $(PIP) -c constraints.txt -e '.[test,test-tpu]'
	@touch $@

.venv-gpu/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python $(PIP) -c constraints.txt -e '.[test,test-gpu]'
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-tpu .venv-gpu build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@echo "kept: runs/, which has what was trained, and benchmarks/results/"
