"""What is met by doing less at once: a device out of memory halves a micro-batch, or the rows written at once, once.

Neither number changes a result, so the work that failed is done anew from its start and the run goes on as if it had
been started with the smaller one. Left out: fitting a teacher (`teacher.prepare`), and a CPU, where nobody is told.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdrl.batch import Rollouts, last_layout
from kdrl.engines import Sample, TorchEngine
from kdrl.engines.joint import JointEngine, JointSample, Rule
from kdrl.errors import RunError
from kdrl.features.live import Features
from kdrl.models import LoadedModel
from kdrl.recipe import Recipe
from kdrl.update import Scored, Tally, Updater

log = logging.getLogger("kdrl")

T = TypeVar("T")


@dataclass
class Limit:
    """A recipe's number that decides memory alone, held as `attribute` by everything that follows it."""

    option: str
    value: int
    attribute: str
    halved: bool = False
    _followers: list[Any] = field(default_factory=list, repr=False)

    def follow(self, follower: T) -> T:
        """Keep a part at this number from now on; returns it."""
        self._followers.append(follower)
        setattr(follower, self.attribute, self.value)
        return follower

    def set(self, value: int) -> None:
        """Make it a smaller number, for good."""
        self.value, self.halved = value, True
        for follower in self._followers:
            setattr(follower, self.attribute, value)

    def run(self, work: Callable[[], T], used: int | None = None, undo: Callable[[], None] = lambda: None) -> T:
        """`work()`; out of memory, half of what it used at once and, after `undo`, once more.

        That is `used` at most, or by default the tokens of the micro-batch that did not fit, so that it is split.
        Raises RunError when half is not enough, was done before, or splits nothing: one response, or one token.
        """
        with last_layout() as last:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if used is None:
                    used = last.tokens if last.rows > 1 else 0
                half = min(self.value, used) // 2
                if self.halved or half < 1:
                    raise RunError(self._again(error)) from error
        # Here and not above: a handler keeps the failed work's tensors alive.
        undo()
        _free()
        self.set(half)
        log.warning("the device ran out of memory: %s is %d from now on, which changes no result", self.option, half)
        try:
            return work()
        except torch.OutOfMemoryError as error:
            raise RunError(self._again(error)) from error

    def _again(self, error: BaseException) -> str:
        state = f"was halved to {self.value:,} before" if self.halved else f"is {self.value:,} and cannot be halved"
        return (
            f"the device ran out of memory, and {self.option} {state} ({str(error).splitlines()[0]}). What is saved is "
            f"whole: lower {self.option} in the run's recipe.yaml, which changes no result, or set "
            "student.gradient_checkpointing there, and go on with: kdrl train --resume RUN"
        )


@dataclass
class Limits:
    """The two of a run."""

    tokens: Limit
    rows: Limit

    @classmethod
    def of(cls, recipe: Recipe) -> Limits:
        """As a recipe has them."""
        return cls(
            Limit("optimizer.micro_batch_tokens", recipe.optimizer.micro_batch_tokens, "budget"),
            Limit("rollout.rows", recipe.rollout.rows, "max_rows"),
        )

    def state(self) -> dict[str, int]:
        """Those that were halved, by their option; for checkpoints and metrics."""
        return {limit.option: limit.value for limit in (self.tokens, self.rows) if limit.halved}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on with what `state` gave, unless the recipe has been given less since."""
        for limit in (self.tokens, self.rows):
            if limit.option in state and state[limit.option] < limit.value:
                limit.set(state[limit.option])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def told() -> Iterator[None]:
    """Where no smaller number helps (weights, optimizer, evaluation), at least a sentence: raises RunError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the device ran out of memory ({str(error).splitlines()[0]}). What is saved is whole. "
            "`kdrl train RECIPE --dry-run` shows what needs how much; a smaller model, student.lora or "
            "optimizer.kind=adamw_8bit needs less."
        ) from error


class SparingUpdater(Updater):
    """An updater that halves its micro-batches once where memory runs out, and sums the gradient from the start."""

    def __init__(self, student: LoadedModel, limit: Limit, features: Features | None = None) -> None:
        super().__init__(student, limit.value, features)
        self._limit = limit
        limit.follow(self)
        if features is not None:
            limit.follow(features)

    def score_policy(
        self, rollouts: Rollouts, temperature: float, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Updater.score_policy`."""
        plain = super().score_policy
        return self._limit.run(lambda: plain(rollouts, temperature, rows))

    def probe(self, scored: Scored, keep_N: Tensor, comparison: Any) -> Tensor:
        """As `Updater.probe`."""
        plain = super().probe
        return self._limit.run(lambda: plain(scored, keep_N, comparison))

    def accumulate(self, scored: Scored, rows: Sequence[int], tally: Tally | None = None) -> float:
        """As `Updater.accumulate`; gradients must be clear before it."""
        plain, before = super().accumulate, copy.deepcopy(tally)

        def undo() -> None:
            self.clear()
            if tally is not None:
                vars(tally).update(vars(before))

        return self._limit.run(lambda: plain(scored, rows, tally), undo=undo)


class SparingEngine(TorchEngine):
    """An engine that writes half as many rows at once from where memory runs out; the samples are the same."""

    def __init__(self, loaded: LoadedModel, limit: Limit, filtered_ok: bool = False) -> None:
        super().__init__(loaded, limit.value, filtered_ok)
        self.limit = limit
        limit.follow(self)

    def generate(self, prompts: Sequence[Sequence[int]], *, samples: int, **options: Any) -> list[list[Sample]]:
        """As `TorchEngine.generate`."""
        plain = super().generate
        drawn = samples if options.get("temperature", 1.0) > 0 else 1  # greedy samples of a prompt are one row
        return self.limit.run(lambda: plain(prompts, samples=samples, **options), len(prompts) * drawn)


class SparingJoint(JointEngine):
    """The same for two models that write together."""

    def __init__(self, student: SparingEngine, teacher: SparingEngine) -> None:
        super().__init__(student, teacher)
        self.limit = student.limit

    def generate(
        self, prompts: Sequence[Sequence[int]], rule: Rule, *, samples: int, **options: Any
    ) -> list[list[JointSample]]:
        """As `JointEngine.generate`."""
        plain = super().generate
        return self.limit.run(lambda: plain(prompts, rule, samples=samples, **options), len(prompts) * samples)
