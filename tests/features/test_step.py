"""A feature term in the updater: its value and gradient from plain transformers, and what must not change them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import assert_near, copied, flat, made_responses, plain_gradient, score, toy
from torch import Tensor

from features.toys import DEEP, own, pair, responses, step, updater_of
from kdrl.batch import Response
from kdrl.models import LoadedModel
from kdrl.models.attention import recompute_layers

HIDDEN = {"feature": {"of": "hidden", "layers": {1: 1, -1: -1}}}
MAPS = {"feature": {"of": "attention", "loss": "kl", "layers": "uniform"}}

ENTRIES: dict[str, list[dict[str, Any]]] = {
    "hidden": [HIDDEN],
    "embedding": [{"feature": {"of": "embedding", "loss": "cosine"}}],
    "attention": [MAPS],
    "scores": [{"feature": {"of": "attention_scores", "loss": "mse"}}],
    "output": [{"feature": {"of": "attention_output", "loss": "l1"}}],
    "relation": [{"feature": {"of": {"relation": {"of": "values", "heads": 2, "scale": "dot"}}, "loss": "kl"}}],
    "infonce": [{"feature": {"loss": {"infonce": {"temperature": 0.2}}, "layers": "last", "projector": "linear"}}],
    "sinkhorn": [{"feature": {"loss": "sinkhorn", "layers": "last"}}],
    "mi": [{"feature": {"loss": "mi_alpha", "layers": "last"}}],
    "nd": [{"feature": {"loss": "nd", "layers": "last"}}],
    "nd-batch": [{"feature": {"loss": {"nd": {"centre": "batch"}}, "layers": "last", "reduce": "sequence_mean"}}],
    "vkd": [{"feature": {"projector": "orthogonal", "normalise": "batch"}}],
    "whitened": [{"feature": {"projector": "mlp", "normalise": "whiten", "reduce": {"constant": 9}}}],
    "bits": [{"feature": {"projector": {"linear": {"shared": True}}, "normalise": "token", "bits": 3}}],
    "heads": [{"feature": {"of": "attention", "loss": "kl", "layers": "all", "projector": "head_map"}}],
    "joint": [
        {"distill": {"divergence": "reverse_kl", "weight": 0.5}},
        HIDDEN,
        MAPS,
        {"cross_entropy": {"on": ["student"]}},
    ],
}


def per_token(student: LoadedModel, text: Response, compare: Any, inside: str, teacher: LoadedModel) -> Tensor:
    mine, theirs = own(student, text, inside=inside), own(teacher, text, inside=inside)
    return compare(mine, [x.detach() for x in theirs])


def mean_loss(student: LoadedModel, teacher: LoadedModel, texts: list[Response], compare: Any, inside: str) -> Tensor:
    """The mean over all response tokens, one response at a time, from transformers' own outputs."""
    return torch.cat([per_token(student, text, compare, inside, teacher) for text in texts]).mean()


def kl_rows(s: Tensor, t: Tensor) -> Tensor:
    """KL(teacher || student) of maps `[H, T, L]`, mean over heads."""
    return torch.where(t > 0, t * (t.clamp(min=1e-300).log() - s.clamp(min=1e-300).log()), 0.0).sum(-1).mean(0)


