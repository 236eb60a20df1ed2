"""Whom a step asks about its responses: its teachers and the reference, each while the verifier works if it may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdrl.batch import Rollouts
from kdrl.objectives.base import Term
from kdrl.objectives.objective import Active
from kdrl.objectives.schedules import Moment
from kdrl.teachers import Evidence, Teacher
from kdrl.teachers.base import Need
from kdrl.teachers.beside import Beside
from kdrl.teachers.checks import teacher_of

if TYPE_CHECKING:
    from kdrl.trainer import Parts

# Who is asked: a teacher by its name, or the reference, which has none.
Who = str | None


@dataclass(frozen=True)
class Question:
    """Tokens `[N]` that someone is asked about, and for what."""

    wanted_N: Tensor
    need: Need

    def same(self, other: Question) -> bool:
        """Whether one answer serves both."""
        return self.need == other.need and torch.equal(self.wanted_N, other.wanted_N)


def _asked_by(terms: Sequence[Term[Any]]) -> set[Who]:
    teachers: set[Who] = {name for t in terms if (name := teacher_of(t))}
    return teachers | ({None} if any(t.needs.reference for t in terms) else set())


Answers = Mapping[Who, tuple[Question, Evidence]]


class Asking:
    """Puts a step's questions, each once: those that no verdict decides may be put before the verdicts are known."""

    def __init__(self, parts: Parts, beside: Beside) -> None:
        self.parts, self.beside = parts, beside

    def early(
        self, rollouts: Rollouts, moment: Moment, entropy_N: Tensor | None, logq_N: Tensor | None
    ) -> dict[Who, tuple[Question, Evidence]]:
        """Answers that need no verdicts: of those who are asked by no term that reads some, and who read none."""
        objective = self.parts.objective
        terms = [t for t, weight in zip(objective.terms, objective.weights(moment), strict=True) if weight != 0.0]
        late = _asked_by([t for t in terms if t.asks_by_verdict]) | self.beside.late
        now = _asked_by(terms) - late
        if not now:
            return {}
        active = objective.activate(rollouts, moment, entropy_N, logq_N, judged=False)
        questions = self._questions(self.beside.narrowed(active, rollouts), rollouts)
        return {who: (q, self._put(who, q, rollouts)) for who, q in questions.items() if who in now}

    def ask(
        self, rollouts: Rollouts, active: Sequence[Active], known: Answers
    ) -> tuple[dict[str, Evidence], Evidence | None]:
        """Every teacher's scores by name, and the reference's; whose question is no longer the same is asked again."""
        found: dict[Who, Evidence] = {}
        for who, question in self._questions(active, rollouts).items():
            before = known.get(who)
            serves = before is not None and before[0].same(question)
            found[who] = before[1] if before is not None and serves else self._put(who, question, rollouts)
        return {who: evidence for who, evidence in found.items() if who is not None}, found.get(None)

    def _questions(self, active: Sequence[Active], rollouts: Rollouts) -> dict[Who, Question]:
        found: dict[Who, Question] = {}
        for name in dict.fromkeys(a.teacher for a in active if a.teacher):
            asking = [a for a in active if a.teacher == name]
            whole = any(a.term.needs.teacher == "distribution" for a in asking)
            need = "token" if not whole else "distribution" if self._of(name).gives.distribution else "few"
            wanted_N = torch.stack([a.wanted_N(rollouts.row_N, rollouts.rows) for a in asking]).any(0)
            found[name] = Question(wanted_N, need)
        if self.parts.reference is not None:
            leashed = [a for a in active if a.term.needs.reference]
            keep_N = torch.stack([a.keep_N for a in leashed] or [rollouts.trained_N & False])
            whole = any(a.term.needs.reference == "distribution" for a in leashed)
            found[None] = Question(keep_N.any(0), "distribution" if whole else "token")
        return found

    def _of(self, who: Who) -> Teacher:
        found = self.parts.reference if who is None else self.parts.teachers[who]
        assert found is not None
        return found

    def _put(self, who: Who, question: Question, rollouts: Rollouts) -> Evidence:
        teacher, temperature = self._of(who), self.parts.recipe.rollout.temperature
        return self.parts.limits.tokens.run(
            lambda: teacher.score(rollouts, question.wanted_N, question.need, temperature)
        )
