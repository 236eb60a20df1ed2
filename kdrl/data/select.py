"""Keep or weigh the rows of a data set by scores of a teacher and a small reference model, or of the text alone.

Left out: documents without a prompt, and scores kept between calls.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdrl.build import resolve_device
from kdrl.data.choosing import SelectConfig, domain_shares, kept_count, resample
from kdrl.data.coverage import first_token_probabilities
from kdrl.data.inputs import Inputs, loaded_here
from kdrl.data.rows import Row, check_output, load_rows, write_rows
from kdrl.data.scoring import TextScores, response_ids, score_rows
from kdrl.data.store import read_state
from kdrl.data.text import farthest_apart, gumbel_top, k_center, ngram_importance
from kdrl.errors import UserError
from kdrl.models import LoadedModel, TeacherModelConfig, load_model
from kdrl.models.loading import load_tokenizer
from kdrl.seeds import derive
from kdrl.tasks.base import problem_id
from kdrl.tasks.data import is_true
from kdrl.tasks.readers import read_files

Scores = list[float | None]
Progress = Callable[[str, int, int], None]
"""(what, done, total)."""


@dataclass
class Choice:
    """What a selector found: the rows kept (indices, repeated where drawn twice), every row's score, new columns.

    `unit` says what the score is; `notes` are sentences and `domains` the table of `ddk`.
    """

    kept: list[int]
    score: Scores
    unit: str
    columns: dict[str, list[Any]] = field(default_factory=dict)
    weights: list[float] | None = None
    notes: list[str] = field(default_factory=list)
    domains: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Selection:
    """A finished selection: how many rows there were, the choice, and rows that the task holds out."""

    path: Path
    rows: int
    held: int
    choice: Choice


def select(
    inputs: Inputs,
    config: SelectConfig,
    output: Path,
    *,
    teacher: str | None = None,
    reference: str | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Write the rows that `config` keeps to `output`, in the order of the data, their columns as they were.

    Rows that `task.holdout` keeps from training are written too, unscored, so that the splits stay. Raises UserError.
    """
    check_output(output)
    rows, held = load_rows(inputs.task, inputs.seed)
    chooser = _Chooser(inputs, config, rows, teacher, reference, progress or (lambda what, done, total: None))
    choice: Choice = getattr(chooser, f"_{config.by}")()
    if not choice.kept:
        raise UserError(f"--by {config.by} would keep none of {len(rows)} rows; widen the bounds.")
    added = dict(choice.columns) if config.scores else {}
    if choice.weights is not None:
        added["weight"] = choice.weights
    for name in added:
        if any(name in row.columns for row in rows):
            raise UserError(f"the data has a column {name!r} already, which select would write; rename it.")
    out = [{**rows[i].columns, **{name: values[i] for name, values in added.items()}} for i in choice.kept]
    write_rows(output, [*out, *(_held_row(row, choice) for row in held)])
    return Selection(output, len(rows), len(held), choice)


def _held_row(row: Row, choice: Choice) -> dict[str, Any]:
    return dict(row.columns) if choice.weights is None else {**row.columns, "weight": 1.0}


