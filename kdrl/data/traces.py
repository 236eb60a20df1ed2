"""A trace: what a model wrote to a problem, with its verdict; and which traces of a problem are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdrl.tasks import Problem

Keep = Literal["all", "right", "wrong", "best", "pair"]


@dataclass(frozen=True)
class Trace:
    """One response to `problem`: the `sample`-th of its draws, `tokens` long, `ended` by an end token or stop string.

    `first_thought` is the part of `text` that another model wrote, None where there is none.
    """

    problem: Problem
    sample: int
    text: str
    tokens: int
    ended: bool
    reward: float
    correct: bool
    first_thought: str | None = None

    def row(self, model: str, seed: int) -> dict[str, Any]:
        """The line of the file; a data task reads it back, with the response as the worked solution if it is right."""
        row = {
            "id": self.problem.id,
            "prompt": self.problem.prompt,
            "answer": self.problem.answer,
            "response": self.text,
            "reward": self.reward,
            "correct": self.correct,
            "tokens": self.tokens,
            "ended": self.ended,
            "sample": self.sample,
            "seed": seed,
            "model": model,
        }
        return row if self.first_thought is None else {**row, "first_thought": self.first_thought}


def best_first(traces: Sequence[Trace]) -> list[Trace]:
    """By reward from high to low, then by fewer tokens, then as drawn."""
    return sorted(traces, key=lambda t: (-t.reward, t.tokens, t.sample))


def keep_traces(traces: Sequence[Trace], keep: Keep, most: int | None = None, distinct: bool = False) -> list[Trace]:
    """Those traces of one problem that `keep` asks for.

    `most` takes the first so many of `best_first`; wrong ones that ended by themselves come before cut ones. A pair is
    the best right trace and then the first such wrong one, or nothing. `distinct` drops repeated texts beforehand.
    """
    if distinct:
        first: dict[str, Trace] = {}
        for found in traces:
            first.setdefault(found.text, found)
        traces = list(first.values())
    right = [t for t in traces if t.correct]
    wrong = [t for t in traces if not t.correct]
    if keep == "all":
        return list(traces)
    if keep == "best":
        return best_first(traces)[:1]
    if keep == "right":
        return right if most is None else best_first(right)[:most]
    telling = sorted(wrong, key=lambda t: not t.ended)
    if keep == "wrong":
        return wrong if most is None else telling[:most]
    return [best_first(right)[0], telling[0]] if right and wrong else []


def satisfied(traces: Sequence[Trace], keep: Keep) -> bool:
    """Whether a problem needs no further tries: it has a right trace, a wrong one, or one of each for a pair."""
    verdicts = {t.correct for t in traces}
    wanted = {"all": set(), "wrong": {False}, "pair": {True, False}}.get(keep, {True})
    return wanted <= verdicts
