"""Chunk terms and projectors on a CUDA device: the same loss and gradients as on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import assert_near

from kdrl.models import LoadedModel
from kdrl.update import Updater
from kdrl.vocab.spaces import make_spaces

from .pairs import model_of, objective_of, scored, teacher_of, written

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ENTRIES: dict[str, dict[str, Any]] = {
    "chunk_kl": {"chunk_kl": {}},
    "alm": {"chunk_distill": {"tau": 5.0}},
    "alm-debiased": {"chunk_distill": {"tau": 5.0, "debias": True, "threshold": 0.07}},
    "overlap": {"overlap_distill": {}},
    "gold": {"group_distill": {}},
    "multilevel": {"multilevel_distill": {"transport": 0.5}},
    "dskd": {"dual_distill": {}},
    "dskd-v2": {"dual_distill": {"label": "teacher", "start": "heads"}},
    "dskd-cma": {"dual_distill": {"align": "attention"}},
}


def moved(loaded: LoadedModel, device: str) -> LoadedModel:
    return replace(loaded, model=copy.deepcopy(loaded.model).to(device))


@pytest.mark.parametrize("name", ENTRIES)
def test_the_device_changes_nothing(name: str):
    entry, found = ENTRIES[name], []
    models = model_of("byte-level", 1, trainable=True), model_of("characters", 2, hidden_size=24)
    for device in ("cpu", "cuda"):
        student, teacher = (moved(model, device) for model in models)
        # Projectors are drawn on the CPU and moved.
        spaces = make_spaces(objective_of([entry]), student, {"teacher": teacher}, 5)
        step = scored(student, teacher_of(student, teacher, spaces=True), written(student), [entry])
        updater = Updater(student, 70)
        updater.attach(spaces)
        value = updater.accumulate(step, range(step.rollouts.rows))
        parameters = [*updater.parameters, *updater.projectors]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found.append((value, torch.cat([g.flatten() for g in grads]).cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_near(found[1][1], found[0][1])
