"""The dependency parser: its transitions against trees, its scores against a loop, and the program that trains it."""

from __future__ import annotations

import doctest
import gzip
import json
import math
import random
import re
from pathlib import Path

import modeling_transition_parser
import pytest
import torch
from accelerate import Accelerator
from example_program import TRAINS_AND_MEASURES, run_with
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import local_hub
from modeling_transition_parser import (
    UNATTACHED,
    Configurations,
    TransitionParser,
    TransitionParserConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_parcor import (
    ACRT,
    SAM,
    CorruptionConstraint,
    CorruptionEvaluator,
    EvaluationRecord,
    GaussianNoise,
    GradientPenalty,
    MultiStepRisk,
    defended_backward,
)
from hf_parcor.cli.main import main as command_line

pytest.importorskip("datasets", reason="the examples need the extra 'examples'")
pytest.importorskip("evaluate", reason="the examples need the extra 'examples'")
from train_parser import AttachmentScore, OracleRows, Tree, read_conllu, sentence_batches

SCRIPT = Path(__file__).parents[2] / "examples" / "train_parser.py"
EWT = Path(__file__).parents[3] / "shared" / "data" / "ud_english_ewt"
RELATIONS = ["root", "nsubj", "obj"]


def crossing(heads):
    """Return whether any two arcs cross, the root being at place 0."""
    arcs = [tuple(sorted((word, head))) for word, head in enumerate(heads, 1)]
    return any(a < c < b < d for a, b in arcs for c, d in arcs)


def derived(transitions, relation_count):
    """Return heads and relations that transitions make, with lists: a reading of the definition."""
    words = len(transitions) // 2
    stack, buffer, arcs = [0], list(range(1, words + 1)), {}
    for transition in transitions:
        if transition == 0:
            stack.append(buffer.pop(0))
        elif transition <= relation_count:
            dependent = stack.pop(-2)
            arcs[dependent] = (stack[-1], transition)
        else:
            dependent = stack.pop()
            arcs[dependent] = (stack[-1], transition - relation_count)
    assert (stack, buffer) == ([0], [])
    return [arcs[word] for word in range(1, words + 1)]


def check_derivations(trees, model, *, longhand=True):
    """Check that the oracle makes each projective tree again and gives up on all others; return how many those are."""
    count = model.config.relation_count
    refused = 0
    for batch in sentence_batches(model, trees, 256):
        configurations = Configurations(batch["words"], batch["tags"], count)
        taken = []
        for _ in range(2 * batch["words"].shape[1]):
            chosen = configurations.oracle(batch["heads"], batch["relations"])
            legal = torch.nn.functional.pad(configurations.legal_transitions(), (0, 1), value=True)  # -1 is the last
            assert bool(legal.gather(1, chosen[:, None] % (2 * count + 2)).all())
            configurations.take(chosen)
            taken.append(chosen)
        done, heads = configurations.done(), batch["heads"]
        assert torch.equal(configurations.heads[done], heads[done])
        assert torch.equal(configurations.relations[done], batch["relations"][done])
        for row, moves in enumerate(torch.stack(taken, 1).tolist()):
            gold = [head for head in heads[row].tolist() if head != UNATTACHED]
            assert bool(done[row]) != crossing(gold)
            if longhand and done[row]:
                arcs = zip(gold, batch["relations"][row].tolist(), strict=False)
                assert derived(moves[: 2 * len(gold)], count) == list(arcs)
        refused += int((~done).sum())
    return refused


def parser(dropout=0.0, seed=0, vocabulary=20):
    torch.manual_seed(seed)
    config = TransitionParserConfig(
        words=[f"w{index}" for index in range(vocabulary)],
        tags=["A", "B"],
        relations=RELATIONS,
        embedding_size=4,
        hidden_size=8,
        dropout=dropout,
    )
    return TransitionParser(config).eval()


def tree(heads, generator):
    return Tree(
        [f"W{generator.randrange(30)}" for _ in heads],  # a third is beyond the vocabulary
        [generator.choice("ABC") for _ in heads],
        list(heads),
        [generator.choice([*RELATIONS, "other"]) for _ in heads],
        [generator.random() < 0.2 for _ in heads],
    )


@st.composite
def any_heads(draw, longest=9):
    """Trees with one root: each word hangs on one that comes before it in some order."""
    words = draw(st.integers(1, longest))
    order = draw(st.permutations(range(1, words + 1)))
    heads = [0] * words
    for index, word in enumerate(order[1:], 1):
        heads[word - 1] = order[draw(st.integers(0, index - 1))]
    return heads


@st.composite
def projective_heads(draw, longest=40):
    """Projective trees: a span has a head, and the spans beside it hang on that."""
    words = draw(st.integers(1, longest))
    heads = [0] * words

    def attach(start, end, head):
        while start < end:  # several dependents in a row, each with a span of its own
            cut = draw(st.integers(start + 1, end)) if head else end
            root = draw(st.integers(start, cut - 1))
            heads[root] = head
            attach(start, root, root + 1)
            attach(root + 1, cut, root + 1)
            start = cut

    attach(0, words, 0)
    return heads


class TestTransitions:
    @pytest.mark.slow
    @given(st.lists(projective_heads(), min_size=1, max_size=4))
    @settings(max_examples=25, deadline=None)
    def test_the_oracle_makes_projective_trees_again(self, batch):
        assert not any(map(crossing, batch))
        generator = random.Random(0)
        assert check_derivations([tree(heads, generator) for heads in batch], parser()) == 0

    @given(st.lists(any_heads(), min_size=1, max_size=8))
    @settings(max_examples=25, deadline=None)
    def test_it_makes_no_other(self, batch):
        generator = random.Random(0)
        trees = [tree(heads, generator) for heads in batch]
        assert check_derivations(trees, parser()) == sum(map(crossing, batch))
        model = parser()
        rows = OracleRows(sentence_batches(model, trees, 3), model.config.relation_count)
        assert (rows.trees, rows.non_projective) == (len(batch), sum(map(crossing, batch)))
        assert len(rows) == sum(2 * len(heads) for heads in batch if not crossing(heads))

    @pytest.mark.slow
    @pytest.mark.parametrize("split", ["train", "dev", "test"])
    def test_real_trees(self, split):
        if not EWT.is_dir():
            pytest.skip("UD English EWT is not beside the project: shared/data/ud_english_ewt")
        found = read_conllu(EWT / f"en_ewt-ud-{split}.conllu.gz")
        model = TransitionParser(TransitionParserConfig(relations=sorted({r for one in found for r in one.relations})))
        refused = check_derivations(found, model, longhand=split == "dev")
        assert refused == sum(crossing(one.heads) for one in found) > 0

    def test_features_longhand(self):
        """ "They saw films": saw has a dependent on its left when films has been shifted."""
        words, tags = torch.tensor([[5, 6, 7]]), torch.tensor([[3, 4, 3]])
        one = Configurations(words, tags, 3)
        for transition in (0, 0, 2, 0):
            one.take(torch.tensor([transition]))
        found, root = one.features()[0].tolist(), 2
        assert found[:6] == [7, 6, root, 0, 0, 0]  # stack, then an empty buffer
        assert found[6:18] == [*[0] * 6, 5, 0, 0, 0, 0, 0]  # they is the leftmost dependent of saw
        assert found[18:24] == [3, 4, root, 0, 0, 0]
        assert found[36:] == [*[0] * 6, 2, *[0] * 5]

    def test_second_and_grand_dependents(self):
        """Word 4 has 3 and 2 on its left, 2 has 1; the same mirrored on the right of 5's head."""
        one = Configurations(torch.arange(11, 18)[None], torch.zeros(1, 7, dtype=torch.long), 1)
        for transition in (0, 0, 1, 0, 0, 1, 1):  # 1 under 2, then 3 and 2 under 4
            one.take(torch.tensor([transition]))
        assert one.heads.tolist() == [[2, 4, 4, *[UNATTACHED] * 4]]
        around = one.features()[0, 6:12].tolist()
        assert around == [12, 0, 13, 0, 11, 0]  # leftmost, rightmost, those next to them, leftmost of the leftmost
        for transition in (0, 2, 0, 0, 2, 2):  # 5 under 4, then 7 under 6, and 6 under 4
            one.take(torch.tensor([transition]))
        around = one.features()[0, 6:12].tolist()
        assert around == [12, 16, 13, 15, 11, 17]

    def test_the_example_in_the_docstring(self):
        assert doctest.testmod(modeling_transition_parser).attempted > 0
        assert doctest.testmod(modeling_transition_parser).failed == 0


def trees(count=40, longest=12, seed=0):
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        order = list(range(1, generator.randrange(1, longest) + 1))
        generator.shuffle(order)
        heads = [0] * len(order)
        for index, word in enumerate(order[1:], 1):
            heads[word - 1] = order[generator.randrange(index)]
        found.append(tree(heads, generator))
    return found


def parsed_alone(model, one):
    words, tags = model.encode([one.words], [one.tags])
    heads, relations = model.parse(words, tags)
    return heads[0].tolist(), relations[0].tolist()


class TestParsing:
    def test_a_batch_parses_as_one_sentence_at_a_time(self):
        model = parser().double()
        some = trees()
        words, tags = model.encode([one.words for one in some], [one.tags for one in some])
        heads, relations = model.parse(words, tags)
        for row, one in enumerate(some):
            length = len(one.words)
            alone = parsed_alone(model, one)
            assert (heads[row, :length].tolist(), relations[row, :length].tolist()) == alone
            assert alone[0].count(0) == 1
            assert not crossing(alone[0])
            assert set(heads[row, length:].tolist()) <= {UNATTACHED}

    def test_scores_are_those_of_a_loop(self):
        model, some = parser().double(), trees()
        names = dict(enumerate(RELATIONS, 2))
        attached = labelled = words = 0
        for one in some:
            heads, relations = parsed_alone(model, one)
            for word, punctuation in enumerate(one.punctuation):
                if not punctuation:
                    words += 1
                    right = heads[word] == one.heads[word]
                    attached += right
                    labelled += right and names.get(relations[word]) == one.relations[word]
        score = AttachmentScore(list(sentence_batches(model, some, 7)))
        assert score(model) == {"uas": attached / words, "las": labelled / words}
        assert 0 < labelled < attached < words
        assert score.info_of("uas").greater_is_better
        assert score.info_of("loss") is None

    def test_no_answer_is_never_right(self):
        model, some = parser(), trees()
        score = AttachmentScore(list(sentence_batches(model, some, 7)))
        for value in (math.nan, math.inf):
            torch.nn.init.constant_(model.transitions.weight, value)
            assert score(model) == {"uas": 0.0, "las": 0.0, "predictions_not_finite": 1.0}

    def test_nothing_but_punctuation(self):
        model = parser()
        comma = Tree([","], ["A"], [0], ["root"], [True])
        with pytest.raises(ValueError, match="punctuation"):
            AttachmentScore(list(sentence_batches(model, [comma], 2)))(model)

    @pytest.mark.slow
    @for_each("target", [None, "word_embeddings", "hidden", "transitions"])
    def test_corrupted_and_back(self, target):
        """What is shared between corruptions changes no number, and every bit comes back."""
        model, some = parser(), trees(8, 6)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        score = AttachmentScore(list(sentence_batches(model, some, 4)))
        records = [
            CorruptionEvaluator(model, score, target_modules=target, reuse_prefix=reuse, progress=False).evaluate(
                [GaussianNoise(0.5), GaussianNoise(1.0)], trials=2
            )
            for reuse in (True, False)
        ]
        assert [row.metrics for row in records[0].rows()] == [row.metrics for row in records[1].rows()]
        assert len({row.metrics["uas"] for row in records[0].rows()}) > 1
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_saved_parser_loads_without_the_example(self, tmp_path):
        model, one = parser(), trees(1, 9, seed=3)[0]
        model.save_pretrained(tmp_path)
        entry = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"]
        loaded = get_class_from_dynamic_module(entry, str(tmp_path)).from_pretrained(tmp_path)
        assert not isinstance(loaded, TransitionParser)
        assert parsed_alone(loaded, one) == parsed_alone(model, one)


class FixedDropout(torch.nn.Module):
    """Dropout with one mask for all passes."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mask", (torch.rand(size) > 0.5) * 2.0)

    def forward(self, hidden):
        return hidden * self.mask


NEARLY_NOTHING = CorruptionConstraint(epsilon=1e-9)


@for_each(
    "defense",
    [MultiStepRisk(NEARLY_NOTHING, steps=1), ACRT(NEARLY_NOTHING), SAM(NEARLY_NOTHING), GradientPenalty(weight=1e-9)],
)
def test_a_defense_against_nearly_nothing_is_the_stock_step(defense):
    model = parser().train().double()
    model.dropout = FixedDropout(8).double()
    batches = sentence_batches(model, trees(), 64)
    rows = OracleRows(batches, model.config.relation_count)
    accelerator = Accelerator(cpu=True)

    def gradients(step):
        model.zero_grad()
        step(lambda: model(rows.features, rows.labels).loss)
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    stock = gradients(lambda loss: accelerator.backward(loss()))
    ours = gradients(lambda loss: defended_backward(accelerator, defense, model, loss))
    assert all(float(gradient.abs().max()) > 0 for gradient in stock.values())
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-7)


CONLLU = """
# text = They don't see (it).
1\tThey\tthey\tPRON\tPRP\t_\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\t_\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4\tsee\tsee\tVERB\tVB\t_\t0\troot\t_\t_
4.1\tit\tit\tPRON\tPRP\t_\t_\t_\t4:obj\t_
5\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_


# text = Yes
1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_"""


class TestReading:
    @for_each(("name", "ends"), [("a.conllu", "\n"), ("a.conllu.gz", "\n\n"), ("a.conllu", "")])
    def test_words_alone(self, tmp_path, name, ends):
        content = (CONLLU + ends).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert read_conllu(tmp_path / name) == [
            Tree(
                ["They", "do", "n't", "see", "."],
                ["PRP", "AUX", "RB", "VB", "."],
                [4, 4, 4, 0, 4],
                ["nsubj", "aux", "advmod", "root", "punct"],
                [False, False, False, False, True],
            ),
            Tree(["Yes"], ["UH"], [0], ["root"], [False]),
        ]

    @for_each(
        ("text", "says"),
        [
            ("", "sentences"),
            ("1\ta\n", "10 columns"),
            (CONLLU.replace("\n5\t", "\n6\t"), "the word 5"),
            (CONLLU.replace("\t0\troot", "\t7\troot", 1), "heads from 0 to 5"),
            (CONLLU.replace("\t0\troot", "\t_\troot", 1), "heads from 0 to 5"),
            (CONLLU.replace("\t4\tnsubj", "\t0\tnsubj"), "one word with head 0"),
            (CONLLU.replace("\t4\tnsubj", "\t2\tnsubj").replace("\t4\taux", "\t1\taux"), "ancestors"),
        ],
    )
    def test_what_is_no_tree(self, tmp_path, text, says):
        path = tmp_path / "a.conllu"
        path.write_text(text)
        with pytest.raises(ValueError, match=says) as caught:
            read_conllu(path)
        assert str(path) in str(caught.value)

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match="found none"):
            read_conllu(tmp_path / "a.conllu")


def sentence(one):
    rows = zip(one.words, one.tags, one.heads, one.relations, one.punctuation, strict=True)
    cells = [
        f"{index}\t{word}\t_\t{'PUNCT' if dot else 'X'}\t{tag}\t_\t{head}\t{relation}\t_\t_\n"
        for index, (word, tag, head, relation, dot) in enumerate(rows, 1)
    ]
    return "".join(cells)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "train.conllu").write_text("\n".join(map(sentence, trees(30))))
    (tmp_path / "dev.conllu.gz").write_bytes(gzip.compress("\n".join(map(sentence, trees(12, seed=1))).encode()))
    return tmp_path


def run(folder, monkeypatch, **more):
    given = {
        **TRAINS_AND_MEASURES,
        "train_file": str(folder / "train.conllu"),
        "validation_file": str(folder / "dev.conllu.gz"),
        "output_dir": str(folder / "out"),
        "embedding_size": 4,
        "hidden_size": 8,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 2,
        "corruptions": ["gradient=0.1:norm=inf,top_n=5", "gaussian=0.1"],
        "corruption_trials": 2,
        **more,
    }
    return run_with(SCRIPT, given, monkeypatch)


def result(out, name):
    return json.loads((out / f"{name}_results.json").read_text())


class TestProgram:
    @pytest.mark.slow
    def test_it_trains_measures_goes_on_and_makes_a_card(self, files, monkeypatch, capsys):
        best_by = "eval_robustness_gaussian_sigma_0.1_uas"
        more = {"save_strategy": "epoch", "eval_strategy": "epoch", "metric_for_best_model": best_by}
        more |= {"watched_corruptions": ["gaussian=0.1"]}
        out = run(files, monkeypatch, **more, load_best_model_at_end=True)
        assert "| gradient-based L∞ ε=0.1 n=5" in capsys.readouterr().out
        record, measured, trained = (
            EvaluationRecord.load(out / "robustness.json"),
            result(out, "eval"),
            result(out, "train"),
        )
        assert record.clean.mean("uas") == measured["eval_uas"]
        assert record.clean.mean("las") == measured["eval_las"]
        assert record.evaluated_on.rows == measured["eval_samples"] == 12
        assert trained["train_trees"] == 30
        assert trained["train_non_projective_trees"] == sum(crossing(one.heads) for one in trees(30)) > 0
        assert measured["eval_non_projective_trees"] == sum(crossing(one.heads) for one in trees(12, seed=1))
        state = json.loads((out / "trainer_state.json").read_text())
        assert state["best_metric"] == record.corruptions[-1].mean("uas")
        log = state["log_history"]
        assert all("eval_uas" in entry for entry in log if "eval_loss" in entry)
        assert any("loss_corrupted" in entry for entry in log)
        assert command_line(["card", str(out)]) == 0
        card = (out / "README.md").read_text()
        assert "gradient-based L∞ ε=0.1 n=5" in card
        assert re.search(r"\buas\b", card)
        # Once more, from the last checkpoint, and a third time from the saved model alone.
        again = run(files, monkeypatch, **more, num_train_epochs=3, resume_from_checkpoint="true")
        assert json.loads((again / "trainer_state.json").read_text())["epoch"] == 3
        before = result(again, "eval")
        alone = run(
            files,
            monkeypatch,
            model_name_or_path=str(again),
            output_dir=str(files / "alone"),
            train_file=None,
            do_train=False,
            skip_corruptions=True,
        )
        assert {key: result(alone, "eval")[key] for key in ("eval_uas", "eval_las")} == {
            key: before[key] for key in ("eval_uas", "eval_las")
        }

    @pytest.mark.slow
    def test_rows_of_the_hub(self, files, monkeypatch):
        import io

        import datasets

        rows = [
            {
                "tokens": [*one.words, "empty"],
                "upos": [*("PUNCT" if dot else "X" for dot in one.punctuation), "_"],
                "xpos": [*one.tags, None],
                "head": [*map(str, one.heads), "None"],
                "deprel": [*one.relations, "_"],
            }
            for one in trees(12, seed=1)
        ]
        packed = io.BytesIO()
        datasets.Dataset.from_list(rows).to_parquet(packed)
        contents = {f"xy/{split}/0000.parquet": packed.getvalue() for split in ("train", "validation")}
        given = {"train_file": None, "validation_file": None, "dataset_name": "org/trees", "dataset_config_name": "xy"}
        repositories = {"org/trees": {"main": {"trees.py": b""}, "refs/convert/parquet": contents}}
        with local_hub(repositories, monkeypatch, files):
            out = run(
                files, monkeypatch, **given, cache_dir=str(files / "cache"), skip_corruptions=True, defense="none"
            )
        assert result(out, "eval")["eval_samples"] == 12
        assert not (out / "robustness.json").exists()

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"train_file": None, "validation_file": None}, "expected --train_file"),
            ({"train_file": "nowhere.conllu"}, "nowhere.conllu: expected a file, found none"),
            ({"validation_file": None}, "--validation_file"),
            ({"do_train": False, "do_eval": False, "do_predict": True}, "got --do_predict alone"),
            ({"max_train_samples": 0}, "max_train_samples: expected a whole number >= 1, got 0"),
            ({"max_eval_samples": 0}, "max_eval_samples: expected a whole number >= 1, got 0"),
            ({"do_train": False}, "--model_name_or_path"),
            ({"corruptions": ["gradient=0.1:nrom=inf"]}, "norm"),
        ],
    )
    def test_bad_input(self, files, monkeypatch, change, says):
        with pytest.raises(ValueError, match=says):
            run(files, monkeypatch, **change)
        assert not (files / "out").exists()
