"""Data sets of the Hub, also those that are still a loading script: of these the Hub's own copy is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_parcor.errors import InputError, nearest, one_line

logger = logging.getLogger(__name__)

CONVERTED = "refs/convert/parquet"
"""The branch with the Hub's own copy of a data set, as Parquet files: `CONFIGURATION/SPLIT/0000.parquet`."""

_OF_CONVERSIONS = "refs/convert/"
_MAIN = "main"


def load_hub_data(
    name: str,
    configuration: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> Any:
    """Return a data set of the Hub, or of a local folder that `datasets` knows.

    `datasets` no longer runs loading scripts. Where it meets one, the branch `refs/convert/parquet` is read instead,
    with the same rows, and the log says so. That branch has no list of configurations; each is a folder there, which
    is why `load_dataset(name, configuration, revision="refs/convert/parquet")` alone does not find one. It is looked
    for on the Hub each time: where there is no network, give files instead.

    Args:
        name: Its name, or the folder.
        configuration: Which of its configurations; needed if there are several.
        split: Which split; all of them for None.
        revision: Branch, tag or commit. With a branch of conversions given, that is read at once; with any other than
            `main`, a script is an error, since the copy is of `main`.
        cache_dir: Where downloads are kept.

    Returns:
        A `datasets.Dataset`, or for all splits a `datasets.DatasetDict`.

    Raises:
        InputError: There is no such data set, configuration, split or revision; or it is a script without a copy.
        ImportError: datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} needs datasets; install it with: pip install 'hf-parcor[cli]'") from error
    known: dict[str, Any] = {"split": split, "cache_dir": cache_dir}
    if revision is not None and revision.startswith(_OF_CONVERSIONS):
        return _load_converted(name, configuration, revision, known)
    try:
        return datasets.load_dataset(name, configuration, revision=revision, **known)
    except (*failures_of_hub(), RuntimeError, datasets.exceptions.DatasetsError) as error:
        if not _is_script(name, revision, error):
            if isinstance(error, RuntimeError):
                raise
            told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
            raise InputError(
                f"{name}: expected a data set on the Hub, a folder or a file{_wanted(configuration, split, revision)}"
                f", got {one_line(told or error)}; check name, split and network"
            ) from error
        refused = error
    if Path(name).exists():
        raise InputError(
            f"{name}: expected files of data, got a loading script ({one_line(refused)}); move the script away, or "
            "name the data's own files"
        ) from refused
    if revision not in (None, _MAIN):
        raise InputError(
            f"{name}: expected files of data at revision {revision!r}, got a loading script ({one_line(refused)}); "
            f"the Hub's copy is of {_MAIN}: leave the revision out, or give {CONVERTED}"
        ) from refused
    logger.warning(f"{name} is a loading script, which datasets no longer runs: the Hub's copy is read, {CONVERTED}.")
    return _load_converted(name, configuration, CONVERTED, known)


def download_from_hub(name: str, choose: Callable[[Sequence[str]], str], cache_dir: str | None = None) -> Path:
    """Return where one of the files of a data set lies, downloaded unless it is there already.

    Args:
        name: The data set's name on the Hub.
        choose: Says which, given the paths of all its files; raises `ValueError` if none will do.
        cache_dir: Where downloads are kept.

    Raises:
        InputError: There is no such data set, or none of its files will do.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        chosen = choose(api.list_repo_files(name, repo_type="dataset"))
        return Path(api.hf_hub_download(name, chosen, repo_type="dataset", cache_dir=cache_dir))
    except failures_of_hub() as error:
        raise InputError(
            f"{name}: expected a local folder or file, or a data set on the Hub with a suitable file, got "
            f"{one_line(error)}; check name and network"
        ) from error


def _load_converted(name: str, configuration: str | None, revision: str, known: dict[str, Any]) -> Any:
    import datasets

    try:
        folder = configuration or _only_configuration(name, revision)
        return datasets.load_dataset(name, data_dir=folder, revision=revision, **known)
    except InputError:
        raise
    except (*failures_of_hub(), datasets.exceptions.DatasetsError) as error:
        there = _configurations_if_reached(name, revision)
        if configuration is not None and there and configuration not in there:
            raise _no_such(name, revision, configuration, there) from error
        raise InputError(
            f"{name}: expected the Hub's copy of it{_wanted(configuration, known['split'], revision)}, got "
            f"{one_line(error)}; check configuration, split and network. If there is no copy, download what lies "
            f"beside the script (huggingface.co/datasets/{name}/tree/{_MAIN}) and give the files, or name "
            "another data set with the same rows"
        ) from error


def failures_of_hub() -> tuple[type[Exception], ...]:
    """Return what is raised where there is no such thing on the Hub, or no network."""
    from huggingface_hub import errors

    # Its own errors and those of its network library, whose name differs between releases, have this base.
    network = [kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (OSError, ValueError, *network)


def _is_script(name: str, revision: str | None, error: Exception) -> bool:
    """Return whether loading failed because of a loading script.

    Where an earlier copy lies in its cache, `datasets` looks there instead of saying so; then the Hub is asked.
    """
    if "scripts are no longer supported" in str(error):
        return True
    import datasets
    from huggingface_hub import HfApi

    script = f"{name.rpartition('/')[2]}.py"
    try:
        api = HfApi(endpoint=datasets.config.HF_ENDPOINT)
        return bool(api.file_exists(name, script, repo_type="dataset", revision=revision))
    except failures_of_hub():
        return False


def _only_configuration(name: str, revision: str) -> str:
    there = _configurations(name, revision)
    if len(there) != 1:
        raise _no_such(name, revision, None, there)
    return there[0]


def _configurations(name: str, revision: str) -> list[str]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFolder

    entries = HfApi(endpoint=datasets.config.HF_ENDPOINT).list_repo_tree(name, revision=revision, repo_type="dataset")
    return sorted(entry.path for entry in entries if isinstance(entry, RepoFolder))


def _configurations_if_reached(name: str, revision: str) -> list[str]:
    """Return the configurations there are, none if the Hub does not say: this is for a message."""
    try:
        return _configurations(name, revision)
    except failures_of_hub():
        return []


def _no_such(name: str, revision: str, configuration: str | None, there: list[str]) -> InputError:
    hint = nearest(configuration, there) if configuration is not None else ""
    found = ", ".join(there) or "none"
    return InputError(
        f"{name}: expected one of the configurations in {revision}: {found}; got {configuration!r}{hint}; name one"
    )


def _wanted(configuration: str | None, split: str | None, revision: str | None) -> str:
    asked = {"configuration": configuration, "split": split, "revision": revision}
    words = [f"{what} {value!r}" for what, value in asked.items() if value is not None]
    return f", with {', '.join(words)}" if words else ""
