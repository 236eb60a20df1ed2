"""Writers and verdicts that a test can read, in place of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tiny import problem

from kdrl.batch import Origin, Response
from kdrl.objectives.schedules import Moment
from kdrl.sources.base import Collected, Judge, Request, Source
from kdrl.tasks import Problem
from kdrl.tasks.base import Verdict


class Script(Source):
    """Writes `samples` responses a problem; the text is `problem/origin/sample/seed`, the tokens follow both."""

    def __init__(self, origin: Origin = "student", samples: int = 2) -> None:
        self.origin: Origin = origin
        self.samples = samples
        self.calls: list[Request] = []

    def write(self, request: Request) -> list[Response]:
        self.calls.append(request)
        request.out.generated += self.samples * len(request.problems)
        judged = self.origin == "gold"
        return [
            Response(p, group, [3], ids, self.origin, True, f"{p.id}/{self.origin}/{j}/{request.seed}", judged=judged)
            for p, group in zip(request.problems, request.groups, strict=True)
            for j in range(self.samples)
            for ids in [[2 + j, 3 + request.seed % 11, 1]]
        ]


class Pool:
    """Says what `verdict` says of a text; counts what it was asked."""

    def __init__(self, verdict: Callable[[str], bool] = lambda text: False) -> None:
        self.verdict = verdict
        self.asked: list[str] = []

    def send_only(self, items: Sequence[tuple[str, Problem]]) -> None:
        """Nobody works meanwhile."""

    def score(self, items: Sequence[tuple[str, Problem, Any]]) -> list[Verdict]:
        self.asked += [text for text, _, _ in items]
        return [Verdict(float(self.verdict(text)), self.verdict(text), "ok") for text, _, _ in items]


def judge(verdict: Callable[[str], bool] = lambda text: False) -> Judge:
    pool: Any = Pool(verdict)
    return Judge(pool, 8)


def request(step: int = 0, total: int = 100, count: int = 3, seed: int | None = None) -> Request:
    """A step's request as the collector would make it: `count` new problems a step."""
    positions = tuple(range(step * count, (step + 1) * count))
    problems = [problem(str(i), f"{i}=") for i in positions]
    seed = 1000 + step if seed is None else seed
    return Request.of(problems, 0, seed, positions=positions, moment=Moment(step, total), out=Collected())
