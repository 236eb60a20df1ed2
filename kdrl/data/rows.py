"""Rows of a data set as `kdrl select` sees them: prompt, response, verdict; and files of rows written back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl.errors import UserError
from kdrl.jsonlines import plain
from kdrl.tasks import Problem, TaskConfig, build_task
from kdrl.tasks.base import user_text
from kdrl.tasks.data import DataTask
from kdrl.tasks.readers import ENDINGS


@dataclass(frozen=True)
class Row:
    """One row: where it stands, its columns, its problem, and the response that is scored (None: it has none)."""

    where: str
    columns: Mapping[str, Any]
    problem: Problem
    response: str | None

    def wanted(self) -> str:
        """The response; raises UserError when there is none."""
        if self.response is None:
            raise UserError(
                f"{self.where} has no response to score: neither `response` nor `solution`. Name its column with "
                "task.columns.solution=COLUMN."
            )
        return self.response

    def text(self) -> str:
        """Prompt and response in one."""
        return f"{user_text(self.problem.prompt)}\n{self.response or ''}"


def load_rows(config: TaskConfig, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Training rows in the order of the file, and those that `task.holdout` keeps from training.

    The response is the column `response` (what `kdrl generate` wrote), else the worked solution;
    `task.columns.solution` names another. Raises UserError for generated tasks, which have no rows, and for no rows.
    """
    if config.kind != "data":
        raise UserError(
            f"task.name is {config.kind!r}, which has no rows to select from; write some with `kdrl generate` first."
        )
    if config.limit is not None or config.max_prompt_tokens is not None:
        raise UserError("task.limit and task.max_prompt_tokens have no effect on select; leave them to training.")
    task = build_task(config, seed)
    assert isinstance(task, DataTask)
    shares = config.holdout.model_dump() if config.holdout else {}
    held = [_row(config, *row) for split, share in shares.items() if share for row in task.rows(split)]
    rows = [_row(config, *row) for row in task.rows("train")]
    if not rows:
        raise UserError("the data set has no training rows.")
    return rows, held


def _row(config: TaskConfig, where: str, columns: Mapping[str, Any], problem: Problem) -> Row:
    named = "solution" in config.columns
    response = problem.solution if named else columns.get("response", problem.solution)
    return Row(where, columns, problem, None if response is None else str(response))


def check_output(path: Path) -> None:
    """Raise UserError unless rows can be written to a new file of this name."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--output {path} ends in {path.suffix!r}; known endings: {', '.join(ENDINGS)}.")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}.")
    if path.exists():
        raise UserError(f"--output {path} exists already; choose another name or remove it.")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows in the format of the file's ending, whole or not at all; raises UserError."""
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix.lower() == ".parquet":
            _write_parquet(part, rows)
        else:
            part.write_text(_text(path, rows), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written: {error.strerror or error}; free some space first.") from error


def _text(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    kind = path.suffix.lower()
    if kind == ".csv":
        return _csv(path, rows)
    lines = [json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in rows]
    return "".join(f"{line}\n" for line in lines) if kind == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    for row in rows:
        nested = next((name for name, value in row.items() if isinstance(value, list | dict)), None)
        if nested is not None:
            raise UserError(f"--output {path}: column {nested!r} holds lists, which CSV cannot; choose .jsonl.")
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = pyarrow.table({name: pyarrow.array([row.get(name) for row in rows]) for name in names})
        pyarrow.parquet.write_table(table, path)
    except pyarrow.ArrowException as error:
        path.unlink(missing_ok=True)
        raise UserError(f"the rows do not fit into Parquet columns ({error}); choose .jsonl.") from error
