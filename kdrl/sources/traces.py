"""Stored responses with their verdicts, as `kdrl generate` writes them; those of a problem share a group."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdrl.batch import Response
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.seeds import derive
from kdrl.sources.base import Request, Source
from kdrl.sources.text import encoded_text
from kdrl.tasks import Problem
from kdrl.tasks.base import problem_id
from kdrl.tasks.readers import read_files
from kdrl.tasks.streams import ListStream

Take = Literal["all", "right", "wrong", "pair"]
Known = Callable[[], Mapping[str, Problem]]


@dataclass(frozen=True)
class Trace:
    """One stored response."""

    text: str
    reward: float
    correct: bool
    ended: bool


@dataclass(frozen=True)
class TraceBook:
    """The traces of a file by problem id, and the problems in the order of their first trace."""

    path: str
    problems: dict[str, Problem]
    traces: dict[str, list[Trace]]

    @classmethod
    def read(cls, path: str, known: Known) -> TraceBook:
        """All lines of a file; `known` gives the task's problems for lines that name one by `id` alone.

        Raises UserError naming file and line for one that is cut off, no object, or lacks what a trace needs.
        """
        book = cls(path, {}, {})
        looked_up: Mapping[str, Problem] | None = None
        for where, row in read_files([path]):
            if row.get("prompt") is None and looked_up is None:
                looked_up = known()
            problem = _problem(row, where, looked_up or {})
            book.problems.setdefault(problem.id, problem)
            book.traces.setdefault(problem.id, []).append(_trace(row, where))
        if not book.traces:
            raise UserError(f"{path} holds no traces.")
        return book

    def stream(self, take: Take, seed: int) -> ListStream:
        """The problems that have what `take` asks for, reshuffled each epoch; the others are counted as skipped."""
        fit = [p for name, p in self.problems.items() if _fitting(self.traces[name], take)]
        if not fit:
            kinds = {"pair": "a right and a wrong trace", "right": "a right trace", "wrong": "a wrong trace"}
            raise UserError(f"no problem of {self.path} has {kinds[take]}; take other traces, or write more of them.")
        skipped: Counter[str] = Counter(
            {f"without_{take}": len(self.problems) - len(fit)} if len(fit) < len(self.problems) else {}
        )
        return ListStream(fit, seed, lambda problem, index: problem, skipped)


def _problem(row: Mapping[str, Any], where: str, known: Mapping[str, Problem]) -> Problem:
    prompt, name = row.get("prompt"), row.get("id")
    if prompt is not None:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(t, dict) for t in prompt)):
            raise UserError(f"{where}: a trace's prompt is text or a list of messages, not {str(prompt)[:60]!r}.")
        meta = {k: v for k, v in row.items() if k not in ("prompt", "answer", "solution")}
        return Problem(problem_id(prompt), prompt, row.get("answer"), row.get("solution"), meta)
    if name is None:
        raise UserError(f"{where}: a trace needs its prompt, or the id of a problem of the task.")
    if name not in known:
        raise UserError(f"{where}: the task has no problem of id {name!r}, and the trace has no prompt of its own.")
    return known[name]


def _trace(row: Mapping[str, Any], where: str) -> Trace:
    text, right, reward = row.get("response"), row.get("correct"), row.get("reward")
    if not isinstance(text, str):
        raise UserError(f"{where}: a trace needs its response as text, not {text!r}.")
    if not isinstance(right, bool):
        raise UserError(f"{where}: a trace needs `correct`, true or false, not {right!r}; `kdrl generate` writes it.")
    if reward is None:
        reward = float(right)
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise UserError(f"{where}: a trace's reward is a number, not {reward!r}.")
    return Trace(text, float(reward), right, bool(row.get("ended", True)))


def _fitting(traces: Sequence[Trace], take: Take) -> list[Trace]:
    """The traces to draw from; empty where `take` cannot be had."""
    if take == "all":
        return list(traces)
    if take == "pair":
        return list(traces) if len({t.correct for t in traces}) == 2 else []
    return [t for t in traces if t.correct is (take == "right")]


class TraceSource(Source):
    """A problem's traces in its group, cut at `max_tokens`; at most `most` of them, drawn anew every time.

    A problem without fitting traces gets none and is counted.
    """

    def __init__(
        self, book: TraceBook, student: LoadedModel, max_tokens: int, take: Take, most: int | None = None
    ) -> None:
        self.book, self.student, self.max_tokens, self.most = book, student, max_tokens, most
        self.take: Take = take

    def write(self, request: Request) -> list[Response]:
        """Stored responses, with the verdicts of the file."""
        out: list[Response] = []
        for problem, group in zip(request.problems, request.groups, strict=True):
            traces = self._draw(problem.id, random.Random(derive(request.seed, "traces", group)))
            request.out.tell("without_trace", not traces)
            prompt = encode_prompt(self.student, problem.prompt)
            out += [self._response(trace, problem, group, prompt) for trace in traces]
        request.out.generated += len(out)
        return out

    def _draw(self, name: str, draw: random.Random) -> list[Trace]:
        traces = _fitting(self.book.traces.get(name, []), self.take)
        if self.take == "pair" and traces:
            return [draw.choice([t for t in traces if t.correct is right]) for right in (True, False)]
        if self.most is not None and len(traces) > self.most:
            return draw.sample(traces, self.most)
        return traces

    def _response(self, trace: Trace, problem: Problem, group: int, prompt: list[int]) -> Response:
        ids, _ = encoded_text(self.student, trace.text)
        ids = ids if trace.ended else ids[:-1] or ids
        return Response(
            problem,
            group,
            prompt,
            ids[: self.max_tokens],
            "teacher",
            trace.ended and len(ids) <= self.max_tokens,
            trace.text,
            reward=trace.reward,
            correct=trace.correct,
            judged=True,
        )
