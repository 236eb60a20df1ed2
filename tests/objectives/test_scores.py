"""Scores: each against its formula written for one token at a time, how expressions are read, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kdrl.errors import UserError
from kdrl.objectives.distill import DistillConfig
from kdrl.objectives.schedules import Moment
from kdrl.objectives.scores import SCORES, Score, Tokens, column, measure, register_score

from .numbers import Array, entropy, kdrl_of, kl, pair, sm, term_of
from .reference import as_tensor, close, tokens_of

N, V = 12, 9
PAIRS = [pair(seed, V) for seed in range(N)]
P, Q = (np.stack([sm(z[i]) for z in PAIRS]) for i in (0, 1))
Y = np.random.default_rng(5).integers(0, V, N)
ROW = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2])
INDEX = np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1])
LENGTH = np.bincount(ROW)[ROW]
CORRECT = np.array([True, False, True])[ROW]
REWARD = np.array([1.0, 0.0, 0.7])[ROW]
RATE = np.array([0.5, 0.5, 0.25])[ROW]
RIGHT = np.array([4.0, 3.5, 2.0])[ROW]


def step_of(**more: Any) -> Tokens:
    data = {"index": INDEX, "length": LENGTH, "reward": REWARD, "correct": CORRECT, "group_rate": RATE}
    data |= {"right_length": RIGHT}
    return tokens_of(
        as_tensor(np.log(P)), as_tensor(np.log(Q)), Y, data={k: torch.tensor(v) for k, v in data.items()}, **more
    )


TOKENS = step_of()


def value_of(spec: Any, tokens: Tokens = TOKENS) -> Array:
    score = Score(spec)
    if score.number is None and "batch" in score.reads:

        def evaluate(inner: Score, known: Any) -> torch.Tensor:
            return column(inner(replace(tokens, measured=known)), tokens.logq_C).expand(len(tokens.logq_C))

        tokens = replace(tokens, measured=measure(score, evaluate, torch.tensor(ROW), tokens.moment))
    found = column(score(tokens), tokens.logq_C)
    return found.numpy()


def head_gap(p: Array, q: Array, mu: float) -> float:
    mass, inside = 0.0, 0.0
    for v in np.argsort(-p):
        inside += abs(p[v] - q[v]) if mass < mu else 0.0
        mass += p[v]
    return inside / np.abs(p - q).sum()


def hit(p: Array, q: Array, k: int) -> float:
    return float(q.argmax() in np.argsort(-p)[:k])


# fn(p, q, y) of one token
SINGLE: dict[str, tuple[Any, Any]] = {
    "max_p": ("max_p", lambda p, q, y: p.max()),
    "max_q": ("max_q", lambda p, q, y: q.max()),
    "entropy_p": ("entropy_p", lambda p, q, y: entropy(p)),
    "relative_entropy_p": ("relative_entropy_p", lambda p, q, y: entropy(p) / math.log(V)),
    "entropy_q": ("entropy_q", lambda p, q, y: entropy(q)),
    "entropy_gap": ("entropy_gap", lambda p, q, y: entropy(p) - entropy(q)),
    "head_gap": ("head_gap", lambda p, q, y: head_gap(p, q, 0.5)),
    "head_gap mu": ({"head_gap": 0.8}, lambda p, q, y: head_gap(p, q, 0.8)),
    "forward_kl": ("forward_kl", lambda p, q, y: kl(p, q)),
    "reverse_kl": ("reverse_kl", lambda p, q, y: kl(q, p)),
    "disagreement": ("disagreement", lambda p, q, y: 0.5 * np.abs(p - q).sum()),
    "top_k_hit": ("top_k_hit", lambda p, q, y: hit(p, q, 5)),
    "top_k_hit 1": ({"top_k_hit": 1}, lambda p, q, y: hit(p, q, 1)),
    "top_k_hit 2": ({"top_k_hit": {"k": 2}}, lambda p, q, y: hit(p, q, 2)),
    "power_sum_p": ("power_sum_p", lambda p, q, y: (p**0.2).sum()),
    "power_sum_p gamma": ({"power_sum_p": {"gamma": 0.6}}, lambda p, q, y: (p**0.6).sum()),
    "mft": ("mft", lambda p, q, y: min(1, (p.max() - p[y] + 0.2) / (1 + p.max() - p[y]))),
    "label_p": ("label_p", lambda p, q, y: p[y]),
    "label_q": ("label_q", lambda p, q, y: q[y]),
    "ce_p": ("ce_p", lambda p, q, y: -np.log(p[y])),
    "ce_q": ("ce_q", lambda p, q, y: -np.log(q[y])),
    "log_ratio": ("log_ratio", lambda p, q, y: np.log(p[y] / q[y])),
    "density_ratio": ("density_ratio", lambda p, q, y: p[y] / q[y]),
    "density_ratio hellinger": ({"density_ratio": {"power": 0.5}}, lambda p, q, y: math.sqrt(p[y] / q[y])),
    "density_ratio jensen": ({"density_ratio": {"mix": 0.5}}, lambda p, q, y: 2 * p[y] / (p[y] + q[y])),
    "above": ({"above": {"of": "max_p", "value": 0.6}}, lambda p, q, y: float(p.max() > 0.6)),
    "below": ({"below": {"of": "entropy_gap", "value": 0}}, lambda p, q, y: float(entropy(p) < entropy(q))),
    "one_minus": ({"one_minus": "label_p"}, lambda p, q, y: 1 - p[y]),
    "choose": (
        {"choose": {"where": {"above": {"of": "max_q", "value": 0.4}}, "then": 3, "otherwise": -1}},
        lambda p, q, y: 3 if q.max() > 0.4 else -1,
    ),
    "affine": ({"affine": {"of": "max_p", "scale": 0.99, "offset": 0.01}}, lambda p, q, y: 0.99 * p.max() + 0.01),
    "times": ({"times": {"of": "max_p", "by": "ce_q"}}, lambda p, q, y: -p.max() * np.log(q[y])),
    "clip": ({"clip": {"of": "ce_q", "low": 1, "high": 2}}, lambda p, q, y: np.clip(-np.log(q[y]), 1, 2)),
    "clip one side": ({"clip": {"of": "log_ratio", "low": 0}}, lambda p, q, y: max(0, np.log(p[y] / q[y]))),
    "a number": (0.25, lambda p, q, y: 0.25),
    "nested": (
        {"above": {"of": {"times": {"of": "max_p", "by": {"one_minus": "label_q"}}}, "value": 0.5}},
        lambda p, q, y: float(p.max() * (1 - q[y]) > 0.5),
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_scores_of_one_token(name: str):
    spec, formula = SINGLE[name]
    expected = np.array([formula(p, q, y) for p, q, y in zip(P, Q, Y, strict=True)])
    close(np.broadcast_to(value_of(spec), N), expected)
    if name not in ("a number",):
        assert len(set(expected.round(9))) > 1, "the tokens do not tell this formula from a constant"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("position", INDEX / LENGTH),
        ("length", LENGTH),
        ("reward", REWARD),
        ("correct", CORRECT),
        ("group_rate", RATE),
        ("dads", np.where(CORRECT, 1 - np.exp(-math.e * RATE), 1)),
        ("stcr", np.where(CORRECT, 1, 2 - 1.00001 ** -(LENGTH - RIGHT))),
        ({"stcr": {"base": 2}}, np.where(CORRECT, 1, 2 - 0.5 ** (LENGTH - RIGHT))),
        ("signed", np.where(CORRECT, 1, -1)),
        ({"signed": {"right": 2, "wrong": 0.3}}, np.where(CORRECT, 2, 0.3)),
        ({"choose": {"where": "correct", "then": 0.2, "otherwise": 0.7}}, np.where(CORRECT, 0.2, 0.7)),
    ],
    ids=str,
)
def test_scores_of_data(spec: Any, expected: Array):
    close(value_of(spec), expected)


@pytest.mark.parametrize(
    ("name", "formula"),
    [("sigmoid_log_ratio", lambda p, q: p / (p + q)), ("sigmoid_log_ratio_q", lambda p, q: q / (p + q))],
)
def test_scores_of_entries(name: str, formula: Any):
    close(value_of(name), formula(P, Q))


# ---------------------------------------------------------------- scores over a step

CE = -np.log(P[np.arange(N), Y])
RATIO = np.log(P[np.arange(N), Y] / Q[np.arange(N), Y])
RKL = np.array([kl(q, p) for p, q in zip(P, Q, strict=True)])
MEDIAN = np.sort(RKL)[(N - 1) // 2]


def of_row(row: int) -> Array:
    return np.equal(ROW, row)


def cumulative(values: Array) -> Array:
    return np.concatenate([np.cumsum(np.abs(values[of_row(r)])) / np.abs(values[of_row(r)]).sum() for r in range(3)])


STEP: dict[str, tuple[Any, Array]] = {
    "top_share": ({"top_share": {"of": "reverse_kl", "share": 0.25}}, np.isin(RKL, np.sort(RKL)[-3:]).astype(float)),
    "top_share none": ({"top_share": {"of": "reverse_kl", "share": 0.0}}, np.zeros(N)),
    "top_share all": ({"top_share": {"of": "reverse_kl", "share": 1.0}}, np.ones(N)),
    "easy half": (
        {"one_minus": {"of": {"top_share": {"of": {"one_minus": "label_p"}, "share": 0.5}}}},
        (np.exp(-CE) > np.sort(np.exp(-CE))[5]).astype(float),
    ),
    "over_median": ({"over_median": "reverse_kl"}, np.exp(-0.5 * np.tanh(np.log(RKL / MEDIAN)))),
    "over_median settings": (
        {"over_median": {"of": "reverse_kl", "c": 0.6, "base": 2}},
        2 * np.exp(-0.6 * np.tanh(np.log(RKL / MEDIAN))),
    ),
    "softmax": ({"softmax": "ce_p"}, np.concatenate([sm(CE[of_row(r)] / 10) * of_row(r).sum() for r in range(3)])),
    "softmax settings": (
        {"softmax": {"of": "ce_p", "temperature": 2}},
        np.concatenate([sm(CE[of_row(r)] / 2) * of_row(r).sum() for r in range(3)]),
    ),
    "mean_one": ({"mean_one": "ce_p"}, CE / CE.mean()),
    "early": ({"early": "log_ratio"}, 1 + 0.5 * (1 - cumulative(RATIO))),
    "early settings": ({"early": {"of": "log_ratio", "gamma": 2}}, 1 + 2 * (1 - cumulative(RATIO))),
    "of one another": (
        {"mean_one": {"of": {"softmax": {"of": "ce_p", "temperature": 1}}}},
        np.concatenate([sm(CE[of_row(r)]) * of_row(r).sum() for r in range(3)]),
    ),
    "in an expression": ({"times": {"of": {"mean_one": "ce_p"}, "by": "max_p"}}, CE / CE.mean() * P.max(-1)),
}


@pytest.mark.parametrize("name", STEP)
def test_scores_over_a_step(name: str):
    spec, expected = STEP[name]
    close(value_of(spec), expected)


def test_a_softmax_over_a_response_averages_to_one_and_a_mean_one_score_over_the_step():
    softened = value_of({"softmax": {"of": "ce_p", "temperature": 0.01}})
    for r in range(3):
        close(softened[of_row(r)].mean(), 1.0)
    close(value_of({"mean_one": "disagreement"}).mean(), 1.0)


def test_ties_are_all_in_the_top_share():
    close(value_of({"top_share": {"of": "correct", "share": 0.1}}), CORRECT)


def test_a_step_of_no_tokens_breaks_no_score():
    none, row = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    for name in ("top_share", "over_median", "softmax", "mean_one", "early"):
        settings = {"of": "ce_p", "share": 0.5} if name == "top_share" else {"of": "ce_p"}
        assert Score({name: settings}).measure(none, row, Moment()).shape == (0,)


def test_scores_of_zeros_stay_finite():
    zero, row = torch.zeros(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    for spec in ({"over_median": "ce_p"}, {"softmax": "ce_p"}, {"mean_one": "ce_p"}, {"early": "log_ratio"}):
        assert Score(spec).measure(zero, row, Moment()).isfinite().all(), spec


def test_every_built_in_score_is_told_above():
    told = {next(iter(spec)) if isinstance(spec, dict) else spec for spec, _ in [*SINGLE.values(), *STEP.values()]}
    told |= {
        "position",
        "length",
        "reward",
        "correct",
        "group_rate",
        "dads",
        "stcr",
        "signed",
        "sigmoid_log_ratio",
        "sigmoid_log_ratio_q",
    }
    built_in = {name for name in SCORES if SCORES.get(name).function.__module__.startswith("kdrl.")}
    assert built_in <= told, built_in - told


# ---------------------------------------------------------------- scores are data, and finite

NAMES = [*SINGLE, *STEP]


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_through_a_score(name: str):
    """A weight that is a score multiplies the gradient of the plain loss."""
    spec = SINGLE[name][0] if name in SINGLE else STEP[name][0]
    teachers, students = np.stack([z[0] for z in PAIRS]), np.stack([z[1] for z in PAIRS])
    tokens: dict[str, Any] = {"data": TOKENS.data}
    if name in STEP:
        known = {}
        for part in Score(spec).batch_parts():
            known[part.key] = as_tensor(value_of(part.spec))
        tokens["measured"] = known
    plain = term_of({"divergence": "forward_kl"}, teachers, students, Y)
    scaled = term_of({"divergence": "forward_kl", "scale": spec}, teachers, students, Y, **tokens)
    weight = np.broadcast_to(value_of(spec), N)
    close(scaled[0], weight * plain[0])
    close(scaled[1], weight[:, None] * plain[1])


@pytest.mark.parametrize("name", [n for n in SINGLE if n != "a number"])
def test_ruled_out_and_peaked_tokens_give_finite_scores(name: str):
    logits = torch.tensor(
        [[0.0, 0.0, 0.0], [300.0, 0.0, -300.0], [1.0, -np.inf, -np.inf], [-np.inf, 1.0, 0.0]], dtype=torch.float64
    )
    logp = logits.repeat_interleave(4, 0).log_softmax(-1)
    logq = logits.repeat(4, 1).log_softmax(-1)
    for label in range(3):
        found = Score(SINGLE[name][0])(tokens_of(logp, logq, [label] * 16))
        assert torch.as_tensor(found).isfinite().all(), (name, label)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("name", NAMES)
def test_an_expression_is_written_back_as_it_was_said(name: str):
    spec = SINGLE[name][0] if name in SINGLE else STEP[name][0]
    config = DistillConfig.model_validate({"scale": spec})
    written = config.model_dump(mode="json")
    assert written.get("scale", spec) == spec
    assert DistillConfig.model_validate(json.loads(json.dumps(written))).scale == Score(spec)
    assert Score(Score(spec)) == Score(spec)
    assert Score(spec) != Score(0.987)


@pytest.mark.parametrize(
    "spec",
    [
        {"affine": {"of": "max_p", "scale": {"linear": {"from": 0.0, "to": 2.0}}}},
        {"clip": {"of": 5, "high": {"linear": {"from": 0.0, "to": 2.0}}}},
        {"linear": {"from": 0.0, "to": 2.0}},
        {"one_minus": {"of": {"linear": {"from": 1.0, "to": -1.0}}}},
        {"top_share": {"of": "max_p", "share": {"linear": {"from": 0.0, "to": 1.0}}}},
    ],
    ids=str,
)
def test_settings_and_leaves_may_be_schedules(spec: Any):
    name = next(iter(spec))
    for step, part in ((0, 0.0), (5, 1.0), (10, 2.0)):
        found = np.broadcast_to(value_of(spec, step_of(moment=Moment(step, 10))), N)
        if name == "affine":
            expected = part * P.max(-1)
        elif name == "top_share":
            expected = P.max(-1) >= np.sort(P.max(-1))[::-1][int(part * N / 2) - 1] if part else np.zeros(N)
        else:
            expected = np.full(N, part)
        close(found, expected)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("max_pp", "no score or schedule is called 'max_pp'; did you mean 'max_p'"),
        ("entropy", "did you mean"),
        ({"head_gab": 0.5}, "did you mean 'head_gap'"),
        ({"head_gap": {"nu": 0.5}}, "head_gap has no setting 'nu'; did you mean 'mu'"),
        ({"above": {"of": "max_p"}}, "above needs value"),
        ("above", "above needs of, value"),
        ({"one_minus": {"max_p": 1}}, r"takes another score by its setting `of`: \{one_minus: \{of: max_p"),
        ({"above": "max_p"}, "above needs value"),
        ({"top_share": {"of": "max_p"}}, "top_share needs share"),
        ({"max_p": {"temperature": 2}}, "max_p has no setting 'temperature'"),
        ({"above": {"of": "nothing", "value": 1}}, "no score or schedule is called 'nothing'"),
        ({"above": {"of": "max_p", "value": "high"}}, "is not a number"),
        ({"above": {"of": "max_p", "value": True}}, "a number or a mapping"),
        ({"choose": {"where": "correct", "then": 1}}, "choose needs otherwise"),
        (True, "a number or a mapping"),
        (None, "a number or a mapping"),
        ({"linear": {"from": 1}}, "linear needs to"),
        ([1, 2], "is not a number"),
        ({}, "names one kind"),
        ({"max_p": {}, "max_q": {}}, "names one kind"),
    ],
    ids=str,
)
def test_expressions_that_cannot_be_read_are_refused(spec: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Score(spec)
    with pytest.raises(ValidationError, match=says):
        DistillConfig.model_validate({"divergence": {"arms": [{"of": "p||q", "gate": spec}]}})


@pytest.mark.parametrize(
    "spec",
    [
        {"scale": "sigmoid_log_ratio"},
        {"scale": {"one_minus": "sigmoid_log_ratio"}},
        {"target": {"teacher_temperature": "sigmoid_log_ratio"}},
        {"target": {"label_mix": "sigmoid_log_ratio"}, "divergence": "forward_kl"},
        {"target": {"decouple": {"label": 1, "rest": "sigmoid_log_ratio"}}, "divergence": "forward_kl"},
        {"divergence": {"arms": [{"of": "p||q", "gate": {"mean_one": "sigmoid_log_ratio"}}]}},
    ],
    ids=str,
)
def test_a_score_of_entries_is_for_gates_alone(spec: Any):
    with pytest.raises(ValidationError, match="only gate an arm"):
        DistillConfig.model_validate(spec)


# ---------------------------------------------------------------- one's own


def test_a_score_of_one_s_own_in_a_weight_and_a_gate():
    @register_score("test_square_gap")
    def square_gap(tokens: Tokens, power: float = 2.0) -> torch.Tensor:
        logp, logq = tokens.both()
        return (logp.exp() - logq.exp()).abs().pow(power).sum(-1)

    close(value_of("test_square_gap"), ((P - Q) ** 2).sum(-1))
    close(value_of({"test_square_gap": 3}), (np.abs(P - Q) ** 3).sum(-1))
    zt, zs = PAIRS[0]
    plain = kdrl_of({}, zt, zs)
    for spec in ({"scale": "test_square_gap"}, {"divergence": {"arms": [{"of": "q||p", "gate": "test_square_gap"}]}}):
        found = kdrl_of(spec, zt, zs)
        close(found[0], plain[0] * ((P[0] - Q[0]) ** 2).sum())
        close(found[1], plain[1] * ((P[0] - Q[0]) ** 2).sum())


def test_scores_of_one_s_own_that_read_entries_or_the_step():
    @register_score("test_entry_p", reads="entries")
    def entry_p(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
        return logp.exp()

    @register_score("test_rank", reads="batch")
    def rank(values_N: torch.Tensor, row_N: torch.Tensor) -> torch.Tensor:
        return values_N.argsort().argsort().to(values_N.dtype)

    close(value_of("test_entry_p"), P)
    close(value_of({"test_rank": "ce_p"}), CE.argsort().argsort())
    # Such a gate does not cancel where the student is the teacher: the exception to zero gradient at p = q.
    zt, p = PAIRS[0][0], P[0]
    value, gradient = kdrl_of({"divergence": {"arms": [{"of": "p||q", "gate": "test_entry_p"}]}}, zt, zt)
    close(value, 0.0)
    close(gradient, (p * p).sum() * p - p * p)
    assert np.abs(gradient).max() > 1e-3


def test_a_built_in_score_cannot_be_replaced():
    with pytest.raises(UserError, match="score 'max_p' is built in"):
        register_score("max_p")(lambda tokens: tokens.logq_C)
