"""Streams of problems: a file's in reshuffled epochs, a generator's filtered by split and free of repetitions."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kdrl.errors import UserError, nearest
from kdrl.seeds import derive
from kdrl.tasks.base import SPLITS, Problem, ProblemStream, user_text

Drawn = Callable[[int], tuple[str, bytes, Problem]]
"""Raw draw number -> (its split, the digest of its text, the problem)."""
Finish = Callable[[Problem, int], Problem]
"""Adds the worked solution to a problem at a position."""


def check_split(split: str) -> None:
    """Refuse a split that does not exist."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}{nearest(split, SPLITS)}")


@dataclass(frozen=True)
class PromptLimit:
    """The longest prompt in tokens and what to do with a longer one; `tokens` counts them."""

    most: int | None = None
    refuse: bool = False
    tokens: Callable[[Problem], int] | None = None

    def fits(self, problem: Problem) -> bool:
        """Whether the problem is short enough; raises UserError for a longer one when asked to refuse."""
        if self.most is None or self.tokens is None or (count := self.tokens(problem)) <= self.most:
            return True
        if self.refuse:
            where = problem.meta.get("where") or f"starts {user_text(problem.prompt)[:60]!r}"
            raise UserError(
                f"a prompt has {count} tokens, task.max_prompt_tokens is {self.most} ({where}); "
                "raise it, shorten the prompt or set task.on_long: skip."
            )
        return False


def permutation(size: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch; a function of its arguments."""
    order = list(range(size))
    random.Random(derive(seed, "epoch", epoch)).shuffle(order)
    return order


class ListStream:
    """Finitely many problems, in order (`seed` None) or shuffled anew each epoch."""

    def __init__(self, problems: Sequence[Problem], seed: int | None, finish: Finish, skipped: Counter[str]) -> None:
        self.size: int | None = len(problems)
        self.skipped = skipped
        self._problems, self._seed, self._finish = problems, seed, finish
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, index: int) -> Problem:
        if index < 0:
            raise IndexError(index)
        epoch, place = divmod(index, len(self._problems))
        if self._seed is not None:
            if self._order[0] != epoch:
                self._order = (epoch, permutation(len(self._problems), self._seed, epoch))
            place = self._order[1][place]
        return self._finish(self._problems[place], index)


class WeightedStream:
    """Finitely many problems, each met in proportion to its weight: floor or ceil of n w / sum w times of n.

    Systematic resampling over a fresh order each epoch, so the expected number is exact; a function of (seed, index).
    Raises UserError when all weights are 0.
    """

    def __init__(
        self, problems: Sequence[Problem], weights: Sequence[float], seed: int, finish: Finish, skipped: Counter[str]
    ) -> None:
        self.size: int | None = len(problems)
        self.skipped = skipped
        self._problems, self._weights, self._seed, self._finish = problems, weights, seed, finish
        if not sum(weights) > 0:
            raise UserError("the weights of all training problems (task.columns.weight) are 0; give some of them more.")
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, index: int) -> Problem:
        if index < 0:
            raise IndexError(index)
        epoch, place = divmod(index, len(self._problems))
        if self._order[0] != epoch:
            self._order = (epoch, self._draw(epoch))
        return self._finish(self._problems[self._order[1][place]], index)

    def _draw(self, epoch: int) -> list[int]:
        n = len(self._problems)
        draw = random.Random(derive(self._seed, "weights", epoch))
        order = permutation(n, self._seed, epoch)
        step = math.fsum(self._weights) / n
        point, reached = draw.random() * step, 0.0
        chosen: list[int] = []
        for place in order:
            reached += self._weights[place]
            while len(chosen) < n and point + len(chosen) * step < reached:
                chosen.append(place)
        last = next(place for place in reversed(order) if self._weights[place] > 0)
        chosen += [last] * (n - len(chosen))  # rounding may leave the last point at the very end
        draw.shuffle(chosen)
        return chosen


class EpochStream:
    """The first `size` problems of another stream, reshuffled each epoch; solutions are those of that stream."""

    def __init__(self, inner: ProblemStream, size: int, seed: int) -> None:
        self.size: int | None = size
        self.skipped = inner.skipped
        self._inner, self._n, self._seed = inner, size, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, index: int) -> Problem:
        if index < 0:
            raise IndexError(index)
        epoch, place = divmod(index, self._n)
        if self._order[0] != epoch:
            self._order = (epoch, permutation(self._n, self._seed, epoch))
        return self._inner[self._order[1][place]]


@dataclass
class _Window:
    drawn: Drawn
    next_draw: int = 0
    seen: set[bytes] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


class GeneratedStream:
    """Problems of one split out of an endless generator, distinct in text within a window of positions.

    `window` None is one endless window (held-out splits). When the texts of a window run out, a UserError says how many
    there are, or with `repeats` (training) they come again. That they have run out is inferred from a long row of
    repetitions, so a rare text may still be missing.
    """

    def __init__(
        self,
        draws: Callable[[int], Drawn],
        split: str,
        finish: Finish,
        limit: PromptLimit,
        share: float,
        window: int | None,
        repeats: bool,
    ) -> None:
        self.size: int | None = None
        self.skipped: Counter[str] = Counter()
        self._draws, self._split, self._finish, self._limit = draws, split, finish, limit
        self._share, self._window, self._repeats = share, window, repeats
        self._windows: OrderedDict[int, _Window] = OrderedDict()

    def __getitem__(self, index: int) -> Problem:
        if index < 0:
            raise IndexError(index)
        number, place = (0, index) if self._window is None else divmod(index, self._window)
        window = self._open(number)
        while len(window.problems) <= place:
            self._extend(window)
        return self._finish(window.problems[place], index)

    def _open(self, number: int) -> _Window:
        if number not in self._windows:
            self._windows[number] = _Window(self._draws(number))
            if len(self._windows) > 2:
                self._windows.popitem(last=False)
        self._windows.move_to_end(number)
        return self._windows[number]

    def _extend(self, window: _Window) -> None:
        """Draw until one problem more is found."""
        again = misses = too_long = 0
        patience = 100 + 5 * len(window.seen)
        while True:
            split, key, problem = window.drawn(window.next_draw)
            window.next_draw += 1
            misses += 1
            if split == self._split:
                if key in window.seen:
                    again += 1
                elif self._limit.fits(problem):
                    window.seen.add(key)
                    window.problems.append(problem)
                    return
                else:
                    self.skipped["too_long"] += 1
                    too_long += 1
            if again >= patience or misses >= 10 * patience / self._share:
                self._exhausted(window, too_long)
                again = misses = too_long = 0

    def _exhausted(self, window: _Window, too_long: int) -> None:
        found = len(window.seen)
        if self._repeats and found:
            window.seen.clear()
            return
        if too_long:
            raise UserError(
                f"{too_long} problems of the {self._split} split in a row have more than {self._limit.most} prompt "
                f"tokens ({found} fit); raise task.max_prompt_tokens or make task.settings easier."
            )
        raise UserError(
            f"only {found} different {self._split} problems exist with these task.settings; ask for fewer, raise the "
            "share in task.holdout or make the settings wider."
        )
