# `make demo` and `make test` need Python 3.10 to 3.13 and nothing else: they make .venv on first use, and again only
# when a requirement file changes.
#   make quick                              lint, types, and the tests of the folders that you changed
#   make test ONLY=tests/core/attention     lint, types, and these tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
READY := $(VENV)/.ready
DEMO_OUT ?= demo_output
ONLY ?=
PYTEST_ARGS ?=
# One process per CPU, at most four: each takes about 1 GB. `PYTEST_ARGS=-n0` runs all tests in one process.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# PyTorch's builds without CUDA; the default ones on Linux take gigabytes.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := test
.PHONY: demo test quick test-comfyui test-ray compile-kernels help-tables lint setup

setup: $(READY)

demo: $(READY)
	$(BIN)/lightforcing demo --out $(DEMO_OUT)

test: lint
	$(PYTEST) $(ONLY) $(PYTEST_ARGS)

# A source file's tests are in the folder of the same path below tests/ (for the core, below tests/core/).
quick: lint
	@changed=$$( (git diff --name-only HEAD -- '*.py'; git ls-files --others --exclude-standard -- '*.py') \
		| sed -E 's#^lightforcing_core/#core/#; /^tests\//!s#^#tests/#' | xargs -rn1 dirname | sort -u \
		| while read -r folder; do test -d "$$folder" && echo "$$folder"; done); \
	test -z "$$changed" && echo "no Python file changed" || $(PYTEST) -q $$changed $(PYTEST_ARGS)

# The tests that start a real ComfyUI: COMFYUI_PATH is its folder, COMFYUI_PYTHON the interpreter it runs with.
# If either is unset, they skip and say so. They share one server, so they run in one process.
test-comfyui: $(READY)
	$(BIN)/python -m pytest tests/nodes tests/workflows tests/browser $(PYTEST_ARGS)

# The kernels compiled by another version of Triton, such as `make compile-kernels TRITON=3.3.1`.
TRITON ?= 3.3.1
compile-kernels: $(READY)
	test -d $(VENV)/triton/$(TRITON) || $(PIP) --no-deps --target $(VENV)/triton/$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(VENV)/triton/$(TRITON) $(PYTEST) tests/kernels/test_compiled.py $(PYTEST_ARGS)

# `lightforcing render` on Ray, which these tests start and kill parts of.
test-ray: $(READY)
	$(PIP) "ray>=2.40"
	$(BIN)/python -m pytest tests/cli/render/test_ray.py $(PYTEST_ARGS)

# The input tables of the nodes' help pages, from the texts in locales/.
help-tables:
	$(PYTHON) tools/help_tables.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	MYPYPATH=$(VENV)/src $(BIN)/mypy -m lightforcing $(foreach part,benchmarks cli kernels lightforcing_core nodes,-p lightforcing.$(part)) \
		-p laboratory.quality

# mypy reads the package under its installed name, so the root is linked as `lightforcing` in $(VENV)/src.
$(READY): requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10; run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $$(grep ^torch== requirements-dev.txt)
	$(PIP) -r requirements.txt -r requirements-dev.txt
	$(PIP) --no-deps -e .
	mkdir -p $(VENV)/src && ln -sfn "$(CURDIR)" $(VENV)/src/lightforcing
	touch $@
