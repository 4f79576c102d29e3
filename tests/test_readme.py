"""The pages' Python examples run, in order, on a tiny model; their commands, flags and paths exist."""

from __future__ import annotations

import contextlib
import doctest
import gzip
import io
import pkgutil
import re
import runpy
import shlex
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import tiny
import torch
from iwslt_distribution import distribution, tar
from local_models import save_bert, write_sentences
from torch.utils.data import DataLoader
from trainings import QUIET
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, TrainingArguments

import hf_parcor
from hf_parcor import EvaluationRecord, RobustnessReport, SweepRecord
from hf_parcor.cli import main

ROOT = Path(__file__).parents[1]
FOLDERS = ("examples", "hf_parcor", "model_cards", "scripts")
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md")),
    ]
}


FIRST = "README.md"


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def taken_for_granted(tmp_path):
    """What the examples take for granted: a model, its data, its arguments; and an archive of IWSLT."""
    (tmp_path / "de-en.tgz").write_bytes(tar(distribution()))
    torch.manual_seed(0)
    config = BertConfig(**tiny.encoder())
    model, defended_model = (BertForSequenceClassification(config) for _ in range(2))
    rows = [{"input_ids": torch.randint(20, (6,)), "labels": i % 2} for i in range(8)]
    return {
        "model": model,
        "defended_model": defended_model,
        "quantized_model": defended_model,
        "model_init": lambda: model,
        "train_dataset": rows,
        "eval_dataset": rows,
        "train_loader": DataLoader(rows, batch_size=2),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "training_args": TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, **QUIET),
        "batches": [
            {"input_ids": torch.stack([row["input_ids"] for row in rows]), "labels": torch.tensor([0, 1] * 4)}
        ],
    }


@pytest.fixture
def names(tmp_path):
    return taken_for_granted(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if fences(text, "python") and page != FIRST])
