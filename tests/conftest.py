"""Fixtures of the training loop's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_world

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.jsonl, judge.py and a saved teacher."""
    return make_world(tmp_path_factory.mktemp("world"))
