"""What the doctor measures: accuracies, one small step's responses, the teachers' scores of them, and its gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdrl.build import Builder
from kdrl.errors import UserError
from kdrl.metrics import Phases
from kdrl.objectives.logspace import entropy
from kdrl.objectives.scores import Tokens
from kdrl.objectives.terms import Distill
from kdrl.teachers import Evidence, Teacher
from kdrl.teachers.base import Given
from kdrl.teachers.served import ServedTeacher
from kdrl.trainer import Parts, Trainer
from kdrl.update import Scored, Tally
from kdrl.vocab.teacher import VocabTeacher

TOP = 10


@dataclass(frozen=True)
class Accuracy:
    """Greedy answers of a model."""

    right: int
    problems: int
    tokens: float
    split: str


@dataclass(frozen=True)
class Gap:
    """A teacher against the student on the student's tokens: R = log p - log q, and whole distributions where known.

    Of a teacher with tokens of its own R is a chunk's, and `covered` the share of the trained tokens that are in one.
    """

    ratio: float
    magnitude: float
    beyond: float
    top: int = 0
    overlap: float | None = None
    entropy: float | None = None
    covered: float | None = None

    @property
    def alike(self) -> bool:
        """Whether the two are one model on these tokens."""
        return self.magnitude < 1e-5


@dataclass(frozen=True)
class TermGradient:
    """One term's own gradient, as weighted."""

    name: str
    family: str
    weight: float
    kept: int
    norm: float
    mass: float | None
    teacher: str | None = None


@dataclass
class Measured:
    """Everything that was measured."""

    rows: int
    tokens: float
    truncated: float
    flat: float
    entropy: float
    seconds: dict[str, float]
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    gaps: dict[str, Gap] = field(default_factory=dict)
    terms: list[TermGradient] = field(default_factory=list)
    alignment: dict[str, float] = field(default_factory=dict)


def measure(builder: Builder, parts: Parts, problems: int) -> Measured:
    """Write a small step's responses, score them, and take every term's gradient; nothing is trained."""
    accuracy = _accuracies(builder, problems)  # first, for scoring may move a teacher off the device
    trainer, phases = Trainer(parts), Phases()
    scored = trainer.trial(0, phases)
    responses = scored.rollouts.responses
    logq_N, entropy_N = parts.updater.score_policy(scored.rollouts, scored.temperature)
    trained_N = scored.rollouts.trained_N
    groups: dict[int, set[float]] = {}
    for response in responses:
        groups.setdefault(response.group, set()).add(response.reward)
    found = Measured(
        rows=len(responses),
        tokens=sum(len(r.token_ids) for r in responses) / len(responses),
        truncated=sum(not r.ended for r in responses) / len(responses),
        flat=sum(len(seen) == 1 for seen in groups.values()) / len(groups),
        entropy=float(entropy_N[trained_N].mean()),
        seconds={},
        accuracy=accuracy,
    )
    tally, start = Tally(), time.perf_counter()
    parts.updater.accumulate(scored, range(scored.rollouts.rows), tally)
    parts.updater.clear()
    found.seconds = {**phases.seconds, "update": phases.seconds.get("update", 0.0) + time.perf_counter() - start}
    found.terms = list(_gradients(parts, scored, tally))
    found.gaps = {name: gap for name, t in parts.teachers.items() if (gap := _gap(parts, scored, name, t, logq_N))}
    numbers = trainer.beside.numbers(responses)
    found.alignment = {key: value for key, value in numbers.items() if key.startswith("vocabulary/")}
    return found


def _gradients(parts: Parts, scored: Scored, tally: Tally) -> Iterable[TermGradient]:
    updater = parts.updater
    for active in scored.active:
        updater.accumulate(replace(scored, active=[active]), range(scored.rollouts.rows))
        squares = [float(g.double().square().sum()) for g in updater.gradients() if g is not None]
        updater.clear()
        _, mass, _, count = tally.divergence.get(active.name, [0.0, 0.0, 0.0, 0.0])
        limited = isinstance(active.term, Distill) and active.term.config.support.kind == "topk"
        yield TermGradient(
            active.name,
            active.term.family,
            active.weight,
            int(active.keep_N.sum()),
            sum(squares) ** 0.5,
            mass / count if limited and count else None,
            active.teacher,
        )


