"""A few steps of a recipe in a folder that is thrown away, with what each of them did."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kdrl.bench.flops import Cost
from kdrl.bench.machine import peak_bytes, reset_peak
from kdrl.build import Builder
from kdrl.models import LoadedModel
from kdrl.recipe import Recipe
from kdrl.repeatable import repeatable
from kdrl.teachers import TeacherConfig
from kdrl.trainer import InterruptedRunError, Trainer
from kdrl.update import Scored, Tally, Updater
from kdrl.watch import Watch


class _EnoughError(Exception):
    """As many steps as asked for are done."""


@dataclass
class Steps:
    """Counted steps: rows as in metrics.jsonl, seconds from end to end of a step, and operations of its updates."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    device: str = "cpu"
    counted_flops: bool = True

    @property
    def tokens(self) -> list[int]:
        """Response tokens of each step."""
        return [round(row["tokens"] * row["batch_responses"]) for row in self.rows]

    def phase(self, name: str) -> list[float]:
        """Seconds of a phase in each step."""
        return [row[f"time/{name}"] for row in self.rows]


class _Marks(Watch):
    """Writes what a run writes, keeps each step's row, and ends the run after enough of them."""

    def begin(self, steps: Steps, warm: int, count: int, flops: list[float]) -> None:
        self._steps, self._warm, self._count, self._flops = steps, warm, count, flops
        self._seen, self._last = 0, time.perf_counter()

    def step(self, row: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any]] = ()) -> None:
        super().step(row, rollouts)
        now, before = time.perf_counter(), self._last
        self._last = now
        self._seen += 1
        if self._seen > self._warm:
            self._steps.rows.append(dict(row))
            self._steps.seconds.append(now - before)
            self._steps.flops.append(sum(self._flops))
        self._flops.clear()
        if self._seen == self._warm + self._count:
            raise _EnoughError


def run_steps(recipe: Recipe, count: int, *, warm: int = 1, prepare: Callable[[Builder], None] | None = None) -> Steps:
    """Train `warm` steps that are not counted and `count` that are, as `kdrl train` does; nothing is kept of them.

    Schedules stand as at the start of the recipe's own number of steps; `prepare` may change what was built. Raises
    what training raises. Left out: evaluation, checkpoints, trackers, and a cache that the teacher would write to.
    """
    recipe = undisturbed(recipe, warm + count)
    found, flops = Steps(), list[float]()
    with ExitStack() as stack, repeatable():  # as a run has it
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        builder = Builder(recipe, folder, stack)
        if prepare is not None:
            prepare(builder)
        parts = builder.parts()
        stack.callback(parts.checkpoints.close)
        parts.checkpoints.claim()
        found.device = builder.device
        found.counted_flops = _count_flops(parts.updater, parts.student, flops)
        watch = _Marks(folder, recipe.log, recipe.steps, console=Console(quiet=True))
        stack.enter_context(watch)
        reset_peak(builder.device)
        watch.begin(found, warm, count, flops)
        try:
            Trainer(parts).run(watch)
        except _EnoughError:
            found.peak_bytes = peak_bytes(builder.device)
        except InterruptedRunError:
            raise InterruptedRunError("stopped; a measurement leaves nothing to go on with.") from None
    return found


def undisturbed(recipe: Recipe, steps: int) -> Recipe:
    """The recipe without what would leave something behind or stands between steps."""
    teachers = {
        name: unwritten(section) if isinstance(section, TeacherConfig) else section
        for name, section in recipe.teachers.items()
    }
    off = {"tensorboard": False, "wandb": False, "trackio": False, "project": None, "progress": "off"}
    change: dict[str, Any] = {
        "steps": max(recipe.steps, steps),
        "evaluate": recipe.evaluate.model_copy(update={"every": 0, "final_problems": 0}),
        "checkpoint": recipe.checkpoint.model_copy(update={"every": 0, "keep_best": False}),
        "log": recipe.log.model_copy(update=off),
        "teachers": teachers,
    }
    if recipe.teacher is not None:
        change["teacher"] = unwritten(recipe.teacher)
    return recipe.model_copy(update=change)


def unwritten(section: TeacherConfig) -> TeacherConfig:
    """The teacher without the cache that it would write to, so that nothing is left behind."""
    writes = section.cache is not None and section.cache.write
    return section.model_copy(update={"cache": None}) if writes else section


def _count_flops(updater: Updater, student: LoadedModel, into: list[float]) -> bool:
    """From now on every accumulation also puts down its operations; False where they cannot be counted."""
    cost, accumulate = Cost.of(student), updater.accumulate
    if cost is None:
        return False

    def counted(scored: Scored, rows: Sequence[int], tally: Tally | None = None) -> float:
        rollouts = scored.rollouts
        wanted_N = torch.zeros_like(rollouts.trained_N)
        for active in scored.active:
            wanted_N |= active.wanted_N(rollouts.row_N, rollouts.rows)
        wanted_N &= torch.isin(rollouts.row_N, torch.tensor(list(rows), device=wanted_N.device))
        into.append(cost.of_update(rollouts, wanted_N))
        return accumulate(scored, rows, tally)

    updater.accumulate = counted
    return True
