#!/usr/bin/env bash
# Installs everything into .venv, then runs the linter, the type checker and all tests; other words go to pytest.
# With --fast first: no type checker, and only tests that are not marked slow (those that start ranks or programs, or took
# more than about half a second when they were measured). That is the loop while writing code: a minute and a half on two idle cores.
source "$(dirname "${BASH_SOURCE[0]}")/set_up.sh" dev
export OMP_NUM_THREADS=1  # two test workers share two cores
fast=()
if [ "${1:-}" = --fast ]; then
    shift
    fast=(-m "not slow")
fi
set -x
.venv/bin/ruff check .
.venv/bin/ruff format --check .
[ ${#fast[@]} -gt 0 ] || .venv/bin/mypy
# What a file sets up, ranks say, is set up once. Files come in their order, which ends with small ones: the default, most
# tests first, would leave the slowest for the end, and a worker idle.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${fast[@]+"${fast[@]}"} "$@"