def _gap(parts: Parts, scored: Scored, name: str, teacher: Teacher, logq_N: Tensor) -> Gap | None:
    """None where the teacher scores none of the tokens, or its own ones in place of the student's."""
    known = scored.evidence.get(name)
    if known is None or not bool(known.scored_N.any()):
        return None
    if isinstance(teacher, VocabTeacher):
        return _chunk_gap(scored, name, teacher, known, logq_N)
    keep_N = known.scored_N
    ratio_N = (known.logp_N - logq_N)[keep_N].double()
    bounds = [a.term.config.clamp for a in scored.active if isinstance(a.term, Distill) and a.term.config.clamp]
    beyond = float((ratio_N.abs() > (bounds[0] if bounds else 10.0)).double().mean())
    gap = Gap(float(ratio_N.mean()), float(ratio_N.abs().mean()), beyond)
    need = "distribution" if teacher.gives.distribution else "few" if teacher.gives.topk else "token"
    if isinstance(teacher, ServedTeacher):
        teacher = teacher.giving(TOP)
    if need == "token":
        return gap
    try:
        whole = teacher.score(scored.rollouts, keep_N, need, scored.temperature)
    except UserError:
        return gap  # from a server that gives as many likeliest tokens as terms ask, and not as many as are looked at
    top = min(TOP, parts.student.vocab_size, TOP if whole.few is None else whole.few.ids_NK.shape[1])
    return replace(
        gap,
        top=top,
        overlap=_mean(parts, scored, whole, keep_N, lambda tokens, logq_CV: _overlap(tokens, logq_CV, top)),
        entropy=None if whole.few is not None else _mean(parts, scored, whole, keep_N, _entropy),
    )


def _chunk_gap(scored: Scored, name: str, teacher: VocabTeacher, known: Evidence, logq_N: Tensor) -> Gap:
    """R of whole chunks: the sum over a chunk's tokens, where every part of it was scored."""
    kept_N = known.scored_N
    ratio_N = (known.logp_N - logq_N)[kept_N].double()
    _, chunk_N = known.columns["chunk"][kept_N].unique(return_inverse=True)
    ratio_C = ratio_N.new_zeros(int(chunk_N.max()) + 1).index_add(0, chunk_N, ratio_N)
    configs = [a.term.config for a in scored.active if a.teacher == name]
    bounds = [bound for config in configs if (bound := getattr(config, "clamp", None))]
    beyond = float((ratio_C.abs() > (bounds[0] if bounds else 10.0)).double().mean())
    mean, magnitude = float(ratio_C.mean()), float(ratio_C.abs().mean())
    return Gap(mean, magnitude, beyond, covered=teacher.numbers()["covered"])


def _overlap(tokens: Tokens, logq_CV: Tensor, top: int) -> Tensor:
    """Share of the teacher's likeliest tokens that are the student's too, `[C, 1]`."""
    mine_CK = logq_CV.topk(top).indices
    if tokens.few is not None:
        theirs_CK = tokens.few.ids_NK[:, :top]
    else:
        assert tokens.logp_CV is not None
        theirs_CK = tokens.logp_CV.topk(top).indices
    return (theirs_CK[:, :, None] == mine_CK[:, None, :]).any(-1).to(logq_CV).mean(-1, keepdim=True)


def _entropy(tokens: Tokens, logq_CV: Tensor) -> Tensor:
    assert tokens.logp_CV is not None
    return entropy(tokens.logp_CV)[:, None]


def _mean(
    parts: Parts, scored: Scored, evidence: Evidence, keep_N: Tensor, look: Callable[[Tokens, Tensor], Tensor]
) -> float:
    given = Given(scored.rollouts.tokens_N, scored.data)
    found_N = parts.updater.probe(scored, keep_N, lambda index_M: evidence.comparison(look, index_M, given, 1))
    return float(found_N[keep_N].double().mean())


def _accuracies(builder: Builder, problems: int) -> dict[str, Accuracy]:
    """Greedy accuracy of student and teachers on the first development problems, of training where there are none."""
    if not problems:
        return {}
    greedy = {"problems": problems, "samples": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "k": []}
    config = builder.recipe.evaluate.model_copy(update=greedy | {"split": "development"})
    try:
        builder.task.problems("development")
    except UserError:
        config = config.model_copy(update={"split": "train"})
    found: dict[str, Accuracy] = {}
    with torch.no_grad():
        for name in ("student", *builder.models, *builder.served):
            result = builder.evaluate_model(name, config)
            total = len(result.records)
            right = round(result.accuracy * total)
            found[name] = Accuracy(right, total, result.metrics["tokens"] or 0.0, config.split)
    return found
