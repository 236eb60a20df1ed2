"""`kdrl.divergence`: the arithmetic of a run on plain logits, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdrl
from kdrl.errors import UserError
from kdrl.objectives.terms import Distill, DistillConfig

from .reference import DIVERGENCES, Array, close, gradient_of, log_softmax, softmax, token_view, value_of

SAMPLED: list[dict[str, Any]] = [
    {"divergence": "reverse_kl", "support": {"token": "k1"}},
    {"divergence": "reverse_kl", "support": {"token": "k2"}},
    {"divergence": "reverse_kl", "support": {"token": "k3"}},
    {"support": {"token": {"estimator": "k2", "as": "loss"}}, "clamp": 0.5},
    {"support": {"token": {"estimator": "k1", "as": "advantage"}}, "clamp": None},
    {"divergence": "forward_kl", "support": {"token": {"estimator": "k3", "as": "loss"}}},
]
SPECS = [*({"divergence": d} for d in DIVERGENCES), {"support": {"topk": 2}}, *SAMPLED]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
TOKENS = torch.tensor([[0, 3, 1], [4, 4, 2]])


def logits(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def measured(spec: Any, student: Tensor, teacher: Tensor, **keys: Any) -> tuple[Array, Array]:
    loss = kdrl.divergence(student, teacher, spec, TOKENS, **keys)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("support", [None, "full", {"topk": 5}])
def test_distributions_equal_the_formula(divergence: Any, support: Any):
    student, teacher = logits(0)
    spec = {"divergence": divergence} | ({} if support is None else {"support": support})
    value, gradient = measured(spec, student, teacher)
    assert value.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        p, q = softmax(teacher[i, j].numpy()), softmax(student[i, j].detach().numpy())
        close(value[i, j], value_of(divergence, p, q))
        close(gradient[i, j], gradient_of(divergence, p, q))


def test_an_empty_spec_is_reverse_kl_over_the_vocabulary():
    close(measured({}, *logits(1))[0], measured({"divergence": "reverse_kl", "support": "full"}, *logits(1))[0])


@pytest.mark.parametrize("spec", SAMPLED, ids=str)
def test_sampled_tokens_give_what_the_term_of_a_run_gives(spec: dict[str, Any]):
    student, teacher = logits(2)
    value, gradient = measured(spec, student, teacher)
    other = student.detach().clone().requires_grad_()
    pick = TOKENS[..., None]
    view = token_view(
        other.log_softmax(-1).gather(-1, pick).flatten(),
        teacher_N=teacher.log_softmax(-1).gather(-1, pick).flatten(),
    )
    loss = Distill(DistillConfig.model_validate(spec)).loss(view)
    loss.sum().backward()
    assert other.grad is not None
    close(value.flatten(), loss.detach())
    close(gradient, other.grad)


def test_k2_gradient_by_hand():
    student, teacher = logits(3)
    _, gradient = measured({"support": {"token": "k2"}}, student, teacher)
    z = student.detach().numpy()
    pick = np.eye(5)[TOKENS.numpy()]
    ratio = ((log_softmax(teacher.numpy()) - log_softmax(z)) * pick).sum(-1, keepdims=True)
    close(gradient, -ratio * (pick - softmax(z)))


@every_spec
def test_the_mask_silences_value_and_gradient(spec: Any):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    value, gradient = measured(spec, *logits(4))
    for given in (mask, mask.long(), mask.double()):
        masked_value, masked_gradient = measured(spec, *logits(4), mask=given)
        close(masked_value, value * mask.numpy())
        close(masked_gradient, gradient * mask.numpy()[..., None])
    assert (value[~mask.numpy()] != 0).any()


@every_spec
def test_another_teacher_gives_another_gradient_and_none_of_its_own(spec: Any):
    student, teacher = logits(5)
    other = logits(6)[1].requires_grad_()
    assert np.abs(measured(spec, student, teacher)[1] - measured(spec, student, other)[1]).max() > 1e-3
    kdrl.divergence(student, other, spec, TOKENS).sum().backward()
    assert other.grad is None


@every_spec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits_are_computed_in_float32(spec: Any, dtype: torch.dtype):
    student, teacher = logits(7, dtype)
    loss = kdrl.divergence(student, teacher, spec, TOKENS)
    assert loss.dtype == torch.float32
    exact, exact_gradient = measured(spec, student.detach().double().requires_grad_(), teacher.double())
    close(loss.detach(), exact, 2e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.dtype == dtype
    close(gradient.double(), exact_gradient, 1e-2 if dtype != torch.float32 else 2e-5)
    mixed = kdrl.divergence(student, teacher.double(), spec, TOKENS)
    assert mixed.dtype == torch.float64


@pytest.mark.parametrize("lead", [(), (4,), (2, 3, 1)])
def test_any_leading_shape(lead: tuple[int, ...]):
    student, teacher = torch.randn(2, *lead, 3, 5, dtype=torch.float64)
    tokens = torch.zeros((*lead, 3), dtype=torch.long)
    for spec in SPECS:
        assert kdrl.divergence(student, teacher, spec, tokens).shape == (*lead, 3)
    assert kdrl.divergence(student[..., :0, :], teacher[..., :0, :], {}).shape == (*lead, 0)


@pytest.mark.parametrize(("key", "value"), [("mask", "wrong_response"), ("skip_eos", True)])
def test_keys_that_single_tokens_cannot_show_are_refused(key: str, value: Any):
    with pytest.raises(UserError, match=f"cannot apply {key}"):
        kdrl.divergence(*logits(8), {"divergence": "forward_kl", key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("weight", 0.1), ("mask", "all"), ("reduce", "sum"), ("on", ["student"]), ("skip_eos", False)]
)
def test_keys_that_act_after_the_loss_leave_it_as_it_is(key: str, value: Any):
    plain = kdrl.divergence(*logits(8), {"divergence": "forward_kl"})
    assert torch.equal(kdrl.divergence(*logits(8), {"divergence": "forward_kl", key: value}), plain)


@pytest.mark.parametrize("tokens", [TOKENS + 50, TOKENS - 50, TOKENS.double()], ids=["above", "below", "not integers"])
def test_tokens_outside_the_vocabulary_are_refused(tokens: torch.Tensor):
    with pytest.raises(UserError, match="integer ids from 0 to"):
        kdrl.divergence(*logits(8), {"support": {"token": "k2"}}, tokens)


def test_what_is_no_tensor_of_logits_is_refused():
    with pytest.raises(UserError, match="student_logits is a floating-point tensor"):
        kdrl.divergence(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), {})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"divergence": "forward_kl", "support": {"token": "k2"}}, "descends the reverse KL"),
        ({"support": {"token": {"estimator": "k1", "as": "loss"}}}, "k1 cannot be differentiated as a loss"),
        ({"divergence": {"jsd": 0.5}, "support": {"token": "k2"}}, "jsd has no sampled-token estimator"),
        ({"divergence": {"jsd": {"beta": 0.0, "scale": "paper"}}}, "zero for every student at beta 0"),
        ({"divergence": {"jsd": {"beta": 1.0, "scale": "paper"}}}, "zero for every student at beta 1"),
        ({"divergence": {"jsd": 1.5}}, "beta between 0 and 1"),
        ({"divergence": {"jds": 0.5}}, "jsd"),
        ({"divergence": "foward_kl"}, "forward_kl"),
        ({"divergence": {"kind": "forward_kl", "beta": 0.5}}, "beta belongs to jsd"),
        ({"support": "topk"}, r"write \{topk: 64\}"),
        ({"support": {"topk": 0}}, "greater than or equal to 1"),
        ({"support": {"token": "k4"}}, "'k1', 'k2' or 'k3'"),
        ({"support": "token"}, r"write \{token: k2\}"),
        ({"support": {"topk": {"k": 4, "as": "loss"}}}, "no setting 'as'"),
        ({"support": "full", "clamp": 3.0}, "clamp bounds a sampled-token ratio"),
        ({"divergance": "forward_kl"}, "divergance"),
        ({"support": {"topk": True}}, "topk"),
        ({"divergence": {"jsd": True}}, "jsd"),
        ({"divergence": {"jsd": {"kind": "forward_kl"}}}, "kind"),
        ({"support": {"token": {"kind": "full"}}}, "kind"),
        ("forward_kl", "mapping"),
    ],
    ids=str,
)
def test_specs_that_cannot_teach_or_be_read_are_refused(spec: Any, says: str):
    with pytest.raises(UserError, match=says):
        kdrl.divergence(*logits(9), spec, TOKENS)


def test_shapes_that_differ_are_refused():
    student, teacher = logits(10)
    for wrong in (teacher[..., :4], teacher[:1], teacher[:, :2], teacher[0]):
        with pytest.raises(UserError, match="differ"):
            kdrl.divergence(student, wrong, {})


def test_sampled_support_without_tokens_says_what_is_missing():
    with pytest.raises(UserError, match="needs tokens="):
        kdrl.divergence(*logits(11), {"support": {"token": "k2"}})


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (2, 4), (3,), (2, 3, 1)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(UserError, match="tokens"):
        kdrl.divergence(*logits(12), {"support": {"token": "k2"}}, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (3,), (4, 2, 3), (2, 3, 1)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(UserError, match="mask"):
        kdrl.divergence(*logits(13), {}, mask=torch.ones(shape, dtype=torch.bool))


def test_minus_infinity_logits_stay_finite():
    student, teacher = torch.zeros(2, 3, 4, dtype=torch.float64)
    student[0, 1], teacher[1, 2], student[2, 3], teacher[2, 3] = -np.inf, -np.inf, -np.inf, -np.inf
    student.requires_grad_()
    for spec in SPECS:
        loss = kdrl.divergence(student, teacher, spec, torch.tensor([0, 0, 0]))
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all(), spec
        assert gradient.isfinite().all(), spec
