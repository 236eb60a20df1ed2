"""Which teacher a problem belongs to, by a column of its data or its generator's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdrl.errors import UserError, nearest
from kdrl.tasks.base import Problem
from kdrl.teachers.combined import RouteConfig


def columns_of(problem: Problem) -> dict[str, Any]:
    """Everything that is known of a problem beside prompt and answer: metadata first, then item, then columns."""
    item = problem.meta.get("item")
    inner = item if isinstance(item, Mapping) else {}
    metadata = inner.get("metadata")
    return {**(metadata if isinstance(metadata, Mapping) else {}), **inner, **problem.meta}


def route_of(config: RouteConfig, problem: Problem, where: str = "teacher") -> str:
    """The name of the teacher; raises UserError for a problem without the column, or with a value of no teacher.

    `where` is the place of the section in the recipe.
    """
    columns = columns_of(problem)
    if config.by not in columns:
        raise UserError(
            f"{where}.route.by={config.by} is no column of the problem {problem.id}{nearest(config.by, columns)}"
        )
    value = str(columns[config.by])
    name = config.to.get(value, config.otherwise)
    if name is None:
        raise UserError(
            f"{where}.route names no teacher for {config.by}={value!r}; add it to route.to, or set route.otherwise."
        )
    return name
