#!/usr/bin/env bash
# Installs everything into .venv, then runs the linter, the type checker and all tests; other words go to pytest.
# With --fast first: no type checker, and only tests that are not marked slow (those that start ranks or programs, or took
# more than 0.3 s of a core). That is the loop while writing code: a minute and a half on two idle cores.
# With --share K/N first: the fast tests, and the slow ones of every Nth file from the Kth.
source "$(dirname "${BASH_SOURCE[0]}")/set_up.sh" dev
export OMP_NUM_THREADS=1  # each test worker has a core
workers=$(getconf _NPROCESSORS_ONLN)
workers=$((workers < 2 ? 2 : workers > 8 ? 8 : workers))  # which grow to 1.3 GB each
chosen=()
case "${1:-}" in
    --fast) chosen=(-m "not slow") && shift ;;
    --share) chosen=(--slow-share "$2") && shift 2 ;;
esac
types=$(mktemp)
trap 'rm -f "$types"' EXIT
set -x
.venv/bin/ruff check .
.venv/bin/ruff format --check .
checker=
if [ "${chosen[0]:-}" != -m ]; then  # it keeps one core busy: beside the tests, which do not always have work for both
    .venv/bin/mypy > "$types" 2>&1 & checker=$!
fi
# What a file sets up, ranks say, is set up once. Files come in their order, which ends with small ones: the default, most
# tests first, would leave the slowest for the end, and a worker idle.
status=0
.venv/bin/python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder ${chosen[@]+"${chosen[@]}"} "$@" || status=$?
[ -z "$checker" ] || wait "$checker" || status=1
cat "$types"
exit "$status"
