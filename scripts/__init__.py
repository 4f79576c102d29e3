"""Experiments, a file each, run from the checkout as modules: `python -m scripts.<name> --help`."""
