"""One optimizer step of a method's whole objective, as its YAML has it, through the update of a run: logits by hand."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kdrl.batch import MicroBatch, Response, Rollouts
from kdrl.models import LoadedModel
from kdrl.objectives.head import Head
from kdrl.objectives.objective import Objective, token_data
from kdrl.objectives.schedules import Moment
from kdrl.objectives.terms import TERMS
from kdrl.tasks import Problem
from kdrl.teachers import Evidence
from kdrl.update import Scored, Updater

from .numerics import Array

VOCABULARY = 7
HEAD = Head(torch.eye(VOCABULARY, dtype=torch.float64))

# Reward, verdict, writer and whether it ended, of each response of each group.
Row = tuple[float, bool, str, bool]


@dataclass(frozen=True)
class Batch:
    """N tokens of B responses of one step: who wrote what, what came of it, and what teacher and start make of it.

    `inside_B` are the responses of the present mini-batch, `old_N` the log-probs when the step began, `importance_N`
    weights of tokens that a mixture sampled.
    """

    token_N: Array
    row_N: Array
    group_B: Array
    reward_B: Array
    correct_B: Array
    origin_B: Array
    ended_B: Array
    inside_B: Array
    teacher_NV: Array
    initial_NV: Array
    old_N: Array
    importance_N: Array

    @property
    def last_N(self) -> Array:
        """Final tokens of responses that ended."""
        ends = np.append(self.row_N[1:] != self.row_N[:-1], True)
        return ends & self.ended_B[self.row_N]

    def by(self, *writers: str) -> Array:
        """Tokens of the mini-batch by these writers."""
        return (np.isin(self.origin_B, writers) & self.inside_B)[self.row_N]


def _plain(writer: str = "student", guide: str = "student") -> list[list[Row]]:
    """Mixed groups, one with no right response and one with no wrong one; `guide` wrote the last of each."""
    groups: list[list[Row]] = [
        [(1.0, True, writer, True), (0.0, False, writer, False), (0.25, True, writer, True), (1.0, True, guide, True)],
        [(0.0, False, writer, True), (1.0, True, writer, False), (0.0, False, writer, True), (0.5, False, guide, True)],
        [(0.0, False, writer, True), (0.0, False, writer, False), (0.0, False, guide, True)],
        [(1.0, True, writer, True), (1.0, True, guide, True)],
    ]
    return groups


def _pairs(one: str, other: str) -> list[list[Row]]:
    outcomes = [(1.0, 0.0), (0.0, 1.0), (0.5, 1.0), (0.0, 0.0), (1.0, 0.5)]
    return [[(a, a == 1.0, one, True), (b, b == 1.0, other, i % 2 == 0)] for i, (a, b) in enumerate(outcomes)]


def _groups(name: str) -> list[list[Row]]:
    if name == "luffy":
        return _plain(guide="teacher") * 2
    if name == "gspo":
        return _plain() * 3
    if name in ("plad", "dpkd-sequence", "xpo"):
        return _pairs("student", "teacher")
    if name == "redi":
        return [[(1.0, True, "teacher", True), (0.0, False, "teacher", True)] for _ in range(4)]
    if name == "minillm":
        return [[(0.0, False, "mixed", True)] for _ in range(10)]
    groups = _plain()
    if name == "hdpo":
        groups[2] += [(1.0, True, "privileged", True)] * 2
    return groups


# log q/q_old is drawn with a standard deviation that reaches over the method's clip on both sides.
SPREAD = {"gspo": 2.0e-3, "cispo": 1.8}
# A range that drops tokens shows only where ratios stand close to its ends.
AT_THE_ENDS = np.log([0.49, 0.51, 1.98, 2.02, 1.1])
# The longest text in which the sum of later rewards is discounted.
LONG = {"minillm": 5}


def made_batch(name: str, minibatches: int, seed: int) -> tuple[Batch, Array]:
    """A step's random data for a method, and the student's logits; the first of `minibatches` is the present one."""
    draw = np.random.default_rng([seed, *map(ord, name)])
    groups = _groups(name)
    rows = [(group, row) for group, members in enumerate(groups) for row in members]
    lengths = draw.integers(1, 1 + LONG.get(name, 3), size=len(rows))
    row_N = np.repeat(np.arange(len(rows)), lengths)
    size = (len(row_N), VOCABULARY)
    token_N = draw.integers(VOCABULARY, size=len(row_N))
    z = draw.normal(size=size) * 1.7
    teacher_NV = draw.normal(size=size) * 1.5
    # Some tokens that the teacher all but rules out, and one where its two likeliest are all but alike.
    count, by = (2, 70.0) if name == "minillm" else (len(row_N) // 6, 14.0)
    spoiled = draw.permutation(len(row_N))[:count]
    teacher_NV[spoiled, token_N[spoiled]] -= by
    first, second = np.argsort(-teacher_NV[0])[:2]
    teacher_NV[0, second] = teacher_NV[0, first] - 1.0e-4
    moved_N = draw.normal(size=len(row_N)) * SPREAD.get(name, 0.35)
    if name == "mopd":
        moved_N = AT_THE_ENDS[np.arange(len(row_N)) % len(AT_THE_ENDS)]
    inside_B = draw.permutation(len(rows)) % minibatches == 0
    batch = Batch(
        token_N=token_N,
        row_N=row_N,
        group_B=np.array([group for group, _ in rows]),
        reward_B=np.array([row[0] for _, row in rows]),
        correct_B=np.array([row[1] for _, row in rows]),
        origin_B=np.array([row[2] for _, row in rows]),
        ended_B=np.array([row[3] for _, row in rows]),
        inside_B=inside_B,
        teacher_NV=teacher_NV,
        initial_NV=draw.normal(size=size) * 2.0,
        old_N=_logp(z).gather(-1, torch.from_numpy(token_N)[:, None])[:, 0].numpy() - moved_N,
        importance_N=np.exp2(draw.integers(-2, 3, size=len(row_N))) if name == "minillm" else np.ones(len(row_N)),
    )
    return batch, z


def _logp(logits: Array) -> Tensor:
    return torch.log_softmax(torch.from_numpy(logits), -1)


class _Table(torch.nn.Module):
    """A student whose logits at each of the step's tokens are its parameters."""

    def __init__(self, logits: Array) -> None:
        super().__init__()
        self.logits_NV = torch.nn.Parameter(torch.from_numpy(logits.copy()))