FORMULAS: dict[str, tuple[str, Any]] = {
    "hidden": ("hidden_states", lambda s, t: ((s[1] - t[1]).square().mean(-1) + (s[2] - t[2]).square().mean(-1)) / 2),
    "embedding": ("hidden_states", lambda s, t: 1 - torch.cosine_similarity(s[0], t[0], dim=-1)),
    "attention": ("attentions", lambda s, t: (kl_rows(s[0], t[0]) + kl_rows(s[1], t[1])) / 2),
}


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_value_and_gradient_from_transformers_own_outputs(name: str, architecture: str):
    change = DEEP | {"architecture": architecture}
    if architecture == "gpt2":
        change |= {"kv_heads": None, "head_dim": None}
    student, teacher = toy(1, trainable=True, sharp=4.0, **change), toy(2, sharp=4.0, **change)
    texts = responses()
    inside, compare = FORMULAS[name]
    want = plain_gradient(student, lambda: mean_loss(student, teacher, texts, compare, inside))
    value = float(mean_loss(student, teacher, texts, compare, inside).detach())
    loss, gradient = step(student, teacher, ENTRIES[name], texts=texts)
    assert loss == pytest.approx(value, rel=1e-5)
    assert_near(gradient, want)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_splitting_padding_and_order_change_nothing(name: str):
    student, teacher = pair(hidden_size=24) if name in ("vkd", "whitened", "bits", "infonce") else pair()
    texts = made_responses(groups=2, size=3)
    for text in texts:
        text.trained = [i % 3 != 1 for i in range(len(text.token_ids))]
    whole = step(student, teacher, ENTRIES[name], texts=texts)
    assert whole[1].norm() > 1e-6
    for budget, order in ((1, [0, 1, 2, 3, 4, 5]), (60, [5, 3, 1, 0, 2, 4])):
        loss, gradient = step(student, teacher, ENTRIES[name], texts=texts, budget=budget, rows=order)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert_near(gradient, whole[1])


def test_only_kept_tokens_are_compared():
    """A mask on the right responses is the term on those responses alone; relations see no masked token."""
    student, teacher = pair()
    texts = made_responses(groups=3, size=3)
    right = [t for t in texts if t.correct]
    assert 0 < len(right) < len(texts)
    for name in ("hidden", "attention", "relation", "nd"):
        inner = ENTRIES[name][0]["feature"]
        masked = step(student, teacher, [{"feature": inner | {"mask": "right_response"}}], texts=texts)
        alone = step(student, teacher, ENTRIES[name], texts=right)
        assert masked[0] == pytest.approx(alone[0], rel=1e-5)
        assert_near(masked[1], alone[1])


@pytest.mark.parametrize("name", ["hidden", "embedding", "attention", "scores", "output", "relation"])
def test_zero_where_student_is_teacher(name: str):
    student = toy(1, trainable=True, sharp=4.0, **DEEP)
    loss, gradient = step(student, copied(student), ENTRIES[name])
    assert abs(loss) < 1e-9
    assert float(gradient.abs().max()) < 1e-6


def test_terms_stand_beside_the_others():
    """The step of several terms is the sum of their steps: watching the pass does not touch them."""
    student, teacher = pair()
    parts = [step(student, teacher, [entry]) for entry in ENTRIES["joint"]]
    loss, gradient = step(student, teacher, ENTRIES["joint"])
    assert loss == pytest.approx(parts[0][0] + sum(p[0] for p in parts[1:]), rel=1e-5)
    assert_near(gradient, torch.stack([p[1] for p in parts]).sum(0))


def test_the_teacher_decides_and_gets_no_gradient():
    student, teacher = pair()
    other = toy(5, sharp=4.0, **DEEP)
    for name in ("hidden", "attention", "nd"):
        assert not torch.allclose(step(student, teacher, ENTRIES[name])[1], step(student, other, ENTRIES[name])[1])
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("name", ["hidden", "attention", "output", "relation"])
def test_gradient_checkpointing_changes_nothing(name: str):
    student, teacher = pair()
    whole = step(student, teacher, ENTRIES[name])
    recompute_layers(student.model)
    again = step(student, teacher, ENTRIES[name])
    assert again[0] == pytest.approx(whole[0], rel=1e-9)
    assert_near(again[1], whole[1])


