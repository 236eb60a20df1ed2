"""Reading a run directory: whatever is missing or broken becomes a sentence, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdrl.errors import UserError
from kdrl.jsonlines import read_lines
from kdrl.results import EvaluationResult


@dataclass
class Run:
    """What a run directory holds; `notes` says in words what it does not."""

    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]
    evaluations: dict[str, EvaluationResult]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def final(self) -> EvaluationResult | None:
        """The held-out evaluation of the finished student."""
        return self.evaluations.get("final")

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, over the steps that have it as a number."""
        pairs = [(row["step"], row[key]) for row in self.rows if _number(row.get(key)) and _number(row.get("step"))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]

    def total(self, key: str) -> float | None:
        """Sum over the steps, None when the metric was never logged."""
        values = self.column(key)[1]
        return sum(values) if values else None

    def last(self, key: str) -> float | None:
        """The last value, None when the metric was never logged."""
        values = self.column(key)[1]
        return values[-1] if values else None

    def keys(self, prefix: str) -> list[str]:
        """Names of logged metrics that start with `prefix`, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))

    @property
    def teacher_calls_saved(self) -> float | None:
        """Share of the responses that masking kept from the teacher; None without a teacher."""
        # Both are counted up over the run.
        asked, saved = self.last("teacher_calls"), self.last("teacher_calls_saved")
        if asked is None and saved is None:
            return None
        whole = (asked or 0.0) + (saved or 0.0)
        return (saved or 0.0) / whole if whole else None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_run(path: Path) -> bool:
    """Whether the folder holds anything that a run writes."""
    return path.is_dir() and any((path / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "evaluation.json"))


def read_run(path: str | Path) -> Run:
    """Read a run directory; raises UserError only when it is none at all."""
    path = Path(path)
    if not is_run(path):
        what = "does not exist" if not path.exists() else "holds no recipe.yaml, metrics.jsonl or evaluation.json"
        raise UserError(f"{path} {what}, so it is not a run; give the folder that kdrl train wrote (--output)")
    notes: list[str] = []
    recipe_text = _text(path / "recipe.yaml", notes) or ""
    recipe = _parsed(recipe_text, yaml.safe_load, "recipe.yaml", notes)
    environment = _parsed(_text(path / "environment.json", notes), json.loads, "environment.json", notes)
    rows, row_notes = read_lines(path / "metrics.jsonl")
    rollouts, rollout_notes = read_lines(path / "rollouts.jsonl") if (path / "rollouts.jsonl").exists() else ([], [])
    unnumbered = [row for row in rows if not _number(row.get("step"))]
    if unnumbered:
        row_notes.append(f"{len(unnumbered)} lines of metrics.jsonl have no step and are left out")
    rows = [row for row in rows if _number(row.get("step"))]
    if not rows:
        row_notes.append("no training step was logged, so there are no curves")
    notes += row_notes + rollout_notes
    evaluations = _evaluations(path / "evaluation.json", notes)
    return Run(path, recipe, recipe_text, environment, rows, rollouts, evaluations, notes)


def _text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        notes.append(f"{path.name} does not exist")
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"{path.name} cannot be read ({error})")
    return None


def _parsed(text: str | None, parse: Callable[[str], Any], name: str, notes: list[str]) -> dict[str, Any]:
    if text is None or not text.strip():
        return {}
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError) as error:
        notes.append(f"{name} is broken ({' '.join(str(error).split())[:120]})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{name} is not a mapping")
        return {}
    return value


def _evaluations(path: Path, notes: list[str]) -> dict[str, EvaluationResult]:
    if not path.exists():
        notes.append("evaluation.json does not exist: the run is not finished, or has no held-out evaluation")
        return {}
    raw = _parsed(_text(path, notes), json.loads, path.name, notes)
    found = {}
    for name in ("final", "teacher", "start"):
        if raw.get(name) is None:
            continue
        try:
            found[name] = EvaluationResult.from_dict(raw[name])
        except UserError as error:
            notes.append(f"evaluation.json, {name}: {error}")
    if "final" not in found:
        notes.append("evaluation.json has no evaluation of the finished student")
    return found
