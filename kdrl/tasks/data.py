"""Problems from the user's own rows: JSONL, JSON, Parquet and CSV files, `datasets` folders and hub ids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrl.errors import UserError, nearest
from kdrl.tasks.base import Problem, ProblemStream, Prompt, problem_id, user_text
from kdrl.tasks.config import HoldoutConfig, TaskConfig
from kdrl.tasks.extract import extract
from kdrl.tasks.readers import read_files, read_hub
from kdrl.tasks.render import Rendered, keyed, render
from kdrl.tasks.solutions import Solver
from kdrl.tasks.splits import split_of
from kdrl.tasks.streams import ListStream, PromptLimit, WeightedStream, check_split

AnyRow = tuple[str, Mapping[str, Any] | Problem]
"""Where a row stands, and its columns or the finished problem."""


@dataclass(frozen=True)
class _Entry:
    problem: Problem
    shown: Rendered
    where: str
    row: Mapping[str, Any]
    weight: float = 1.0


class DataTask:
    """Finite problems in splits: by file, by the data set's own splits, or by `holdout` shares of the texts."""

    def __init__(
        self, config: TaskConfig, seed: int, limit: PromptLimit, rows: Callable[[str], Iterator[AnyRow]] | None = None
    ) -> None:
        self.config, self.seed, self.limit = config, seed, limit
        self.solver = Solver(config, seed)
        self._rows = rows or _rows_of(config)
        self._holdout = config.holdout or HoldoutConfig()
        self._entries: dict[str, list[_Entry]] = {}
        self._shared = 0
        self._load()

    def _load(self) -> None:
        given = {split: [self._entry(*row) for row in self._rows(split)] for split in ("train", "development", "test")}
        for entry in given["train"]:
            split = split_of(entry.shown.split_key, self._holdout.development, self._holdout.test)
            self._entries.setdefault(split, []).append(entry)
        for split in ("development", "test"):
            if given[split] and self._entries.get(split):
                raise UserError(f"task.holdout.{split} is set, but the data set has its own {split} split; keep one.")
            self._entries.setdefault(split, []).extend(given[split])
        self._entries["development"] = self._apart("development", "test")
        for held_out in ("development", "test"):
            before = self._entries.get("train", [])
            self._entries["train"] = self._apart("train", held_out)
            self._shared += len(before) - len(self._entries["train"])

    def _apart(self, split: str, other: str) -> list[_Entry]:
        """The entries of `split` whose text is not in `other`; a shared one is refused or dropped."""
        theirs = {entry.shown.key: entry for entry in reversed(self._entries.get(other, []))}
        mine = self._entries.get(split, [])
        shared = next((entry for entry in mine if entry.shown.key in theirs), None)
        if shared is not None and self.config.on_shared == "refuse":
            raise UserError(
                f"the {split} problem {shared.where} has the same prompt as the {other} problem "
                f"{theirs[shared.shown.key].where}: {user_text(shared.problem.prompt)[:80]!r}. "
                f"Remove it from one of them, or set task.on_shared: drop to leave such problems out of {split}."
            )
        return [entry for entry in mine if entry.shown.key not in theirs]

    def _entry(self, where: str, row: Mapping[str, Any] | Problem) -> _Entry:
        if isinstance(row, Problem):
            return _Entry(row, keyed(self.config, row.prompt, row.meta, where), where, row.meta)
        shown = self._prompt(where, row)
        reference = _column(self.config, row, "answer", where)
        if self.config.reference_extract.how != "whole":
            found = extract(str(reference), self.config.reference_extract)
            if found is None:
                raise UserError(f"{where}: task.reference_extract finds no answer in {str(reference)[-80:]!r}.")
            reference = found
        meta = {**row, "where": where}
        problem = Problem(problem_id(shown.prompt), shown.prompt, reference, self._solution(where, row), meta)
        return _Entry(problem, shown, where, row, _weight(self.config, row, where))

    def _solution(self, where: str, row: Mapping[str, Any]) -> str | None:
        """The worked solution; of a trace that `kdrl generate` wrote, its response where that is right."""
        value = _column(self.config, row, "solution", where, optional=True)
        if value is None and "solution" not in self.config.columns and is_true(row.get("correct")):
            value = row.get("response")
        return None if value is None else str(value)

    def _prompt(self, where: str, row: Mapping[str, Any]) -> Rendered:
        config, columns = self.config, self.config.columns
        messages_column = columns.get("messages", "messages")
        if "prompt" not in columns and ("messages" in columns or (messages_column in row and "prompt" not in row)):
            if config.template is not None:
                raise UserError(f"task.template renders a prompt, but {where} has `messages`; drop one of the two.")
            messages = _column(config, row, "messages", where)
            return keyed(config, _with_system(config, _messages(messages, where), where), row, where)
        if config.template is not None and "prompt" not in columns:
            return render(config, "", row, where)
        value = _column(config, row, "prompt", where)
        if isinstance(value, list):
            if config.template is not None:
                raise UserError(f"task.template renders a prompt, but that of {where} is messages; drop the template.")
            return keyed(config, _with_system(config, _messages(value, where), where), row, where)
        text = str(value)
        return render(config, text, {**row, "prompt": text}, where)

    def problems(self, split: str) -> ProblemStream:
        """The stream of a split: training reshuffled every epoch, the others in order and each text once."""
        check_split(split)
        entries = self._entries.get(split, [])
        if not entries:
            how = "task.path" if split == "train" else f"task.{split}_path or task.holdout.{split}"
            raise UserError(f"this task has no {split} problems; give them by {how}.")
        skipped: Counter[str] = Counter()
        if split == "train":
            skipped.update({"shared": self._shared} if self._shared else {})
        else:
            entries = _distinct(entries, skipped)
        fitting = [entry for entry in entries if self._fits(entry.problem, skipped)]
        kept = [entry.problem for entry in fitting]
        if not kept:
            raise UserError(
                f"none of the {len(entries)} {split} prompts fits task.max_prompt_tokens {self.limit.most}; raise it."
            )
        if split == "train" and "weight" in self.config.columns:
            weights = [entry.weight for entry in fitting[: self.config.limit]]
            return WeightedStream(kept[: self.config.limit], weights, self.seed, self.solver.train, skipped)
        if split == "train":
            return ListStream(kept[: self.config.limit], self.seed, self.solver.train, skipped)
        return ListStream(kept, None, self.solver.held_out, skipped)

    def rows(self, split: str) -> list[tuple[str, Mapping[str, Any], Problem]]:
        """Each row of a split, where it stands and what it asks, in the order of the file; repetitions included."""
        check_split(split)
        return [(entry.where, entry.row, entry.problem) for entry in self._entries.get(split, [])]

    def _fits(self, problem: Problem, skipped: Counter[str]) -> bool:
        fits = self.limit.fits(problem)
        if not fits:
            skipped["too_long"] += 1
        return fits


