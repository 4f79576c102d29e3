"""What all tests share: no network, fixed seeds, a tiny classifier with data for it."""

from __future__ import annotations

import atexit
import gc
import hashlib
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Two threads wait for each other more than they compute on models as small as these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What `evaluate` copies, and imports as one package, is kept out of the user's caches.
os.environ["HF_MODULES_CACHE"] = os.environ["HF_METRICS_CACHE"] = tempfile.mkdtemp()

import hypothesis
import pytest
import tiny
import torch
import transformers
from torch import nn

from hf_parcor import (
    BitFlips,
    ConductanceDrift,
    CorruptionConstraint,
    FloatQuantization,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    Pruning,
    Quantization,
    RandomCorruption,
    UniformNoise,
    WorstBitFlips,
)
from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.evaluation.passes import prefixes
from scripts.counting import PeakMemory

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

hypothesis.settings.register_profile("any machine", deadline=None)  # no test depends on how busy it is
hypothesis.settings.load_profile("any machine")

torch.sparse.check_sparse_tensor_invariants.enable()  # PyTorch 2.11 warns where nobody has said whether


def _share(said: str) -> tuple[int, int]:
    first, _, every = said.partition("/")
    if first.isdigit() and every.isdigit() and 1 <= int(first) <= int(every):
        return int(first), int(every)
    raise pytest.UsageError(f"--slow-share: expected K/N with 1 ≤ K ≤ N, got {said}; say 1/10")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `scripts/test.sh --share`."""
    parser.addoption(
        "--slow-share",
        metavar="K/N",
        type=_share,
        default=(1, 1),
        help="all fast tests; slow ones of every Nth file from the Kth",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests of files that are not in the share: whole files, for what a file sets up is set up once."""
    first, every = config.getoption("--slow-share")
    slow = [item for item in items if item.get_closest_marker("slow")]
    taken = set(sorted({item.path for item in slow})[first - 1 :: every])
    left_out = {item for item in slow if item.path not in taken}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


Batch = dict[str, torch.Tensor]
SIZES = (4, 4, 2)  # the last batch is smaller, as it is in most data sets
# As they are before a test module that ranks read sets them to 0.
RUNS_TO_PLAN = {name: getattr(prefixes, name) for name in ("RUNS_TO_PLAN", "RUNS_TO_PLAN_ASCENTS")}


@pytest.fixture(autouse=True, scope="session")
def prefixes_are_sought_for_little_data():
    """Let measurements share a prefix also where seeking it takes longer: the data of tests are a few rows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in RUNS_TO_PLAN:
            patch.setattr(prefixes, name, 0)
        yield


@pytest.fixture
def prefixes_are_sought_where_it_pays(monkeypatch):
    """Let measurements share a prefix where seeking it takes less than it saves, as they do outside of tests."""
    for name, runs in RUNS_TO_PLAN.items():
        monkeypatch.setattr(prefixes, name, runs)


@pytest.fixture(autouse=True, scope="module")
def unburdened() -> None:
    """Keep the libraries out of the garbage collections: each Trainer begins with one, which took most of its test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every generator that transformers knows, so that no test depends on the order of tests."""
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Let no test leave PyTorch another for those after it.

    With two threads in each of two workers all later tests took ten times longer; without gradients 398 failed.
    """
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    left = torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)
    assert left == (threads, gradients), f"the test began with {(threads, gradients)} and left {left}"


@pytest.fixture
def freed() -> Iterator[Callable[..., bool]]:
    """Return a function that makes a model, uses it, and says whether it is freed without a garbage collection."""

    def of(make: Callable[[], nn.Module], use: Callable[[nn.Module], object]) -> bool:
        model = make()
        kept = weakref.ref(model)
        use(model)
        del model
        return kept() is None

    gc.disable()
    yield of
    gc.enable()


@pytest.fixture
def tiny_bert() -> Callable[..., nn.Module]:
    """Return a builder of BERT classifiers with 2 layers of width 8; keyword arguments go to the configuration."""

    def build(kind: type[nn.Module] = transformers.BertForSequenceClassification, **settings: Any) -> nn.Module:
        return kind(transformers.BertConfig(**{**tiny.encoder(), **settings}))

    return build


@pytest.fixture
def classifier(tiny_bert: Callable[..., nn.Module]) -> nn.Module:
    """Return a tiny BERT with two labels, dropout, and weights large enough to make a difference."""
    return tiny_bert(initializer_range=0.5)


@pytest.fixture
def batches() -> list[Batch]:
    """Return ten labelled sequences in batches of 4, 4 and 2."""
    return [{"input_ids": torch.randint(1, 20, (size, 6)), "labels": torch.randint(0, 2, (size,))} for size in SIZES]


@pytest.fixture
def labelled_rows() -> list[dict[str, Any]]:
    """Return 24 sequences of 8 tokens out of 30, each with one of three labels, for Trainers."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(30, (8,), generator=generator),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": int(torch.randint(3, (), generator=generator)),
        }
        for _ in range(24)
    ]


@pytest.fixture
def bits_of() -> Callable[[nn.Module], str]:
    """Return a function that hashes every parameter and every buffer of a model, bit for bit."""

    def digest(model: nn.Module) -> str:
        sha = hashlib.sha256()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    return digest


@pytest.fixture
def peak_memory() -> type[PeakMemory]:
    """Return the context manager that watches how much memory tensors take."""
    return PeakMemory


ROWS = {
    "random": RandomCorruption(CorruptionConstraint(epsilon=2.0)),
    "gradient": GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=0.1)),
    "multi_step": MultiStepCorruption(CorruptionConstraint(epsilon=1.0)),
    "gaussian": GaussianNoise(0.1),
    "uniform": UniformNoise(0.2),
    "drift": ConductanceDrift(1e6),
    "quantization": Quantization(2),
    "float_quantization": FloatQuantization("fp8_e5m2", "channel"),
    "pruning": Pruning(0.4, "all"),
    "bit_flips": BitFlips(count=5, bits="exponent"),
    "worst_bit_flips": WorstBitFlips(2, of="int8"),
}


@pytest.fixture
def one_of_each() -> dict[str, Corruption]:
    """Return one corruption of every kind in the catalogue, by name."""
    assert list(ROWS) == list(CORRUPTIONS), "a new corruption needs a row here"
    return ROWS
