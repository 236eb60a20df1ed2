"""What `kdrl select` kept, as tables for people and numbers for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from kdrl.data.select import Selection

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def quantiles(values: Sequence[float | None]) -> list[float]:
    """The QUANTILES of those that are numbers; empty where there are none."""
    found = [value for value in values if value is not None]
    return np.quantile(found, QUANTILES).tolist() if found else []


def numbers(selection: Selection) -> dict[str, Any]:
    """Counts, score quantiles of all rows and of the kept ones, notes and domains, as plain JSON values."""
    choice = selection.choice
    return {
        "output": str(selection.path),
        "rows": selection.rows,
        "kept": len(choice.kept),
        "different": len(set(choice.kept)),
        "held_out": selection.held,
        "score": choice.unit,
        "quantiles": list(QUANTILES),
        "all": quantiles(choice.score),
        "of_kept": quantiles([choice.score[i] for i in choice.kept]),
        "notes": list(choice.notes),
        "domains": list(choice.domains),
    }


def tables(selection: Selection) -> list[Table]:
    """The table of score quantiles, and that of the domains where there is one."""
    found = numbers(selection)
    table = Table(title=found["score"], box=SIMPLE, title_justify="left")
    table.add_column("rows")
    table.add_column("number", justify="right")
    for q in QUANTILES:
        table.add_column({0.0: "min", 0.5: "median", 1.0: "max"}.get(q, f"{q:.0%}"), justify="right")
    for name, count, values in (("all", found["rows"], found["all"]), ("kept", found["kept"], found["of_kept"])):
        table.add_row(name, str(count), *(f"{value:.3g}" for value in values))
    out = [table]
    if found["domains"]:
        domains = Table(box=SIMPLE)
        for name in found["domains"][0]:
            domains.add_column(name, justify="left" if name == "domain" else "right")
        for row in found["domains"]:
            domains.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
        out.append(domains)
    return out


def sentence(selection: Selection) -> str:
    """What was kept, in words."""
    kept, different = len(selection.choice.kept), len(set(selection.choice.kept))
    copies = f" ({different} different ones)" if different < kept else ""
    held = f", and {selection.held} that task.holdout keeps from training" if selection.held else ""
    return f"{kept} rows written{copies} of {selection.rows}{held}: {selection.path}"
