"""Inputs, traces and rows made by hand for the tests of the data commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import raw_recipe, section, with_teacher

from kdrl.data.inputs import Inputs, open_inputs
from kdrl.data.traces import Trace
from kdrl.tasks import Problem


def recipe_file(world: Path, folder: Path, **change: Any) -> Path:
    """A recipe with a teacher over the tiny world."""
    path = folder / "mine.yaml"
    path.write_text(json.dumps(raw_recipe(world, "kdrl", **{**with_teacher(world), **change})))
    return path


def inputs_of(world: Path, folder: Path, **change: Any) -> Inputs:
    return open_inputs(recipe_file(world, folder, **change))


def trace(sample: int, correct: bool, tokens: int = 3, text: str | None = None, ended: bool = True) -> Trace:
    problem = Problem("p", "1+2=", "3")
    return Trace(problem, sample, text or f"t{sample}", tokens, ended, float(correct), correct)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_file(folder: Path, data: Path, *, student: bool = False, **task: Any) -> Path:
    """A YAML file with a task only, or with a new student too."""
    raw: dict[str, Any] = {"task": {"path": str(data), **task}, "device": "cpu"}
    if student:
        raw["student"] = section()
    path = folder / "task.yaml"
    path.write_text(json.dumps(raw))
    return path
