"""Preferences, later rewards and other writers through the update that a run makes: splits, order, plain gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import assert_near, gradient, made_responses, plain_gradient, plain_logp, score, toy
from torch import Tensor

from kdrl.batch import Response
from kdrl.models import LoadedModel
from kdrl.update import Tally, Updater


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return toy(1, trainable=True)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return toy(2)


BOTH = ["student", "teacher"]
TERMS: dict[str, dict[str, Any]] = {
    "luffy": {"policy_gradient": {"advantage": "dr_grpo", "off_policy": {"shape": 0.1}, "on": BOTH}},
    "rlsd": {"policy_gradient": {"modulate": {"share": 0.7}}},
    "mopd": {"policy_gradient": {"teacher_reward": 1.0, "clip": {"kind": "masked", "low": 0.3, "high": 0.5}}},
    "oreal": {"policy_gradient": {"advantage": "rloo", "clip": {"kind": "none"}, "negative_weight": 0.5}},
    "infalign": {"policy_gradient": {"advantage": {"scale": "none", "calibrate": 3.0}}},
    "sequence-kl": {"sequence_kl": {"discount": 0.9, "length_norm": True}},
    "rapo": {"reference_kl": {"direction": "forward", "power": {"right": 1.2, "wrong": 0.8}, "clamp": 2.0}},
    "dpo": {"preference": {"beta": 0.05}},
    "dpkd": {"preference": {"by": "origin", "reference": "teacher", "per_token": True, "beta": 0.7}},
    "ipo": {"preference": {"loss": "squared", "beta": 0.1, "mask": {"top_entropy": 0.6}}},
    "simpo": {"preference": {"reference": "none", "per_token": True, "beta": 2.0, "margin": 1.0}},
    "plad": {
        "preference": {
            "loss": "hinge",
            "by": "origin",
            "reference": "none",
            "per_token": True,
            "beta": 1.0,
            "margin": 9.0,
        }
    },
    "kto": {"preference": {"loss": "kto", "beta": 0.05}},
}


def guided() -> list[Response]:
    """Three groups of three in which the teacher wrote one response of each."""
    responses = made_responses()
    for r in responses[1::3]:
        r.origin = "teacher"
    return responses


@pytest.mark.parametrize("name", TERMS)
def test_splitting_padding_and_order_leave_the_gradient(name: str, student: LoadedModel, teacher: LoadedModel):
    responses, entries = guided(), [TERMS[name]]
    told: dict[str, Any] = {"teacher": teacher, "reference": teacher, "stale": name not in ("rlsd", "infalign")}
    scored = score(student, responses, entries, **told)
    whole = gradient(student, scored)
    assert whole.norm() > 1e-6, "a test on a gradient of zero proves nothing"
    assert_near(gradient(student, scored, budget=1), whole)
    assert_near(gradient(student, scored, budget=60), whole)
    order = torch.randperm(len(responses), generator=torch.Generator().manual_seed(5)).tolist()
    moved = score(student, [responses[i] for i in order], entries, **told)
    assert_near(gradient(replace(student, pad_id=9), moved, budget=100), whole)


@pytest.mark.parametrize("name", ["dpo", "sequence-kl", "kto"])
def test_the_reported_loss_and_counts_do_not_depend_on_the_split(name: str, student: LoadedModel, teacher: LoadedModel):
    scored = score(student, guided(), [TERMS[name]], teacher=teacher, reference=teacher)
    tallies = [Tally(), Tally()]
    for tally, budget in zip(tallies, (1, 4096), strict=True):
        updater = Updater(student, budget)
        updater.accumulate(scored, range(9), tally)
        updater.clear()
    (loss,) = tallies[0].loss.values()
    assert loss == pytest.approx(*tallies[1].loss.values(), rel=1e-5)
    assert loss != 0.0
    assert tallies[0].counts == tallies[1].counts
    if name == "dpo":
        assert tallies[0].counts == {"preference/pairs": 4.0, "preference/groups_without_pair": pytest.approx(1 / 3)}


def sampled(model: LoadedModel, response: Response) -> Tensor:
    logp = plain_logp(model, response.prompt_ids, response.token_ids)
    return logp.gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0]


def test_dpo_from_the_models_own_logits(student: LoadedModel, teacher: LoadedModel):
    responses = guided()
    entries = [{"preference": {"beta": 0.05, "on": BOTH}}]
    scored = score(student, responses, entries, reference=teacher)

    def loss() -> Tensor:
        s = [(sampled(student, r) - sampled(teacher, r).detach()).sum() for r in responses]
        pairs = [[(0, 1), (0, 2)], [(3, 4), (3, 5)]]
        groups = [
            torch.stack([-torch.nn.functional.logsigmoid(0.05 * (s[i] - s[j])) for i, j in group]).mean()
            for group in pairs
        ]
        return torch.stack(groups).mean()

    assert_near(gradient(student, scored, budget=50), plain_gradient(student, loss))


def test_later_rewards_from_the_models_own_logits_also_under_a_mask(student: LoadedModel, teacher: LoadedModel):
    """A token mask says which tokens move, and no token's return: the teacher is read on whole responses."""
    responses = made_responses()
    entry = {"sequence_kl": {"mask": {"top_entropy": 0.4}}}
    scored = score(student, responses, [entry], teacher=teacher)
    (active,) = scored.active
    assert int(active.wanted_N(scored.rollouts.row_N, 9).sum()) > int(active.keep_N.sum())

    def loss() -> Tensor:
        total, kept = torch.zeros(()), 0
        for row, response in enumerate(responses):
            q, p = sampled(student, response), sampled(teacher, response).detach()
            R = (p - q.detach()).clamp(-100, 100)
            later = R.flip(0).cumsum(0).flip(0) - R
            start, end = scored.rollouts.span(row)
            keep = active.keep_N[start:end]
            total, kept = total - (later * q)[keep].sum(), kept + int(keep.sum())
        return total / kept

    assert_near(gradient(student, scored, budget=50), plain_gradient(student, loss))


def test_importance_weights_of_a_mixture_multiply_the_later_rewards(student: LoadedModel, teacher: LoadedModel):
    one, other = made_responses(origin="mixed"), made_responses(origin="mixed")
    for r in other:
        r.importance = [2.0] * len(r.token_ids)
    entries = [TERMS["sequence-kl"]]
    plain = gradient(student, score(student, one, entries, teacher=teacher))
    assert_near(gradient(student, score(student, other, entries, teacher=teacher)), 2.0 * plain)


def test_another_teacher_is_another_gradient(student: LoadedModel, teacher: LoadedModel):
    for name in ("rlsd", "mopd", "sequence-kl", "dpkd"):
        one = gradient(student, score(student, guided(), [TERMS[name]], teacher=teacher))
        other = gradient(student, score(student, guided(), [TERMS[name]], teacher=toy(3)))
        assert (one - other).norm() > 1e-3 * one.norm() > 0
