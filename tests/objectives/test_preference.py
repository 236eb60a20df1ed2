"""Preferences against their formulas in numpy, value and gradient; pairs, ties and groups without a pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kdrl.objectives.preference import Preference, PreferenceConfig

from .reference import Array, as_tensor, close, token_view

# Group 0: three responses, rewards 1 0 1; group 1: a tie; group 2: 0 and 0.5; group 3: one response.
REWARD_B = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.5, 1.0])
GROUP_B = np.array([0, 0, 0, 1, 1, 2, 2, 3])
FOREIGN_B = np.array([0, 0, 1, 0, 1, 0, 0, 1], dtype=bool)
LENGTH_B = [2, 3, 1, 2, 2, 4, 1, 2]
ROW_N = np.repeat(np.arange(8), LENGTH_B)
KEEP_N = np.ones(len(ROW_N), dtype=bool)
KEEP_N[[3, 12]] = False


def term(**keys: Any) -> Preference:
    return Preference(PreferenceConfig.model_validate(keys))


class World:
    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.logq, self.initial, self.teacher = -random.uniform(0.1, 3.0, size=(3, len(ROW_N)))

    def view(self, logq: Any, part: Array | None = None, **more: Any) -> Any:
        part = np.arange(len(ROW_N)) if part is None else part
        rows, row_N = np.unique(ROW_N[part], return_inverse=True)
        pick = ROW_N[part]
        return token_view(
            logq,
            row_N,
            rows=len(rows),
            keep_N=torch.as_tensor(KEEP_N[part]),
            reward_N=as_tensor(REWARD_B[pick]),
            correct_N=torch.as_tensor(REWARD_B[pick] == 1.0),
            group_N=torch.as_tensor(GROUP_B[pick]),
            foreign_N=torch.as_tensor(FOREIGN_B[pick]),
            reference_N=as_tensor(self.initial[part]),
            teacher_N=as_tensor(self.teacher[part]),
            **more,
        )

    def run(self, made: Preference, parts: list[Array] | None = None) -> tuple[float, Array]:
        """Value and gradient on log q, in one piece or micro-batch by micro-batch."""
        with torch.no_grad():
            coupled = made.couple(self.view(as_tensor(self.logq)))
        total, gradient = 0.0, np.zeros(len(ROW_N))
        for part in parts or [np.arange(len(ROW_N))]:
            leaf = as_tensor(self.logq[part]).requires_grad_()
            loss = made.loss(self.view(leaf, part, coupled_N=coupled[torch.as_tensor(part)]))
            kept = torch.where(torch.as_tensor(KEEP_N[part]), loss, 0.0).sum()
            kept.backward()
            assert leaf.grad is not None
            total, gradient[part] = total + kept.item(), leaf.grad.numpy()
        return total, gradient

    def scores(self, logq: Array, reference: Any, per_token: bool) -> Array:
        gap = (logq - {"initial": self.initial, "teacher": self.teacher, "none": 0.0}[reference]) * KEEP_N
        length = np.bincount(ROW_N, weights=KEEP_N.astype(float)) if per_token else 1.0
        return np.bincount(ROW_N, weights=gap) / length


PAIRS: dict[str, list[list[tuple[int, int]]]] = {  # by group: (chosen, rejected)
    "reward": [[(0, 1), (2, 1)], [(6, 5)]],
    "origin": [[(2, 0), (2, 1)], [(4, 3)]],
}


def formula(keys: dict[str, Any], d: float) -> float:
    """The loss of one pair at a difference of scores."""
    beta, margin = keys.get("beta", 0.1), keys.get("margin", 0.0)
    kind = keys.get("loss", "logistic")
    if kind == "squared":
        return (d - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return max(0.0, margin - beta * d)
    return float(np.log1p(np.exp(-(beta * d - margin))))


def reference(world: World, keys: dict[str, Any], logq: Array) -> float:
    s = world.scores(logq, keys.get("reference", "initial"), keys.get("per_token", False))
    groups = PAIRS[keys.get("by", "reward")]
    return float(np.mean([np.mean([formula(keys, s[i] - s[j]) for i, j in pairs]) for pairs in groups]))


def kto(world: World, keys: dict[str, Any], logq: Array) -> float:
    s = world.scores(logq, "initial", keys.get("per_token", False))
    # The drift is data: taken at the point, not where the slope looks.
    z = max(0.0, world.scores(world.logq, "initial", keys.get("per_token", False))[~FOREIGN_B].mean())
    right = REWARD_B == 1
    up, down, beta = keys.get("positive_weight", 1.0), keys.get("negative_weight", 1.0), keys.get("beta", 0.1)
    gain = 1 / (1 + np.exp(-np.where(right, 1, -1) * beta * (s - z)))
    return float((np.where(right, up, down) * (1 - gain)).mean())


def slope(function: Any, x: Array, h: float = 1e-6) -> Array:
    return np.array([(function(x + h * e) - function(x - h * e)) / (2 * h) for e in np.eye(len(x))])


KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "dpkd": {"beta": 0.7, "reference": "teacher", "per_token": True, "by": "origin"},
    "simpo": {"beta": 2.0, "margin": 1.0, "reference": "none", "per_token": True},
    "ipo": {"loss": "squared", "beta": 0.4},
    "plad": {"loss": "hinge", "beta": 1.0, "margin": 0.5, "reference": "none", "per_token": True, "by": "origin"},
    "kto": {"loss": "kto", "beta": 0.8, "positive_weight": 1.3, "negative_weight": 0.7},
    "kto-per-token": {"loss": "kto", "beta": 0.8, "per_token": True},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KINDS)
def test_value_and_gradient_are_the_formulas(name: str, seed: int):
    world, keys = World(seed), KINDS[name]
    want = kto if keys.get("loss") == "kto" else reference
    value, gradient = world.run(term(**keys))
    close(value, want(world, keys, world.logq), 1e-9)
    close(gradient, slope(lambda x: want(world, keys, x), world.logq), 1e-7)
    assert np.abs(gradient).max() > 1e-3
    assert (gradient[~KEEP_N] == 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_of_single_responses_change_nothing(name: str):
    world, made = World(4), term(**KINDS[name])
    whole = world.run(made)
    parts = [np.flatnonzero(np.isin(ROW_N, rows)) for rows in ([7, 1], [0], [2, 3, 4], [5], [6])]
    split = world.run(made, parts)
    close(split[0], whole[0])
    close(split[1], whole[1])


def test_ties_and_groups_without_a_pair_are_left_out_and_counted():
    world, made = World(1), term()
    _, gradient = world.run(made)
    assert (gradient[np.isin(GROUP_B[ROW_N], [1, 3])] == 0).all()
    assert made.count(world.view(as_tensor(world.logq))) == {"pairs": 3.0, "groups_without_pair": 0.5}
    by_origin = term(by="origin").count(world.view(as_tensor(world.logq)))
    assert by_origin == {"pairs": 3.0, "groups_without_pair": 0.5}


def test_a_step_without_any_pair_has_no_loss_and_no_gradient():
    world = World(2)
    part = np.flatnonzero(np.isin(GROUP_B[ROW_N], [1, 3]))
    for keys in (KINDS["dpo"], KINDS["ipo"]):
        made = term(**keys)
        coupled = made.couple(world.view(as_tensor(world.logq[part]), part))
        assert (coupled == 0).all()


def test_impossible_text_under_the_reference_keeps_every_number_finite():
    world = World(3)
    world.initial[0] = -np.inf
    for keys in (KINDS["dpo"], KINDS["kto"]):
        value, gradient = world.run(term(**keys))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_dpkd_weighs_a_pair_more_while_the_student_prefers_its_own_text():
    world, made = World(0), term(**KINDS["dpkd"])
    theirs = np.isin(ROW_N, [4])
    weights = []
    for shift in (-2.0, 0.0, 2.0):
        other = World(0)
        other.logq = world.logq + shift * theirs
        weights.append(-other.run(made)[1][theirs].mean())
    assert weights[0] > weights[1] > weights[2] > 0


def test_what_it_asks_for():
    assert term().needs.reference
    assert term().needs.rewards
    assert term().family == "rl"
    taught = term(reference="teacher", by="origin")
    assert (taught.needs.teacher, bool(taught.needs.reference), taught.needs.rewards) == ("token", False, False)
    assert taught.family == "kd"
    none = term(reference="none")
    assert none.needs.teacher is None
    assert not none.needs.reference


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"reduce": "token_global"}, "averaged over its pairs"),
        ({"scale": 0.5}, "would weigh its tokens apart"),
        ({"on": ["student", "mixed"]}, "importance weights belong to tokens"),
        ({"loss": "squared", "margin": 1.0}, "margin belongs to logistic and hinge"),
        ({"loss": "kto", "margin": 1.0}, "margin belongs to logistic and hinge"),
        ({"positive_weight": 2.0}, "positive_weight belongs to `loss: kto`"),
        ({"loss": "kto", "reference": "none"}, "set reference to initial or teacher"),
        ({"loss": "kto", "by": "origin"}, "leave `by` out"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"loss": "dpo"}, "logistic"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(keys: dict[str, Any], why: str):
    with pytest.raises(ValidationError, match=why):
        term(**keys)


@pytest.mark.parametrize("name", KINDS)
def test_settings_are_written_back_as_they_were_read(name: str):
    config = term(**KINDS[name]).config
    assert PreferenceConfig.model_validate(config.model_dump()).model_dump() == config.model_dump()
