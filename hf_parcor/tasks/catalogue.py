"""All tasks by the name that the Hub and command lines use: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers.models.auto import modeling_auto

from hf_parcor.errors import InputError, nearest
from hf_parcor.tasks.adapters import Adapter
from hf_parcor.tasks.audio_classification import AudioClassification
from hf_parcor.tasks.fill_mask import FillMask
from hf_parcor.tasks.image_classification import ImageClassification
from hf_parcor.tasks.object_detection import ObjectDetection
from hf_parcor.tasks.question_answering import QuestionAnswering
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.sentence_similarity import SENTENCE_TRANSFORMER, SentenceSimilarity, is_sentence_transformer
from hf_parcor.tasks.sequence_to_sequence import Summarization, Translation
from hf_parcor.tasks.speech_recognition import SpeechRecognition
from hf_parcor.tasks.task import Task, load_configuration
from hf_parcor.tasks.text_classification import TextClassification
from hf_parcor.tasks.text_generation import TextGeneration
from hf_parcor.tasks.token_classification import TokenClassification

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            TextClassification(),
            TokenClassification(),
            QuestionAnswering(),
            FillMask(),
            TextGeneration(),
            Summarization(),
            Translation(),
            ImageClassification(),
            ObjectDetection(),
            SpeechRecognition(),
            AudioClassification(),
            SentenceSimilarity(),
        )
    }
)


def task_of(model: str, rows: Rows, given: Mapping[str, str], **settings: Any) -> Task:
    """Return the task that a model's head is for; if it is for several, the one that the data has columns for.

    Args:
        model: A name on the Hub, or a local folder.
        rows: The data.
        given: Columns by role.
        **settings: For `from_pretrained`, such as `revision` and `trust_remote_code`.

    Raises:
        InputError: There is no such model, or it has no head of a known task, or of several that the data fit as well.
    """
    architectures = architectures_of(model, **settings)
    fitting = [task for task in TASKS.values() if task.has_head(architectures)]
    if not fitting:
        raise InputError(
            f"model: expected one with a head for {', '.join(TASKS)}, got {model!r} with "
            f"{', '.join(architectures) or 'no architecture in its configuration'}; fine-tune it, say "
            "--task, or measure it from Python: CorruptionEvaluator takes any model and any metric"
        )
    columns = {task: _columns(task, rows, given) for task in fitting}
    told = [task for task in fitting if _is_told(task, columns[task])]
    possible = told or [task for task in fitting if columns[task]] or fitting
    if len(possible) > 1:
        raise InputError(
            f"task: expected one that {model!r} and the columns {', '.join(rows.columns)} are for, got "
            f"{' and '.join(task.name for task in possible)}; say --task"
        )
    return possible[0]


def _columns(task: Task, rows: Rows, given: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of a task by role; none where they are those of another."""
    try:
        return task.find_columns(rows, given)
    except InputError:
        return {}


def _is_told(task: Task, columns: Mapping[str, str]) -> bool:
    """Return whether the name of a column says that the data are for a task; what is given by hand may not."""
    return any(
        column.lower() in task.roles[role].names or column.startswith(f"{task.name}.")
        for role, column in columns.items()
    )


def task_named(name: str) -> Task:
    """Return a task by its name.

    Raises:
        InputError: There is no such task.
    """
    if name not in TASKS:
        raise InputError(
            f"task: expected one of {', '.join(TASKS)}, got {name!r}{nearest(name, list(TASKS))}; name one of them"
        )
    return TASKS[name]


def check_head(task: Task, model: str, **settings: Any) -> None:
    """Refuse a model without the head that a task needs: it would be measured with random weights there.

    Raises:
        InputError: There is no such model, or it has another head.
    """
    architectures = architectures_of(model, **settings)
    if not task.has_head(architectures):
        ends = " or ".join(f"…{end}" for end in task.heads)
        raise InputError(
            f"model: expected one with a head for {task.name} ({ends}), got {model!r} with "
            f"{', '.join(architectures) or 'no architecture in its configuration'}; fine-tune it for the task first, "
            "or name another --task"
        )


def architectures_of(model: str, **settings: Any) -> list[str]:
    """Return the classes that a model was saved as; of a PEFT adapter, those of its model that end as its task says.

    If none does, since the adapter brings another head, it is what such classes end in.

    One of sentence-transformers is of its class, and of that which it has of Transformers.

    Raises:
        InputError: There is no such model.
    """
    revision = settings.get("revision")
    embeds = [SENTENCE_TRANSFORMER] if is_sentence_transformer(model, revision) else []
    adapter = Adapter.found(model, revision)
    if adapter is not None and adapter.head:
        config = load_configuration(model, **settings) if adapter.base[0] else None
        saved = [name for name in getattr(config, "architectures", None) or () if name.endswith(adapter.head)]
        # PEFT calls classes of recordings those of texts.
        hears = modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.get(getattr(config, "model_type", ""), "")
        return [*(saved or [hears if hears.endswith(adapter.head) else adapter.head]), *embeds]
    return [*(load_configuration(model, **settings).architectures or []), *embeds]