class _Chooser:
    """One method a selector; each returns the Choice."""

    def __init__(
        self,
        inputs: Inputs,
        config: SelectConfig,
        rows: Sequence[Row],
        teacher: str | None,
        reference: str | None,
        progress: Progress,
    ) -> None:
        self.inputs, self.config, self.rows, self.progress = inputs, config, rows, progress
        self.named = {"teacher": teacher, "reference": reference}
        self.notes: list[str] = []
        self._check_models()

    def _check_models(self) -> None:
        takes = {
            "difference": {"teacher", "reference"},
            "ddk": {"teacher", "reference"},
            "perplexity": {self.config.of},
            "length": {"teacher"},
            "coverage": {"teacher"},
        }.get(self.config.by, set())
        for role, name in self.named.items():
            if name is not None and role not in takes:
                raise UserError(f"--{role} has no effect on --by {self.config.by}; leave it out.")
        if self.config.by != "length":
            for role in takes:
                self._section(role)

    def _section(self, role: str) -> TeacherModelConfig:
        named = self.named[role]
        if named is not None:
            return self.inputs.model_section(named)
        section = self.inputs.teacher if role == "teacher" else self.inputs.student
        if section is None:
            raise UserError(
                f"--by {self.config.by} asks a {role} model and none is named: give --{role} PATH_OR_ID, or a recipe."
            )
        return loaded_here(section, f"--{role}")

    def _both(self, indices: Sequence[int]) -> tuple[TextScores, TextScores]:
        """Scores of teacher and reference; what the second cannot write is found out before the first one's work."""
        tokenizer = load_tokenizer(self._section("reference"))
        for i in indices:
            response_ids(tokenizer, self.rows[i])
        return self._scores("teacher", indices), self._scores("reference", indices)

    def _asked(self, role: str, job: Callable[[LoadedModel], Any]) -> Any:
        """What a job makes of a model, which is held no longer than it: one model at a time."""
        device = resolve_device(self.inputs.device)
        loaded = load_model(self._section(role), device, trainable=False, seed=self.inputs.seed)
        found = job(loaded)
        del loaded
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        return found

    def _scores(self, role: str, indices: Sequence[int]) -> TextScores:
        rows = [self.rows[i] for i in indices]
        follow = partial(self.progress, role)
        found: TextScores = self._asked(role, lambda loaded: score_rows(loaded, rows, progress=follow))
        if found.unscored:
            self.notes.append(f"the {role} cannot score {found.unscored} rows: empty, or longer than its context")
        return found

    def _by_score(self, score: Scores, unit: str, columns: dict[str, list[Any]], *, largest: bool) -> Choice:
        """Bounds, or the rows at one end of the scores; ties go to the earlier row, unscored rows are left out."""
        config = self.config
        have = [(i, value) for i, value in enumerate(score) if value is not None]
        if config.keep is None:
            low = -math.inf if config.low is None else config.low
            high = math.inf if config.high is None else config.high
            kept = [i for i, value in have if low <= value <= high]
        else:
            down = largest != config.reverse
            ordered = sorted(have, key=lambda pair: (-pair[1] if down else pair[1], pair[0]))
            kept = sorted(i for i, _ in ordered[: self._count(len(have))])
        return Choice(kept, score, unit, columns, notes=self.notes)

    def _count(self, total: int) -> int:
        assert self.config.keep is not None
        count = kept_count(self.config.keep, total)
        if count > total:
            raise UserError(f"--keep {count} asks for more than the {total} rows there are; give fewer, or a share.")
        return count

    def _difference(self) -> Choice:
        """MiniPLM (2410.17215): reference loss minus teacher loss, both per token of the teacher's tokenizer."""
        teacher, reference = self._both(range(len(self.rows)))
        score: Scores = []
        for nats_t, nats_r, tokens in zip(teacher.nats, reference.nats, teacher.tokens, strict=True):
            score.append(None if nats_t is None or nats_r is None else (nats_r - nats_t) / tokens)
        columns = {"nats_teacher": teacher.nats, "nats_reference": reference.nats, "difference": score}
        return self._by_score(score, "reference loss - teacher loss, nats per teacher token", columns, largest=True)

    def _perplexity(self) -> Choice:
        found = self._scores(self.config.of, range(len(self.rows)))
        score = [None if x is None else _exp(x / n) for x, n in zip(found.nats, found.tokens, strict=True)]
        columns = {f"perplexity_{self.config.of}": score}
        return self._by_score(score, f"perplexity of the {self.config.of}, per token", columns, largest=False)

    def _length(self) -> Choice:
        stored = [row.columns.get("tokens") for row in self.rows]
        if self.named["teacher"] is None and all(_is_count(value) for value in stored):
            score: Scores = [float(value) for value in stored]  # type: ignore[arg-type]
            return self._by_score(score, "tokens, as the data says", {}, largest=False)
        tokenizer = load_tokenizer(self._section("teacher"))
        score = [float(len(response_ids(tokenizer, row))) for row in self.rows]
        return self._by_score(score, "tokens of the teacher's tokenizer", {"length": score}, largest=False)

    def _success(self) -> Choice:
        """Share of a prompt's traces that are right."""
        named = self.config.traces
        if named is not None:
            verdicts = [_verdict(where, row) for where, row in read_files([named])]
            sources = [named]
        else:
            verdicts = [_verdict(row.where, row.columns, row.problem.id) for row in self.rows]
            path = self.inputs.task.path
            sources = [path] if isinstance(path, str) else list(path or ())
        for source in sources:
            _check_unfiltered(source)
        shares: dict[str, list[bool]] = {}
        for name, right in verdicts:
            shares.setdefault(name, []).append(right)
        score: Scores = []
        for row in self.rows:
            found = shares.get(row.problem.id)
            score.append(sum(found) / len(found) if found else None)
        if missing := sum(value is None for value in score):
            self.notes.append(f"{missing} rows have a prompt without a trace in {named} and are left out")
        return self._by_score(score, "share of the prompt's traces that are right", {"success": score}, largest=True)

    def _diversity(self) -> Choice:
        """Greedy k-center by edit distance (DED, 2508.09883), within each prompt or over all rows."""
        texts = [row.wanted() for row in self.rows]
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(row.problem.id if self.config.per_prompt else "", []).append(i)
        score: Scores = [None] * len(texts)
        kept: list[int] = []
        for number, members in enumerate(groups.values()):
            count = self.config.per_prompt or self._count(len(members))
            inner = None if self.config.per_prompt else (lambda done, total: self.progress("rows", done, total))
            for place, distance in farthest_apart([texts[i] for i in members], count, inner).items():
                score[members[place]] = distance
                kept.append(members[place])
            if self.config.per_prompt:
                self.progress("prompts", number + 1, len(groups))
        unit = "edit distance to the nearest other one that is kept"
        return Choice(sorted(kept), score, unit, {"distance": score}, notes=self.notes)

    def _coverage(self) -> Choice:
        """Greedy k-center over the teacher's first-token probabilities (PCoreSet, 2506.00910)."""
        follow = partial(self.progress, "teacher")
        places, p_NK = self._asked(
            "teacher", lambda loaded: first_token_probabilities(loaded, self.rows, progress=follow)
        )
        if left_out := len(self.rows) - len(places):
            self.notes.append(f"the teacher cannot read {left_out} prompts: longer than its context")
        count = self._count(len(places))
        found = k_center(len(places), lambda i: np.linalg.norm(p_NK - p_NK[i], axis=1), count) if places else {}
        score: Scores = [None] * len(self.rows)
        for place, distance in found.items():
            score[places[place]] = distance
        unit = "distance of the teacher's probabilities to the nearest other kept row's"
        return Choice(sorted(places[i] for i in found), score, unit, {"distance": score}, notes=self.notes)

    def _ngram(self) -> Choice:
        config = self.config
        task = self.inputs.task.model_copy(update={"path": config.target, "dataset": None, "settings": {}})
        task = task.model_copy(update={"development_path": None, "test_path": None, "holdout": None})
        target, _ = load_rows(task, self.inputs.seed)
        score = ngram_importance([row.text() for row in self.rows], [row.text() for row in target])
        kept = sorted(gumbel_top(score, self._count(len(score)), derive(config.seed, "ngram")))
        unit = "log importance toward the target's n-grams, nats"
        return Choice(kept, list(score), unit, {"importance": list(score)}, notes=self.notes)

    def _ddk(self) -> Choice:
        """Domain shares from perplexity ratios of reference (student) and teacher."""
        config = self.config
        members = self._domains()
        probed = [i for name, all_of in members.items() for i in self._probe(name, all_of)]
        teacher, reference = self._both(probed)
        sums = {name: [0.0, 0.0, 0] for name in members}
        for i, nats_t, nats_r, n in zip(probed, teacher.nats, reference.nats, teacher.tokens, strict=True):
            if nats_t is not None and nats_r is not None:
                sum_of = sums[str(self.rows[i].columns[config.domain])]
                sum_of[0], sum_of[1], sum_of[2] = sum_of[0] + nats_t, sum_of[1] + nats_r, sum_of[2] + n
        empty = [name for name, (_, _, n) in sums.items() if not n]
        if empty:
            raise UserError(f"no row of the domain {empty[0]!r} could be scored; leave the domain out of the data.")
        perplexity = {name: (_exp(t / n), _exp(r / n)) for name, (t, r, n) in sums.items()}
        shares = domain_shares({name: r / t for name, (t, r) in perplexity.items()}, config.alpha)
        total = len(self.rows)
        weight = {name: shares[name] * total / len(all_of) for name, all_of in members.items()}
        per_row = [weight[str(row.columns[config.domain])] for row in self.rows]
        kept, weights = list(range(total)), per_row
        if config.keep is not None:
            kept = resample(members, shares, kept_count(config.keep, total), config.seed)
            weights = None
        table = [
            {
                "domain": name,
                "rows": len(members[name]),
                "teacher ppl": perplexity[name][0],
                "reference ppl": perplexity[name][1],
                "share": len(members[name]) / total,
                "new share": shares[name],
                "weight": weight[name],
                "kept": sum(str(self.rows[i].columns[config.domain]) == name for i in kept),
            }
            for name in members
        ]
        return Choice(kept, list(per_row), "weight of the row's domain", {}, weights, self.notes, table)

    def _domains(self) -> dict[str, list[int]]:
        column = self.config.domain
        members: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            if row.columns.get(column) is None:
                raise UserError(f"{row.where} has no column {column!r}, its domain; name another with --domain COLUMN.")
            members.setdefault(str(row.columns[column]), []).append(i)
        if len(members) < 2:
            raise UserError(f"column {column!r} holds one domain only, so there are no shares to choose.")
        return members

    def _probe(self, name: str, members: Sequence[int]) -> list[int]:
        if len(members) <= self.config.probe:
            return list(members)
        return sorted(random.Random(derive(self.config.seed, "probe", name)).sample(members, self.config.probe))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _is_count(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.isdigit())


def _verdict(where: str, row: Any, name: str | None = None) -> tuple[str, bool]:
    """A trace's problem and whether it is right; raises UserError for a row that is no trace."""
    if "correct" not in row or (name is None and "prompt" not in row):
        raise UserError(
            f"{where} is no trace with a verdict (columns prompt and correct); write some with `kdrl generate` "
            "and name their file with --traces."
        )
    return name or problem_id(row["prompt"]), is_true(row["correct"])


def _check_unfiltered(source: str) -> None:
    """Refuse traces of which only some were kept: their share of right ones says nothing."""
    state = read_state(Path(source))
    settings = {} if state is None else state["settings"]
    kept = settings.get("keep", "all")
    if kept != "all" or settings.get("distinct"):
        how = "--distinct" if kept == "all" else f"--keep {kept}"
        raise UserError(
            f"{source} was written with {how}, so the share of right traces in it says nothing; generate without it."
        )
