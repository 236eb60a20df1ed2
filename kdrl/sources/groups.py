"""Two writers in one group: preference pairs, and a teacher's traces among the student's rollouts."""

from __future__ import annotations

from collections.abc import Mapping

from kdrl.batch import Response
from kdrl.sources.base import Request, Source, by_group


class TogetherSource(Source):
    """Every problem's group holds the responses of both writers, the first one's first.

    The second writer has draws of its own: with the first one's numbers the two would be correlated.
    """

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second = first, second

    def parts(self) -> Mapping[str, Source]:
        """Both writers."""
        return {"first": self.first, "second": self.second}

    def write(self, request: Request) -> list[Response]:
        """Both writers' responses, group by group."""
        return by_group([*self.first.write(request), *self.second.write(request.apart("second"))])
