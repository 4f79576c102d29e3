"""Breaks modules of the library in small ways, one after the other, and says which breaks no test notices.

    python -m scripts.mutants hf_parcor/constraints.py
    python -m scripts.mutants hf_parcor/training/*.py --tests tests/training tests/test_batches.py --slow --count 20
    python -m scripts.mutants hf_parcor/constraints.py:41 hf_parcor/constraints.py:52 --slow   # what begins there

A break turns a comparison, an operator, a condition or a number into another one, or leaves a statement out. The tests
run once as they are, and what lines each of them reaches is noted; then each break runs in a process of its own, with
those tests alone that reach its lines, the fastest first, until one fails. What none of them notices is tried with the
tests that start ranks (`--slow`). Programs that tests start run unbroken, and what is computed when a module is
imported, or for the parameters of a test, is not broken.

Not every break is a fault: a bound that is met by no number, or a limit that saves time, may change unnoticed.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
OTHERS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_AROUND = 40  # characters of a line that are shown before and behind what is broken
_UNTOUCHED = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)  # wording, and what tests do not see


class Break(NamedTuple):
    """One way to break a module: the lines of the statement that it is in, and what breaks the tree."""

    lines: range
    apply: Callable[[], None]


def breaks(tree: ast.Module) -> list[Break]:
    """Return all ways to break the functions of a module.

    Examples:
        >>> tree = ast.parse("def f(x): return x + 1")
        >>> for one in breaks(tree)[:1]:
        ...     one.apply()
        >>> ast.unparse(tree.body[0].body[0])
        'return x - 1'
    """
    return [one for statements, inside in _bodies(tree) if inside for one in _breaks_of(statements)]


def _bodies(node: ast.AST, inside: bool = False) -> Iterator[tuple[list[ast.stmt], bool]]:
    """Yield every list of statements below a node, and whether it is in a function."""
    inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    for value in (getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers", "cases")):
        if not isinstance(value, list):
            continue  # of a lambda
        if value and isinstance(value[0], ast.stmt):
            yield value, inside
        for entry in value:
            yield from _bodies(entry, inside)


def _breaks_of(statements: list[ast.stmt]) -> Iterator[Break]:
    for index, statement in enumerate(statements):
        if isinstance(statement, (*_UNTOUCHED, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        body = getattr(statement, "body", None)
        end = body[0].lineno if isinstance(body, list) else (statement.end_lineno or statement.lineno) + 1
        lines = range(statement.lineno, max(end, statement.lineno + 1))
        if _can_be_left_out(statement):

            def leave_out(index: int = index, old: ast.stmt = statement) -> None:
                statements[index] = ast.copy_location(ast.Pass(), old)

            yield Break(lines, leave_out)
        for node in _expressions(statement):
            for apply in _changes(node):
                yield Break(lines, apply)


def _can_be_left_out(statement: ast.stmt) -> bool:
    """Whether nothing is unknown without it: a call whose result is dropped, or a write to what is there already."""
    if isinstance(statement, ast.Assign):
        return all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in statement.targets)
    return isinstance(statement, ast.AugAssign) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    )


def _expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a statement and its expressions, but no statement inside of it, no annotation and no text."""
    yield node
    for name, value in ast.iter_fields(node):
        for entry in value if isinstance(value, list) else [value]:
            left_out = isinstance(entry, (ast.stmt, ast.JoinedStr)) or name == "annotation"
            if isinstance(entry, ast.AST) and not left_out and getattr(entry, "arg", None) != "strict":  # as of zip
                yield from _expressions(entry)


def _changes(node: Any) -> Iterator[Callable[[], None]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHERS:
        yield lambda: node.ops.__setitem__(0, OTHERS[type(node.ops[0])]())  # type: ignore[call-overload]
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OTHERS:
        yield lambda: setattr(node, "op", OTHERS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield lambda: setattr(node, "operand", ast.UnaryOp(node.op, node.operand))  # twice is not at all
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)) and isinstance(
        node.test, (ast.Name, ast.Attribute, ast.Call)
    ):
        yield lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))  # of others it changes more
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield lambda: setattr(node, "value", value)


