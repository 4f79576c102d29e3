"""Why coarse quantization breaks a model: how far its largest weights lie out, and how many weights round to zero.

    python -m scripts.quantization_outliers --model MODEL

A tensor has one scale, so one weight far out makes the step large for all others.
"""

from __future__ import annotations

import argparse

from transformers import AutoModel

from hf_parcor.functional import quantize


def main() -> None:
    """Print the matrices in which 4 bits round most weights to zero."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--most", type=int, default=10, help="how many matrices")
    options = parser.parse_args()
    rows = []
    for name, weight in AutoModel.from_pretrained(options.model).named_parameters():
        if weight.ndim == 2:
            zeros = [float((quantize(weight.detach(), bits) == 0).float().mean()) for bits in (4, 5, 6, 8)]
            rows.append((zeros, float(weight.detach().abs().max() / weight.detach().std()), name))
    print(f"{'matrix':52} max/std  rounded to zero at 4, 5, 6, 8 bits")
    for zeros, reach, name in sorted(rows, reverse=True)[: options.most]:
        print(f"{name:52} {reach:7.0f}  {'  '.join(f'{100 * share:4.0f} %' for share in zeros)}")


if __name__ == "__main__":
    main()
