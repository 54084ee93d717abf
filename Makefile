# `make demo` and `make test` need Python 3.10+ (tested with 3.11) and nothing else: they make .venv on first use
# and again only when a requirement file changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_OUT ?= demo_output
PYTEST_ARGS ?=

.DEFAULT_GOAL := test
.PHONY: demo test test-comfyui locales lint setup

setup: $(READY)

demo: $(READY)
	$(BIN)/lightforcing demo --out $(DEMO_OUT)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The tests that start a real ComfyUI: COMFYUI_PATH is its folder, COMFYUI_PYTHON the interpreter it runs with.
# Where either is unset they skip and say so.
test-comfyui: $(READY)
	$(BIN)/python -m pytest tests/nodes tests/workflows tests/browser $(PYTEST_ARGS)

# locales/en/nodeDefs.json from the nodes' schemas, in that same ComfyUI; translations are then written by hand.
locales:
	$(COMFYUI_PYTHON) tests/nodes/in_comfy/node_texts.py "$(COMFYUI_PATH)" "$(CURDIR)" "$(COMFYUI_PATH)" \
		locales/en/nodeDefs.json > /dev/null

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	MYPYPATH=$(VENV)/src $(BIN)/mypy -m lightforcing -p lightforcing.cli -p lightforcing.kernels -p lightforcing.lightforcing_core \
		-p lightforcing.nodes -p lightforcing.benchmarks

# mypy reads the package under its installed name, so the root is linked as `lightforcing` beside the environment.
$(READY): requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10; run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt -e .
	mkdir -p $(VENV)/src && ln -sfn "$(CURDIR)" $(VENV)/src/lightforcing
	touch $@
