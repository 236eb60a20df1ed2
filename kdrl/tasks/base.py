"""What a task is made of: problems, streams of them, and what is known of a response when it is scored."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

SPLITS = ("train", "development", "test")

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """One prompt with its reference answer.

    `id` is a hash of the user text; `prompt` is that text, or chat messages when there is a system prompt or the data
    has turns. `solution` is what a response should read, None where the task has none; `untrained_spans` are character
    spans [start, end) of it that must get no loss (they are context only). `meta` is the task's own item.
    """

    id: str
    prompt: Prompt
    answer: Any
    solution: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    untrained_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ResponseInfo:
    """What shaping needs to know of a response: its tokens, whether the limit cut it, and that limit."""

    tokens: int
    truncated: bool
    max_tokens: int


@dataclass(frozen=True)
class Verdict:
    """A scored response: shaped `reward`, `correct` by the verifier alone, `status` ok, timeout, crash or printed.

    `feedback` is what the verifier says about it in words, None where it gives a score alone.
    """

    reward: float
    correct: bool
    status: str
    feedback: str | None = None


@runtime_checkable
class ProblemStream(Protocol):
    """Random access to problems, a function of (configuration, seed, index): a position is all a resume needs."""

    size: int | None
    """Problems in one epoch; None when there is no end. An index beyond it starts the next, reshuffled epoch."""
    skipped: Counter[str]
    """Reason to number of problems left out."""

    def __getitem__(self, index: int) -> Problem: ...


@runtime_checkable
class Task(Protocol):
    """Something with a stream of problems for `train`, `development` and `test`."""

    def problems(self, split: str) -> ProblemStream:
        """The stream of a split; raises UserError when it has no problems."""
        ...


def user_text(prompt: Prompt) -> str:
    """The text that identifies a problem: the prompt without its system message."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn.get("role") != "system"]
    if len(turns) == 1 and turns[0].get("role") == "user":
        return str(turns[0].get("content"))
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


def rewritten(prompt: Prompt, write: Callable[[str], str]) -> Prompt:
    """The prompt with `write` applied to its text; in a chat, to that of the last message."""
    if isinstance(prompt, str):
        return write(prompt)
    *before, last = prompt
    return [*before, {**last, "content": write(last["content"])}]


def problem_id(prompt: Prompt) -> str:
    """A stable 16-digit hash of the user text; equal texts have equal ids in every run and recipe."""
    return hashlib.sha256(user_text(prompt).encode()).hexdigest()[:16]


def take(stream: ProblemStream, count: int) -> Sequence[Problem]:
    """The first `count` problems of a stream, or its whole epoch where that is shorter."""
    return [stream[index] for index in range(count if stream.size is None else min(count, stream.size))]
