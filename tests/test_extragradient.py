"""Extragradient steps: the way back is exact, a game that rotates settles, and a stopped run goes on to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same_run
from tiny import parts_of, raw_recipe, rows_of, run
from torch import Tensor

from kdrl.errors import UserError
from kdrl.extragradient import Extragradient
from kdrl.planning import memory_plan
from kdrl.recipe import load_recipe
from kdrl.run import resume


class ExtragradientSGD(Extragradient, torch.optim.SGD):
    """For games whose outcome is known."""


class ExtragradientAdamW(Extragradient, torch.optim.AdamW):
    """AdamW that looks ahead."""


def play(kind: Any, steps: int, **options: Any) -> Tensor:
    """min over x, max over y of xy, whose gradient field turns around its only equilibrium, zero."""
    point = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = kind([point], **options)
    for _ in range(steps):
        point.grad = torch.stack([point[1], -point[0]]).detach()
        optimizer.step()
    return point.detach()


def test_a_game_that_plain_steps_leave_is_settled():
    away, home = (play(kind, 400, lr=0.1) for kind in (torch.optim.SGD, ExtragradientSGD))
    assert away.norm() > 5.0
    # (x, y) <- (1 - lr^2) (x, y) turned by -lr: the norm falls by sqrt((1 - lr^2)^2 + lr^2) a pair.
    fall = ((1 - 0.01) ** 2 + 0.01) ** 0.5
    assert float(home.norm()) == pytest.approx(2**0.5 * fall**200, rel=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_a_pair_is_one_step_of_the_optimizer_underneath_with_the_second_gradient(fused: bool):
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 2, generator=draw) for _ in range(6)]
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "fused": fused}

    def after(kind: Any, used: list[Tensor]) -> Tensor:
        p = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = kind([p], **options)
        for gradient in used:
            p.grad = gradient.clone()
            optimizer.step()
        return p.detach()

    plain = after(torch.optim.AdamW, gradients[1::2])
    assert torch.equal(after(ExtragradientAdamW, gradients), plain)
    ahead = after(ExtragradientAdamW, gradients[:5])
    assert torch.equal(ahead, after(torch.optim.AdamW, [gradients[1], gradients[3], gradients[4]]))


def recipe(world: Path, **change: Any) -> dict[str, Any]:
    return raw_recipe(world, "ipo", **{"steps": 4, "optimizer": {"lr": 1e-2, "extragradient": True}} | change)


def test_a_run_writes_on_the_way_and_goes_back(world: Path, tmp_path: Path):
    """Text of every second step comes from the looked-ahead student; what stays is a step from before it."""
    with parts_of(recipe(world), tmp_path / "parts") as parts:
        assert isinstance(parts.optimizer, Extragradient)
    run(recipe(world), tmp_path / "with")
    run(recipe(world, optimizer={"lr": 1e-2}), tmp_path / "without")
    rows = [rows_of(tmp_path / name) for name in ("with", "without")]
    assert rows[0][0]["loss"] == rows[1][0]["loss"]
    assert rows[0][1]["loss"] == rows[1][1]["loss"], "the look-ahead itself is a plain step"
    assert rows[0][2]["loss"] != rows[1][2]["loss"]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_stopped_run_goes_on_to_the_byte(at: int, world: Path, tmp_path: Path):
    raw = recipe(world, checkpoint={"every": 1, "keep": 9})
    run(raw, tmp_path / "whole")
    run(raw, tmp_path / "stopped")
    for done in range(at + 1, 5):
        folder = tmp_path / "stopped" / "checkpoints" / f"step-{done:06d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resume(tmp_path / "stopped", say=lambda text: None)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


PASSES = {"objective": [{"cross_entropy": {"on": ["student"]}}], "optimizer": {"extragradient": True, "epochs": 2}}


@pytest.mark.parametrize(("change", "words"), [({"steps": 3}, "would end on a look-ahead"), (PASSES, "once a step")])
def test_pairs_that_cannot_be_are_refused(change: dict[str, Any], words: str, world: Path):
    with pytest.raises(UserError, match=words):
        load_recipe(recipe(world, **change))


def test_the_plan_counts_what_is_kept(world: Path):
    plans = [memory_plan(load_recipe(raw)) for raw in (recipe(world), recipe(world, optimizer={"lr": 1e-2}))]
    more = {item.name: item.bytes for item in plans[0].items if item not in plans[1].items}
    weights = next(item.bytes for item in plans[0].items if item.name == "student weights")
    assert more == {"before the look-ahead": 3 * weights}
