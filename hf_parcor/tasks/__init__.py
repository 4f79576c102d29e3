"""Tasks: from the rows of a data set to batches and a metric. A new one is a module and a line in the catalogue."""

from hf_parcor.tasks.catalogue import TASKS, architectures_of, check_head, task_named, task_of
from hf_parcor.tasks.files import read_file
from hf_parcor.tasks.image_classification import ImageClassification, decoded_images
from hf_parcor.tasks.images import LabelledImages, read_images
from hf_parcor.tasks.rows import Rows, load_rows
from hf_parcor.tasks.task import Encoding, Example, Processed, Role, Task

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
    "decoded_images",
    "load_rows",
    "read_file",
    "read_images",
    "task_named",
    "task_of",
]
