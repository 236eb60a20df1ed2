"""Any reasoning-gym task by name and settings: problems without end, split by text."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import lru_cache
from typing import Any

from kdrl.errors import UserError, nearest
from kdrl.seeds import derive
from kdrl.tasks.base import Problem, ProblemStream, problem_id
from kdrl.tasks.config import HoldoutConfig, TaskConfig
from kdrl.tasks.render import render
from kdrl.tasks.solutions import Solver
from kdrl.tasks.splits import split_of
from kdrl.tasks.streams import Drawn, EpochStream, GeneratedStream, PromptLimit, check_split

WINDOW = 1024
"""Positions of the training stream that share one seed and repeat no text; a resume redraws at most so many."""
_SIZE = 500
"""Items of one data set, reasoning-gym's default: some tasks make all of them at once, or refuse larger sizes."""

# Found by drawing each task in processes of different PYTHONHASHSEED (reasoning-gym 0.1.25).
_BY_HASH_ORDER = {"codeio", "isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder"}
_BY_CHANCE = {"knight_swap"}

log = logging.getLogger(__name__)


def _warn_if_not_repeatable(dataset: str) -> None:
    """Say that a run on this task cannot be resumed to the byte, and what helps."""
    if dataset in _BY_HASH_ORDER and not os.environ.get("PYTHONHASHSEED", "").isdigit():
        log.warning(
            "reasoning-gym's %r follows Python's hash order: its problems differ from process to process, so an exact "
            "resume or comparison needs PYTHONHASHSEED=0 in the environment.",
            dataset,
        )
    elif dataset in _BY_CHANCE:
        log.warning(
            "reasoning-gym's %r does not repeat its problems, whatever the seed: a resume is not exact.", dataset
        )


def check_settings(dataset: str, settings: Mapping[str, Any]) -> None:
    """Refuse an unknown reasoning-gym task or setting; raises UserError with the nearest name."""
    datasets = _datasets()
    if dataset not in datasets:
        raise UserError(f"reasoning-gym has no task called {dataset!r}{nearest(dataset, datasets)}")
    known = {field.name for field in dataclasses.fields(datasets[dataset][1])} - {"seed", "size"}
    for key in settings:
        if key in ("seed", "size"):
            instead = "seed" if key == "seed" else "task.limit"
            raise UserError(f"task.settings.{key} is not set here: use {instead}.")
        if key not in known:
            raise UserError(f"the reasoning-gym task {dataset!r} has no setting {key!r}{nearest(key, known)}")


def _datasets() -> dict[str, Any]:
    import reasoning_gym  # noqa: F401  (registers the tasks; 1 s, so only when one is used)
    from reasoning_gym.factory import DATASETS

    return DATASETS


def make_dataset(dataset: str, settings: Mapping[str, Any], seed: int) -> Any:
    """A reasoning-gym data set; raises UserError when it refuses the settings."""
    check_settings(dataset, settings)
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(dataset, seed=seed, size=_SIZE, **settings)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"reasoning-gym refuses task.settings of {dataset!r}: {error or type(error).__name__}"
        ) from error


@lru_cache(maxsize=8)
def _cached(dataset: str, settings_json: str) -> Any:
    return make_dataset(dataset, json.loads(settings_json), seed=0)


def scoring_dataset(dataset: str, settings: Mapping[str, Any]) -> Any:
    """The data set whose `score_answer` judges responses, made once a process."""
    return _cached(dataset, json.dumps(dict(settings), sort_keys=True))


def score(response: str, problem: Problem, *, dataset: str, settings: Mapping[str, Any]) -> bool:
    """Whether the task itself gives the full score; its partial credit for near misses counts as wrong."""
    scorer = scoring_dataset(dataset, settings)
    # Some tasks print while they score (bf runs the program), which is no fault of the response.
    with redirect_stdout(io.StringIO()):
        return scorer.score_answer(answer=response, entry=problem.meta["item"]) == 1


class ReasoningGymTask:
    """Fresh problems by seed, those of a split found by drawing and keeping the texts that belong to it."""

    def __init__(self, config: TaskConfig, seed: int, limit: PromptLimit) -> None:
        assert config.dataset is not None
        self.config, self.seed, self.limit = config, seed, limit
        self.holdout = config.holdout or HoldoutConfig(development=0.1, test=0.1)
        self.solver = Solver(config, seed)
        make_dataset(config.dataset, config.settings, 0)
        _warn_if_not_repeatable(config.dataset)

    def problems(self, split: str) -> ProblemStream:
        """The stream of a split; held-out ones are the same for every seed of the run. Raises UserError."""
        check_split(split)
        share = self._share(split)
        if share <= 0:
            raise UserError(f"no problem is left for {split}: raise its share in task.holdout.")
        train = split == "train"
        stream = GeneratedStream(
            draws=lambda window: self._draws(split, window),
            split=split,
            finish=self.solver.train if train else self.solver.held_out,
            limit=self.limit,
            share=share,
            window=(self.config.limit or WINDOW) if train else None,
            repeats=train and self.config.limit is None,
        )
        return EpochStream(stream, self.config.limit, self.seed) if train and self.config.limit else stream

    def _share(self, split: str) -> float:
        shares = {"development": self.holdout.development, "test": self.holdout.test}
        return shares.get(split, 1.0 - sum(shares.values()))

    def _draws(self, split: str, window: int) -> Drawn:
        seed = self.seed if split == "train" else self.config.held_out_seed
        return _Draws(self, derive(seed, "problems", split, window))


class _Draws:
    """Raw draws of one seed: index to (split, text digest, problem)."""

    def __init__(self, task: ReasoningGymTask, seed: int) -> None:
        self.config, self.holdout = task.config, task.holdout
        self.seed, self.block, self.dataset = seed, -1, None

    def _item(self, index: int) -> Mapping[str, Any]:
        block, place = divmod(index, _SIZE)
        with redirect_stdout(io.StringIO()):
            if self.dataset is None or self.block != block:
                seed = derive(self.seed, "block", block) % 2**31
                self.block, self.dataset = block, make_dataset(str(self.config.dataset), self.config.settings, seed)
            return self.dataset[place]

    def __call__(self, index: int) -> tuple[str, bytes, Problem]:
        item = self._item(index)
        fields = {**(item.get("metadata") or {}), "question": item["question"]}
        shown = render(self.config, item["question"], fields, f"a problem of {self.config.dataset}")
        split = split_of(shown.split_key, self.holdout.development, self.holdout.test)
        problem = Problem(problem_id(shown.prompt), shown.prompt, item["answer"], meta={"item": item})
        return split, shown.key, problem
