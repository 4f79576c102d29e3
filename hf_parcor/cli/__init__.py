"""The command `hf-parcor`. Nothing here imports PyTorch before it is needed, and nothing imports this part."""

from hf_parcor.cli.main import main

__all__ = ["main"]
