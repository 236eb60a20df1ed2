"""Rejection sampling: another source's responses, of which those that pass are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl.batch import Response
from kdrl.models import LoadedModel
from kdrl.sources.base import Judge, Request, Source, by_group
from kdrl.sources.keep import Keep
from kdrl.sources.scores import RESPONSE_SCORES, Scoring


class FilteredSource(Source):
    """Keeps responses by `rules`, each over what the one before left; `options` go to `Scoring`.

    Problems with nothing left are written again up to `tries` times in all and then skipped. `prober` writes the
    samples of the score `student_rate`.
    """

    def __init__(
        self,
        inner: Source,
        rules: Sequence[Keep],
        judge: Judge,
        student: LoadedModel,
        *,
        tries: int = 1,
        prober: Source | None = None,
        **options: Any,
    ) -> None:
        self.inner, self.rules, self.judge, self.student = inner, tuple(rules), judge, student
        self.tries, self.prober, self.options = tries, prober, options

    def parts(self) -> Mapping[str, Source]:
        """The source that is filtered."""
        return {"inner": self.inner}

    def write(self, request: Request) -> list[Response]:
        """What passes, group by group; maybe nothing."""
        kept: list[Response] = []
        left = list(range(len(request.problems)))
        for attempt in range(self.tries):
            asked = request.only(left) if attempt == 0 else request.only(left).apart("try", attempt)
            written = self.inner.write(asked)
            self.judge(written, request.out)
            passed = self._pass(written, asked)
            request.out.tell("kept", len(passed), len(written))
            kept += passed
            filled = {r.group for r in passed}
            left = [i for i in left if request.groups[i] not in filled]
            if not left:
                break
        request.out.tell("skipped_problems", len(left))
        return by_group(kept)

    def _pass(self, responses: list[Response], request: Request) -> list[Response]:
        for rule in self.rules:
            if not responses:
                break
            scoring = Scoring(responses, self.student, probe=lambda found: self._probe(found, request), **self.options)
            responses = keep(rule, responses, RESPONSE_SCORES.get(rule.score)(scoring))
        return responses

    def _probe(self, responses: Sequence[Response], request: Request) -> dict[str, float]:
        """Share of right samples of the student for each problem by id; they count as generated."""
        assert self.prober is not None
        present = {r.group for r in responses}
        places = [i for i, group in enumerate(request.groups) if group in present]
        samples = self.prober.write(request.only(places).apart("probe"))
        self.judge(samples, request.out)
        found: dict[str, list[bool]] = {}
        for r in samples:
            found.setdefault(r.problem.id, []).append(r.correct)
        return {problem: sum(right) / len(right) for problem, right in found.items()}


def keep(rule: Keep, responses: Sequence[Response], scores: Sequence[float]) -> list[Response]:
    """The responses that a rule keeps, in their order; of equal scores the earlier comes first.

    `top` and `bottom` keep the share rounded up, so that a step with responses keeps one.
    """
    order = sorted(range(len(responses)), key=lambda i: -scores[i])
    if rule.best is not None:
        rank: dict[int, int] = {}
        chosen = set()
        for i in order:
            place = rank[responses[i].group] = rank.get(responses[i].group, 0) + 1
            chosen |= {i} if place <= rule.best else set()
    elif rule.top is not None:
        chosen = set(order[: math.ceil(rule.top * len(order))])
    elif rule.bottom is not None:
        upwards = sorted(range(len(responses)), key=lambda i: scores[i])
        chosen = set(upwards[: math.ceil(rule.bottom * len(order))])
    else:
        low = -math.inf if rule.above is None else rule.above
        high = math.inf if rule.below is None else rule.below
        chosen = {i for i, score in enumerate(scores) if low < score < high}
    return [response for i, response in enumerate(responses) if i in chosen]
