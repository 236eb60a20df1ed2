"""Support {draws: n}: unbiased for KL(p||q) in value and gradient, by enumeration of all draws."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import kdrl
from kdrl.objectives.distill import Distill, DistillConfig

from .numbers import Array, kl, norm, pair, sm, term_of
from .reference import as_tensor, close, tokens_of


def spec(n: int, tau: float = 1.0) -> dict[str, Any]:
    return {"divergence": "forward_kl", "support": {"draws": {"n": n, "tau": tau}}}


def uniform_for(drawn: tuple[int, ...], share: Array) -> torch.Tensor:
    """Numbers from which inverting the distribution's cumulative sum draws these tokens."""
    ends = np.cumsum(share)
    return torch.tensor([[ends[v] - share[v] / 2 for v in drawn]], dtype=torch.float64)


def of_draw(n: int, tau: float, drawn: tuple[int, ...], teacher: Array, student: Array) -> tuple[Any, Array]:
    uniform = uniform_for(drawn, norm(sm(teacher) ** tau))
    return term_of(spec(n, tau), teacher[None], student[None], uniform_CK=uniform)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("tau", [1.0, 0.7, 1.4])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_over_all_draws_value_and_gradient_are_those_of_the_full_divergence(n: int, tau: float, seed: int):
    teacher, student = pair(seed, 5)
    p, q = sm(teacher), sm(student)
    share = norm(p**tau)
    value, gradient, total = 0.0, np.zeros(5), 0.0
    for drawn in product(range(5), repeat=n):
        chance = float(np.prod(share[list(drawn)]))
        found = of_draw(n, tau, drawn, teacher, student)
        value, gradient, total = value + chance * found[0][0], gradient + chance * found[1][0], total + chance
    close(total, 1.0)
    close(value, kl(p, q))
    close(gradient, q - p)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_one_draw_is_its_importance_weight_times_the_log_ratio(tau: float):
    teacher, student = pair(3, 5)
    p, q = sm(teacher), sm(student)
    share = norm(p**tau)
    for drawn in ((0, 0), (4, 1), (2, 3)):
        w = [p[v] / share[v] / 2 for v in drawn]
        value, gradient = of_draw(2, tau, drawn, teacher, student)
        close(value[0], sum(x * np.log(p[v] / q[v]) for x, v in zip(w, drawn, strict=True)))
        close(gradient[0], sum(x * (q - np.eye(5)[v]) for x, v in zip(w, drawn, strict=True)))


def test_at_the_teacher_every_draw_is_zero_and_the_gradient_only_on_average():
    teacher, _ = pair(3, 5)
    p = sm(teacher)
    slopes = []
    for v in range(5):
        value, gradient = of_draw(1, 1.0, (v,), teacher, teacher)
        close(value[0], 0.0)
        assert np.abs(gradient).max() > 0.01
        slopes.append(gradient[0])
    close(p @ np.array(slopes), np.zeros(5), 1e-12)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_evenly_spread_numbers_draw_each_token_in_its_share(tau: float):
    teacher = pair(4, 6)[0]
    share, count = norm(sm(teacher) ** tau), 20000
    uniform = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    logp = as_tensor(teacher).log_softmax(-1).expand(count, -1)
    # The covered teacher mass of a single draw is the token's own probability, which tells tokens apart.
    config = DistillConfig.model_validate(spec(1, tau))
    mass = Distill(config).compare(tokens_of(logp, logp, uniform_CK=uniform), logp)[:, 1].numpy()
    for v, p_v in enumerate(sm(teacher)):
        assert abs(np.isclose(mass, p_v).mean() - share[v]) < 2e-4


