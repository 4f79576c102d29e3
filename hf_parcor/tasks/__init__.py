"""Tasks: from the rows of a data set to batches and a metric. A new one is a module and a line in the catalogue.

Rows of data need no PyTorch, and their reader does not wait for it: names are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_parcor.tasks.catalogue import TASKS, architectures_of, check_head, task_named, task_of
    from hf_parcor.tasks.files import data_suffix, read_file
    from hf_parcor.tasks.image_classification import ImageClassification, decoded_images
    from hf_parcor.tasks.images import LabelledImages, is_image_pack, read_images
    from hf_parcor.tasks.rows import Rows, load_rows
    from hf_parcor.tasks.task import Encoding, Example, Processed, Role, Task, load_pretrained

__all__ = [
    "TASKS",
    "Encoding",
    "Example",
    "ImageClassification",
    "LabelledImages",
    "Processed",
    "Role",
    "Rows",
    "Task",
    "architectures_of",
    "check_head",
    "data_suffix",
    "decoded_images",
    "is_image_pack",
    "load_pretrained",
    "load_rows",
    "read_file",
    "read_images",
    "task_named",
    "task_of",
]

_PARTS = {
    "catalogue": ("TASKS", "architectures_of", "check_head", "task_named", "task_of"),
    "files": ("data_suffix", "read_file"),
    "image_classification": ("ImageClassification", "decoded_images"),
    "images": ("LabelledImages", "is_image_pack", "read_images"),
    "rows": ("Rows", "load_rows"),
    "task": ("Encoding", "Example", "Processed", "Role", "Task", "load_pretrained"),
}
_HOMES = {name: part for part, names in _PARTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
