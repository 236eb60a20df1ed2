"""Scores over a whole step, draws and scalars with a memory where a run makes them: splitting changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    SpyUpdater,
    assert_near,
    go,
    gradient,
    made_responses,
    parts_of,
    plain_gradient,
    plain_logp,
    raw_recipe,
    rows_of,
    run,
    score,
    toy,
    with_teacher,
)

from kdrl.batch import Response
from kdrl.errors import UserError
from kdrl.measuring import measure_scores
from kdrl.models import LoadedModel
from kdrl.run import resume
from kdrl.trainer import Trainer
from kdrl.update import Scored, Updater


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return toy(1, trainable=True)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return toy(2)


def measured(student: LoadedModel, scored: Scored, budget: int = 4096) -> Scored:
    return replace(scored, measured=measure_scores(Updater(student, budget), scored))


class Plain:
    """Every trained token of the responses from the models' own logits, one unpadded row at a time."""

    def __init__(self, student: LoadedModel, teacher: LoadedModel, responses: Sequence[Response]) -> None:
        pairs = [[plain_logp(m, r.prompt_ids, r.token_ids).detach() for m in (teacher, student)] for r in responses]
        self.logp, self.logq = (torch.cat([pair[i] for pair in pairs]).numpy() for i in (0, 1))
        self.row = np.repeat(np.arange(len(responses)), [len(r.token_ids) for r in responses])
        token = np.concatenate([r.token_ids for r in responses])
        self.ce_p, self.ce_q = (-x[np.arange(len(token)), token] for x in (self.logp, self.logq))
        self.reverse_kl = (np.exp(self.logq) * (self.logq - self.logp)).sum(-1)
        self.max_p = np.exp(self.logp).max(-1)
        self.entropy_q = -(np.exp(self.logq) * self.logq).sum(-1)

    def per_row(self, function: Any, values: np.ndarray, kept: np.ndarray) -> np.ndarray:
        out = np.zeros(len(values))
        for row in np.unique(self.row[kept]):
            mine = (self.row == row) & kept
            out[mine] = function(values[mine])
        return out


def soft(temperature: float) -> Any:
    def weigh(values: np.ndarray) -> np.ndarray:
        e = np.exp((values - values.max()) / temperature)
        return e / e.sum() * len(values)

    return weigh


def early(values: np.ndarray) -> np.ndarray:
    return 1 + 0.5 * (1 - np.cumsum(np.abs(values)) / np.abs(values).sum())


def top(values: np.ndarray, share: float) -> np.ndarray:
    return (values >= np.sort(values)[::-1][round(share * len(values)) - 1]).astype(float)


