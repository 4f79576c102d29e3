"""Models, tokenizers and configurations by name, and one error if there is none."""

from __future__ import annotations

from typing import Any

from hf_parcor.input_error import InputError, one_line


def load_pretrained(what: str, loader: Any, name: str, **settings: Any) -> Any:
    """Return `loader.from_pretrained(name, **settings)`.

    Args:
        what: What messages call it.
        loader: A class of Transformers.
        name: A name on the Hub, or a local folder.
        **settings: For `from_pretrained`.

    Raises:
        InputError: Nothing of that name can be loaded.
    """
    try:
        return loader.from_pretrained(name, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{what}: expected a name on the Hub or a local folder that {loader.__name__} can load, got {name!r} "
            f"({one_line(error)}); check name, files and network"
        ) from error
