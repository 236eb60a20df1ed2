"""Terms beside policy gradient and distillation, what terms need, and terms of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kdrl.errors import UserError
from kdrl.objectives.head import Head, score_tokens
from kdrl.objectives.terms import TERMS, Needs, TokenView, register_term

from .reference import as_tensor, autograd, close, log_softmax, softmax, token_view


def term(name: str, **keys: Any) -> Any:
    made = TERMS.get(name)
    return made(made.Config.model_validate(keys))


def test_cross_entropy_value_and_gradient():
    z = np.random.default_rng(0).normal(size=5)
    value, gradient = autograd(lambda leaf: term("cross_entropy").loss(token_view(leaf.log_softmax(-1)[2:3])), z)
    close(value, -log_softmax(z)[2:3])
    close(gradient, softmax(z) - np.eye(5)[2])


def test_entropy_bonus_raises_entropy_by_its_exact_gradient():
    z = np.random.default_rng(1).normal(size=5)

    def loss(leaf: Tensor) -> Tensor:
        scores = score_tokens(Head(leaf[:, None]), torch.ones(1, 1).double(), torch.tensor([0]), entropy=True)
        return term("entropy").loss(token_view(scores.logp_N, entropy_N=scores.entropy_N))

    value, gradient = autograd(loss, z)
    q, logq = softmax(z), log_softmax(z)
    close(value, [(q * logq).sum()])
    close(gradient, q * (logq - (q * logq).sum()))


def test_reference_leash_by_hand():
    logq, reference = as_tensor([-1.0, -2.0, -1.0]).requires_grad_(), as_tensor([-1.5, -1.0, -40.0])
    view = token_view(logq, reference_N=reference, teacher_N=torch.full_like(reference, -9.0))
    for estimator, values in (("k2", [0.125, 0.5, 50 + 10 * 29]), ("k3", [np.exp(-0.5) - 0.5, np.e - 2, None])):
        loss = term("reference_kl", estimator=estimator).loss(view)
        for found, expected in zip(loss.tolist(), values, strict=True):
            assert expected is None or found == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(loss.sum(), logq)
        close(gradient, [0.5, -1.0, 10.0])


@pytest.mark.parametrize(
    ("name", "keys", "needs"),
    [
        ("policy_gradient", {}, Needs(rewards=True)),
        ("policy_gradient", {"ratio": "sequence"}, Needs(rewards=True)),
        ("policy_gradient", {"ratio": {"alpha": 0.5}}, Needs(rewards=True, teacher="token")),
        ("distill", {}, Needs(teacher="distribution")),
        ("distill", {"support": {"token": "k2"}}, Needs(teacher="token")),
        ("cross_entropy", {}, Needs()),
        ("reference_kl", {}, Needs(reference="token")),
        ("entropy", {}, Needs(entropy=True)),
    ],
)
def test_each_term_asks_for_what_it_reads(name: str, keys: dict[str, Any], needs: Needs):
    assert term(name, **keys).needs == needs


@pytest.mark.parametrize("name", ["policy_gradient", "distill", "cross_entropy", "reference_kl", "entropy"])
def test_unknown_keys_are_refused_by_name(name: str):
    with pytest.raises(ValidationError, match="wieght"):
        term(name, wieght=1.0)
    with pytest.raises(ValidationError, match="on"):
        term(name, on=["studnt"])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("policy_gradient", {"ratio": {"alpha": 1.5}}),
        ("policy_gradient", {"ratio": {"alpha": 0.5, "clamp": 0.0}}),
        ("policy_gradient", {"ratio": "sequnce"}),
        ("reference_kl", {"estimator": "k4"}),
        ("reference_kl", {"clamp": -1.0}),
        ("cross_entropy", {"clamp": 1.0}),
    ],
)
def test_settings_out_of_range_are_refused(name: str, keys: dict[str, Any]):
    with pytest.raises(ValidationError):
        term(name, **keys)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("policy_gradient", {"advantage": "rloo", "ratio": {"alpha": 0.3, "clamp": 2.0}, "clip": {"high": 0.28}}),
        ("policy_gradient", {"clip": {"kind": "cispo", "cap": 5.0}, "reduce": {"constant": 100}}),
        ("distill", {"divergence": {"jsd": {"beta": 0.5, "scale": "paper"}}, "mask": {"not": "wrong_group"}}),
        ("distill", {"support": {"token": "k3"}, "weight": {"linear": {"from": 1, "to": 0}, "warmup": 2}}),
        ("distill", {"support": {"topk": 8}, "divergence": {"jsd": 0.25}, "on": ["gold"], "skip_eos": True}),
        ("distill", {"support": {"token": {"estimator": "k3", "as": "loss"}}, "divergence": "forward_kl"}),
        ("reference_kl", {"estimator": "k3", "clamp": None}),
        *((name, {}) for name in ("policy_gradient", "distill", "cross_entropy", "reference_kl", "entropy")),
        ("policy_gradient", {"clip": {"kind": "none"}}),
        ("policy_gradient", {"ratio": "none"}),
    ],
    ids=str,
)
def test_a_term_written_into_the_resolved_recipe_reads_back_the_same(name: str, keys: dict[str, Any]):
    config = term(name, **keys).config
    for options in ({}, {"exclude_unset": True}, {"mode": "json"}):
        written = config.model_dump(**options)
        again = type(config).model_validate(written)
        assert again.model_dump() == config.model_dump()
        for key in keys:
            assert key in written, "what was asked for is written down"


def test_a_term_of_one_s_own():
    @register_term("test_pull", teacher=True)
    def pull(view: TokenView, power: float, floor: float = 0.0) -> Tensor:
        """(log p - log q)^power, not below the floor."""
        assert view.teacher_N is not None
        return ((view.teacher_N - view.logq_N).abs() ** power).clamp(min=floor)

    made = term("test_pull", power=3.0, weight=0.5, mask="wrong_response", reduce="sum")
    assert made.needs == Needs(teacher="token")
    assert (made.config.weight(0, 1), made.config.mask, made.config.reduce.kind) == (0.5, "wrong_response", "sum")
    assert TERMS.get("test_pull").__doc__ == pull.__doc__

    def loss(leaf: Tensor) -> Tensor:
        return made.loss(token_view(leaf, teacher_N=as_tensor([-1.0, -1.0])))

    value, gradient = autograd(loss, np.array([-2.0, -0.5]))
    close(value, [1.0, 0.125])
    close(gradient, [-3.0, 0.75])
    with pytest.raises(ValidationError, match="power"):
        term("test_pull")
    with pytest.raises(ValidationError, match="ceiling"):
        term("test_pull", power=2.0, ceiling=1.0)


def test_a_term_of_one_s_own_may_ask_for_entropy():
    @register_term("test_calm", entropy=True)
    def calm(view: TokenView) -> Tensor:
        assert view.entropy_N is not None
        return view.entropy_N

    assert term("test_calm").needs == Needs(entropy=True)


def test_a_term_of_one_s_own_that_averages_or_hides_its_settings_is_refused():
    register_term("test_mean")(lambda view: view.logq_N.mean())
    with pytest.raises(UserError, match=r"'test_mean' must return one loss per token, \(2,\), but gave \(\)"):
        term("test_mean").loss(token_view(as_tensor([-1.0, -2.0])))
    with pytest.raises(UserError, match=r"takes \*settings"):
        register_term("test_open")(lambda view, **settings: view.logq_N)
    with pytest.raises(UserError, match="has a setting 'weight', which every term has"):
        register_term("test_weight")(lambda view, weight=1.0: view.logq_N)


def test_settings_of_a_term_are_checked_by_their_annotations():
    @register_term("test_typed")
    def typed(view: TokenView, power: float, side: str = "left") -> Tensor:
        return view.logq_N**power

    with pytest.raises(ValidationError, match="power"):
        term("test_typed", power="much")
    assert term("test_typed", power=2).loss(token_view(as_tensor([-3.0]))).tolist() == [9.0]


def test_a_built_in_term_cannot_be_replaced_and_a_misspelled_one_names_the_nearest():
    with pytest.raises(UserError, match="objective term 'distill' is built in"):
        register_term("distill")(lambda view: view.logq_N)
    with pytest.raises(UserError, match="did you mean 'distill'"):
        TERMS.get("distil")