def test_a_token_that_the_teacher_rules_out_is_never_drawn():
    teacher = torch.tensor([[-np.inf, 0.3, -np.inf, 1.0, -np.inf]], dtype=torch.float64).log_softmax(-1)
    student = torch.zeros(1, 5, dtype=torch.float64).log_softmax(-1)
    config = DistillConfig.model_validate(spec(1))
    p = teacher.exp().numpy()[0]
    seen = set()
    for u in (0.0, 1e-12, 0.2, float(p[1]) - 1e-9, float(p[1]) + 1e-9, 0.9, 1.0 - 2**-24, 1.0 - 2**-53):
        tokens = tokens_of(teacher, student, uniform_CK=torch.tensor([[u]], dtype=torch.float64))
        loss, mass_p, _ = Distill(config).compare(tokens, student)[0].tolist()
        assert np.isfinite(loss)
        seen.add(int(np.argmin(np.abs(p - mass_p))))
    assert seen == {1, 3}


def test_masses_count_a_token_drawn_twice_once():
    teacher, student = pair(5, 5)
    p, q = sm(teacher), sm(student)
    config = DistillConfig.model_validate(spec(3))
    logp, logq = (as_tensor(z)[None].log_softmax(-1) for z in (teacher, student))
    tokens = tokens_of(logp, logq, uniform_CK=uniform_for((2, 2, 4), p))
    found = Distill(config).compare(tokens, logq)[0].tolist()
    close(found[1:], [p[2] + p[4], q[2] + q[4]])


def test_more_draws_scatter_less_around_the_same_mean():
    teacher, student = (as_tensor(z).expand(4000, -1) for z in pair(6, 7))
    exact = kl(sm(pair(6, 7)[0]), sm(pair(6, 7)[1]))
    spread = []
    for n in (1, 4, 16):
        found = kdrl.divergence(student, teacher, spec(n), seed=1).numpy()
        assert abs(found.mean() - exact) < 4 * found.std() / 4000**0.5
        spread.append(found.std())
    assert spread[0] > 1.8 * spread[1] > 3.2 * spread[2]


def test_a_seed_is_a_draw_and_a_mask_moves_none_of_the_others():
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 2, 6, 9, generator=generator, dtype=torch.float64)
    one = kdrl.divergence(student, teacher, spec(2), seed=5)
    assert torch.equal(one, kdrl.divergence(student, teacher, spec(2), seed=5))
    assert not torch.equal(one, kdrl.divergence(student, teacher, spec(2), seed=6))
    shifted = kdrl.divergence(student + 1.5, teacher - 2.0, spec(2), seed=5)
    close(shifted, one)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]]).bool()
    masked = kdrl.divergence(student, teacher, spec(2), mask=mask, seed=5)
    assert torch.equal(masked, torch.where(mask, one, 0.0))
    assert len({float(x) for x in one.flatten()}) == 12, "every token has draws of its own"


def test_the_teacher_may_be_transformed_before_it_is_drawn_from():
    teacher, student = pair(7, 5)
    t = norm(sm(teacher) ** 0.5)
    value, gradient = 0.0, np.zeros(5)
    for v in range(5):
        found = term_of(
            spec(1) | {"target": {"teacher_temperature": 2.0}},
            teacher[None],
            student[None],
            uniform_CK=uniform_for((v,), t),
        )
        value, gradient = value + t[v] * found[0][0], gradient + t[v] * found[1][0]
    close(value, kl(t, sm(student)))
    close(gradient, sm(student) - t)


def test_in_float32_each_of_many_rare_tokens_can_be_drawn():
    """150,000 tokens of which one has nearly all mass: a float32 cumulative sum would lump those that are rarer than
    its last digit."""
    size = 150_000
    logits = torch.tensor(np.random.default_rng(1).normal(size=size), dtype=torch.float32)
    logits[0] = 19.0
    logp = logits.log_softmax(-1)[None]
    p = logp.double().softmax(-1)[0]
    rare = torch.arange(1000, size, 10_007)
    assert float(p[rare].max()) < 6e-8
    uniform = (p.cumsum(-1) - p / 2)[rare]
    for v, u in zip(rare.tolist(), uniform, strict=True):
        tokens = tokens_of(logp, logp, uniform_CK=u.reshape(1, 1))
        mass = float(Distill(DistillConfig.model_validate(spec(1))).compare(tokens, logp)[0, 1])
        assert mass == pytest.approx(float(p[v]), rel=1e-4)
