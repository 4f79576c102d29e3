"""Data sets of the Hub, read by `datasets` itself from a Hub on this machine: scripts, copies, what is missing."""

from __future__ import annotations

import io
import logging

import pytest
from local_hub import local_hub

from hf_parcor.errors import InputError
from hf_parcor.hub_data import CONVERTED, download_from_hub, load_hub_data
from hf_parcor.tasks import load_rows

datasets = pytest.importorskip("datasets", reason="data sets of the Hub need the extra 'cli'")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCRIPT = b"raise SystemExit('a loading script was run')"


def rows(pair, split, count=3):
    one, two = pair.split("-")
    return [{"translation": {one: f"{one} {split} {row}", two: f"{two} {split} {row}"}} for row in range(count)]


def parquet(content):
    file = io.BytesIO()
    datasets.Dataset.from_list(content).to_parquet(file)
    return file.getvalue()


def copy_of(*configurations):
    """The layout of the Hub's copies."""
    return {
        f"{name}/{split}/0000.parquet": parquet(rows(name[-5:], split))
        for name in configurations
        for split in ("train", "validation", "test")
    } | {".gitattributes": b"*.parquet filter=lfs\n"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    repositories = {
        "TED/talks": {"main": {"README.md": b"# talks\n", "talks.py": SCRIPT},
                      CONVERTED: copy_of("talks-de-en", "talks-en-vi")},
        "TED/one": {"main": {"one.py": SCRIPT}, CONVERTED: copy_of("one-de-en")},
        "TED/none": {"main": {"none.py": SCRIPT}},
        "TED/tagged": {"main": {"tagged.py": SCRIPT}, "v1": {"tagged.py": SCRIPT}, CONVERTED: copy_of("talks-de-en")},
        "TED/files": {"main": {"data/train-00000-of-00001.parquet": parquet(rows("de-en", "train"))}},
    }  # fmt: skip
    with local_hub(repositories, monkeypatch, tmp_path) as running:
        yield running


def test_datasets_itself_refuses(hub):
    """If `datasets` reads scripts again, or finds a configuration of the copy by name, less is to do here."""
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        datasets.load_dataset("TED/talks", "talks-de-en")
    with pytest.raises(ValueError, match="talks-de-en"):
        datasets.load_dataset("TED/talks", "talks-de-en", revision=CONVERTED)


READ = {
    "a script": ("TED/talks", "talks-en-vi", None, rows("en-vi", "validation"), True),
    "a script, main asked for": ("TED/talks", "talks-de-en", "main", rows("de-en", "validation"), True),
    "its copy, asked for": ("TED/talks", "talks-de-en", CONVERTED, rows("de-en", "validation"), False),
    "a script with one configuration": ("TED/one", None, None, rows("de-en", "validation"), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", READ)
def test_rows_of_a_script(hub, case, caplog):
    name, configuration, revision, expected, said = READ[case]
    with caplog.at_level(logging.WARNING, logger="hf_parcor"):
        found = load_hub_data(name, configuration, split="validation", revision=revision)
    assert found.to_list() == expected
    assert [CONVERTED in record.getMessage() for record in caplog.records if record.name == "hf_parcor.hub_data"] == (
        [True] if said else []
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "configuration"), [("TED/talks", "talks-de-en"), ("TED/one", None)])
def test_again_with_the_copy_in_the_cache(hub, name, configuration):
    """`datasets` then looks into its cache before it says that there is a script, and finds no such configuration."""
    for split in ("train", "validation", "validation"):
        assert load_hub_data(name, configuration, split=split).to_list() == rows("de-en", split)


@pytest.mark.slow
def test_all_splits(hub):
    found = load_hub_data("TED/talks", "talks-de-en")
    assert {split: data.to_list() for split, data in found.items()} == {
        split: rows("de-en", split) for split in ("train", "validation", "test")
    }


@pytest.mark.slow
def test_files_are_read_as_they_are(hub, caplog):
    assert load_hub_data("TED/files", split="train").to_list() == rows("de-en", "train")
    assert not [record for record in caplog.records if record.name == "hf_parcor.hub_data"]


@pytest.mark.slow
def test_the_command_line_reads_them_too(hub):
    found = load_rows("TED/talks", "test", "talks-de-en")
    assert next(iter(found.entries)) == {"translation.de": "de test 0", "translation.en": "en test 0"}


REFUSED = {
    "no configuration": ({"name": "TED/talks"}, "talks-de-en, talks-en-vi"),
    "no such configuration": ({"name": "TED/talks", "configuration": "talks-de-eng"}, "did you mean talks-de-en"),
    "no such split": ({"name": "TED/talks", "configuration": "talks-de-en", "split": "dev"}, "'dev'"),
    "no copy": ({"name": "TED/none", "configuration": "a"}, "TED/none: .*beside the script"),
    "no copy, nor a configuration": ({"name": "TED/none"}, "TED/none: .*beside the script"),
    "a tag": (
        {"name": "TED/tagged", "configuration": "talks-de-en", "revision": "v1"},
        "'v1'.*leave the revision out",
    ),
    "no such revision": ({"name": "TED/files", "revision": "v2"}, "'v2'.*; check name"),
    "no such data set": ({"name": "TED/talk"}, "TED/talk: .*; check name"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_an_error_with_the_remedy(hub, case):
    asked, says = REFUSED[case]
    with pytest.raises(InputError, match=says):
        load_hub_data(**asked)


@pytest.mark.slow
def test_a_hub_that_is_gone(hub, monkeypatch):
    """The network's own errors are not `OSError`s; its library has another name in each release."""
    monkeypatch.setattr("time.sleep", lambda _: None)  # before the next try
    hub.shutdown()
    hub.server_close()
    for configuration, revision in ((None, None), (None, CONVERTED), ("talks-de-en", CONVERTED)):
        with pytest.raises(InputError, match=r"TED/talks: .*network"):
            load_hub_data("TED/talks", configuration, revision=revision)
    with pytest.raises(InputError, match=r"TED/talks: .*network"):
        download_from_hub("TED/talks", lambda names: names[0])


def test_a_script_in_a_folder(tmp_path):
    (tmp_path / "talks").mkdir()
    (tmp_path / "talks" / "talks.py").write_bytes(SCRIPT)
    with pytest.raises(InputError, match="loading script"):
        load_hub_data(str(tmp_path / "talks"))
