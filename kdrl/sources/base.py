"""What a source is asked for and what it gives back: a step's responses, and numbers about how they came about."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kdrl.batch import Response
from kdrl.objectives.schedules import START, Moment
from kdrl.seeds import derive
from kdrl.tasks import Problem, ResponseInfo, VerifierPool


@dataclass
class Collected:
    """A step's responses, and what happened on the way.

    `generated` counts responses that a model wrote or the data gave, kept or not; `verify_seconds` those that the step
    waited for verdicts; `told` are sums of parts and wholes.
    """

    responses: list[Response] = field(default_factory=list)
    generated: int = 0
    dropped_groups: int = 0
    verify_seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    told: dict[str, list[float]] = field(default_factory=dict)

    def tell(self, name: str, part: float, whole: float | None = None) -> None:
        """Add to a number of the step: a sum, or with `whole` a share."""
        sums = self.told.setdefault(name, [0.0, -1.0 if whole is None else 0.0])
        sums[0] += part
        sums[1] += whole or 0.0

    def numbers(self) -> dict[str, float]:
        """What was told as metrics `source/NAME`; a share of nothing is left out."""
        return {
            f"source/{name}": part if whole < 0 else part / whole for name, (part, whole) in self.told.items() if whole
        }


@dataclass(frozen=True)
class Request:
    """Problems to respond to, with the group of each and its position in the training stream.

    `seed` decides every draw of the round but those that belong to the whole step; `out` is where a source counts.
    """

    problems: tuple[Problem, ...]
    groups: tuple[int, ...]
    positions: tuple[int, ...]
    seed: int = 0
    moment: Moment = START
    out: Collected = field(default_factory=Collected)

    @classmethod
    def of(cls, problems: Sequence[Problem], first_group: int = 0, seed: int = 0, **more: Any) -> Request:
        """A request for problems in consecutive groups."""
        groups = tuple(range(first_group, first_group + len(problems)))
        return cls(tuple(problems), groups, more.pop("positions", groups), seed, **more)

    def only(self, places: Sequence[int]) -> Request:
        """The same for some of the problems."""
        problems, groups, positions = (
            tuple(column[i] for i in places) for column in (self.problems, self.groups, self.positions)
        )
        return replace(self, problems=problems, groups=groups, positions=positions)

    def apart(self, *purpose: str | int) -> Request:
        """The same with draws of its own, for a second writer of the same prompts."""
        return replace(self, seed=derive(self.seed, *purpose))


class Source:
    """Writes responses; what must survive a restart is its `state`, JSON and tensors by name."""

    def write(self, request: Request) -> list[Response]:
        """Responses to the request's problems, group by group."""
        raise NotImplementedError

    def parts(self) -> Mapping[str, Source]:
        """The sources inside this one."""
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the next step depends on beside models and settings, without that of the parts."""
        return {}, {}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave."""


def walk(source: Source, path: str = "source") -> Iterator[tuple[str, Source]]:
    """A source and all inside it, each with its dotted path."""
    yield path, source
    for name, part in source.parts().items():
        yield from walk(part, f"{path}.{name}")


def state_of(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State of a source and all inside it: JSON by path, tensors by `path/name`."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for path, part in walk(source):
        mine, more = part.state()
        if mine or more:
            values[path] = mine
            tensors |= {f"{path}/{name}": tensor for name, tensor in more.items()}
    return values, tensors


def restore_to(source: Source, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_of` gave for a source of the same recipe."""
    for path, part in walk(source):
        if path in values:
            start = f"{path}/"
            part.restore(values[path], {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})


def by_group(responses: Sequence[Response]) -> list[Response]:
    """The responses of several writers group by group, in the writers' order within each."""
    return sorted(responses, key=lambda response: response.group)


class Judge:
    """Gives responses their verdicts, each once; without a pool nothing is asked and they stay wrong."""

    def __init__(self, pool: VerifierPool | None, max_tokens: int) -> None:
        self.pool, self.max_tokens = pool, max_tokens

    def listener(
        self, problems: Sequence[Problem], read: Callable[[Sequence[int]], str]
    ) -> Callable[[int, int, Any], None] | None:
        """What an engine is to call with finished samples, whose text is verified from then on; None without a pool."""
        pool = self.pool
        if pool is None:
            return None
        return lambda prompt, _, sample: pool.send(read(sample.token_ids), problems[prompt])

    def send(self, responses: Sequence[Response]) -> None:
        """Have those without a verdict verified from now on; what was sent of any other response is cancelled."""
        if self.pool is not None:
            self.pool.send_only([(r.text, r.problem) for r in responses if not r.judged])

    def __call__(self, responses: Sequence[Response], out: Collected) -> None:
        """Wait for the verdicts of those that have none yet: reward, correct and status."""
        if self.pool is None:
            return
        asked = [r for r in responses if not r.judged]
        start = time.perf_counter()
        items = [(r.text, r.problem, ResponseInfo(len(r.token_ids), not r.ended, self.max_tokens)) for r in asked]
        for response, verdict in zip(asked, self.pool.score(items), strict=True):
            response.reward, response.correct, response.status = verdict.reward, verdict.correct, verdict.status
            response.judged, response.feedback = True, verdict.feedback
            out.statuses[verdict.status] += 1
        out.verify_seconds += time.perf_counter() - start
