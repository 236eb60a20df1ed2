"""An ensemble whose members' scores are stored: averaged as they are read, with no teacher in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import raw_recipe, rows_of, run, section

from kdrl.recipe import load_recipe
from kdrl.teachers.cache_command import cache_teacher
from kdrl.teachers.cache_config import Stored


def recipe(world: Path, members: dict[str, dict[str, Any]], space: str) -> dict[str, Any]:
    """Forward KL to the mean of two teachers on worked solutions."""
    distill = {"divergence": "forward_kl", "support": "full", "on": ["gold"]}
    raw = raw_recipe(world, None, source="gold", objective=[{"distill": distill}], steps=3, optimizer={"lr": 1e-2})
    raw["rollout"] = {"prompts": 4, "group": 1, "max_new_tokens": 20}
    return raw | {"teachers": members, "teacher": {"average": {"of": {"a": 2.0, "b": 1.0}, "space": space}}}


@pytest.fixture(scope="module")
def members(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    from kdrl.models import load_model, save_final
    from kdrl.models.config import ModelConfig

    folder = tmp_path_factory.mktemp("member")
    other = load_model(ModelConfig.model_validate(section(hidden_size=24)), "cpu", trainable=False, seed=5)
    save_final(other, folder / "other")
    return {"a": {"model": str(world / "teacher")}, "b": {"model": str(folder / "other")}}


@pytest.mark.parametrize("space", ["probability", "log"])
def test_an_average_of_stored_scores_is_that_of_the_teachers(
    space: str, world: Path, members: dict[str, dict[str, Any]], tmp_path: Path
):
    raw = recipe(world, members, space)
    for name in members:
        cache_teacher(load_recipe(raw), tmp_path / name, Stored(kind="hidden"), teacher=name, say=lambda text: None)
    stored = {name: given | {"cache": str(tmp_path / name)} for name, given in members.items()}
    run(raw, tmp_path / "local")
    run(recipe(world, stored, space), tmp_path / "stored")
    for mine, theirs in zip(rows_of(tmp_path / "local"), rows_of(tmp_path / "stored"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert mine["teacher_calls"] == theirs["teacher_calls"] > 0
