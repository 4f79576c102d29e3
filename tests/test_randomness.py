"""States of generators: each kind of accelerator is asked as PyTorch's own functions for it are called."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import call, create_autospec

import torch
from for_each import for_each

from hf_parcor.randomness import RandomStates


@for_each("kind", ["cuda", "xpu", "mps"])
def test_each_accelerator_is_kept_and_put_back_once(kind, monkeypatch):
    """Of Apple's there is one, which takes no index: another call is a TypeError there."""
    theirs = getattr(torch, kind)
    module = SimpleNamespace(
        **{name: create_autospec(getattr(theirs, name)) for name in ("get_rng_state", "set_rng_state")}
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    device = torch.device(kind) if kind == "mps" else torch.device(kind, 1)
    where = () if kind == "mps" else (device,)
    states = RandomStates([device, torch.device("cpu"), torch.device("meta"), device])
    assert module.get_rng_state.mock_calls == [call(*where)]
    states.put_back()
    assert module.set_rng_state.mock_calls == [call(module.get_rng_state.return_value, *where)]
