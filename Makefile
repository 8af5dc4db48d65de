# make quickstart   a real model through the whole chain, set-up included
# make test         the test suite, set-up included
# make docs         these pages as a site in build/site, which needs no network to be read
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --no-compile
MODEL  := models/SmolLM2-135M-Instruct

.PHONY: quickstart test lint docs model clean

quickstart: $(BIN)/.installed $(MODEL)/config.json
	@$(BIN)/onebase run recipes/quickstart.yaml

test: $(BIN)/.installed lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --constraint scripts/constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo build/site/index.html

model: $(MODEL)/config.json

$(BIN)/.installed: pyproject.toml scripts/constraints.txt
	@echo "Installing OneBase and its libraries into $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@$(PIP) --constraint scripts/constraints.txt --editable '.[dev]' >>$(VENV)/install.log 2>&1 || \
	  { cat $(VENV)/install.log; exit 1; }
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib >>$(VENV)/install.log 2>&1 &  # on all cores, while we go on
	@touch $@

$(MODEL)/config.json: | $(BIN)/.installed
	@$(BIN)/python scripts/get_demo_model.py

clean:
	rm -rf $(VENV) runs models build *.egg-info