class _TableUpdater(Updater):
    """The update of a run, with the table in the place of a decoder."""

    def _hidden(self, micro: MicroBatch) -> Tensor:
        return self.student.model.get_parameter("logits_NV")[micro.index_M]


def _responses(batch: Batch) -> list[Response]:
    out = []
    for row in range(len(batch.group_B)):
        mine, group = batch.row_N == row, int(batch.group_B[row])
        response = Response(
            Problem(f"p{group}", "?", "!"),
            group,
            [1],
            batch.token_N[mine].tolist(),
            cast(Any, str(batch.origin_B[row])),
            bool(batch.ended_B[row]),
            "",
        )
        response.importance = batch.importance_N[mine].tolist()
        response.reward, response.correct = float(batch.reward_B[row]), bool(batch.correct_B[row])
        out.append(response)
    return out


def _evidence(batch: Batch, logits: Array) -> Evidence:
    places_N = torch.arange(len(batch.token_N))
    logp_N = _logp(logits).gather(-1, torch.from_numpy(batch.token_N)[:, None])[:, 0]
    return Evidence(logp_N, places_N, 0, torch.from_numpy(logits), HEAD)


def step_of(recipe: dict[str, Any], batch: Batch, z: Array, step: int, *, stale: bool = True) -> tuple[float, Array]:
    """Loss and gradient on the student's logits `[N, V]` of a recipe's objective; `HEAD` must be the student's head."""
    pairs = [next(iter(entry.items())) for entry in recipe["objective"]]
    terms = [TERMS.get(kind)(TERMS.get(kind).Config.model_validate(given)) for kind, given in pairs]
    objective = Objective(terms, drop_flat=recipe.get("rollout", {}).get("dynamic_sampling", 0) > 0)
    rollouts = Rollouts.of(_responses(batch))
    active = objective.activate(rollouts, Moment(step, 1000))
    teacher = _evidence(batch, batch.teacher_NV)
    scored = Scored(
        rollouts,
        active,
        {name: teacher for name in {a.teacher for a in active} if name},
        _evidence(batch, batch.initial_NV),
        torch.from_numpy(batch.old_N) if stale else None,
        None,
        1.0,
        token_data(rollouts),
    )
    table = _Table(z)
    updater = _TableUpdater(cast(LoadedModel, SimpleNamespace(model=table, pad_id=0)), budget=8)
    loss = updater.accumulate(scored, np.flatnonzero(batch.inside_B).tolist())
    grad = table.logits_NV.grad
    return loss, np.zeros(z.shape) if grad is None else grad.numpy()
