"""What an evaluation found: per-problem records, their summary with intervals, comparison on the same problems, JSON.

Torch is not imported, so that a report can be made of finished runs without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdrl import stats
from kdrl.errors import UserError
from kdrl.seeds import derive

if TYPE_CHECKING:
    from rich.table import Table

# The word that stands where tokens per correct answer would divide by zero.
NO_RIGHT_ANSWER = "no right answer"


@dataclass(frozen=True)
class Response:
    """One response: its text, length in tokens, verdict, whether it hit the limit, and the answer that votes."""

    text: str
    tokens: int
    correct: bool
    truncated: bool
    answer: str | None = None
    reward: float = 0.0
    status: str = "ok"


@dataclass(frozen=True)
class Record:
    """A problem with all its responses."""

    id: str
    prompt: str | list[dict]
    responses: tuple[Response, ...]

    @property
    def accuracy(self) -> float:
        """Share of the responses that are right."""
        return sum(r.correct for r in self.responses) / len(self.responses)


@dataclass(frozen=True)
class Comparison:
    """Accuracy of b minus accuracy of a on the same problems, with a paired bootstrap interval over problems."""

    a: str
    b: str
    difference: stats.Difference

    def sentence(self) -> str:
        """The comparison in words."""
        d = self.difference
        clear = d.low > 0 or d.high < 0
        verdict = "the interval leaves 0 out" if clear else "the interval holds 0: no difference is shown"
        return (
            f"{self.b} minus {self.a} on {d.problems} problems: {d.mean:+.3f} "
            f"[{d.low:+.3f}, {d.high:+.3f}] at {d.level:.0%}, p = {d.p:.3g}; {verdict}."
        )


@dataclass(frozen=True)
class EvaluationResult:
    """Records and summary of one model on one set of problems.

    `metrics` holds accuracy (avg@n), pass@k, majority@k, tokens (mean), tokens_median, tokens_per_correct (None when no
    answer is right) and truncated; `intervals` 95 % bootstrap intervals over problems for some of them.
    """

    model: str
    split: str
    samples: int
    seed: int
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float | None]]
    records: tuple[Record, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_records(
        cls,
        records: Sequence[Record],
        *,
        model: str,
        split: str = "test",
        k: Sequence[int] = (),
        seed: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> EvaluationResult:
        """Sum up; every problem must have the same number of responses (ValueError), k at most that (UserError)."""
        sizes = {len(record.responses) for record in records}
        if len(sizes) != 1 or not min(sizes):
            raise ValueError(f"every problem needs the same number of responses, above 0; found {sorted(sizes)}")
        samples = sizes.pop()
        metrics, intervals = _summary(records, samples, k, seed)
        return cls(model, split, samples, seed, metrics, intervals, tuple(records), dict(settings or {}))

    @property
    def accuracy(self) -> float:
        """avg@n: mean over problems of the share of right responses."""
        return self.metrics["accuracy"] or 0.0

    @property
    def problem_ids(self) -> tuple[str, ...]:
        """Ids of the problems, in the order they were asked."""
        return tuple(record.id for record in self.records)

    def headline(self) -> dict[str, float | None]:
        """The metrics without intervals, as a step of metrics.jsonl carries them under `eval/…`."""
        return dict(self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `tokens_per_correct` null is explained by a word beside it."""
        out = asdict(self)
        if self.metrics.get("tokens_per_correct") is None:
            out["notes"] = {"tokens_per_correct": NO_RIGHT_ANSWER}
        return out

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`; raises UserError naming what is missing."""
        try:
            records = tuple(
                Record(r["id"], r["prompt"], tuple(Response(**response) for response in r["responses"]))
                for r in raw["records"]
            )
            intervals = {name: (low, high) for name, (low, high) in raw["intervals"].items()}
            head = {name: raw[name] for name in ("model", "split", "samples", "seed", "metrics")}
            return cls(**head, intervals=intervals, records=records, settings=raw.get("settings", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"this is not an evaluation that kdrl wrote ({error!r}); evaluate the model again"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON; raises UserError naming the file when it cannot be written."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"the evaluation could not be written to {path}: {error.strerror or error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read what `save` wrote; raises UserError naming the file."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not JSON ({error}); evaluate the model again") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def _summary(
    records: Sequence[Record], samples: int, k: Sequence[int], seed: int
) -> tuple[dict[str, float | None], dict[str, tuple[float, float | None]]]:
    right_P = np.array([sum(r.correct for r in record.responses) for record in records])
    tokens_PS = np.array([[r.tokens for r in record.responses] for record in records])
    truncated = np.array([[r.truncated for r in record.responses] for record in records])
    per_problem = {"accuracy": right_P / samples, "tokens": tokens_PS.mean(axis=1), "truncated": truncated.mean(axis=1)}
    for size in k:
        per_problem[f"pass@{size}"] = np.array([stats.pass_at_k(samples, int(c), size) for c in right_P])
    for size in sorted({*k, samples} if samples > 1 else set()):
        votes = [([r.answer for r in record.responses], [r.correct for r in record.responses]) for record in records]
        per_problem[f"majority@{size}"] = np.array([stats.majority_at_k(*vote, size) for vote in votes])
    metrics: dict[str, float | None] = {name: float(values.mean()) for name, values in per_problem.items()}
    metrics["tokens_median"] = float(np.median(tokens_PS))
    metrics["tokens_per_correct"] = _finite(stats.tokens_per_correct(tokens_PS, right_P))
    intervals: dict[str, tuple[float, float | None]] = {}
    for name, values in per_problem.items():
        interval = stats.bootstrap_mean(values, seed=derive(seed, "bootstrap", name))
        intervals[name] = (interval.low, interval.high)
    ratio = stats.bootstrap_ratio(tokens_PS.sum(axis=1), right_P, seed=derive(seed, "bootstrap", "ratio"))
    if math.isfinite(ratio.low):
        intervals["tokens_per_correct"] = (ratio.low, _finite(ratio.high))
    return metrics, intervals


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(a: EvaluationResult, b: EvaluationResult, seed: int = 0) -> Comparison:
    """Paired bootstrap of accuracy(b) - accuracy(a); raises UserError unless both answered the same problems."""
    scores_a, scores_b = ({record.id: record.accuracy for record in result.records} for result in (a, b))
    if scores_a.keys() != scores_b.keys():
        shared = len(scores_a.keys() & scores_b.keys())
        raise UserError(
            f"{a.model} was evaluated on {len(scores_a)} problems of {a.split!r} and {b.model} on {len(scores_b)} of "
            f"{b.split!r}, {shared} of them shared; evaluate both with the same task, split, number and seed"
        )
    ids = sorted(scores_a)
    difference = stats.paired_bootstrap([scores_a[i] for i in ids], [scores_b[i] for i in ids], seed=seed)
    return Comparison(a.model, b.model, difference)


def results_table(results: Sequence[EvaluationResult], title: str | None = None) -> Table:
    """A rich table with one row per metric and one column per result, intervals in brackets."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("metric")
    for result in results:
        table.add_column(result.model, justify="right", overflow="fold")
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    for name in names:
        label = f"avg@{results[0].samples} (accuracy)" if name == "accuracy" else name
        table.add_row(label, *(cell(result, name) for result in results))
    table.add_row("problems", *(str(len(result.records)) for result in results))
    return table


def cell(result: EvaluationResult, name: str) -> str:
    """One metric of a result with its interval, for a table."""
    if name not in result.metrics:
        return "-"
    value = result.metrics[name]
    if value is None:
        return NO_RIGHT_ANSWER
    digits = 1 if name.startswith("tokens") else 3
    text = f"{value:.{digits}f}"
    if name in result.intervals:
        low, high = result.intervals[name]
        text += f" [{low:.{digits}f}, {'∞' if high is None else format(high, f'.{digits}f')}]"
    return text
