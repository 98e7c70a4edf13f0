VENV ?= .venv
# Empty: the first Python 3.10 to 3.14 on PATH.
PYTHON ?=
# Processes that run the tests side by side, each on one core.
WORKERS ?= 2
# Of the study: the folder of BCCD in Pascal VOC form; for its part on photographs more, such as
# STUDY="--photos DIR --yolox-nano FILE".
BCCD ?=
STUDY ?=

.PHONY: help setup demo test test-fast lint study

help:
	@echo "make setup   make $(VENV) with everything needed (PYTHON=..., VENV=... to choose)"
	@echo "make demo    set-up, then the demonstration"
	@echo "make study   set-up, then the study of docs/results.md; BCCD=path/to/BCCD, hours"
	@echo "make test    set-up, then the tests"
	@echo "make test-fast   set-up, then the tests that are not marked slow"
	@echo "make lint    set-up, then the style checks"

setup:
	@VENV="$(VENV)" PYTHON="$(PYTHON)" tools/setup_env.sh

demo: setup
	"$(VENV)/bin/python" -m dfd demo

study: setup
	"$(VENV)/bin/python" tools/study.py --bccd "$(BCCD)" $(STUDY)

test: setup
	OMP_NUM_THREADS=1 "$(VENV)/bin/python" -m pytest -n $(WORKERS) --dist loadscope

test-fast: setup
	OMP_NUM_THREADS=1 "$(VENV)/bin/python" -m pytest -n $(WORKERS) --dist loadscope -m "not slow"

lint: setup
	"$(VENV)/bin/python" -m ruff check .
