"""The student or fixed data, by the toss of a coin."""

from __future__ import annotations

from collections.abc import Mapping

from kdrl.batch import Response
from kdrl.objectives.schedules import Schedule
from kdrl.seeds import derive
from kdrl.sources.base import Request, Source, by_group


def uniform(seed: int, *names: str | int) -> float:
    """A number in [0, 1) for one purpose."""
    return derive(seed, *names) / float(1 << 63)


class MixtureSource(Source):
    """GKD's mixture (2306.13649): the student with probability `share`, per step or per problem.

    A problem's whole group has one writer, so that its advantages are of one kind.
    """

    def __init__(self, student: Source, other: Source, share: Schedule, *, per_sample: bool, seed: int) -> None:
        self.student, self.other, self.share, self.per_sample, self.seed = student, other, share, per_sample, seed

    def parts(self) -> Mapping[str, Source]:
        """Both writers."""
        return {"student": self.student, "other": self.other}

    def write(self, request: Request) -> list[Response]:
        """All of one writer, or problem by problem."""
        step, share = request.moment.step, self.share.at(request.moment)
        if not self.per_sample:
            mine = uniform(self.seed, "mixture", step) < share
            return (self.student if mine else self.other).write(request)
        tosses = [uniform(self.seed, "mixture", step, group) < share for group in request.groups]
        out: list[Response] = []
        for writer, side in ((self.student, True), (self.other, False)):
            places = [i for i, mine in enumerate(tosses) if mine is side]
            if places:
                out += writer.write(request.only(places))
        return by_group(out)
