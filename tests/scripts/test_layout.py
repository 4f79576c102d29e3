"""What can be run lies at the top of scripts/ and stands on its page; what it is made of lies in folders."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PAGE = (SCRIPTS / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(SCRIPTS.glob("*.py"))
PARTS = sorted(SCRIPTS.glob("*/*.py"))


def is_command(path):
    tests = [ast.unparse(node.test) for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in tests


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_what_lies_at_the_top_can_be_run(path):
    assert is_command(path)
    assert f"`{path.name}`" in PAGE


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_lies_in_a_folder_is_a_part(path):
    assert not is_command(path)
    assert f"`{path.parent.name}/`" in PAGE
    assert len(path.read_text().splitlines()) < 250
    commands = "|".join(command.stem for command in COMMANDS)
    assert re.search(rf"^(?:from|import) (?:{commands})\b", path.read_text(), re.MULTILINE) is None