def _rows_of(config: TaskConfig) -> Callable[[str], Iterator[AnyRow]]:
    def rows(split: str) -> Iterator[AnyRow]:
        paths = config.path if split == "train" else getattr(config, f"{split}_path")
        if paths:
            return read_files([paths] if isinstance(paths, str) else paths)
        return read_hub(str(config.dataset), config.settings, split) if config.dataset else iter(())

    return rows


def _distinct(entries: Sequence[_Entry], skipped: Counter[str]) -> list[_Entry]:
    """The entries with each text once."""
    first: dict[bytes, _Entry] = {}
    for entry in entries:
        if first.setdefault(entry.shown.key, entry) is not entry:
            skipped["repeated"] += 1
    return list(first.values())


def _column(config: TaskConfig, row: Mapping[str, Any], role: str, where: str, optional: bool = False) -> Any:
    """The value of a role's column; raises UserError naming the place when it is missing or empty."""
    column = dict(config.columns).get(role, role)  # type: ignore[call-overload]
    value = row.get(column)
    if value is None and (not optional or role in config.columns):
        problem = "is empty" if column in row else f"is missing{nearest(column, row)}"
        hint = "" if column in row else f". Map it with `task.columns: {{{role}: ...}}`"
        raise UserError(f"{where}: the column {column!r} ({role}) {problem}{hint}")
    return value


def _weight(config: TaskConfig, row: Mapping[str, Any], where: str) -> float:
    """The row's weight, 1 where no column is named for it."""
    if "weight" not in config.columns:
        return 1.0
    value = _column(config, row, "weight", where)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0.0 <= weight < math.inf:
        raise UserError(f"{where}: the weight is {value!r}; it must be a number from 0 on.")
    return weight


def is_true(value: Any) -> bool:
    """A truth value as data files hold it: true, 1, or the word (CSV)."""
    return value.strip().lower() in ("true", "1") if isinstance(value, str) else bool(value)


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    shape = "a list of {role, content} that ends with the user's turn"
    if not (isinstance(messages, list) and messages and all(isinstance(turn, Mapping) for turn in messages)):
        raise UserError(f"{where}: messages must be {shape}, but it is a {type(messages).__name__}.")
    turns = [dict(turn) for turn in messages]
    if any(not isinstance(turn.get("role"), str) or turn.get("content") is None for turn in turns):
        raise UserError(f"{where}: messages must be {shape}; a turn lacks its role or content.")
    if turns[-1]["role"] != "user":
        raise UserError(f"{where}: messages must be {shape}, but the last turn is of {turns[-1]['role']!r}.")
    return turns


def _with_system(config: TaskConfig, turns: list[dict[str, Any]], where: str) -> Prompt:
    if config.system_prompt is None:
        return turns
    if turns[0]["role"] == "system":
        raise UserError(f"task.system_prompt is set, but {where} has a system message of its own; drop one of the two.")
    return [{"role": "system", "content": config.system_prompt}, *turns]