def over_median(values: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * np.tanh(np.log(values / np.sort(values)[(len(values) - 1) // 2])))


# expression, and fn(Plain, kept tokens) -> its value there
FULL = {"divergence": "reverse_kl", "support": "full"}
TOKEN = {"divergence": "reverse_kl", "support": {"token": "k2"}}
SCORES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "top_share": (FULL, {"top_share": {"of": "reverse_kl", "share": 0.4}},
                  lambda x, kept: top(x.reverse_kl[kept], 0.4)),
    "over_median": (FULL, {"over_median": "reverse_kl"}, lambda x, kept: over_median(x.reverse_kl[kept])),
    "softmax": (FULL, {"softmax": {"of": "ce_p", "temperature": 2}},
                lambda x, kept: x.per_row(soft(2), x.ce_p, kept)[kept]),
    "mean_one": (FULL, {"mean_one": "max_p"}, lambda x, kept: x.max_p[kept] / x.max_p[kept].mean()),
    "early": (FULL, {"early": "log_ratio"}, lambda x, kept: x.per_row(early, x.ce_q - x.ce_p, kept)[kept]),
    "early, sampled": (TOKEN, {"early": "log_ratio"}, lambda x, kept: x.per_row(early, x.ce_q - x.ce_p, kept)[kept]),
    "top share, sampled": (TOKEN, {"top_share": {"of": "entropy_q", "share": 0.3}},
                           lambda x, kept: top(x.entropy_q[kept], 0.3)),
    "of one another": (FULL, {"mean_one": {"of": {"softmax": {"of": "ce_q", "temperature": 1}}}},
                       lambda x, kept: x.per_row(soft(1), x.ce_q, kept)[kept]),
    "within": (FULL, {"affine": {"of": {"times": {"of": {"over_median": "reverse_kl"}, "by": "max_p"}}, "offset": 1}},
               lambda x, kept: over_median(x.reverse_kl[kept]) * x.max_p[kept] + 1),
}  # fmt: skip


def plain_loss(student: LoadedModel, teacher: LoadedModel, responses: list[Response], kind: str, weight: Any) -> Any:
    """Mean over kept tokens of weight x loss, from the models' own logits."""

    def loss() -> torch.Tensor:
        rows = []
        for r in responses:
            q, p = plain_logp(student, r.prompt_ids, r.token_ids), plain_logp(teacher, r.prompt_ids, r.token_ids)
            if kind == "full":
                rows.append((q.exp() * (q - p.detach())).sum(-1))
            else:
                pick = torch.tensor(r.token_ids)[:, None]
                mine, theirs = q.gather(-1, pick)[:, 0], p.gather(-1, pick)[:, 0]
                rows.append(-(theirs - mine).detach().clamp(-10, 10) * mine)
        return (torch.cat(rows) * torch.as_tensor(weight)).sum()

    return loss


@pytest.mark.parametrize("mask", ["all", "wrong_response"])
@pytest.mark.parametrize("name", SCORES)
def test_a_score_over_the_step_is_its_formula_whatever_the_micro_batches(
    name: str, mask: str, student: LoadedModel, teacher: LoadedModel
):
    term, expression, formula = SCORES[name]
    responses = made_responses()
    plain = Plain(student, teacher, responses)
    kept = np.ones(len(plain.row), bool) if mask == "all" else ~np.array([r.correct for r in responses])[plain.row]
    weight = np.zeros(len(plain.row))
    weight[kept] = formula(plain, kept)
    assert weight[kept].std() > 1e-3

    scored = score(student, responses, [{"distill": {**term, "scale": expression, "mask": mask}}], teacher=teacher)
    kind = "full" if term is FULL else "token"
    want = plain_gradient(student, plain_loss(student, teacher, responses, kind, weight / kept.sum()))
    for measuring, updating in ((4096, 4096), (1, 60), (60, 1)):
        assert_near(gradient(student, measured(student, scored, measuring), budget=updating), want)


@pytest.mark.parametrize(
    "term",
    [
        {"divergence": {"arms": [{"of": "q||p", "gate": {"over_median": "reverse_kl"}}]}},
        {"divergence": {"arms": [{"of": "p||q", "gate": {"top_share": {"of": "max_p", "share": 0.5}}}]},
         "support": {"topk": 4}},
        {"target": {"teacher_temperature": {"over_median": {"of": "reverse_kl"}},
                    "student_temperature": {"over_median": {"of": "reverse_kl"}}, "rescale": True}},
        {"divergence": "forward_kl", "target": {"label_mix": {"clip": {"of": {"mean_one": "ce_q"}, "high": 0.9}}}},
        {"divergence": "forward_kl",
         "target": {"decouple": {"label": {"top_share": {"of": {"one_minus": "label_p"}, "share": 0.5}}, "rest": 1}}},
    ],
    ids=str,
)  # fmt: skip
def test_scores_over_the_step_inside_a_term_do_not_see_the_split(
    term: dict[str, Any], student: LoadedModel, teacher: LoadedModel
):
    scored = score(student, made_responses(), [{"distill": term}], teacher=teacher)
    whole = gradient(student, measured(student, scored))
    assert whole.norm() > 1e-6
    for budget in (1, 60):
        assert_near(gradient(student, measured(student, scored, budget), budget=budget), whole)
    assert measured(student, scored).measured["distill"]


def test_terms_without_a_teacher_are_weighted_by_the_students_own_scores(student: LoadedModel, teacher: LoadedModel):
    responses = made_responses()
    plain = Plain(student, teacher, responses)
    weight = plain.per_row(soft(3), plain.ce_q, np.ones(len(plain.row), bool)) / len(plain.row)
    entry = {"cross_entropy": {"on": ["student"], "scale": {"softmax": {"of": "ce_q", "temperature": 3}}}}

    def loss() -> torch.Tensor:
        rows = [-plain_logp(student, r.prompt_ids, r.token_ids).gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0]
                for r in responses]  # fmt: skip
        return (torch.cat(rows) * torch.as_tensor(weight)).sum()

    scored = score(student, responses, [entry])
    for budget in (1, 4096):
        assert_near(gradient(student, measured(student, scored, budget), budget=budget), plain_gradient(student, loss))


def test_two_terms_measure_over_their_own_tokens(student: LoadedModel, teacher: LoadedModel):
    scale = {"mean_one": "reverse_kl"}
    entries = [
        {"distill": {**FULL, "scale": scale, "mask": "wrong_response"}},
        {"distill": {**FULL, "scale": scale, "mask": "right_response"}},
    ]
    scored = measured(student, score(student, made_responses(), entries, teacher=teacher))
    assert set(scored.measured) == {"distill.0", "distill.1"}
    for active in scored.active:
        (values,) = scored.measured[active.name].values()
        assert values[active.keep_N].mean() == pytest.approx(1.0)
        assert (values[~active.keep_N] == 0).all()


def test_a_mask_that_keeps_nothing_leaves_no_gradient_and_no_number_that_is_none(
    student: LoadedModel, teacher: LoadedModel
):
    responses = made_responses()
    for response in responses:
        response.correct = False
    for name in ("top_share", "over_median", "softmax", "mean_one", "early"):
        settings: dict[str, Any] = {"of": "ce_p"} | ({"share": 0.5} if name == "top_share" else {})
        term = {**FULL, "scale": {name: settings}, "mask": "right_response"}
        scored = score(student, responses, [{"distill": term}], teacher=teacher)
        assert gradient(student, measured(student, scored)).norm() == 0


# ---------------------------------------------------------------- in a run

SCALE = {"mean_one": {"of": {"early": "log_ratio"}}}


def short(world: Path, terms: list[dict[str, Any]], **change: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"objective": terms, "source": "student", **with_teacher(world)}
    return raw_recipe(world, None, **{**settings, **change})


def seen_by(raw: dict[str, Any], folder: Path, budget: int) -> list[Any]:
    with parts_of(raw, folder, f"optimizer.micro_batch_tokens={budget}") as parts:
        spy = SpyUpdater(parts.student, budget)
        parts.updater = spy
        go(parts)
        return spy.seen


@pytest.mark.parametrize(
    "term",
    [
        {"divergence": "forward_kl", "support": {"draws": 3}, "scale": {"over_median": "reverse_kl"}},
        {"divergence": {"arms": [{"of": "q||r", "gate": "sigmoid_log_ratio"}], "assistant": {"share": 0.5}}},
        {"support": {"token": "k2"}, "scale": SCALE},
    ],
    ids=str,
)
def test_a_run_is_the_same_whatever_its_micro_batches(term: dict[str, Any], world: Path, tmp_path: Path):
    raw = short(world, [{"distill": term}])
    one, other = (seen_by(raw, tmp_path / str(budget), budget) for budget in (40, 4096))
    assert len(one) == len(other) == 2
    for a, b in zip(one, other, strict=True):
        assert a.gradient.norm() > 1e-6
        assert (a.gradient - b.gradient).norm() <= 2e-4 * b.gradient.norm()


def test_draws_are_a_function_of_seed_step_and_term(world: Path, tmp_path: Path):
    draws = {"divergence": "forward_kl", "support": {"draws": 3}}
    raw = short(world, [{"distill": draws}, {"distill": draws}])
    one, again = (seen_by(raw, tmp_path / name, 4096) for name in ("a", "b"))
    other = seen_by(raw | {"seed": 4}, tmp_path / "c", 4096)
    found = [[dict(seen.scored.uniform) for seen in seen_all] for seen_all in (one, again, other)]
    for step in range(2):
        assert set(found[0][step]) == {"distill.0", "distill.1"}
        for name in found[0][step]:
            assert torch.equal(found[0][step][name], found[1][step][name])
    flat = [float(values[0, 0]) for rows in (found[0], found[2]) for row in rows for values in row.values()]
    assert len(set(flat)) == 8, "every seed, step and term draws anew"


def test_a_weight_that_holds_the_kl_moves_with_the_rows_of_the_run(world: Path, tmp_path: Path):
    control = {"target_kl": {"target": 0.05, "start": 2.0}}
    raw = short(world, [{"distill": {**FULL, "weight": control}}], steps=5)
    run(raw, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    weight = 2.0
    for row in rows:
        assert row["weight/distill"] == pytest.approx(weight, rel=1e-12)
        weight *= 1 + 0.1 * max(-0.2, min(0.2, row["kl_teacher"] / 0.05 - 1))
    assert rows[-1]["weight/distill"] != 2.0


def test_a_weight_that_balances_sees_the_ratio_at_every_step(world: Path, tmp_path: Path):
    terms: list[dict[str, Any]] = [
        {"policy_gradient": {}},
        {"distill": {**FULL, "weight": {"balance": {"ratio": 0.5, "rate": 1.0}}}},
    ]
    run(short(world, terms, steps=5), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    weight = 1.0
    for row in rows:
        assert row["weight/distill"] == pytest.approx(weight, rel=1e-12)
        ratio = row["kd_rl_norm_ratio"]
        weight *= 1.0 if ratio is None else 0.5 / ratio
    told = [row["kd_rl_norm_ratio"] for row in rows]
    assert sum(ratio is not None for ratio in told) >= 3, "log.gradients_every is 0, and yet it is measured"
    assert weight != 1.0


INNER: dict[str, dict[str, Any]] = {
    "assistant": {"divergence": {"arms": [{"of": "r||q"}],
                                 "assistant": {"a": 1, "share": {"taid": {"alpha": 0.2}}, "detach": True}}},
    "share of tokens": {"scale": {"top_share": {"of": "reverse_kl", "share": {"trend": {"eps": 1e-6, "sigma": 0.3}}}}},
    "label": {"divergence": "forward_kl",
              "target": {"label_mix": {"target_kl": {"target": 0.01, "start": 0.5, "clip": 2.0}}}},
}  # fmt: skip


@pytest.mark.parametrize("name", INNER)
def test_scalars_deep_inside_a_term_move_and_survive_a_stop(name: str, world: Path, tmp_path: Path):
    """They are found in the recipe that the live term reads, and the run goes on with the same bytes."""
    raw = short(world, [{"distill": INNER[name]}], steps=4, checkpoint={"every": 2, "keep": 3})
    with parts_of(raw, tmp_path / "live") as parts:
        trainer = go(parts)
        (path,) = trainer.memory.schedules
        assert trainer.memory.states[path] != trainer.memory.schedules[path].adaptive.begin()  # type: ignore[union-attr]
        (term,) = parts.objective.terms
        schedule = trainer.memory.schedules[path]
        assert schedule.at(trainer.moment) != pytest.approx(schedule.at(replace(trainer.moment, memory=None)))
        moved = Trainer(parts).memory.of(schedule)
        assert moved == schedule.adaptive.begin(), "a new run begins anew"  # type: ignore[union-attr]
        assert any(schedule is mine for mine in schedules_of(term.config)), "the term reads the scalar that moves"
    run(raw, tmp_path / "whole")
    run(raw | {"steps": 4}, tmp_path / "stopped")
    for newest in sorted((tmp_path / "stopped" / "checkpoints").glob("step-*"))[1:]:
        for file in sorted(newest.rglob("*"), reverse=True):
            file.unlink()
        newest.rmdir()
    resume(tmp_path / "stopped", say=lambda text: None)
    states = [state_of(tmp_path / run_name) for run_name in ("whole", "stopped")]
    assert states[0] == states[1]
    timeless = [[{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per", "rollout_tokens"))}
                 for row in rows_of(tmp_path / run_name)] for run_name in ("whole", "stopped")]  # fmt: skip
    assert timeless[0] == timeless[1]


def schedules_of(config: Any) -> list[Any]:
    from kdrl.objectives.schedules import schedules_in

    return [schedule for _, schedule in schedules_in(config)]


def state_of(run_dir: Path) -> dict[str, Any]:
    last = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    (file,) = [f for f in last.glob("*.json") if "schedules" in f.read_text()]
    return json.loads(file.read_text())["schedules"]


def test_a_calibrated_scalar_is_measured_before_the_first_update(world: Path, tmp_path: Path):
    """CAKLD's gamma is the mean of the teacher's largest probability over the first batches, and then stays."""
    gamma = {"calibrated": {"of": "max_p", "batches": 2, "complement": True}}
    raw = short(world, [{"distill": {"divergence": {"symmetric": gamma}}}], steps=2)
    with parts_of(raw, tmp_path / "run") as parts:
        trainer = go(parts)
        (state,) = trainer.memory.states.values()
        assert 0.0 < state["value"] < 1.0
        first = state["value"]
    with parts_of(raw, tmp_path / "other") as parts:
        trainer = Trainer(parts)
        scored = [trainer.trial(i) for i in range(2)]
        values = []
        for each in scored:
            plain = Plain(parts.student, parts_teacher(parts), each.rollouts.responses)
            values.append(plain.max_p)
        assert first == pytest.approx(1 - np.concatenate(values).mean(), rel=1e-4)


def parts_teacher(parts: Any) -> LoadedModel:
    return parts.teachers["teacher"].loaded if hasattr(parts.teachers["teacher"], "loaded") else next(
        value for value in vars(parts.teachers["teacher"]).values() if isinstance(value, LoadedModel))  # fmt: skip


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_a_term_that_warms_up_is_calibrated_like_any_other(warmup: int, world: Path, tmp_path: Path):
    weight: Any = {"constant": 1.0, "warmup": warmup}
    raw = short(world, [{"distill": {"weight": weight, "divergence": {"symmetric": {"calibrated": {"batches": 1}}}}}])
    with parts_of(raw, tmp_path / "run") as parts:
        (state,) = go(parts).memory.states.values()
        assert state["value"] > 0.02


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ({"scale": {"early": "log_ratio"}, "on": ["gold"]}, "gold"),
        ({"support": {"token": "k2"}, "scale": {"top_share": {"of": "reverse_kl", "share": 0.5}}}, "whole distrib"),
        ({"divergence": {"symmetric": {"calibrated": {"of": "max_pp"}}}}, "did you mean"),
        ({"divergence": {"symmetric": {"calibrated": {"of": {"mean_one": "max_p"}}}}}, "calibrated"),
        ({"mask": {"score": {"top_share": {"of": "ce_q", "share": {"trend": {}}}}}}, "memory"),
        ({"weight": {"taid": {"metric": "divergence/other"}}}, "divergence/other"),
        ({"weight": {"balance": {}}}, "only one of them"),
        ({"divergence": {"skew_kl": {"linear": {"from": 0.1, "to": 2.0}}}}, "at step"),
    ],
    ids=str,
)
def test_what_a_run_cannot_serve_is_refused_before_it_starts(
    term: dict[str, Any], says: str, world: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=says):
        run(short(world, [{"distill": term}]), tmp_path / "run")


def test_a_measurement_of_nothing_is_no_number(world: Path, tmp_path: Path):
    term = {"weight": {"linear": {"from": 0, "to": 1}}, "divergence": {"symmetric": {"calibrated": {"batches": 1}}}}
    with pytest.raises(UserError, match="a weight above 0 at the first step"):
        run(short(world, [{"distill": term}]), tmp_path / "run")


def test_a_score_of_distributions_is_refused_where_there_are_none(world: Path, tmp_path: Path):
    for term in ({"policy_gradient": {"scale": "max_p"}}, {"policy_gradient": {"scale": "ce_p"}}):
        with pytest.raises(UserError, match="score"):
            run(short(world, [term]), tmp_path / "run")
