"""Several runs in one table (terminal and page) and one plot of development accuracy, also as an SVG file."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kdrl import stats
from kdrl.errors import UserError
from kdrl.report.arms import Arm, arms_of, difference
from kdrl.report.folder import Run, is_run, read_run
from kdrl.report.page import render, share, write_file
from kdrl.report.svg import Level, Series, chart_css, legend, line_chart
from kdrl.results import NO_RIGHT_ANSWER

# The plot's own files, which a glob such as runs/demo/* hands back the next time.
_OWN = ("comparison.html", "comparison.svg")


@dataclass(frozen=True)
class Row:
    """A line of the comparison."""

    cells: list[str]
    reference: bool


def report_runs(
    run_dirs: Sequence[str | Path], out: str | Path | None = None, *, base: str | None = None
) -> tuple[Table, Path]:
    """Compare runs: a table for the terminal, and `out` (default comparison.html beside the runs) with comparison.svg.

    Differences are paired with the arm called `base` (default `grpo` where there is one, else the first). Files among
    `run_dirs` are passed over, folders that are no runs are named. Raises UserError when no run is left.
    """
    runs, notes = _runs([Path(path) for path in run_dirs])
    arms = arms_of(runs)
    against = _base(arms, base)
    columns, rows = comparison_rows(arms, against)
    page = _target(out, runs)
    notes += _notes(runs, arms)
    title = page.resolve().parent.name or "comparison"
    labels = [arm.name for arm in arms if not arm.reference and _curve(arm, "step") is not None]
    levels = _levels(arms)
    kinds = [("step", "training steps"), ("responses", "responses written")]
    lines = {key: _lines(arms, key) for key, _ in kinds}
    plots = [
        Markup(line_chart(lines[key], levels=levels, width=560, height=320, x_label=words, smooth=False, name=words))
        for key, words in kinds
        if lines[key]
    ]
    footnote = (
        "Intervals are 95 % percentile bootstraps over problems (of the accuracy averaged over seeds); they do not "
        f"hold the spread between seeds (±, a standard deviation). Differences are paired with {against.name}."
    )
    text = render(
        "compare.html",
        title=title,
        about=f"{len(runs)} runs in {sum(not arm.reference for arm in arms)} arms",
        columns=columns,
        rows=rows,
        notes=notes,
        footnote=footnote,
        plots=plots,
        labels=labels,
        members=[(arm.name, [str(run.path) for run in arm.runs]) for arm in arms if not arm.reference],
    )
    write_file(page, text)
    if lines["step"]:
        write_file(page.with_suffix(".svg"), _picture(lines["step"], levels, labels))
    return _table(columns, rows, notes, footnote), page


def _runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    runs, notes = [], []
    for path in dict.fromkeys(paths):
        if is_run(path):
            runs.append(read_run(path))
        elif path.name not in _OWN and not path.is_file():
            notes.append(f"{path} is no run (no recipe.yaml, metrics.jsonl or evaluation.json) and is left out")
    if not runs:
        given = ", ".join(map(str, paths)) or "nothing"
        raise UserError(f"there is no run to compare in {given}; give folders that kdrl train wrote")
    return runs, notes


def _target(out: str | Path | None, runs: Sequence[Run]) -> Path:
    """The page's path: as given (a folder gets comparison.html in it), else beside the runs."""
    if out is None:
        parents = [str(run.path.resolve().parent) for run in runs]
        out = Path(os.path.commonpath(parents))
    page = Path(out)
    page = page if page.suffix == ".html" else page / "comparison.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{page.parent} could not be made: {error.strerror or error}") from error
    return page


def _base(arms: Sequence[Arm], name: str | None) -> Arm:
    trained = [arm for arm in arms if not arm.reference]
    named = [arm for arm in trained if arm.name == (name or "grpo")]
    if name is not None and not named:
        raise UserError(f"no arm is called {name!r}; there are {', '.join(arm.name for arm in trained)}")
    return (named or trained)[0]


def comparison_rows(arms: Sequence[Arm], base: Arm) -> tuple[list[str], list[Row]]:
    """Column titles and one row per arm, as text for terminal and page alike."""
    seeds = any(len(arm.runs) > 1 for arm in arms)
    columns = [
        "arm",
        *(["seeds"] if seeds else []),
        "held-out accuracy",
        "95 % interval",
        f"difference from {base.name}",
    ]
    columns += ["mean tokens", "tokens per correct answer", "truncated", "teacher calls saved", "steps", "responses"]
    return columns, [Row(_cells(arm, base, seeds), arm.reference) for arm in arms]


def _cells(arm: Arm, base: Arm, seeds: bool) -> list[str]:
    count = [str(len(arm.runs)) if arm.runs else "–"] if seeds else []
    steps, responses = _mean_last(arm, "step"), _mean_last(arm, "responses")
    saved = share(arm.teacher_calls_saved(), 0)
    ends = ["–" if value is None else f"{value:,.0f}" for value in (steps, responses)]
    if not arm.results:
        return [arm.name, *count, "not evaluated", *["–"] * 5, saved, *ends]
    mean, spread, limits = arm.mean("accuracy"), arm.spread, arm.interval()
    accuracy = share(mean) + (f" ± {100 * spread:.1f}" if spread is not None else "")
    between = f"{100 * limits.low:.1f} – {100 * limits.high:.1f}" if limits else "–"
    tokens, each = arm.mean("tokens"), arm.tokens_per_correct()
    return [
        arm.name,
        *count,
        accuracy,
        between,
        "–" if arm is base else _difference(base, arm),
        "–" if tokens is None else f"{tokens:.1f}",
        NO_RIGHT_ANSWER if each is None else f"{each:.1f}",
        share(arm.mean("truncated")),
        saved,
        *ends,
    ]


