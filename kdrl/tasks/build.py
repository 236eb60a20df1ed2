"""From the task section of a recipe to a live task; the registry of tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kdrl.errors import UserError, nearest
from kdrl.registry import Registry
from kdrl.tasks.base import Problem, Task
from kdrl.tasks.config import TaskConfig
from kdrl.tasks.data import DataTask
from kdrl.tasks.reasoning_gym import ReasoningGymTask
from kdrl.tasks.streams import PromptLimit
from kdrl.tasks.userfn import is_reference, load_function

TASKS: Registry[Callable[..., Any]] = Registry("task")
register_task = TASKS.add

_BUILT_IN = ("data", "reasoning_gym")
# What kdrl does to rows; a task that brings its own streams has done all that itself.
_ROW_OPTIONS = (
    "dataset",
    "columns",
    "template",
    "split_by",
    "system_prompt",
    "limit",
    "solution",
    "max_prompt_tokens",
    "holdout",
    "reference_extract",
)


def build_task(config: TaskConfig, seed: int, prompt_tokens: Callable[[Problem], int] | None = None) -> Task:
    """The task of a recipe. `prompt_tokens` counts a prompt's tokens after the chat template.

    Raises UserError for anything in the section that is unknown, missing, unreadable or has no effect.
    """
    if config.max_prompt_tokens is not None and prompt_tokens is None:
        raise UserError("task.max_prompt_tokens needs a tokenizer to count with, and none was given.")
    limit = PromptLimit(config.max_prompt_tokens, config.on_long == "refuse", prompt_tokens)
    if config.kind == "reasoning_gym":
        return ReasoningGymTask(config, seed, limit)
    return DataTask(config, seed, limit) if config.kind == "data" else _registered(config, seed, limit)


def _registered(config: TaskConfig, seed: int, limit: PromptLimit) -> Task:
    name = config.kind
    if is_reference(name):
        factory = load_function(name, "task.name")
    elif name in TASKS:
        factory = TASKS.get(name)
    else:
        raise UserError(f"no task is called {name!r}{nearest(name, [*TASKS, *_BUILT_IN])}")
    if config.dataset is not None:
        raise UserError(f"task.dataset has no meaning for the task {name!r}; drop it.")
    _check_settings(name, factory, config.settings)
    made = factory(**config.settings)
    if callable(getattr(made, "problems", None)):
        return _own_streams(name, made, config)
    if not isinstance(made, Sequence) or not made:
        raise UserError(
            f"the task {name!r} returned a {type(made).__name__}; it must be a filled list or have .problems."
        )
    if all(isinstance(entry, Problem) for entry in made):
        _refuse_options(name, config, ("columns", "template", "system_prompt", "reference_extract"))
    return DataTask(config, seed, limit, lambda split: _rows(name, made) if split == "train" else iter(()))


def _rows(name: str, made: Sequence[Any]) -> Iterator[tuple[str, Mapping[str, Any] | Problem]]:
    for number, entry in enumerate(made, 1):
        if not isinstance(entry, Mapping | Problem):
            raise UserError(f"entry {number} of the task {name!r} is a {type(entry).__name__}, not a dict or Problem.")
        yield f"{name} entry {number}", entry


def _own_streams(name: str, made: Any, config: TaskConfig) -> Task:
    _refuse_options(name, config, _ROW_OPTIONS)
    return made


def _refuse_options(name: str, config: TaskConfig, options: Sequence[str]) -> None:
    for option in config.changed(*options):
        raise UserError(f"task.{option} has no effect on what the task {name!r} makes; drop it.")


def _check_settings(name: str, factory: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        known = list(inspect.signature(factory).parameters)
        unknown = next((key for key in settings if key not in known), None)
        why = f"no setting {unknown!r}{nearest(unknown, known)}" if unknown and known else str(error)
        raise UserError(f"task.settings of {name!r}: {why}") from error
