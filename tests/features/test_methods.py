"""The methods that are made of feature terms: as data that reads back, and as one tiny run each."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny import raw_recipe, rows_of, run, with_teacher

from kdrl.explain import deviations
from kdrl.methods import get_method
from kdrl.recipe import load_recipe, plain
from kdrl.yamls import load_yaml

NAMES = ("tinybert", "align-to-distill", "vkd", "nd", "qat-kd")


@pytest.mark.parametrize("name", NAMES)
def test_one_run(name: str, world: Path, tmp_path: Path):
    run(raw_recipe(world, name, rollout={"prompts": 4, "group": 1}, **with_teacher(world)), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and not row["skipped_updates"] for row in rows)
    features = [key for key in rows[0] if key.startswith("loss/feature")]
    assert len(features) == sum("feature" in entry for entry in get_method(name).recipe["objective"])
    assert all(row[key] > 0 for row in rows for key in features)


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_back_and_deviates_from_nothing(name: str, world: Path):
    raw = raw_recipe(world, name, **with_teacher(world))
    del raw["rollout"]
    recipe = load_recipe(raw)
    assert deviations(recipe) == []
    assert plain(load_recipe(load_yaml(recipe.to_yaml(), "stored"))) == plain(recipe)
