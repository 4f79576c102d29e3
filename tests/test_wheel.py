"""The wheel: what is in it, and that the README's ten lines run from it alone, without extras, checkout and network.

`scripts/check_wheel.sh` does it in a clean environment, with the newest or the lowest versions; it needs a registry.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from test_architecture import OPTIONAL, PACKAGE, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command, folder, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, folder / "source" / "hf_parcor", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    offline = ("--no-deps", "--no-index", "--quiet")
    run("-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", folder, folder / "source", folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_it_holds_the_package_with_its_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert held == wanted | {"hf_parcor/py.typed"}


@pytest.mark.slow
def test_it_asks_for_no_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = archive.read(name).decode()
    needed = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in needed} == {"torch", "transformers", "accelerate", "pyyaml"}
    assert all(">=" in line for line in needed)


@pytest.mark.slow
def test_the_ten_lines_of_the_first_page_run_from_it(wheel, tmp_path):
    installed = tmp_path / "installed"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", installed, wheel, folder=tmp_path)
    first = (ROOT / "README.md").read_text(encoding="utf-8")
    ten_lines = re.findall(r"```python\n(.*?)```", first, flags=re.DOTALL)[0]
    without = f"import sys\nsys.modules.update(dict.fromkeys({sorted(OPTIONAL | {'sklearn'})}))\n"
    whose = f"\nimport hf_parcor\nassert hf_parcor.__file__.startswith({str(installed)!r}), hf_parcor.__file__\n"
    program = without + ten_lines + whose
    printed = run("-c", program, folder=tmp_path, PYTHONPATH=str(installed), HF_HUB_OFFLINE="1")
    losses = {label.strip(): float(loss) for label, loss in re.findall(r"^(.*) loss (\S+)$", printed, re.MULTILINE)}
    assert list(losses) == ["no corruption", "gradient-based L2 ε=0.1", "4-bit quantization"]
    assert losses["gradient-based L2 ε=0.1"] > losses["no corruption"]


def test_the_page_says_the_lower_bounds():
    first = (ROOT / "README.md").read_text(encoding="utf-8")
    bounds = dict(re.findall(r"^(\w+)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    assert all(f"{name} ≥ {bounds[name]}" in first for name in ("torch", "transformers", "accelerate"))
    assert f"Python ≥ {PROJECT['requires-python'].removeprefix('>=')}" in first


def test_the_citation_is_of_this_version_and_of_the_papers_that_cards_name():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    on_cards = (PACKAGE / "cards" / "text.py").read_text(encoding="utf-8")
    for paper in citation["references"]:
        authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
        assert f"title = {{{paper['title']}}}" in on_cards
        assert f"author = {{{authors}}}" in on_cards
