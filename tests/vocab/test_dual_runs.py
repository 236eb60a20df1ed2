"""Dual-space distillation in whole runs: resumed to the byte, planned for, refused where it cannot look inside."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_world, raw_recipe, rows_of, run

from kdrl.checkpoint import Checkpoints
from kdrl.errors import UserError
from kdrl.models import save_final
from kdrl.planning import memory_plan
from kdrl.recipe import load_recipe, merge
from kdrl.run import resume

from .pairs import model_of
from .test_dual import spaces_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("dual"))
    loaded = copy.copy(model_of("byte-level", 7, sharp=4.0, hidden_size=24))
    loaded.model.float()
    save_final(loaded, folder / "byte-teacher")
    return folder


def recipe_of(world: Path, method: str, **change: Any) -> dict[str, Any]:
    base = {"teacher": {"model": str(world / "byte-teacher")}, "rollout": {"group": 2}}
    return merge(raw_recipe(world, method, **base), change)


@pytest.mark.parametrize("name", ["dskd", "dskd-v2", "dskd-cma"])
def test_a_resumed_run_is_the_same_to_the_byte(name: str, world: Path, tmp_path: Path):
    raw = recipe_of(world, name, steps=3, checkpoint={"every": 1, "keep": 5})
    whole = run(raw, tmp_path / "whole")
    for row in rows_of(tmp_path / "whole"):
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0
    cut = tmp_path / "cut"
    run(raw, cut)
    for folder in sorted((cut / "checkpoints").glob("*"))[1:]:
        for file in folder.glob("*"):
            file.unlink()
        folder.rmdir()
    again = resume(cut, say=lambda text: None)
    assert (again.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    config = load_recipe(raw).checkpoint
    ends = [Checkpoints(folder, config).latest() for folder in (cut, tmp_path / "whole")]
    tensors = [end.tensors["student"] for end in ends if end is not None]
    mine = [key for key in tensors[0] if key.startswith("dual_distill.")]
    assert len(mine) == (6 if name == "dskd-cma" else 4)
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in mine)


HEAD_LORA = {"lora": {"rank": 2, "target_modules": ["q_proj", "lm_head"]}}


@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 2}}, HEAD_LORA, {"autocast": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["dskd-v2", "dskd-cma"])
def test_other_students_and_the_base_of_adapters_as_teacher(
    name: str, student: dict[str, Any], world: Path, tmp_path: Path
):
    given = {"student": {"model": str(world / "byte-teacher"), **student}, "teacher": {"model": str(world / "teacher")}}
    raw = raw_recipe(world, name, rollout={"group": 2}, checkpoint={"every": 0})
    run({**raw, **given}, tmp_path / "other")
    run({**raw, **given, "teacher": {"model": str(world / "byte-teacher")}}, tmp_path / "base")
    for row in rows_of(tmp_path / "other") + rows_of(tmp_path / "base"):
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0
        assert row["loss/dual_distill"] > 0
        assert 0 <= row["dual_distill/agreement"] <= 1


def test_several_updates_of_a_step_and_two_such_terms(world: Path, tmp_path: Path):
    raw = recipe_of(world, "dskd", optimizer={"minibatches": 2, "epochs": 2, "lr": 1.0e-3})
    raw["teachers"] = {"other": {"model": str(world / "teacher")}}
    raw["objective"] = [
        {"dual_distill": {"lr_scale": 10.0}},
        {"dual_distill": {"teacher": "other", "align": "attention", "weight": 0.5}},
    ]
    run(raw, tmp_path / "run")
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows_of(tmp_path / "run"))


def test_the_plan_counts_the_projectors(world: Path):
    for name in ("dskd", "dskd-cma"):
        recipe = load_recipe(recipe_of(world, name))
        config = next(e.config for e in recipe.objective if e.name == "dual_distill")
        spaces = spaces_of(
            model_of("byte-level", 1), model_of("characters", 2, hidden_size=24), {"dual_distill": config}
        )
        count = sum(p.numel() for p in spaces.named_parameters.values())
        items = {(item.name, item.phase): item.bytes for item in memory_plan(recipe).items}
        assert items["dual_distill: projectors", "always"] == 12 * count
        assert ("dual_distill: attention", "update") in items or name == "dskd"


def test_a_teacher_whose_inside_is_elsewhere_is_refused(world: Path):
    for change in ({"served": {"urls": ["http://127.0.0.1:1"]}}, {"cache": "nowhere"}):
        with pytest.raises(UserError, match=r"objective\.dual_distill.*hidden states"):
            load_recipe(recipe_of(world, "dskd", teacher=change))
    with pytest.raises(UserError, match="leave offload out"):
        load_recipe(recipe_of(world, "dskd", teacher={"offload": True}))
