"""The shape of the code, read from its imports: dependencies point one way, and optional libraries stay optional."""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from for_each import for_each

import hf_parcor

PACKAGE = Path(hf_parcor.__file__).parent
ROOT = PACKAGE.parent
OPTIONAL = {
    *("datasets", "evaluate", "lm_eval", "matplotlib", "pandas", "peft", "sacrebleu", "sacremoses", "scipy", "seqeval")
}
PUBLIC = [
    "CorruptionConstraint",
    "RandomCorruption",
    "GradientCorruption",
    "MultiStepCorruption",
    "GaussianNoise",
    "UniformNoise",
    "Quantization",
    "BitFlips",
    "WorstBitFlips",
    "select_parameters",
    "corrupted",
    "MultiStepRisk",
    "ACRT",
    "GradientPenalty",
    "SAM",
    "AWP",
    "ParameterDefenseMixin",
    "ParameterDefenseTrainer",
    "Seq2SeqParameterDefenseTrainer",
    "ParameterDefenseTrainingArguments",
    "Seq2SeqParameterDefenseTrainingArguments",
    "CorruptionEvaluator",
    "DefenseConfig",
    "defended_backward",
    "RobustnessCallback",
]

# What each part may import of the others, from the table that people read. A new part needs a row there.
MAY_IMPORT = {
    part: set(re.findall(r"\w+", others))
    for part, others in re.findall(
        r"^\| `(\w+)` \|.*\| ([\w, –]+) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@cache
def imports_of(path, *, top_level=False):
    """Return the full names that a file imports; at the top level only those that run when it is imported."""
    found = set()

    def visit(node):
        if top_level and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(node)
        ):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in SOURCES else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree_of(path))
    return frozenset(found)


def part_of(name):
    return name.split(".")[1]


def own_imports(path):
    return {name for name in imports_of(path) if name.split(".")[0] == "hf_parcor"}


def sources(*parts):
    """Return the names of all modules of these parts, of all parts where none is named."""
    found = [name for name in SOURCES if "." in name and (not parts or part_of(name) in parts)]
    assert found, "nothing of that name is left to look at"
    return found


def libraries(*parts):
    return {name: {other.split(".")[0] for other in imports_of(SOURCES[name])} for name in sources(*parts)}


def offenders(found, forbidden=None):
    """Return what each module has of what is forbidden, of anything by default, for those that have some."""
    bad = {name: sorted(has if forbidden is None else has & forbidden) for name, has in found.items()}
    return {name: has for name, has in bad.items() if has}


class TestDependencies:
    def test_every_part_has_a_row(self):
        assert {part_of(name) for name in SOURCES if "." in name} == set(MAY_IMPORT)

    def test_a_row_names_only_rows_above_it(self):
        above = set()
        for part, others in MAY_IMPORT.items():
            assert others <= above, part
            above.add(part)

    def test_imports_point_downwards(self):
        upwards = {}
        for name in sources():
            parts = {part_of(other) if "." in other else other for other in own_imports(SOURCES[name])}
            upwards[name] = parts - {part_of(name)} - MAY_IMPORT[part_of(name)]
        assert offenders(upwards) == {}

    def test_there_are_no_cycles(self):
        graph = {name: own_imports(path) & set(SOURCES) for name, path in SOURCES.items()}
        TopologicalSorter(graph).prepare()

    def test_what_is_drawn_is_drawn_from_records_alone(self):
        drawing = {"hf_parcor.reports.plots", "hf_parcor.reports.panels"}
        wording = {"hf_parcor.reports.numbers", "hf_parcor.reports.tables"}  # how numbers and groups are written
        for name in drawing:
            assert {part_of(found) for found in own_imports(SOURCES[name]) - drawing - wording} == {"records"}

    def test_formulas_have_no_engine(self):
        assert offenders(libraries("theory", "statistics", "records", "reports"), {"torch", "transformers"}) == {}

    def test_corruptions_and_defenses_know_no_trainer(self):
        assert offenders(libraries("defenses", "corruptions"), {"transformers", "accelerate"}) == {}

    def test_numbers_know_no_model(self):
        words = {}
        for name in sources("functional", "corruptions"):
            nodes = list(ast.walk(tree_of(SOURCES[name])))
            words[name] = {node.id for node in nodes if isinstance(node, ast.Name)}
            words[name] |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            words[name] |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert offenders(words, {"nn", "Module"}) == {}


def loaded_by(program):
    """Return the names of all modules that a program of its own has loaded at its end."""
    program += "\nimport sys\nprint(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


# The library `evaluate` reads these as scripts; nothing of ours imports them.
SCRIPTS = {name for name, path in SOURCES.items() if path.parent.parent.name == "metric_modules"}