def test_python_examples_run(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in fences(PAGES[page], "python"):
        exec(compile(example, page, "exec", dont_inherit=True), names)


@pytest.fixture(scope="module")
def pasted(tmp_path_factory):
    """What the script printed, and its names and weights after each example; nothing is given to it."""
    folder, after = tmp_path_factory.mktemp("first"), []

    def note(names):
        after.append({**names, "weights": {key: value.clone() for key, value in names["model"].state_dict().items()}})

    names = {"note": note}
    script = "\nnote(globals())\n".join([*fences(PAGES[FIRST], "python"), ""])
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        torch.manual_seed(0)
        exec(compile(script, FIRST, "exec", dont_inherit=True), names)
    return folder, printed.getvalue(), after


@pytest.mark.slow
class TestTheFirstPageAsOneScript:
    """Its Python, pasted together and run once; what it says is computed again with PyTorch alone."""

    LAYERS = ("bert.encoder.layer.0", "bert.encoder.layer.1")

    def at(self, state, batches):
        """The model with the weights after an example, and a function of its accuracy on the batches."""
        model = BertForSequenceClassification(state["model"].config).eval()
        model.load_state_dict(state["weights"])

        def accuracy():
            with torch.no_grad():
                right = [(model(**batch).logits.argmax(-1) == batch["labels"]).float() for batch in batches]
            return float(torch.cat(right).mean())

        return model, accuracy

    def test_each_section_is_one_example(self, pasted):
        assert len(pasted[2]) == 6, "ten lines, and two more of training, two of probing, one of publishing"

    def test_training_defends_what_was_asked_for(self, pasted):
        everything, last_layer = (state["trainer"] for state in pasted[2][:2])
        assert set(everything.defended_parameters()) == {name for name, _ in everything.model.named_parameters()}
        assert all(name.startswith(self.LAYERS[1]) for name in last_layer.defended_parameters())
        steps = last_layer.state.max_steps
        of_an_epoch = steps / last_layer.args.num_train_epochs
        assert everything.state.global_step == everything.defense_config.defended_steps
        assert last_layer.defense_config.defended_steps == steps - of_an_epoch / 2

    def test_numbers_of_an_evaluation(self, pasted):
        folder, printed, after = pasted
        state, batches = after[3], after[3]["batches"]
        assert all(torch.equal(state["weights"][key], value) for key, value in after[2]["weights"].items()), "restored"
        model, accuracy = self.at(state, batches)
        by_hand = {"no corruption": accuracy()}
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".attention." in name and "LayerNorm" not in name:
                    unit = weight.abs().max() / 7
                    weight.copy_((weight / unit).round() * unit if unit > 0 else weight)
        by_hand["4-bit quantization"] = accuracy()
        rows = {row.label: row.mean("accuracy") for row in EvaluationRecord.load(folder / "robustness.json").rows()}
        assert list(rows) == ["no corruption", "gradient-based L2 ε=0.1", "Gaussian σ=0.02", "4-bit quantization"]
        assert {label: rows[label] for label in by_hand} == pytest.approx(by_hand)
        assert all(f"{label:30} {value:.3f}" in printed.splitlines() for label, value in rows.items())

    def test_numbers_and_verdict_of_a_probe(self, pasted):
        folder, printed, after = pasted
        state, batches = after[4], after[4]["batches"]
        sweep = state["sweep"]
        assert tuple(sweep.records) == self.LAYERS
        by_hand = {}
        for layer, record in sweep.records.items():
            for row, epsilon in zip(record.corruptions, (0.1, 0.2, 0.5), strict=True):
                model, accuracy = self.at(state, batches)
                weights = list(model.get_submodule(layer).parameters())
                rows = sum(len(batch["labels"]) for batch in batches)
                loss = sum(model(**batch).loss * len(batch["labels"]) for batch in batches) / rows
                gradient = torch.autograd.grad(loss, weights)
                norm = torch.cat([part.flatten() for part in gradient]).norm()
                with torch.no_grad():
                    for weight, part in zip(weights, gradient, strict=True):
                        weight += epsilon * part / norm
                by_hand[layer, epsilon] = accuracy()
                assert row.mean("accuracy") == pytest.approx(by_hand[layer, epsilon])
        verdict = state["report"].verdict
        assert str(state["report"]) in printed
        weakest = [layer for layer in self.LAYERS if re.search(rf"{layer} is the most fragile", verdict[0])]
        strengths, clean = (0.1, 0.2, 0.5), self.at(state, batches)[1]()
        falls = {
            layer: sum(clean - by_hand[layer, epsilon] for epsilon in strengths) / len(strengths)
            for layer in self.LAYERS
        }
        largest = max(falls, key=falls.__getitem__)
        if weakest:
            assert weakest == [largest]
        else:
            assert falls[largest] <= 0.01 * clean or f"falls by {100 * falls[largest]:.1f} points" in verdict[0]
        assert (folder / "robustness.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    def test_the_card_claims_what_happened(self, pasted):
        folder, _, after = pasted
        state, trainer = after[5], after[5]["trainer"]
        card = (folder / "my-run" / "README.md").read_text(encoding="utf-8")
        assert trainer.defense_config.defended_steps == trainer.state.global_step > 0
        assert re.search(r"defended in training .* in all of its [\d,]+ steps", card)
        assert "adversarial-parameter-defense" in card.split("---")[1]
        evaluation = [
            {key: row[key][None] if key != "labels" else torch.tensor([row[key]]) for key in row}
            for row in state["eval_dataset"]
        ]
        model, _ = self.at(state, evaluation)
        with torch.no_grad():
            loss = sum(float(model(**batch).loss) for batch in evaluation) / len(evaluation)
        (record,) = trainer.robustness_records.values()
        assert record.clean.mean("loss") == pytest.approx(loss, rel=1e-5)
        assert f"{loss:.3f}" in card


PUBLIC = (ROOT / "hf_parcor" / "API.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^### `(\w+)`\n.*?```pycon\n(.*?)```", PUBLIC, flags=re.DOTALL | re.MULTILINE))


class TestThePageOfPublicNames:
    def test_it_says_what_the_docstrings_say(self):
        written = runpy.run_path(str(ROOT / "scripts" / "public_names.py"))["page"]()
        assert written == PUBLIC, "run python -m scripts.public_names"

    @pytest.mark.slow
    @pytest.mark.parametrize("name", hf_parcor.__all__)
    def test_an_example_runs_after_the_imports_of_the_page(self, name):
        names = {}
        exec(fences(PUBLIC, "python")[0], names)
        example = doctest.DocTestParser().get_doctest(EXAMPLES[name], names, name, None, None)
        assert any(name in part.source for part in example.examples) or name.endswith("Mixin")
        found = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(example)
        assert found.failed == 0 < found.attempted


def test_the_command_of_the_first_page(tmp_path, monkeypatch, capsys):
    """It prints a table and a verdict, and keeps record, report and a checkpoint, as the page says."""
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^hf-parcor (probe .* --group .*)$", PAGES[FIRST], flags=re.MULTILINE)
    save_bert(tmp_path / "my-model")
    rows = Path(write_sentences(tmp_path / "dev.tsv"))
    Path("dev.tsv.gz").write_bytes(gzip.compress(rows.read_bytes()))
    assert main(shlex.split(command)) == 0
    sweep, printed = SweepRecord.load("probe/probe.json"), capsys.readouterr().out
    assert all(f"| {layer}" in printed for layer in ("no corruption", *sweep.records))
    flat = " ".join(printed.split())
    assert all(" ".join(sentence.split()) in flat for sentence in RobustnessReport(sweep.records).verdict)
    assert {path.name for path in Path("probe").iterdir()} == {
        f"probe.{suffix}" for suffix in ("json", "jsonl", "html", "md")
    }


SCRIPT = """
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser
from transformers import Trainer, TrainingArguments

class ComparingTrainer(Trainer):
    def evaluate(self, *args, **kwargs):
        return {"eval_score": float(self.predict(self.eval_dataset).predictions.max())}

(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
rows = [{"input_ids": [i, 1 + i, 2], "labels": i % 2} for i in range(8)]
torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(**shape))
trainer = ComparingTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
trainer.train()
"""


def test_the_two_imports_are_all_that_changes(tmp_path):
    """A script that extends the Trainer's class and reads flags; ε = 1e-9 is the stock training."""
    (lines,) = fences(PAGES[FIRST], "diff")
    before, after = (re.search(rf"^{re.escape(sign)}(.*)$", lines, flags=re.MULTILINE)[1] for sign in "-+")
    assert before in SCRIPT
    flags = ["--output_dir", str(tmp_path), "--max_steps", "4", "--seed", "1", "--use_cpu", "--report_to", "none"]
    flags += ["--optim", "sgd", "--learning_rate", "0.1", "--disable_tqdm", "true", "--save_strategy", "no"]

    def weights(script, *more):
        names = {"torch": torch, "shape": {**tiny.encoder(), **tiny.STILL}, "flags": [*flags, *more]}
        exec(compile(script, FIRST, "exec", dont_inherit=True), names)
        assert names["trainer"].evaluate()
        return torch.cat([weight.detach().flatten() for weight in names["model"].parameters()])

    stock = weights(SCRIPT)
    swapped = SCRIPT.replace(before, after)
    torch.testing.assert_close(weights(swapped, "--defense_epsilon", "1e-9"), stock, rtol=0, atol=1e-6)
    assert not torch.allclose(weights(swapped, "--defense_epsilon", "1"), stock, atol=1e-3)


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_that_exist(page):
    scripts = re.findall(r"\b(?:bash|python) ((?:scripts|examples)/[^\s`]+)", PAGES[page])
    scripts += [f"scripts/{name}.py" for name in re.findall(r"\bpython -m scripts\.(\w+)", PAGES[page])]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    assert "python scripts/" not in PAGES[page], "scripts are run as modules"


def test_two_commands_are_enough():
    assert all(f"bash scripts/{name}.sh" in PAGES[FIRST] for name in ("quickstart", "test"))


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


def test_the_page_names_the_programs_that_take_a_revision_of_their_data():
    sentence = re.search(r"`--dataset_revision` of (.*?) names that branch", PAGES["examples/README.md"], re.DOTALL)
    programs = [path for path in (ROOT / "examples").glob("*.py") if "dataset_revision:" in path.read_text()]
    assert sorted(re.findall(r"\w+\.py", sentence[1])) == sorted(path.name for path in programs)


def leads_somewhere(page, target):
    path, _, heading = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    if target.startswith("http") or not heading:
        return target.startswith("http") or file.exists()
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]


def exists(name):
    """Say whether a path or a dotted name is one."""
    if "/" in name or name.endswith(".py"):
        return (ROOT / name).exists()
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


def test_links_lead_somewhere():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 50
    assert [link for link in links if not leads_somewhere(*link)] == []
    assert [page for page, text in PAGES.items() if r"\](" in text] == [], "a link in a table of escaped texts is none"


def test_paths_and_names_exist():
    """Those of the pages, and the names in docstrings."""
    sources = {str(path): path.read_text(encoding="utf-8") for path in (ROOT / "hf_parcor").rglob("*.py")}
    names = [
        (page, name)
        for page, text in [*PAGES.items(), *sources.items()]
        for name in re.findall(r"`((?:tests|hf_parcor|scripts|examples)/[\w./]+|hf_parcor(?:\.\w+)+)", text)
    ]
    assert len(names) > 40
    assert [(page, name) for page, name in names if not exists(name)] == []
