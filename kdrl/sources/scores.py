"""Scores of whole responses, for filters: verdicts, length, mean log-probs, and how often a problem is solved.

Scores of single tokens are `kdrl.objectives.scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kdrl.batch import Response, Rollouts
from kdrl.objectives.head import TokenScores, score_tokens
from kdrl.registry import Registry

if TYPE_CHECKING:
    from kdrl.models import LoadedModel


@dataclass(frozen=True)
class Scoring:
    """Judged responses of a round, and who can be asked about them; `probe` gives each problem's share of right ones.

    `temperature` is the policy's, `budget` the tokens of a forward pass.
    """

    responses: Sequence[Response]
    student: LoadedModel
    teacher: LoadedModel | None = None
    temperature: float = 1.0
    budget: int = 4096
    probe: Callable[[Sequence[Response]], dict[str, float]] = field(default=lambda responses: {})


ScoreFunction = Callable[[Scoring], list[float]]
RESPONSE_SCORES: Registry[ScoreFunction] = Registry("response score")


def register_response_score(name: str) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register `fn(scoring: Scoring) -> one number per response` as a score that filters can name."""

    def register(function: ScoreFunction) -> ScoreFunction:
        RESPONSE_SCORES.add(name, of=function)(function)
        return function

    return register


@torch.no_grad()
def forward_scores(
    model: LoadedModel, responses: Sequence[Response], temperature: float, budget: int, *, entropy: bool = False
) -> TokenScores:
    """Log-probs (and entropies) of all response tokens, flat `[N]`, in float32, `budget` tokens at a time."""
    # Here, because a recipe reads the names of these scores and needs no transformers for it.
    from kdrl.models import head_of
    from kdrl.models.packing import micro_batches, wanted_states

    rollouts = Rollouts.of(responses, model.device)
    every_N = torch.ones_like(rollouts.trained_N)
    logp_N = torch.zeros(rollouts.tokens, device=model.device)
    entropy_N = torch.zeros_like(logp_N)
    head = head_of(model)
    for micro in micro_batches(model, rollouts, range(rollouts.rows), every_N, budget):
        targets_M, hidden_MD = rollouts.tokens_N[micro.index_M], wanted_states(model, micro)
        found = score_tokens(head, hidden_MD, targets_M, temperature=temperature, entropy=entropy)
        logp_N[micro.index_M] = found.logp_N.to(logp_N.dtype)
        if found.entropy_N is not None:
            entropy_N[micro.index_M] = found.entropy_N.to(logp_N.dtype)
    return TokenScores(logp_N, entropy_N if entropy else None, ())


def _mean_logp(model: LoadedModel, scoring: Scoring) -> list[float]:
    logp_N = forward_scores(model, scoring.responses, scoring.temperature, scoring.budget).logp_N
    lengths = [len(r.token_ids) for r in scoring.responses]
    return [float(part.mean()) for part in logp_N.split(lengths)]


@register_response_score("reward")
def reward(scoring: Scoring) -> list[float]:
    """The reward."""
    return [r.reward for r in scoring.responses]


@register_response_score("correct")
def correct(scoring: Scoring) -> list[float]:
    """1 where the verifier accepts the response."""
    return [float(r.correct) for r in scoring.responses]


@register_response_score("length")
def length(scoring: Scoring) -> list[float]:
    """Tokens of the response."""
    return [float(len(r.token_ids)) for r in scoring.responses]


@register_response_score("student_logp")
def student_logp(scoring: Scoring) -> list[float]:
    """The student's mean log-prob of the tokens; perplexity is exp(-x)."""
    return _mean_logp(scoring.student, scoring)


@register_response_score("teacher_logp")
def teacher_logp(scoring: Scoring) -> list[float]:
    """The teacher's mean log-prob of the tokens."""
    assert scoring.teacher is not None
    return _mean_logp(scoring.teacher, scoring)


@register_response_score("logp_gap")
def logp_gap(scoring: Scoring) -> list[float]:
    """Teacher's less student's mean log-prob, which is the student's loss less the teacher's (ACID, 2411.18674)."""
    return [t - s for t, s in zip(teacher_logp(scoring), student_logp(scoring), strict=True)]


@register_response_score("group_rate")
def group_rate(scoring: Scoring) -> list[float]:
    """Share of right responses in the response's group."""
    groups: dict[int, list[bool]] = {}
    for r in scoring.responses:
        groups.setdefault(r.group, []).append(r.correct)
    return [sum(groups[r.group]) / len(groups[r.group]) for r in scoring.responses]


@register_response_score("student_rate")
def student_rate(scoring: Scoring) -> list[float]:
    """How often the student solves the problem: rollout.group samples that are judged and dropped (DED, 2508.09883)."""
    rates = scoring.probe(scoring.responses)
    return [rates[r.problem.id] for r in scoring.responses]