def test_statistics_are_of_the_whole_step():
    """`batch` standardises by the tokens of the step: against torch on all of the teacher's vectors at once."""
    student, teacher = pair()
    texts = responses()
    theirs = torch.cat([own(teacher, text)[2].detach() for text in texts])
    mine = torch.cat([own(student, text)[2].detach() for text in texts])
    standard = (theirs - theirs.mean(0)) / theirs.std(0, correction=0)
    values, vectors = torch.linalg.eigh(torch.cov(theirs.T, correction=0))
    white = (theirs - theirs.mean(0)) @ vectors @ torch.diag(values.rsqrt()) @ vectors.T
    layer = (theirs - theirs.mean(-1, keepdim=True)) / (theirs.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for how, want in (("batch", standard), ("whiten", white), ("token", layer)):
        entry = {"feature": {"layers": "last", "normalise": how}}
        assert step(student, teacher, [entry], texts=texts)[0] == pytest.approx(
            float((mine - want).square().mean()), rel=2e-3
        )


def test_nd_centres_are_means_of_equal_labels():
    student, teacher = pair()
    texts = responses()
    labels = torch.tensor([token for text in texts for token in text.token_ids])
    assert len(labels.unique()) < len(labels), "some labels come more than once"
    theirs = torch.cat([own(teacher, text)[2].detach() for text in texts])
    mine = torch.cat([own(student, text)[2].detach() for text in texts])
    total = 0.0
    for s, t, label in zip(mine, theirs, labels, strict=True):
        centre = theirs[labels == label].mean(0)
        total += float(1 - s @ centre / centre.norm() / max(s.norm(), t.norm()))
    assert step(student, teacher, ENTRIES["nd"], texts=texts)[0] == pytest.approx(total / len(labels), rel=1e-5)


def test_projectors_learn_and_stay_orthogonal():
    student, teacher = pair(hidden_size=24)
    entry = {"feature": {"layers": "uniform", "projector": "orthogonal", "normalise": "token"}}
    scored = score(student, responses(), [entry], teacher=teacher)
    updater = updater_of(student, teacher, [entry])
    assert updater.features is not None
    names = list(updater.features.named_parameters)
    assert names == [f"feature.{i}.parametrizations.weight.original" for i in range(2)]
    optimizer = torch.optim.AdamW(updater.features.groups(), lr=0.05)
    losses = []
    for _ in range(25):
        losses.append(updater.accumulate(scored, list(range(4))))
        _, applied = updater.step(optimizer, None)
        assert applied
        for projector in updater.features.live["feature"].projectors:
            weight = projector.weight  # type: ignore[union-attr]
            assert weight.shape == (24, 16)
            assert torch.allclose(weight.T @ weight, torch.eye(16, dtype=torch.float64), atol=1e-9)
    assert losses[-1] < 0.97 * losses[0]
    flat(updater)


def test_projectors_come_from_the_seed():
    student, teacher = pair(hidden_size=24)
    entry = {"feature": {"projector": {"mlp": {"width": 7}}}}
    made = [updater_of(student, teacher, [entry], seed=seed).projectors for seed in (1, 1, 2)]
    assert [tuple(p.shape) for p in made[0][:4]] == [(7, 16), (7,), (24, 7), (24,)]
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not torch.equal(made[0][0], made[2][0])
    assert not torch.equal(made[0][0], made[0][4]), "each layer pair has its own"
    shared = updater_of(student, teacher, [{"feature": {"projector": {"linear": {"shared": True}}}}])
    assert len(shared.projectors) == 2


def test_a_projector_is_clipped_apart_from_the_student():
    student, teacher = pair(hidden_size=24)
    entry = {"feature": {"projector": "linear"}}
    scored = score(student, responses(), [entry], teacher=teacher)
    updater = updater_of(student, teacher, [entry])
    updater.accumulate(scored, [0, 1, 2, 3])
    own_norm = torch.cat([p.grad.flatten() for p in updater.parameters if p.grad is not None]).norm()
    optimizer = torch.optim.SGD([*updater.parameters, *updater.projectors], lr=0.0)
    assert updater.step(optimizer, 1e-3)[0] == pytest.approx(float(own_norm), rel=1e-6)
    assert all(p.grad is None for p in updater.projectors)
    updater.accumulate(scored, [0, 1, 2, 3])
    first = updater.projectors[0]
    assert first.grad is not None
    first.grad.fill_(torch.nan)
    assert updater.step(optimizer, 1.0)[1] is False, "a projector that broke stops the update"
