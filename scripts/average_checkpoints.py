"""Write the mean of the last checkpoints of a run as a model folder that `from_pretrained` loads.

    python -m scripts.average_checkpoints RUN --last 10 --output RUN/average-10

RUN is a Trainer's output folder, with checkpoints in safetensors. Configuration and tokenizer are the last one's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_parcor.translation import average_checkpoints, last_checkpoints


def main() -> None:
    """Average."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder with the checkpoints")
    parser.add_argument("--last", type=int, default=10, help="how many, the last ones")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()
    checkpoints = last_checkpoints(options.run, options.last)
    folder = average_checkpoints(checkpoints, options.output)
    print(f"The mean of {', '.join(path.name for path in checkpoints)} is in {folder}.")


if __name__ == "__main__":
    main()
