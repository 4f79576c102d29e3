#!/usr/bin/env bash
# Installs everything into .venv, then trains, defends and corrupts a real BERT: see scripts/quickstart.py.
source "$(dirname "${BASH_SOURCE[0]}")/set_up.sh" examples
exec .venv/bin/python -m scripts.quickstart "$@"
