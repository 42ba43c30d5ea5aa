# make demo   train and evaluate the `cpu` preset into runs/cpu
# make test   lint and test
# make test-interop   test beside Lightning, accelerate, transformers and the Hub (large installs)
# All make their own virtual environment in $(VENV) and need nothing but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
ifneq ($(words $(VENV)),1)
$(error VENV is '$(VENV)': make knows no names with spaces; give another folder)
endif

PIP_INSTALL = $(VENV)/bin/python -m pip install --no-input --disable-pip-version-check -q
SOURCES = setup.py pyproject.toml constraints.txt

.PHONY: demo test test-interop
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.with-train
	$(VENV)/bin/python -m relay_fast.train --preset cpu --out runs/cpu

test: $(VENV)/.with-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/python -m pytest tests/ -n 2 -q

test-interop: $(VENV)/.with-interop
	$(VENV)/bin/python -m pytest tests/interop -q

$(VENV)/.with-train: $(SOURCES)
	$(call make_venv,train)

$(VENV)/.with-test: $(SOURCES)
	$(call make_venv,train$(comma)test)

$(VENV)/.with-interop: $(SOURCES)
	$(call make_venv,train$(comma)test$(comma)interop)

comma := ,

# Stamped only after a finished install: an interrupted one is taken up again.
define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "relay_fast needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...")'
@echo "installing relay_fast[$(1)] into $(VENV) (a few minutes the first time)"
@$(PYTHON) -m venv $(VENV)
@$(PIP_INSTALL) -c constraints.txt -e '.[$(1)]'
@touch $@
endef
