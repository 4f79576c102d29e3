"""A card and what lies beside it, as files in the folder of a model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from hf_parcor.cards.facts import ModelFacts
from hf_parcor.cards.front_matter import RESULTS_FOLDER, RESULTS_PREFIX, eval_result_file, metadata_of
from hf_parcor.cards.text import CURVES, HEAT_MAP, pictures_of, section_of, updated_card
from hf_parcor.reports.markup import text_of
from hf_parcor.strict_json import replace_bytes, replace_text

CARD = "README.md"
FACTS = "robustness_facts.json"


def files_beside(facts: ModelFacts) -> dict[str, bytes]:
    """Return what lies beside a card, by path: the facts, the result for a leaderboard, and the pictures.

    There are no pictures where Matplotlib is not installed.
    """
    files = {FACTS: facts.to_json().encode()}
    files |= {path: text.encode() for path, text in eval_result_file(facts).items()}
    return files if find_spec("matplotlib") is None else files | pictures_of(facts)


def is_ours(path: str) -> bool:
    """Say whether a path beside a card is one that `files_beside` may have made, for these facts or older ones."""
    place = PurePosixPath(path)
    of_the_hub = str(place.parent) == RESULTS_FOLDER and place.name.startswith(RESULTS_PREFIX)
    return path in (FACTS, CURVES, HEAT_MAP) or (of_the_hub and place.suffix == ".yaml")


def card_of(
    facts: ModelFacts, files: Mapping[str, bytes], text: str = "", *, training: str = "", generated: bool = False
) -> str:
    """Return a card that says the facts.

    Args:
        facts: What to say.
        files: What lies beside the card; the pictures among them are shown.
        text: The card as it is; "" for none.
        training: As in `section_of`.
        generated: As in `updated_card`.

    Raises:
        ValueError: As in `updated_card`.
    """
    section = section_of(facts, pictures=files, training=training)
    return updated_card(text or f"\n# {text_of(facts.name)}\n", section, metadata_of(facts), generated=generated)


def read_text(path: Path) -> str:
    """Return the text of a card with its line endings; "" where there is no file.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got {error}; save it as UTF-8") from error


def write_files(folder: Path, card: str, files: Mapping[str, bytes]) -> Path:
    """Write a card, and what lies beside it in place of what lay there of ours, and return the card's path.

    The card is written last and at once: an interruption leaves the old one.
    """
    for old in [*(folder / name for name in (FACTS, CURVES, HEAT_MAP)), *(folder / RESULTS_FOLDER).glob("*")]:
        name = old.relative_to(folder).as_posix()
        if is_ours(name) and name not in files:
            old.unlink(missing_ok=True)
    for name, content in files.items():
        replace_bytes(folder / name, content)
    return replace_text(folder / CARD, card)


def write_card(folder: str | Path, facts: ModelFacts) -> Path:
    """Create or update the card in a folder, with the files beside it, and return its path.

    Raises:
        ValueError: The existing card is not UTF-8, or as in `updated_card`. Nothing was written.
    """
    files = files_beside(facts)
    card = card_of(facts, files, read_text(Path(folder) / CARD))
    return write_files(Path(folder), card, files)
