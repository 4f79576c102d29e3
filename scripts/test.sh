#!/usr/bin/env bash
# Installs everything into .venv, then runs the linter, the type checker and all tests.
source "$(dirname "${BASH_SOURCE[0]}")/set_up.sh" dev
export OMP_NUM_THREADS=1  # two test workers share two cores
set -x
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# What a file sets up, ranks say, is set up once. Files come in their order, which ends with small ones: the default, most
# tests first, would leave the slowest for the end, and a worker idle.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
