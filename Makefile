VENV ?= .venv
# Empty: the first Python 3.10 to 3.12 on PATH.
PYTHON ?=

.PHONY: help setup demo test lint

help:
	@echo "make setup   make $(VENV) with everything needed (PYTHON=..., VENV=... to choose)"
	@echo "make demo    set-up, then the demonstration"
	@echo "make test    set-up, then the tests"
	@echo "make lint    set-up, then the style checks"

setup:
	@VENV="$(VENV)" PYTHON="$(PYTHON)" tools/setup_env.sh

demo: setup
	"$(VENV)/bin/python" tools/demo.py

test: setup
	"$(VENV)/bin/python" -m pytest

lint: setup
	"$(VENV)/bin/python" -m ruff check .
