"""The pages' Python examples run, in order, on a tiny model; their commands, flags and paths exist."""

from __future__ import annotations

import re
import runpy
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from iwslt_distribution import distribution, tar
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, TrainingArguments

from hf_parcor import EvaluationRecord

ROOT = Path(__file__).parents[1]
FOLDERS = ("examples", "hf_parcor", "model_cards", "scripts")
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in [
        ROOT / "README.md",
        *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md")),
    ]
}


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def names(tmp_path):
    """What the examples take for granted: a model, its data, its arguments; and an archive of IWSLT."""
    (tmp_path / "de-en.tgz").write_bytes(tar(distribution()))
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )
    rows = [{"input_ids": torch.randint(20, (6,)), "labels": i % 2} for i in range(8)]
    return {
        "model": model,
        "model_init": lambda: model,
        "train_dataset": rows,
        "eval_dataset": rows,
        "train_loader": DataLoader(rows, batch_size=2),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "training_args": TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
        ),
        "batches": [
            {"input_ids": torch.stack([row["input_ids"] for row in rows]), "labels": torch.tensor([0, 1] * 4)}
        ],
    }


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if fences(text, "python")])
def test_python_examples_run(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in fences(PAGES[page], "python"):
        exec(compile(example, page, "exec"), names)


def test_the_first_page_shows_training_and_probing(names, tmp_path, monkeypatch, capsys):
    test_python_examples_run("README.md", names, tmp_path, monkeypatch)
    assert [row.label for row in EvaluationRecord.load("robustness.json").corruptions] == [
        "gradient-based L2 ε=0.1",
        "Gaussian σ=0.02",
        "4-bit quantization",
    ]
    printed = capsys.readouterr().out
    assert "no corruption" in printed
    assert names["report"].verdict[0] in printed


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_that_exist(page):
    scripts = re.findall(r"\b(?:bash|python) ((?:scripts|examples)/[^\s`]+)", PAGES[page])
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_two_commands_are_enough():
    assert all(f"bash scripts/{name}.sh" in PAGES["README.md"] for name in ("quickstart", "test"))


def arguments_of(script):
    """The classes of arguments of an example."""
    pytest.importorskip("datasets", reason="the examples need the extra 'examples'")
    names = runpy.run_path(str(ROOT / script))
    return [kind for kind in names.values() if is_dataclass(kind) and kind.__name__.endswith("Arguments")]


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "--defense_target_modules" in text])
def test_flags_of_the_example_exist(page):
    for example in (fence for fence in fences(PAGES[page], "bash") if "--defense_target_modules" in fence):
        (script,) = re.findall(r"python (examples/\S+)", example)
        line = re.findall(r"--\S+(?: [^-\s]\S*)*", example.replace("\\\n", " "))
        flags = [part for option in line for part in option.split()]
        parsed = HfArgumentParser(arguments_of(script)).parse_args_into_dataclasses(flags)
        targets = [getattr(arguments, "defense_target_modules", None) for arguments in parsed]
        assert [target for target in targets if target] in ([["last-encoder-layer"]], [["last-decoder-layer"]])


@pytest.mark.parametrize(
    ("page", "target"),
    [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)],
)
def test_links_lead_somewhere(page, target):
    if target.startswith("http"):
        return
    path, _, heading = target.partition("#")
    file = (ROOT / page).parent / path
    assert file.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]


@pytest.mark.parametrize(
    ("page", "path"),
    [
        (page, path)
        for page, text in PAGES.items()
        for path in re.findall(r"`((?:tests|hf_parcor|scripts|examples)/[\w./]+)`", text)
    ],
)
def test_paths_exist(page, path):
    assert (ROOT / path).exists()