@pytest.fixture(scope="module")
def without_optional_libraries():
    """What a process loads that has no optional library: with the training, and then with all modules of ours."""
    program = f"""
import importlib, sys

blocked = {OPTIONAL | {"sklearn"}!r}  # needs SciPy; Transformers before 5.21 imports it

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for library in blocked:
    try:
        importlib.import_module(library)
    except ModuleNotFoundError:
        continue
    raise AssertionError(library)
import hf_parcor.training
print(*sys.modules)
for name in {sorted(set(SOURCES) - SCRIPTS - {"hf_parcor.__main__"})!r}:  # that one is a program, and ends
    importlib.import_module(name)
print(*sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    training, everything = (set(line.split()) for line in result.stdout.splitlines())
    return training, everything


def lines_behind_imports(path):
    """What is moved into a file of its own is no more than before."""
    nodes = tree_of(path).body
    imports = [node.end_lineno for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return path.read_text(encoding="utf-8").count("\n") - max(imports, default=0)


class TestWhatIsLoaded:
    """Reading records waits for no engine, and training for no reader."""

    def test_by_records_and_reports(self):
        assert loaded_by("import hf_parcor.records, hf_parcor.reports").isdisjoint(
            {"torch", "transformers", "accelerate", *OPTIONAL, "hf_parcor.cards"}
        )

    @pytest.mark.slow
    def test_by_training(self, without_optional_libraries):
        training, _ = without_optional_libraries
        found = {name for name in training if name.startswith("hf_parcor.")}
        readers = {"records", "reports", "cards", "cli", "evaluation", "indicators", "tasks", "translation"}
        assert {part_of(name) for name in found}.isdisjoint(readers | {"trainers"})
        lines = sum(lines_behind_imports(SOURCES[name]) for name in found)
        assert lines <= 14_237, "training has come to load more; is all of it needed to train?"

    def test_by_the_command_line_where_nothing_is_measured(self, tmp_path):
        program = f"""
import contextlib, io, json
from pathlib import Path
from hf_parcor.cli.main import COMMANDS, main
from hf_parcor.records import CorruptionRecord, EvaluationRecord
from hf_parcor.records.evaluation import CorruptionKind

def row(label, accuracy):
    kind = CorruptionKind(label, "bits", "bits per weight", "{{}} bits")
    return CorruptionRecord(label, label, {{"bits": 4}}, (0,), {{"accuracy": (accuracy,)}}, kind=kind)

seeds = [Path({str(tmp_path)!r}, name) for name in "ab"]
for index, folder in enumerate(seeds):
    rows = (row("quantization", 0.5 + index / 10),)
    record = EvaluationRecord("m", {{}}, 1, row("none", 0.9), rows, weights=str(folder))
    record.save(folder / "robustness.json")
    (folder / "config.json").write_text("{{}}")  # a model that was trained
    (folder / "defense_config.json").write_text(json.dumps({{"defense": "sam"}}))
names = list(map(str, seeds))
page = str(Path({str(tmp_path)!r}, "page.html"))
lines = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
lines += [["report", *names, "--pages", page], ["compare", *names, "--pages", page]]
with contextlib.redirect_stdout(io.StringIO()):
    assert [main(line) for line in lines] == [0] * len(lines)
"""
        found = loaded_by(program)
        assert (tmp_path / "page.html").is_file()
        assert found.isdisjoint({"torch", "transformers", "accelerate", "datasets", "huggingface_hub"})


class TestFiles:
    def test_names(self):
        assert [name for name in SOURCES if re.search(r"util|helper|misc|common", name.rpartition(".")[2])] == []

    def test_no_tracked_file_names_a_place_on_a_machine(self):
        try:
            listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("not a git checkout")
        place = re.compile(r"(?<![\w.~])/(?:work|home|root|Users|mnt|tmp|opt)/\w|[A-Z]:\\Users")
        found = []
        for name in filter(None, listed.stdout.split("\0")):
            path = ROOT / name
            if path.is_file():
                text = path.read_bytes().decode("utf-8", errors="replace")
                found += [f"{name}: {match.group()}" for match in place.finditer(text)]
        assert found == []


class TestOptionalLibraries:
    def test_none_is_imported_at_the_top_of_a_module(self):
        found = {name: imports_of(SOURCES[name], top_level=True) for name in set(SOURCES) - SCRIPTS}
        tops = {name: {other.split(".")[0] for other in imported} for name, imported in found.items()}
        assert offenders(tops, OPTIONAL) == {}

    @pytest.mark.slow
    def test_everything_imports_without_them(self, without_optional_libraries):
        _, everything = without_optional_libraries
        assert everything >= set(SOURCES) - SCRIPTS - {"hf_parcor.__main__"}
        assert everything.isdisjoint(OPTIONAL)


class TestPublicNames:
    def test_the_promises(self):
        assert set(PUBLIC) <= set(hf_parcor.__all__)
        assert [name for name in PUBLIC if not getattr(hf_parcor, name).__module__.startswith("hf_parcor.")] == []

    @for_each("name", [name for name in SOURCES if SOURCES[name].name == "__init__.py"])
    def test_all_is_sorted_and_complete(self, name):
        module = importlib.import_module(name)
        body = tree_of(SOURCES[name]).body
        lazily = [node for block in filter(is_type_checking, body) for node in block.body]
        imported = {
            alias.asname or alias.name
            for node in [*body, *lazily]
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_parcor")
            for alias in node.names
            if not alias.name.startswith("_")
        }
        if not hasattr(module, "__all__"):
            assert not imported
            return
        defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        order = sorted(module.__all__, key=lambda entry: (not entry.isupper(), not entry[0].isupper(), entry))
        assert module.__all__ == order
        assert imported <= set(module.__all__) <= imported | defined
        assert all(hasattr(module, entry) for entry in module.__all__)

    @pytest.mark.slow
    def test_the_top_imports_nothing_until_it_is_asked(self):
        program = """
import importlib.metadata
import sys

import hf_parcor

assert not [name for name in sys.modules if name.startswith(("hf_parcor.", "torch"))]
assert hf_parcor.__version__ == importlib.metadata.version("hf-parcor")
assert hf_parcor.CorruptionConstraint(epsilon=1).epsilon == 1
assert hf_parcor.records.EvaluationRecord is hf_parcor.EvaluationRecord
assert set(hf_parcor.__all__) <= set(dir(hf_parcor))
"""
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
