#!/usr/bin/env bash
# Runs all that needs a GPU, in less than 9 minutes; records go to $OUT. Wants torch, transformers and accelerate alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec timeout --kill-after 5 532 "${PYTHON:-python3}" -m scripts.gpu_checks --output "${OUT:-runs/gpu_checks}" "$@"
