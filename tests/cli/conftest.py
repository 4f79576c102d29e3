"""A tiny classifier with data, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from local_models import save_bert, write_sentences

from hf_parcor.cli import main


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny BERT that classifies sentences, with its tokenizer."""
    return save_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def models_of_seeds(classifier_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of four such models with other weights, by name."""
    folders = {"plain": classifier_folder}
    for seed, name in enumerate(("defended", "other", "last"), start=1):
        folders[name] = save_bert(tmp_path_factory.mktemp(name), seed=seed)
    return folders


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file with six sentences and labels."""
    return write_sentences(tmp_path_factory.mktemp("data") / "sätze.tsv")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Return a function that runs a line and words in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(line: object, *words: object) -> Result:
        capsys.readouterr()
        code = main([*str(line).split(), *map(str, words)])
        return Result(code, *capsys.readouterr())

    return command
