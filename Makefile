# Two commands to know: `make train` and `make test`. Each makes the virtual environment if there is none.
PYTHON ?= python3
RUN_DIR ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)
BIN := .venv/bin
STAMP := .venv/.installed

# Two files of tests at a time, one thread per process: tests start several workers on few cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true

# Where an environment forbids bytecode files, every process compiles torch anew: 5 seconds instead of 2.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install train test test-core test-full docs check

install: $(STAMP)

# The stamp is written last: an installation that was cut short is done again. --no-compile: Python compiles what is
# imported when it is imported, a small part of the 2 GB.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: 2 GB, a few minutes"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

train: $(STAMP)
	$(BIN)/ml2o meta-train --run-dir $(RUN_DIR)

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

# What a change of the mathematics breaks first: rules, problems, meta-gradients, the optimizers of torch.
CORE := tests/rules tests/problems tests/torch_optim tests/metatrain/test_metagradient.py tests/metatrain/test_episode.py
test-core: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not long" $(CORE)

# The long ones: two files at a time where none starts Ray, the others one after the other, since two clusters side by
# side starve each other where cores are few.
CALM := $(CORE) tests/paretoset tests/reporting
test-full: test
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m long $(CALM)
	$(TEST_ENV) $(BIN)/python -m pytest -m long $(addprefix --ignore=,$(CALM))

docs: $(STAMP)
	$(BIN)/python docs/settings.py > docs/settings.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .
