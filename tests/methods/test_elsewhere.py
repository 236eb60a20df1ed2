"""Every method of rewards and preferences as its own YAML has it: the step's loss and gradient against its formula."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from kdrl.methods import get_method

from .numerics import Array, sm
from .rewarded import WHOLE, log_q, normalised, to
from .typed import BESIDE, OBJECTIVES
from .whole import HEAD, Batch, made_batch, step_of

# Steps at which a schedule shows all of its numbers; the first step for all others.
STEPS = {"kdrl-annealed": (0, 40, 300), "tgpo": (0, 150, 300), "opd-then-rl": (59, 60)}
CLOSE = 1.0e-6


@pytest.fixture(autouse=True)
def _student_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrl.update.head_of", lambda student: HEAD)


def steps_of(name: str) -> tuple[int, ...]:
    return STEPS.get(name, (0,))


@cache
def batch_of(name: str, seed: int) -> tuple[Batch, Array]:
    minibatches = get_method(name).recipe.get("optimizer", {}).get("minibatches", 1)
    return made_batch(name, minibatches, seed)


def formula(name: str, batch: Batch, z: Array, step: int) -> tuple[float, Array]:
    """The formula's loss and its gradient by complex steps."""
    slope = np.zeros(z.shape)
    for at in np.ndindex(*z.shape):
        moved = z.astype(complex)
        moved[at] += 1e-30j
        slope[at] = np.imag(WHOLE[name](batch, moved, step)) / 1e-30
    return float(np.real(WHOLE[name](batch, z, step))), slope


@cache
def wanted(name: str, seed: int, step: int) -> tuple[float, Array]:
    return formula(name, *batch_of(name, seed), step)


def distance(name: str, recipe: dict[str, Any], seed: int, step: int) -> float:
    """How far the recipe's loss and gradient are from the formula's, in units of the gradient's largest entry."""
    value, slope = wanted(name, seed, step)
    found_value, found_slope = step_of(recipe, *batch_of(name, seed), step)
    size = np.abs(slope).max()
    assert size > 1e-9
    return max(abs(found_value - value) / max(size, abs(value)), np.abs(found_slope - slope).max() / size)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_loss_and_gradient_are_those_of_the_formula(name: str, seed: int):
    for step in steps_of(name):
        assert distance(name, get_method(name).recipe, seed, step) < CLOSE


def numbers(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers in a recipe."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, (*path, key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path


def changed(recipe: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """The recipe with one number 10 % (at least 1, of a whole one) larger."""
    out = copy.deepcopy(recipe)
    at: Any = out
    for key in path[:-1]:
        at = at[key]
    old = at[path[-1]]
    at[path[-1]] = old + max(1, old // 10) if isinstance(old, int) else old * 1.1 or 0.1
    return out


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_no_number_of_the_objective_could_be_wrong_unseen(name: str):
    recipe = get_method(name).recipe
    for path in numbers(recipe["objective"]):
        wrong = changed(recipe, ("objective", *path))
        seen = [distance(name, wrong, seed, step) for seed in (0, 1) for step in steps_of(name)]
        assert max(seen) > 5 * CLOSE, path


def on_policy() -> list[str]:
    """Methods that make one update of each step's rollouts."""
    steps = {name: get_method(name).recipe.get("optimizer", {}) for name in WHOLE}
    return sorted(name for name, given in steps.items() if not {"minibatches", "epochs"} & set(given))


@pytest.mark.parametrize("name", on_policy())
def test_one_update_of_fresh_samples_is_the_formula_at_a_ratio_of_one(name: str):
    batch, z = batch_of(name, 2)
    fresh, step = replace(batch, old_N=np.real(log_q(batch, z))), steps_of(name)[-1]
    value, slope = formula(name, fresh, z, step)
    found_value, found_slope = step_of(get_method(name).recipe, batch, z, step, stale=False)
    size = np.abs(slope).max()
    assert abs(found_value - value) < CLOSE * max(size, abs(value))
    assert np.abs(found_slope - slope).max() < CLOSE * size


def test_kdrl_on_policy_moves_each_token_by_its_advantage_and_the_teacher():
    batch, z = batch_of("kdrl", 3)
    _, slope = step_of(get_method("kdrl").recipe, batch, z, 0, stale=False)
    R = np.clip(to(batch, z, batch.teacher_NV), -10, 10)
    gain = normalised(batch.reward_B, batch.group_B)[batch.row_N] + 2e-3 * R
    want = -gain[:, None] * (np.eye(z.shape[1])[batch.token_N] - sm(z)) / len(z)
    assert np.abs(slope - want).max() < CLOSE * np.abs(want).max()


@pytest.mark.parametrize("name", sorted(BESIDE))
def test_what_stands_beside_the_objective_is_what_was_published(name: str):
    """Source, groups, mini-batches and epochs, typed here a second time."""
    assert {key: value for key, value in get_method(name).recipe.items() if key != "objective"} == BESIDE[name]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_whose_terms_are_checked_elsewhere_have_the_published_numbers(name: str):
    assert get_method(name).recipe["objective"] == OBJECTIVES[name]