class Mutants:
    """A plug-in of pytest that runs the collected tests as they are, and then for breaks of modules.

    Args:
        modules: The modules' files, and the lines at which what is broken begins; none for all.
        count: How many breaks of each, at most, drawn at random.
        seed: Of that draw.
    """

    def __init__(self, modules: Mapping[Path, set[int]], count: int, seed: int) -> None:
        self._modules, self._count, self._seed = modules, count, seed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what was collected, each time in a process of its own: none knows what another one broke."""
        texts = {path: path.read_text(encoding="utf-8") for path in self._modules}  # now: they may be edited meanwhile
        for path in self._modules:
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        with tempfile.TemporaryDirectory() as folder:
            noted = Path(folder) / "reached"
            _in_a_process(lambda: _run_and_note(session.items, set(map(str, self._modules)), noted))
            unbroken: list[_Unbroken] = pickle.loads(noted.read_bytes())
        failed = [item.nodeid for item, result in zip(session.items, unbroken, strict=True) if result.failed]
        print("", *(f"left out, since it fails unbroken: {name}" for name in failed), sep="\n")
        for path, text in texts.items():
            self._break(path, text, session.items, unbroken)
        return True

    def _break(self, path: Path, text: str, items: Sequence[pytest.Item], unbroken: Sequence[_Unbroken]) -> None:
        name = str(path.relative_to(ROOT))
        known = breaks(ast.parse(text))
        functions = [
            one for one in gc.get_objects() if type(one) is FunctionType and one.__code__.co_filename == str(path)
        ]
        usable = [place for _, place in sorted((one.seconds, at) for at, one in enumerate(unbroken) if not one.failed)]
        tried = noticed = 0
        wanted = self._modules[path]
        places = [place for place, one in enumerate(known) if not wanted or min(one.lines) in wanted]
        for index in sorted(random.Random(f"{name} {self._seed}").sample(places, min(self._count, len(places)))):
            tree = ast.parse(text)
            breaks(tree)[index].apply()
            codes = dict(_codes(compile(ast.fix_missing_locations(tree), str(path), "exec")))
            if any(codes[_key(one)].co_freevars != one.__code__.co_freevars for one in functions):
                continue  # a function that is there cannot become this one
            lines = {(str(path), line) for line in known[index].lines}
            reaching = [at for at in usable if lines & unbroken[at].reached]
            of_ranks = [at for at in usable if _starts_ranks(items[at]) and at not in reaching]
            tried += 1
            for chosen in filter(None, (reaching, of_ranks)):
                tests = [items[at] for at in chosen]
                limits = [20 + 10 * int(unbroken[at].seconds) for at in chosen]
                if _in_a_process(partial(_run_broken, tests, limits, path, tree, codes, functions)):
                    noticed += 1
                    break
            else:
                change = _change(ast.unparse(ast.parse(text)), ast.unparse(tree))
                count = len(reaching) + len(of_ranks)
                print(f"  {name}:{min(known[index].lines)}: {change} ({count} tests)", flush=True)
        print(f"{name}: {noticed} of {tried} breaks noticed, of {len(places)} possible", flush=True)


class _Unbroken(NamedTuple):
    """What a test does while nothing is broken."""

    failed: bool
    seconds: float
    reached: set[tuple[str, int]]


def _change(was: str, now: str) -> str:
    """Return what differs between two texts, with what is around it on its line.

    Examples:
        >>> _change("def f(x): return x < 1", "def f(x): return x <= 1")
        'def f(x): return x < 1 -> def f(x): return x <= 1'
    """
    pairs = zip(was.splitlines(), now.splitlines(), strict=False)
    old, new = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    begin = max(0, len(os.path.commonprefix([old, new])) - _AROUND)  # noqa: RUF071 (by characters)
    end = max(0, len(os.path.commonprefix([old[::-1], new[::-1]])) - _AROUND)  # noqa: RUF071
    return " -> ".join(line[begin : max(begin, len(line) - end)].strip() for line in (old, new))


def _starts_ranks(item: pytest.Item) -> bool:
    return "run_on_ranks" in getattr(item, "fixturenames", ())


def _in_a_process(work: Callable[[], int]) -> int:
    """Return what some work returns in a copy of this process, other than 0 if it fails or is killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 1
        with suppress(BaseException):
            code = work()
        os._exit(code)
    try:
        return os.waitpid(child, 0)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # ranks and programs that it has left


