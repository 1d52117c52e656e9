# make run            environment, six notebooks, summary, report (PRESET=smoke; also cpu, distilled or a100)
# make test           linter, formatter, notebooks against their stored outputs, test suite
# make test-graded    notebooks and test suite again, under PyTorch 2.1 and NumPy 1
# make publish        put what `make run PRESET=...` made where it is committed
# make report         render the report of the committed run to _report/
#
# BIN=/path/of/an/environment/bin uses that environment as it is, and makes none.

PYTHON ?= python3.11
PRESET ?= smoke
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(CURDIR)/$(VENV)/bin

# The notebooks' kernels run in notebooks/, so this path has to be absolute.
export BLM_BUILD := $(abspath $(or $(BLM_BUILD),build))
export BLM_PRESET := $(PRESET)
export PATH := $(BIN):$(PATH)
MAKEFLAGS += --no-print-directory

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
RESULTS := $(BLM_BUILD)/$(PRESET)
TESTED := $(BLM_BUILD)/test$(VENV:.venv%=%)

ifeq ($(origin BIN),file)
READY := $(VENV)/ready
QUARTO_TRIED := $(VENV)/quarto-tried
endif

.PHONY: run notebooks publish report test test-graded lint suite

run: notebooks $(QUARTO_TRIED)
	@echo && $(BIN)/python -m blm_core summary
	@if command -v quarto >/dev/null; then \
	    quarto render --log-level warning && echo "report       _report/index.html, of the committed run"; \
	else \
	    $(BIN)/python -m nbconvert --to html --log-level ERROR --output-dir $(RESULTS)/html $(RESULTS)/notebooks/*.ipynb && \
	    echo "report       not rendered, as Quarto is not here and cannot be installed; see $(RESULTS)/html"; \
	fi

notebooks: $(READY)
	$(BIN)/python -m nbconvert --to notebook --execute --output-dir $(RESULTS)/notebooks $(NOTEBOOKS)

publish: $(READY)
	$(BIN)/python -m blm_core.evidence publish

report: $(READY)
	command -v quarto >/dev/null || $(BIN)/python -m pip install -c $(CONSTRAINTS) quarto-cli
	quarto render

test: lint suite

test-graded:
	$(MAKE) suite VENV=.venv-graded CONSTRAINTS=constraints-graded.txt

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# Notebooks first, so that the test suite has the last word. They start from nothing, as on a new machine.
suite: export BLM_PRESET := smoke
suite: export BLM_BUILD := $(TESTED)
suite: export BLM_OVERRIDES :=
suite: export BLM_GPT2XL :=
suite: export BLM_RECORDED :=
suite: $(READY)
	rm -rf $(TESTED)
	$(BIN)/python -m pytest --nbval-lax $(NOTEBOOKS)
	$(BIN)/python -m pytest

$(VENV)/ready: $(CONSTRAINTS) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11, or name one by PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e ".[comparison,notebooks,dev]"
	@touch $@

# Quarto's package downloads a release while it is built, which fails where only a package registry can be reached.
# It is tried once per environment.
$(VENV)/quarto-tried: $(VENV)/ready
	@command -v quarto >/dev/null || timeout 600 $(BIN)/python -m pip install --disable-pip-version-check \
	    -c $(CONSTRAINTS) quarto-cli >$(VENV)/quarto.log 2>&1 || true
	@touch $@