def _difference(base: Arm, arm: Arm) -> str:
    found = difference(base, arm)
    if isinstance(found, stats.Difference):
        return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return found


def _mean_last(arm: Arm, key: str) -> float | None:
    values = [value for run in arm.runs if (value := run.last(key)) is not None]
    return statistics.fmean(values) if values else None


def _curve(arm: Arm, key: str) -> Series | None:
    """Development accuracy against `key`, mean over the seeds with the range between them as a band."""
    seen: dict[float, list[tuple[float, float]]] = {}
    for run in arm.runs:
        for row in run.rows:
            x, y = row.get(key), row.get("eval/accuracy")
            if isinstance(x, (int, float)) and isinstance(y, (int, float)):
                seen.setdefault(float(row["step"]), []).append((float(x), float(y)))
    # A step that only some seeds have reached would bend the mean.
    whole = {step: pairs for step, pairs in sorted(seen.items()) if len(pairs) == len(arm.runs)}
    if not whole:
        return None
    xs = [statistics.fmean(x for x, _ in pairs) for pairs in whole.values()]
    ys = [[y for _, y in pairs] for pairs in whole.values()]
    band = ([min(y) for y in ys], [max(y) for y in ys]) if len(arm.runs) > 1 else ([], [])
    return Series(arm.name, xs, [statistics.fmean(y) for y in ys], *band, dots=True)


def _lines(arms: Sequence[Arm], key: str) -> list[Series]:
    """Curves of the trained arms, coloured by arm so that both plots agree."""
    shown = [arm for arm in arms if not arm.reference and _curve(arm, "step") is not None]
    curves = [(index, _curve(arm, key)) for index, arm in enumerate(shown)]
    return [Series(c.label, c.x, c.y, c.low, c.high, dots=True, colour=index) for index, c in curves if c is not None]


def _levels(arms: Sequence[Arm]) -> list[Level]:
    return [
        Level(f"{arm.name}, held-out", arm.mean("accuracy") or 0.0) for arm in arms if arm.reference and arm.results
    ]


def _picture(lines: Sequence[Series], levels: Sequence[Level], labels: Sequence[str]) -> str:
    """The plot as a file of its own, with its legend and both colour schemes."""
    style = chart_css("svg") + ".ground{fill:var(--ground)}"
    chart = line_chart(
        lines,
        levels=levels,
        width=720,
        height=380,
        x_label="training steps",
        y_label="accuracy on development problems",
        smooth=False,
        style=style,
        name="Accuracy on development problems against training steps",
    )
    head = 26
    chart = chart.replace(
        'viewBox="0 0 720 380"', f'viewBox="0 -{head} 720 {380 + head}" width="720" height="{380 + head}"'
    )
    ground = f'<rect class="ground" x="0" y="-{head}" width="720" height="{380 + head}"/>'
    return chart.replace("</style>", f"</style>{ground}{legend(labels, 48, -4)}", 1) + "\n"


def _notes(runs: Sequence[Run], arms: Sequence[Arm]) -> list[str]:
    """What is wrong with the runs, and arms whose seeds were not all evaluated."""
    notes = [f"{run.path.name}: {note}" for run in runs for note in run.notes if "environment.json" not in note]
    for arm in arms:
        if not arm.reference and 0 < len(arm.results) < len(arm.runs):
            notes.append(f"{arm.name}: only {len(arm.results)} of {len(arm.runs)} seeds have a held-out evaluation")
    return notes


# Columns that a terminal has no room for, and short words for those it shows, explained below the table.
_PAGE_ONLY = ("steps", "responses")
_SHORT = {
    "held-out accuracy": "acc",
    "95 % interval": "95 %",
    "mean tokens": "tok",
    "tokens per correct answer": "tok/\nright",
    "truncated": "cut",
    "teacher calls saved": "saved",
}
_WORDS = (
    "acc: held-out accuracy; tok/right: tokens per correct answer; cut: truncated responses; saved: teacher calls "
    "saved by masking; shares in %."
)


def _table(columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str], footnote: str) -> Table:
    """The comparison for a terminal of 80 columns."""
    caption = "\n".join([f"{_WORDS} {footnote}", *(f"note: {note}" for note in notes)])
    table = Table(caption=escape(caption), caption_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    shown = [index for index, column in enumerate(columns) if column not in _PAGE_ONLY]
    for index in shown:
        # The header may take several lines, a name or a number not; the difference breaks before its interval.
        word = _SHORT.get(columns[index], columns[index].replace("difference from ", "– "))
        breaks = word.startswith("– ") or word == "tok/\nright"
        table.add_column(
            escape(word),
            min_width=13 if word.startswith("– ") else None,
            justify="left" if index == 0 else "right",
            overflow="fold",
            no_wrap=not breaks,
        )
    for index, row in enumerate(rows):
        last_reference = row.reference and not (index + 1 < len(rows) and rows[index + 1].reference)
        table.add_row(*(_dense(row.cells[i]) for i in shown), end_section=last_reference)
    return table


def _dense(cell: str) -> str:
    """A cell of the page without the spaces and signs that a terminal has no room for."""
    cell = cell.replace("not evaluated", "none")
    return escape(cell.replace(" %", "").replace(" ± ", "±").replace(" – ", "–").replace(", ", ","))