def _run(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Run a test, and return whether it failed."""
    before = item.session.testsfailed
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return item.session.testsfailed > before


def _run_and_note(items: Sequence[pytest.Item], files: set[str], path: Path) -> int:
    """Run tests, and write down what each of them reaches of some files, how long it takes, and whether it fails."""
    reached: set[tuple[str, int]] = set()

    def of_line(frame: FrameType, event: str, argument: object) -> Any:
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return of_line

    def of_call(frame: FrameType, event: str, argument: object) -> Any:
        return of_line if frame.f_code.co_filename in files else None

    found = []
    for item, following in zip(items, [*items[1:], None], strict=True):
        begin = time.perf_counter()
        sys.settrace(of_call)
        threading.settrace(of_call)
        failed = _run(item, following)
        found.append(_Unbroken(failed, time.perf_counter() - begin, set(reached)))
        reached.clear()
    path.write_bytes(pickle.dumps(found))
    return 0


def _run_broken(
    items: Sequence[pytest.Item],
    limits: Sequence[int],
    path: Path,
    tree: ast.Module,
    codes: Mapping[tuple[str, int], CodeType],
    functions: Sequence[FunctionType],
) -> int:
    """Run tests until one fails, with what the functions of a module do replaced: 1 if one fails, else 0.

    One that takes more seconds than its limit ends this process.
    """
    for function in functions:
        function.__code__ = codes[_key(function)]
    with tempfile.TemporaryDirectory() as folder:
        if any(map(_starts_ranks, items)):
            shutil.copytree(ROOT / "hf_parcor", Path(folder) / "hf_parcor")
            (Path(folder) / path.relative_to(ROOT)).write_text(ast.unparse(tree), encoding="utf-8")
            sys.path.insert(0, folder)  # where ranks look first
        for item, following, limit in zip(items, [*items[1:], None], limits, strict=True):
            signal.alarm(limit)
            if _run(item, following):
                return 1
    return 0


def _key(function: FunctionType) -> tuple[str, int]:
    return function.__code__.co_qualname, function.__code__.co_firstlineno


def _codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    """Yield the code of each function inside of another code, with its name and first line."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield (constant.co_qualname, constant.co_firstlineno), constant
            yield from _codes(constant)


def main() -> None:
    """Break what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="+", metavar="FILE[:LINE]")
    parser.add_argument("--tests", nargs="+", default=["tests", "hf_parcor"], metavar="PATH", help="default: all")
    parser.add_argument("--count", type=int, default=12, help="breaks of each module; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of their draw; default: %(default)s")
    parser.add_argument("--slow", action="store_true", help="also with tests that are marked slow")
    arguments = parser.parse_args()
    modules: dict[Path, set[int]] = {}
    for name, _, line in (one.partition(":") for one in arguments.modules):
        if not Path(name).is_file():
            parser.error(f"FILE: expected a module's path, got {name!r}, which is no file; see `ls hf_parcor`")
        modules.setdefault(Path(name).resolve(), set()).update([int(line)] if line else [])
    chosen = [] if arguments.slow else ["-m", "not slow"]
    how = ["-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
    sys.exit(
        pytest.main([*how, *chosen, *arguments.tests], plugins=[Mutants(modules, arguments.count, arguments.seed)])
    )


if __name__ == "__main__":
    main()
