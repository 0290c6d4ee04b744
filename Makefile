# `make quickstart` trains and evaluates the default model; `make test` runs every test. Both install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := registry vision fusion distill conf model_cards  # part of the package `zoo`, beside its own folder
# A worker per core, but at least two: half of a test's time goes into imports.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)

.PHONY: install quickstart test lint format clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --config-settings editable_mode=strict
	touch $@

install: $(VENV)/.installed

quickstart: install
	$(BIN)/zoo train
	$(BIN)/zoo eval model=last

test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/zoo
	ln -s $(CURDIR)/zoo/* $(addprefix $(CURDIR)/,$(FOLDERS)) build/types/zoo/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p zoo

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
