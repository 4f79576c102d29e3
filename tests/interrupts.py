"""Ctrl-C at any line, and what it must not leave behind."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import hf_parcor

MAY_BE_IGNORED = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
"""An interrupt that comes while Python throws a block of an earlier call away is printed, and nothing ends."""

_OURS = (str(Path(hf_parcor.__file__).parent), contextlib.__file__)  # contextlib ends our blocks


def interrupted_at_lines(run: Callable[[], object], every: int) -> Iterator[int]:
    """Call a function again and again, each time interrupted some lines of ours later, and yield after each.

    A test that uses it has the mark `MAY_BE_IGNORED`.
    """
    for at in itertools.count(1, every):
        lines = itertools.count(1)

        def trace(frame: FrameType, event: str, argument: Any, at: int = at, lines: Iterator[int] = lines) -> Any:
            if not frame.f_code.co_filename.startswith(_OURS):
                return None
            if event == "line" and next(lines) == at:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            run()
            if next(lines) <= at:
                return
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        yield at


def state_of(model: nn.Module) -> list[object]:
    """Return all that a step or a measurement replaces for a while, to be compared."""
    weights = [(name, value.numpy().tobytes()) for name, value in model.state_dict().items()]
    trained = [(parameter.requires_grad, len(parameter._backward_hooks or ())) for parameter in model.parameters()]
    modules = [
        (name, module.training, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return [torch.is_grad_enabled(), trained, modules, weights]
