"""Model and data, as the flags name them: looked for before PyTorch is imported, so that a mistake is told at once."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from hf_parcor.cli.flags import BETWEEN_ROWS, SPLIT, TRAIN_SPLIT, WINDOWED, pairs
from hf_parcor.cli.terminal import check_output_folder, refused, tell
from hf_parcor.errors import InputError, one_line
from hf_parcor.hub_data import failures_of_hub
from hf_parcor.records.metric_info import LM_EVAL
from hf_parcor.strict_json import read_strict_json

if TYPE_CHECKING:
    from hf_parcor.tasks import Rows

_ADAPTER = "adapter_config.json"
_CONFIGURATIONS = ("config.json", _ADAPTER)
_MODEL, _DATASET = "model", "dataset"
_CALLED = {_MODEL: "model", _DATASET: "--dataset", "train_dataset": "--train-dataset"}


def check_sources(arguments: argparse.Namespace) -> None:
    """Refuse a model or data that are not named, or are nowhere.

    A name on the Hub is asked for once, where Transformers would ask six times before it says that there is no
    network. If there is none, the rest of the process makes do with what was downloaded before.

    Args:
        arguments: Those of `add_subject`.

    Raises:
        InputError: There is no such model, or there are no such data.
    """
    for name in (_MODEL, _DATASET):
        if not getattr(arguments, name):
            raise InputError(f"{_CALLED[name]}: expected one, got none; name a local one, or one on the Hub")
    pairs(arguments.column or [], "--column")
    _check_windows(arguments)
    _check_lm_eval(arguments)
    _check_loading(arguments)
    if arguments.revision != "main" and Path(arguments.model).exists():
        raise InputError(
            f"--revision: expected a model on the Hub with it, got {arguments.revision!r} beside the folder "
            f"{arguments.model}; leave it out: a folder has none"
        )
    _check_model(arguments.model, arguments.revision)
    sources = {name: source for name in (_DATASET, "train_dataset") if (source := getattr(arguments, name, None))}
    for name, source in sources.items():
        _check_data(source, _CALLED[name])
    for setting, default, read_by in (
        ("dataset_config", None, list(sources)),
        ("split", SPLIT, [_DATASET]),
        ("train_split", TRAIN_SPLIT, list(sources)[-1:]),
    ):
        asked = getattr(arguments, setting, default)
        if asked != default and all(_is_file(sources[name]) for name in read_by):
            raise InputError(
                f"--{setting.replace('_', '-')}: expected a data set on the Hub, or a folder, with it, got {asked!r} "
                f"beside {_CALLED[read_by[0]]} {sources[read_by[0]]}; leave it out: a file has none"
            )


def read_data(arguments: argparse.Namespace) -> tuple[Rows, dict[str, str]]:
    """Return all rows of the data to measure on, and the columns that the flags name, by role.

    Raises:
        InputError: There are no such data.
    """
    return rows_of(arguments, arguments.dataset, arguments.split), pairs(arguments.column or [], "--column")


def rows_of(arguments: argparse.Namespace, source: str, split: str) -> Rows:
    """Return all rows of a split.

    Raises:
        InputError: There are no such data.
    """
    from hf_parcor.tasks import load_rows

    with redirect_stdout(sys.stderr), refused(ImportError):
        return load_rows(source, split, arguments.dataset_config)


def windows_of(arguments: argparse.Namespace) -> tuple[int | None, str | None]:
    """Return the stride of windows over a text, and what stands between its rows; `train` has no such flags."""
    between: str = getattr(arguments, "between_rows", "end-of-text")
    return getattr(arguments, "stride", None), BETWEEN_ROWS[between]


def _check_windows(arguments: argparse.Namespace) -> None:
    """Refuse windows of a task without, and a stride that would leave tokens out.

    Raises:
        InputError: Either is asked for.
    """
    stride, between = windows_of(arguments)
    if (stride is not None or between is not None) and arguments.task not in (None, WINDOWED):
        raise InputError(
            f"--stride, --between-rows: expected neither for {arguments.task}, got one; they are of {WINDOWED}"
        )
    if stride is not None and arguments.max_length is not None and stride > arguments.max_length:
        raise InputError(
            f"--stride: expected at most the {arguments.max_length} tokens of --max-length, got {stride}; lower it, "
            "so that no token is left out"
        )


def _check_lm_eval(arguments: argparse.Namespace) -> None:
    """Refuse tasks of lm-eval where it is not installed, or for a model that is asked for another task.

    Raises:
        InputError: They are asked for.
    """
    if not (arguments.metric or "").startswith(LM_EVAL):
        return
    if arguments.task not in (None, WINDOWED):
        raise InputError(f"--metric: expected one of {arguments.task}, got {arguments.metric!r}; it is of {WINDOWED}")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            f"--metric: expected lm-eval for {arguments.metric!r}, got none; pip install 'hf-parcor[lm-eval]'"
        )


def _check_loading(arguments: argparse.Namespace) -> None:
    """Refuse flags of `add_loading` that do not go together; `train` has none.

    Raises:
        InputError: A device beside a map of devices, a map in each of several processes, or a folder that nothing is
            offloaded to, or that cannot be written to.
    """
    devices, folder = getattr(arguments, "device_map", None), getattr(arguments, "offload_folder", None)
    if devices is None:
        if folder is not None:
            raise InputError(f"--offload-folder: expected it with --device-map, got {folder!r} alone; add a map")
        return
    if arguments.device is not None:
        raise InputError(f"--device: expected none with --device-map, got {arguments.device!r}; leave one of them out")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"--device-map: expected one process, got {os.environ['WORLD_SIZE']}, of which each would take the same "
            "devices; start one, or leave the map out"
        )
    if folder is not None:
        check_output_folder(folder, "--offload-folder")


def _check_model(name: str, revision: str) -> None:
    folder = Path(name)
    if not folder.exists():
        _check_on_hub(_MODEL, name, revision, _CALLED[_MODEL])
        return
    if not any((folder / file).is_file() for file in _CONFIGURATIONS):
        raise InputError(
            f"model: expected a folder with {' or '.join(_CONFIGURATIONS)}, got {name!r} without; name the one that "
            "save_pretrained wrote to"
        )
    adapter = folder / _ADAPTER
    if adapter.is_file():
        try:
            found = read_strict_json(adapter)
        except (OSError, ValueError) as error:
            raise InputError(f"{adapter}: {error}; save the adapter again") from error
        belongs_to = found.get("base_model_name_or_path") if isinstance(found, dict) else None
        if belongs_to:
            _check_model(belongs_to, found.get("revision") or "main")


def _check_data(source: str, called: str) -> None:
    from hf_parcor.tasks import data_suffix, is_image_pack

    if Path(source).exists() or is_image_pack(source):  # which may be a pattern
        return
    if data_suffix(source):
        raise InputError(f"{called}: expected a file, found none at {source}; check its name")
    _check_on_hub(_DATASET, source, None, called)


def _is_file(source: str) -> bool:
    from hf_parcor.tasks import is_image_pack

    return Path(source).is_file() or is_image_pack(source)


def _check_on_hub(kind: str, name: str, revision: str | None, called: str) -> None:
    """Refuse what is neither on the Hub nor was downloaded before.

    Args:
        kind: Of repository: model, or dataset.
        name: What may be the name of one.
        revision: Branch, tag or commit; None for the main branch.
        called: What messages call it.

    Raises:
        InputError: It is no name, or there is no such thing, or it cannot be reached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as answers

    ask = HfApi().model_info if kind == _MODEL else HfApi().dataset_info
    try:
        ask(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except failures_of_hub() as error:
        found = error
    else:
        return
    if not isinstance(found, answers.HFValidationError):
        if not isinstance(found, answers.HfHubHTTPError):
            _go_on_offline(found)
            if kind == _DATASET:
                return  # the cache of `datasets` is searched by itself, and that asks nothing any more
        elif not isinstance(found, (answers.RepositoryNotFoundError, answers.RevisionNotFoundError)):
            return  # the Hub is busy, say: loading asks again
        if kind == _MODEL and _is_downloaded(name, revision):
            return
    local = "folder" if kind == _MODEL else "folder or file"
    raise InputError(
        f"{called}: expected a local {local} or a name on the Hub, got {name!r} ({one_line(found)}); check "
        "name, revision and network"
    ) from found


def _go_on_offline(error: Exception) -> None:
    """Let the rest of the process ask the Hub for nothing: each question would be repeated for half a minute."""
    from huggingface_hub import constants

    if not constants.is_offline_mode():
        tell(f"the Hub is not reached ({one_line(error)}): only what was downloaded before is used")
        constants.HF_HUB_OFFLINE = True


def _is_downloaded(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _CONFIGURATIONS)
