#!/usr/bin/env bash
# Builds the wheel, checks it, installs it without extras into a clean environment, and runs the README's ten lines there.
#
#     bash scripts/check_wheel.sh           # the newest versions that pyproject.toml admits
#     bash scripts/check_wheel.sh lowest    # the lowest ones
#
# PYTHON=python3.12 chooses the interpreter. It needs a package registry, and no Hub.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 python -m pip --quiet"

"${PYTHON:-python3}" -m venv "$folder/tools"
"${PYTHON:-python3}" -m venv "$folder/clean"
PATH="$folder/tools/bin:$PATH" $pip install build twine
"$folder/tools/bin/python" -m build --outdir "$folder/dist" . > "$folder/build.log" || { cat "$folder/build.log"; exit 1; }
"$folder/tools/bin/twine" check --strict "$folder"/dist/*

lowest=()
if [ "${1:-}" = lowest ]; then
    mapfile -t lowest < <(sed -n '/^dependencies/,/^]/s/^ *"\([a-z]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml)
fi
export PATH="$folder/clean/bin:$PATH" HF_HUB_OFFLINE=1
unset PYTHONPATH
$pip install "${lowest[@]}" "$folder"/dist/*.whl
python -m pip list --format freeze | grep -iE "^(torch|transformers|accelerate|pyyaml|hf.parcor)=="

sed -n '/^## Ten lines/,/^## /{/^```python/,/^```/{/^```/!p}}' README.md > "$folder/ten_lines.py"
cd "$folder"
python ten_lines.py
hf-parcor --help > /dev/null
echo "The wheel works."
