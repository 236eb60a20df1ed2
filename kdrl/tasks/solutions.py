"""Worked solutions that a student can be trained on, and their corruption for teachers.

A corrupted solution has one wrong intermediate result and goes on correctly from it: the text up to and including the
wrong result is context only (`untrained_spans`), the rest teaches a model to continue from its own mistakes.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kdrl.errors import UserError
from kdrl.registry import Registry
from kdrl.seeds import derive
from kdrl.tasks.base import Problem
from kdrl.tasks.config import TaskConfig
from kdrl.tasks.userfn import is_reference, load_function

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Solution:
    """A solution's text and the character spans [start, end) of it that get no loss."""

    text: str
    untrained_spans: tuple[tuple[int, int], ...] = ()


class Writer(Protocol):
    """Item -> worked solution. `corrupt` is a Random to draw a mistake from; a writer may do without the parameter."""

    def __call__(self, item: Item, /, *, corrupt: random.Random | None = None) -> Solution | str:
        """Write the solution."""
        ...


WRITERS: Registry[Callable[..., Solution | str]] = Registry("solution writer")
register_solution = WRITERS.add


class Solver:
    """Adds worked solutions to problems as the recipe says; raises UserError for an unknown or unfit writer."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self._share, self._seed, self._generated = config.corrupt, seed, config.kind == "reasoning_gym"
        self._writer: Callable[..., Solution | str] | None = None
        if config.solution is None:
            return
        name = config.solution
        self._name = name
        self._writer = load_function(name, "task.solution") if is_reference(name) else WRITERS.get(name)
        if self._share and "corrupt" not in inspect.signature(self._writer).parameters:
            raise UserError(f"the solution writer {name!r} has no parameter `corrupt`: task.corrupt cannot be used.")

    def held_out(self, problem: Problem, index: int) -> Problem:
        """The problem with its right solution."""
        return self._solve(problem, None)

    def train(self, problem: Problem, index: int) -> Problem:
        """The problem with its solution, a share of positions with a mistake; a function of (seed, index)."""
        mistake = None
        if self._share:
            draw = random.Random(derive(self._seed, "corrupt", index))
            mistake = draw if draw.random() < self._share else None
        return self._solve(problem, mistake)

    def _solve(self, problem: Problem, mistake: random.Random | None) -> Problem:
        if self._writer is None:
            return problem
        # A writer sees the generator's item (question, answer, metadata), or the columns of a data row.
        item = problem.meta["item"] if self._generated else {**problem.meta, "answer": problem.answer}
        options = {"corrupt": mistake} if mistake is not None else {}
        try:
            written = self._writer(item, **options)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"the solution writer {self._name!r} does not fit this task ({type(error).__name__}: {error})."
            ) from error
        solution = Solution(written) if isinstance(written, str) else written
        return replace(problem, solution=solution.text, untrained_spans=solution.untrained_spans)
