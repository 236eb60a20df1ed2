"""Several runs as arms of one comparison: seeds of one recipe together, teacher and untouched student once."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdrl import stats
from kdrl.report.folder import Run
from kdrl.results import EvaluationResult, Record
from kdrl.seeds import derive

_SEED_SUFFIX = re.compile(r"[-_.]?(?:seed|s)[-_]?\d+$")


@dataclass
class Arm:
    """Runs whose recipes differ in seed and output alone, or a reference (teacher, untouched student)."""

    name: str
    results: list[EvaluationResult]
    runs: list[Run] = field(default_factory=list)
    reference: bool = False

    def mean(self, metric: str) -> float | None:
        """Mean of a held-out metric over the seeds; None when any lacks it."""
        values = [result.metrics.get(metric) for result in self.results]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the accuracy over seeds (n - 1); None for a single one."""
        return statistics.stdev(r.accuracy for r in self.results) if len(self.results) > 1 else None

    def per_problem(self) -> dict[str, float]:
        """Accuracy of each held-out problem, averaged over the seeds that saw it."""
        seen: dict[str, list[float]] = {}
        for result in self.results:
            for record in result.records:
                seen.setdefault(record.id, []).append(record.accuracy)
        return {name: statistics.fmean(values) for name, values in seen.items()}

    def interval(self) -> stats.Interval | None:
        """Bootstrap over problems of the accuracy averaged over seeds."""
        scores = self.per_problem()
        if not scores:
            return None
        return stats.bootstrap_mean([scores[i] for i in sorted(scores)], seed=derive(0, "report", "interval"))

    def tokens_per_correct(self) -> float | None:
        """All tokens of all seeds per right answer; None when nothing is right."""
        responses = [r for result in self.results for record in result.records for r in record.responses]
        right = sum(r.correct for r in responses)
        return sum(r.tokens for r in responses) / right if right else None

    def teacher_calls_saved(self) -> float | None:
        """Mean share of teacher calls that masking saved; None without a teacher."""
        values = [run.teacher_calls_saved for run in self.runs if run.teacher_calls_saved is not None]
        return statistics.fmean(values) if values else None


def difference(base: Arm, arm: Arm) -> stats.Difference | str:
    """Paired bootstrap of arm minus base over the same problems, or why there is none."""
    a, b = base.per_problem(), arm.per_problem()
    if not a or not b:
        return "not evaluated"
    if a.keys() != b.keys():
        return "other problems"
    ids = sorted(a)
    return stats.paired_bootstrap([a[i] for i in ids], [b[i] for i in ids], seed=derive(0, "report", "difference"))


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Teacher and untouched student first, then the arms in the order their first run was given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_recipe_key(run), []).append(run)
    names = _names(list(groups.values()))
    trained = [
        Arm(name, [run.final for run in members if run.final is not None], members)
        for name, members in zip(names, groups.values(), strict=True)
    ]
    return [*_references(runs, "teacher", "teacher"), *_references(runs, "start", "start student"), *trained]


def _recipe_key(run: Run) -> str:
    """Equal for runs that belong together; a run without a recipe stays alone."""
    if not run.recipe:
        return f"no recipe: {run.path.resolve()}"
    rest = {key: value for key, value in run.recipe.items() if key not in ("seed", "output")}
    return json.dumps(rest, sort_keys=True, default=str)


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Folder names without the seed; where two arms would share one, their folders' names or whole paths."""
    bare = [_SEED_SUFFIX.sub("", runs[0].name) or runs[0].name for runs in groups]
    full = [runs[0].name for runs in groups]
    paths = [str(runs[0].path) for runs in groups]
    longer = [name if full.count(name) == 1 else path for name, path in zip(full, paths, strict=True)]
    return [name if bare.count(name) == 1 else other for name, other in zip(bare, longer, strict=True)]


def _references(runs: Sequence[Run], which: str, word: str) -> list[Arm]:
    """One arm per distinct model; the same evaluation stored in several runs counts once."""
    by_model: dict[str, dict[tuple[object, ...], EvaluationResult]] = {}
    for run in runs:
        result = run.evaluations.get(which)
        if result is not None:
            by_model.setdefault(result.model, {})[_fingerprint(result.records)] = result
    several = len(by_model) > 1
    return [
        Arm(f"{word} {model}" if several else word, list(results.values()), reference=True)
        for model, results in by_model.items()
    ]


def _fingerprint(records: Sequence[Record]) -> tuple[object, ...]:
    return tuple((r.id, r.accuracy, sum(response.tokens for response in r.responses)) for r in records)
