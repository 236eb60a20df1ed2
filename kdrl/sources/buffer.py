"""DistiLLM's replay: new samples, old ones, or fixed data, with a share that may grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Response
from kdrl.models import LoadedModel, encode_prompt
from kdrl.objectives.schedules import Schedule
from kdrl.sources.base import Judge, Request, Source
from kdrl.sources.mixture import uniform
from kdrl.sources.student import decoded
from kdrl.tasks import Problem


@dataclass(frozen=True)
class Entry:
    """A stored response: the position of its problem in the training stream, its tokens and its verdict."""

    position: int
    token_ids: tuple[int, ...]
    ended: bool
    reward: float
    correct: bool
    status: str


class BufferSource(Source):
    """DistiLLM's adaptive off-policy source (2402.03898), one draw r ~ U(0,1) per step.

    r < phi (1 - t/T), or r < phi while the buffer is not full: the student writes, and it is stored. Else r < phi:
    as many stored responses as the student would write, drawn without repetition, each a group of its own; the step's
    own problems are passed over. Else the other writer. Verdicts are stored with the responses.
    """

    def __init__(
        self,
        student: Source,
        other: Source,
        share: Schedule,
        size: int,
        *,
        samples: int,
        model: LoadedModel,
        judge: Judge,
        next_problem: Callable[[int], Problem],
        seed: int,
    ) -> None:
        self.student, self.other, self.share, self.samples = student, other, share, samples
        self.model, self.judge, self.next_problem, self.seed = model, judge, next_problem, seed
        self.entries: deque[Entry] = deque(maxlen=size)

    def parts(self) -> Mapping[str, Source]:
        """Both writers."""
        return {"student": self.student, "other": self.other}

    @property
    def full(self) -> bool:
        """Whether the next response pushes one out."""
        return len(self.entries) == self.entries.maxlen

    def write(self, request: Request) -> list[Response]:
        """New, replayed or fixed responses."""
        moment = request.moment
        phi, draw = self.share.at(moment), uniform(self.seed, "buffer", moment.step)
        request.out.tell("buffer_share", phi)
        if draw < phi * (1.0 - moment.step / moment.total) or (draw < phi and not self.full):
            responses = self._store(request)
        else:
            responses = self._replay(request) if draw < phi else self.other.write(request)
        request.out.tell("buffer_size", len(self.entries))
        return responses

    def _store(self, request: Request) -> list[Response]:
        responses = self.student.write(request)
        self.judge(responses, request.out)
        position = dict(zip(request.groups, request.positions, strict=True))
        self.entries.extend(
            Entry(position[r.group], tuple(r.token_ids), r.ended, r.reward, r.correct, r.status) for r in responses
        )
        return responses

    def _replay(self, request: Request) -> list[Response]:
        count = min(len(self.entries), len(request.problems) * self.samples)
        generator = torch.Generator().manual_seed(request.seed)
        chosen = torch.randperm(len(self.entries), generator=generator)[:count].tolist()
        return [self._response(self.entries[i], request.groups[0] + n) for n, i in enumerate(chosen)]

    def _response(self, entry: Entry, group: int) -> Response:
        problem = self.next_problem(entry.position)
        return Response(
            problem,
            group,
            encode_prompt(self.model, problem.prompt),
            list(entry.token_ids),
            "buffer",
            entry.ended,
            decoded(self.model, entry.token_ids),
            reward=entry.reward,
            correct=entry.correct,
            status=entry.status,
            judged=True,
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All entries: tokens, lengths and positions as tensors, the rest as JSON."""
        columns = {
            "position": [e.position for e in self.entries],
            "length": [len(e.token_ids) for e in self.entries],
            "token_ids": [token for e in self.entries for token in e.token_ids],
        }
        verdicts = [[e.ended, e.reward, e.correct, e.status] for e in self.entries]
        tensors = {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}
        return {"verdicts": verdicts}, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The entries as they were."""
        lengths = tensors["length"].tolist()
        texts = [tuple(part.tolist()) for part in tensors["token_ids"].split(lengths)]
        self.entries.clear()
        for position, text, verdict in zip(tensors["position"].tolist(), texts, values["verdicts"], strict=True):
            self.entries.append(Entry(position, text, *verdict))
