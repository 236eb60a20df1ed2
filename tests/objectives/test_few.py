"""A teacher that gives some outcomes alone: the same losses as from its whole distribution, and who is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kdrl.objectives.distill import Distill, DistillConfig
from kdrl.objectives.support import Few
from kdrl.teachers.base import Gives

from .reference import Array, as_tensor, autograd, close, distribution_loss, tokens_of

SERVED: list[dict[str, Any]] = [
    {"support": {"topk": 3}, "divergence": d}
    for d in (
        "forward_kl",
        "reverse_kl",
        {"jsd": 0.3},
        {"skew_kl": 0.1},
        {"alpha_beta": {"alpha": 0.2, "beta": 0.7}},
        "tv",
    )
]
SERVED += [
    {"support": {"topk": {"k": 3, "rest": "renormalise"}}},
    {"support": {"topk": {"k": 3, "rest": "renormalise_teacher"}}, "divergence": "forward_kl"},
    {"support": {"topk": {"k": 4, "top_p": 0.8}}, "divergence": "forward_kl"},
    {"support": {"topk": {"k": 3, "rest": "partial"}}, "divergence": {"pair": ["uniform", "uniform"]}},
    {"support": {"topk": 7}},
    {"support": {"topk": 3}, "scale": {"affine": {"of": "ce_p", "scale": 2.0}}},
    {"support": {"topk": 3}, "divergence": {"arms": [{"of": "p||q", "gate": "label_q"}]}},
]


def logits(seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    return random.normal(size=(5, 7)) * 1.5, random.normal(size=(5, 7))


@pytest.mark.parametrize("spec", SERVED, ids=str)
@pytest.mark.parametrize("stored", [4, 7])
def test_the_likeliest_tokens_are_all_that_a_top_k_loss_reads(spec: dict[str, Any], stored: int):
    config = DistillConfig.model_validate(spec)
    assert config.few == "topk"
    teacher, student = logits()
    logp = as_tensor(teacher).log_softmax(-1)
    token = torch.tensor([0, 3, 6, 2, 1])
    few = Few(*reversed(torch.topk(logp, max(stored, config.support.k or 0), dim=-1)))

    def alone(z: torch.Tensor) -> torch.Tensor:
        logq = z.log_softmax(-1)

        tokens = replace(tokens_of(logp, logq, token), logp_CV=None, few=few)
        return Distill(config).compare(tokens, logq)[:, 0]

    found = autograd(alone, student)
    whole = autograd(lambda z: distribution_loss(config, logp, z.log_softmax(-1), token), student)
    close(found[0], whole[0], 1e-7)
    close(found[1], whole[1], 1e-7)


def test_draws_with_their_weights_are_the_mean_over_draws():
    teacher, student = logits(1)
    logp, config = (
        as_tensor(teacher).log_softmax(-1),
        DistillConfig.model_validate({"divergence": "forward_kl", "support": {"draws": 4}}),
    )
    ids = torch.tensor([[0, 2, 0], [1, 1, 1], [3, 4, 5], [6, 0, 0], [2, 2, 3]])
    weight = torch.tensor(
        [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25], [0.75, 0.25, 0.0], [0.5, 0.0, 0.5]]
    ).double()
    few = Few(ids, logp.gather(-1, ids), weight)

    def loss(z: torch.Tensor) -> torch.Tensor:

        logq = z.log_softmax(-1)
        return Distill(config).compare(replace(tokens_of(logp, logq), logp_CV=None, few=few), logq)[:, 0]

    value, gradient = autograd(loss, student)
    q = np.exp(student) / np.exp(student).sum(-1, keepdims=True)
    hand = np.zeros(5)
    target = np.zeros((5, 7))
    for n in range(5):
        for i, w in zip(ids[n].tolist(), weight[n].tolist(), strict=True):
            hand[n] += w * (logp[n, i].item() - np.log(q[n, i]))
            target[n, i] += w
    close(value, hand)
    close(gradient, target.sum(-1, keepdims=True) * q - target)


@pytest.mark.parametrize(
    "spec",
    [
        {"support": "full"},
        {"support": {"topk": {"k": 3, "of": "student"}}},
        {"support": {"topk": 3}, "target": {"teacher_temperature": 2.0}},
        {"support": {"topk": 3}, "scale": "entropy_p"},
        {"support": {"topk": 3}, "divergence": "rank"},
    ],
    ids=str,
)
def test_what_reads_more_is_not_served(spec: dict[str, Any]):
    needs = Distill(DistillConfig.model_validate(spec)).needs
    assert needs.few is None
    assert not Gives(distribution=False, topk=100, draws=100).serves(needs)
    assert Gives().serves(needs)


def test_who_is_served_by_how_many():
    needs = Distill(DistillConfig.model_validate({"support": {"topk": 8}})).needs
    assert [Gives(distribution=False, topk=k).serves(needs) for k in (0, 7, 8, 20)] == [False, False, True, True]
    drawn = Distill(DistillConfig.model_validate({"divergence": "forward_kl", "support": {"draws": 12}})).needs
    assert not Gives(distribution=False, topk=64).serves(drawn)
    assert Gives(distribution=False, draws=12).serves(drawn)
    sampled = Distill(DistillConfig.model_validate({"support": {"token": "k2"}})).needs
    assert Gives(distribution=False).serves(sampled)
