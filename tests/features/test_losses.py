"""Every loss and its gradient against a few lines of its formula in float64, and zero where student is teacher."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl.features.config import Feature, FeatureLoss
from kdrl.features.losses import (
    RESPONSE_LOSSES,
    TOKEN_LOSSES,
    map_loss,
    norm_and_direction,
    relation_loss,
)


def drawn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(grad)


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def assert_same(mine: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor], *shape: int) -> None:
    """Equal per token, and equal gradients of an uneven sum, at two random points."""
    for seed in (1, 2):
        grads = []
        for function in (mine, formula):
            student = drawn(*shape, seed=seed, grad=True)
            loss_T = function(student)
            (loss_T * torch.linspace(1.0, 2.0, len(loss_T), dtype=torch.float64)).sum().backward()
            assert student.grad is not None
            grads.append((loss_T.detach(), student.grad))
        assert torch.allclose(grads[0][0], grads[1][0], atol=1e-12)
        assert torch.allclose(grads[0][1], grads[1][1], atol=1e-12)
        assert grads[0][1].norm() > 1e-3


def spec(kind: str, **more: Any) -> FeatureLoss:
    return FeatureLoss.model_validate({kind: more})


TEACHER = drawn(6, 5, seed=9)


def huber(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, x * x / 2, x.abs() - 0.5)


def test_losses_of_one_vector():
    pairs = {
        "mse": lambda s, t: ((s - t) ** 2).mean(),
        "l1": lambda s, t: huber(s - t).mean(),
        "cosine": lambda s, t: 1 - unit(s) @ unit(t),
    }
    assert pairs.keys() == TOKEN_LOSSES.keys()
    for name, formula in pairs.items():

        def whole(student: Tensor, formula: Any = formula) -> Tensor:
            return torch.stack([formula(s, t) for s, t in zip(student, TEACHER, strict=True)])

        assert_same(lambda s, name=name: TOKEN_LOSSES[name](s, TEACHER, spec(name)), whole, 6, 5)
        assert float(TOKEN_LOSSES[name](TEACHER, TEACHER, spec(name)).abs().max()) < 1e-15


def test_norm_and_direction():
    centres = drawn(6, 5, seed=4)

    def formula(student: Tensor) -> Tensor:
        out = []
        for s, t, c in zip(student, TEACHER, centres, strict=True):
            longest = s.norm() if s.norm() > t.norm() else t.norm()
            out.append(1 - s @ unit(c) / longest)
        return torch.stack(out)

    assert_same(lambda s: norm_and_direction(s, TEACHER, centres), formula, 6, 5)
    # Least, and zero, along the centre with at least the teacher's norm; a shorter student pays.
    along = torch.stack([3.0 * t.norm() * unit(c) for t, c in zip(TEACHER, centres, strict=True)])
    assert torch.allclose(norm_and_direction(along, TEACHER, centres), torch.zeros(6, dtype=torch.float64), atol=1e-12)
    assert bool((norm_and_direction(along / 30, TEACHER, centres) > 0.5).all())
    assert bool((norm_and_direction(TEACHER, TEACHER, centres) > 1e-3).all()), "not zero at the teacher"


def critic(student: Tensor, tau: float) -> list[list[Tensor]]:
    return [[unit(s) @ unit(t) / tau for t in TEACHER] for s in student]


def test_infonce():
    def formula(student: Tensor) -> Tensor:
        f = critic(student, 0.3)
        return torch.stack([-(f[j][j].exp() / sum(f[i][j].exp() for i in range(6))).log() for j in range(6)])  # type: ignore[union-attr]

    assert_same(lambda s: RESPONSE_LOSSES["infonce"](s, TEACHER, spec("infonce", temperature=0.3)), formula, 6, 5)
    one = drawn(1, 5)
    assert float(RESPONSE_LOSSES["infonce"](one, TEACHER[:1], spec("infonce"))) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mi_alpha(alpha: float):
    def formula(student: Tensor) -> Tensor:
        f = critic(student, 0.5)
        out = []
        for j in range(6):
            with_own = sum(f[i][j].exp() for i in range(6)) / 6
            without = sum(f[i][j].exp() for i in range(6) if i != j) / 5
            joint = (f[j][j].exp() / (alpha * with_own + 1 - alpha)).log()
            out.append(-1 - joint + without / (alpha * without + 1 - alpha))
        return torch.stack(out)

    mine = spec("mi_alpha", alpha=alpha, temperature=0.5)
    assert_same(lambda s: RESPONSE_LOSSES["mi_alpha"](s, TEACHER, mine), formula, 6, 5)
    student = drawn(6, 5)
    if alpha == 1.0:
        nce = RESPONSE_LOSSES["infonce"](student, TEACHER, spec("infonce", temperature=0.5))
        assert torch.allclose(RESPONSE_LOSSES["mi_alpha"](student, TEACHER, mine), nce - math.log(6), atol=1e-12)
    assert float(RESPONSE_LOSSES["mi_alpha"](student[:1], TEACHER[:1], mine)) == 0.0


def test_mi_alpha_is_a_bound_of_what_two_samples_share():
    """Independent features: no positive bound beyond chance; equal ones: up to log T."""
    student, other = drawn(400, 8, seed=1), drawn(400, 8, seed=2)
    bound = spec("mi_alpha", alpha=0.5, temperature=0.2)
    assert float(-RESPONSE_LOSSES["mi_alpha"](student, other, bound).mean()) < 0.02
    assert 1.0 < float(-RESPONSE_LOSSES["mi_alpha"](student, student, bound).mean()) < math.log(400)


def test_sinkhorn_nears_the_best_assignment():
    """With little smoothing the mean is the cheapest matching of students to teachers, found by trying all of them."""
    student = drawn(5, 4, seed=3)
    teacher = drawn(5, 4, seed=5)
    cost = torch.stack([torch.stack([1 - unit(s) @ unit(t) for t in teacher]) for s in student])
    best = min(sum(float(cost[i, p[i]]) for i in range(5)) for p in itertools.permutations(range(5))) / 5
    sharp = spec("sinkhorn", entropy=2e-3, iterations=4000)
    assert float(RESPONSE_LOSSES["sinkhorn"](student, teacher, sharp).mean()) == pytest.approx(best, abs=2e-3)
    assert float(RESPONSE_LOSSES["sinkhorn"](teacher, teacher, sharp).mean()) < 1e-6


def test_sinkhorn_value_and_gradient():
    def formula(student: Tensor) -> Tensor:
        cost = torch.stack([torch.stack([1 - unit(s) @ unit(t) for t in TEACHER]) for s in student])
        kernel = (-cost.detach() / 0.1).exp()
        u = v = torch.ones(6, dtype=torch.float64)
        for _ in range(200):
            v = 1 / 6 / (kernel.T @ u)
            u = 1 / 6 / (kernel @ v)
        plan = u[:, None] * kernel * v
        assert torch.allclose(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-9)
        return 6 * (plan * cost).sum(1)

    mine = spec("sinkhorn", entropy=0.1, iterations=200)
    assert_same(lambda s: RESPONSE_LOSSES["sinkhorn"](s, TEACHER, mine), formula, 6, 5)


# Two heads, four queries, six keys; the third query sees one key and the last none.
COUNTED = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
MAP = drawn(2, 4, 6, seed=7)


def softmax(row: Tensor) -> Tensor:
    return row.exp() / row.exp().sum()


ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda s, t: ((s - t) ** 2).mean(),
    "l1": lambda s, t: huber(s - t).mean(),
    "cosine": lambda s, t: 1 - s @ t / (s.norm() * t.norm()),
    "kl": lambda s, t: (t * (t.log() - s.log())).sum(),
}


@pytest.mark.parametrize("kind", sorted(ROWS))
@pytest.mark.parametrize("as_softmax", [True, False])
def test_maps_row_by_row(kind: str, as_softmax: bool):
    if kind == "kl" and not as_softmax:
        return
    tau = 2.0 if kind == "kl" else 1.0
    loss = spec(kind, temperature=2.0) if kind == "kl" else spec(kind)

    def formula(student: Tensor) -> Tensor:
        out = []
        for q in range(4):
            keys = COUNTED[q]
            if not bool(keys.any()):
                out.append(student.sum() * 0.0)
                continue
            rows = [(student[h, q, keys] / tau, MAP[h, q, keys] / tau) for h in range(2)]
            rows = [(softmax(s), softmax(t)) for s, t in rows] if as_softmax else rows
            out.append(sum(ROWS[kind](s, t) for s, t in rows) / 2)
        return torch.stack(out)

    def mine(student: Tensor) -> Tensor:
        return map_loss(student, MAP, COUNTED, loss, softmax=as_softmax)

    assert_same(mine, formula, 2, 4, 6)
    assert float(mine(MAP).abs().max()) < 1e-14


RELATIONS = {
    "llava-kd": ({}, "cosine"),
    "faqd": ({}, "mse"),
    "minilm": ({"heads": 2, "scale": "dot"}, "kl"),
    "trg": ({"neighbours": 2}, "kl"),
}


@pytest.mark.parametrize("name", sorted(RELATIONS))
def test_relations_within_a_response(name: str):
    settings, kind = RELATIONS[name]
    of = Feature.model_validate({"relation": {"of": "hidden", **settings}})
    heads = settings.get("heads", 1)
    teacher = drawn(5, 8, seed=3)

    def product(x: Tensor, h: int, i: int, j: int) -> Tensor:
        width = x.shape[1] // heads
        a, b = x[i, h * width : (h + 1) * width], x[j, h * width : (h + 1) * width]
        return a @ b / math.sqrt(width) if settings.get("scale") == "dot" else unit(a) @ unit(b)

    def formula(student: Tensor) -> Tensor:
        out = []
        for i in range(5):
            keys = list(range(5))
            if "neighbours" in settings:
                keys = sorted((j for j in keys if j != i), key=lambda j: -float(product(teacher, 0, i, j)))[:2]
            loss = torch.zeros((), dtype=torch.float64)
            for h in range(heads):
                s, t = (torch.stack([product(x, h, i, j) for j in keys]) for x in (student, teacher))
                s, t = (softmax(s), softmax(t)) if kind == "kl" else (s, t)
                loss = loss + ROWS[kind](s, t) / heads
            out.append(loss)
        return torch.stack(out)

    # The student is narrower: a relation needs no projector.
    assert_same(lambda s: relation_loss(s, teacher, of, spec(kind)), formula, 5, 6)
    assert float(relation_loss(teacher, teacher, of, spec(kind)).abs().max()) < 1e-14
    turned = teacher @ torch.linalg.qr(drawn(8, 8, seed=8))[0]
    if heads == 1:
        assert float(relation_loss(turned, teacher, of, spec(kind)).abs().max()) < 1e-12, "a rotation changes nothing"
    assert torch.isfinite(relation_loss(drawn(1, 6), teacher[:1], of, spec(kind))).all()
