"""Contract 4 for what moves beside the student: killed and resumed, the same bytes as undisturbed."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from killing import attempt, kill_until_done, server
from test_resume import assert_same_run, tensors_of
from tiny import raw_recipe, rows_of, run, with_teacher

from kdrl.errors import UserError
from kdrl.run import resume

OWN: dict[str, Any] = {"teacher": "self", "on": ["student"], "divergence": "forward_kl"}


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return server()


def recipes(world: Path) -> dict[str, dict[str, Any]]:
    often: dict[str, Any] = {"steps": 6, "checkpoint": {"every": 1, "keep": 2}}
    with_both: dict[str, Any] = {"objective": [{"distill": {"on": ["student"]}}, {"distill": OWN}]} | often
    prompted = with_teacher(world)
    prompted["teacher"]["prepare"] = {"soft_prompt": {"tokens": 3, "lr": 1e-2}}
    fast = {"lr": 1e-2, "minibatches": 2}
    mean = {"kind": "ema", "rate": 0.2, "context": "{prompt}{sibling}"}
    return {
        "mean": raw_recipe(world, None, objective=[{"distill": OWN}], self_teacher=mean, optimizer=fast, **often),
        "mean-lora": raw_recipe(
            world, None, objective=[{"distill": OWN}], self_teacher=mean, student={"lora": {"rank": 2}}, **often
        ),
        "past-and-soft-prompt": raw_recipe(
            world, None, self_teacher={"kind": "past", "every": 4}, **with_both, **prompted
        ),
        "rounded": raw_recipe(
            world,
            None,
            objective=[{"distill": OWN}],
            self_teacher={"kind": "initial"},
            student={"quantise": {"bits": 3, "group": 8}},
            optimizer={"lr": 1e-2},
            **often,
        ),
    }


GROUPS = {
    "mean": {"self_teacher"},
    "mean-lora": {"self_teacher"},
    "past-and-soft-prompt": {"self_teacher", "prepared_teacher"},
    "rounded": set(),
}


@pytest.mark.parametrize("name", list(GROUPS))
def test_killed_and_resumed_equals_undisturbed(name: str, world: Path, tmp_path: Path, context: ForkServerContext):
    raw = recipes(world)[name]
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    died, _ = kill_until_done(context, raw, tmp_path / "killed", seed=len(name), kills=2)
    assert died >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    found = tensors_of(tmp_path / "whole" / "checkpoints" / "step-000006")
    beside = {key.split(".")[0] for key in found} - {"student", "optimizer"}
    assert beside == GROUPS[name]
    if name == "mean-lora":
        assert all("lora" in key for key in found if key.startswith("self_teacher"))
    if name == "past-and-soft-prompt":
        assert any(key.endswith("vectors|exp_avg") for key in found)
        assert all(row["prepare/loss"] is not None for row in rows_of(tmp_path / "whole"))


def test_another_self_teacher_than_the_checkpoints_is_refused(world: Path, tmp_path: Path):
    raw = recipes(world)["rounded"] | {"steps": 1, "self_teacher": {"kind": "initial"}}
    run(raw, tmp_path / "run")
    stored = tmp_path / "run" / "recipe.yaml"
    stored.write_text(stored.read_text().replace("kind: initial", "kind: ema"))
    with pytest.raises(UserError, match=r"the checkpoint's self-teacher does not hold model\.embed"):
        resume(tmp_path / "run", say=lambda text: None)
