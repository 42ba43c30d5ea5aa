# make demo   train and evaluate the `cpu` preset into runs/cpu
# make test   lint and test
# make docs   the API reference, into site/ (pages of HTML: open site/index.html)
# make test-interop   test beside Lightning, accelerate, transformers and the Hub (large installs)
# make test-cards     compile and rehearse the kernels for the cards from sm_80 on, without one
# make test-oldest    what depends on their versions, with the oldest torch and triton (large installs)
# All make their own virtual environment in $(VENV) and need nothing but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
ifneq ($(words $(VENV)),1)
$(error VENV is '$(VENV)': make knows no names with spaces; give another folder)
endif

SITE ?= site

OLDEST_VENV = .venv-oldest
OLDEST_TESTS = tests/kernels tests/ops tests/engine tests/batch tests/decoding tests/training
# A worker keeps its half of the tests, with what their modules share, until the other has none left.
TWO_WORKERS = -n 2 --dist worksteal
SOURCES = setup.py pyproject.toml constraints.txt

.PHONY: demo docs test test-interop test-cards test-oldest
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.with-train
	$(VENV)/bin/python -m relay_fast.train --preset cpu --out runs/cpu

# pdoc evaluates the annotations of NamedTuples in the module that it has lost, and warns of it.
PDOC_WARNINGS = error,ignore:Error parsing type annotation ForwardRef,ignore:Cannot determine where
DOCUMENTED = relay_fast $(addprefix relay_fast.,train generate evaluate recipes relay training \
    decoding models data ops tasks batch reporting config utils kernels)

docs: $(VENV)/.with-docs
	PYTHONWARNINGS='$(PDOC_WARNINGS)' $(VENV)/bin/python -m pdoc -d google --no-show-source \
	    --output-directory $(SITE) $(DOCUMENTED) '!relay_fast\.(.*\.)?_.*'

test: $(VENV)/.with-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/python -m pytest tests/ $(TWO_WORKERS) -q

test-interop: $(VENV)/.with-interop
	$(VENV)/bin/python -m pytest tests/interop -q

test-cards: $(VENV)/.with-test
	$(VENV)/bin/python -m pytest tests/cards $(TWO_WORKERS) -q

test-oldest: $(OLDEST_VENV)/.with-oldest
	$(OLDEST_VENV)/bin/python -m pytest $(OLDEST_TESTS) $(TWO_WORKERS) -q
	$(OLDEST_VENV)/bin/python benchmarks/compile_report.py --quick

$(VENV)/.with-train: $(SOURCES)
	$(call make_venv,train)

$(VENV)/.with-test: $(SOURCES)
	$(call make_venv,train$(comma)test)

$(VENV)/.with-interop: $(SOURCES)
	$(call make_venv,train$(comma)test$(comma)interop$(comma)docs)

$(VENV)/.with-docs: $(SOURCES)
	$(call make_venv,train$(comma)data$(comma)docs)

# Versions that the environment of `test` does not have, so in one of its own.
$(OLDEST_VENV)/.with-oldest: $(SOURCES) constraints-oldest.txt
	$(call make_venv_in,$(OLDEST_VENV),train$(comma)test,constraints-oldest.txt)

comma := ,

# Stamped only after a finished install: an interrupted one is taken up again.
make_venv = $(call make_venv_in,$(VENV),$(1),constraints.txt)
define make_venv_in
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "relay_fast needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...")'
@echo "installing relay_fast[$(2)] into $(1) (a few minutes the first time)"
@$(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install --no-input --disable-pip-version-check -q -c $(3) -e '.[$(2)]'
@touch $@
endef
