"""What tests of scripts share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process its threads: a campaign takes all cores."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
