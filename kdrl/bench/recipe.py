"""What `kdrl bench` says of a recipe: seconds and tokens a second by phase, operations of the update, memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from rich.table import Table

from kdrl.bench.flops import matmul_flops, peak_flops
from kdrl.bench.machine import machine
from kdrl.bench.steps import Steps, run_steps
from kdrl.bench.turns import summary
from kdrl.errors import UserError
from kdrl.heap import settle
from kdrl.memory import MemoryPlan
from kdrl.planning import memory_plan
from kdrl.recipe import Recipe
from kdrl.teachers.checks import check_named_models

PHASES = ("rollout", "verify", "teacher", "update")


def measure_recipe(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Run a few steps and sum them up as plain JSON; raises UserError for what training refuses."""
    check_named_models(recipe)
    plan = memory_plan(recipe)
    if plan.device == "cpu":
        if not plan.fits:
            raise UserError(f"the run {plan.verdict}. `kdrl train RECIPE --dry-run` shows the whole plan.")
        settle(tight=plan.tight)  # as a run does
    found = run_steps(recipe, steps)
    return {
        **machine(),
        "device": found.device,
        "student": {"dtype": recipe.student.dtype, "autocast": recipe.student.autocast},
        "steps": steps,
        "responses": [row["batch_responses"] for row in found.rows],
        "tokens": found.tokens,
        "phases": phases(found),
        "update": update(found, compute_dtype(recipe)),
        "memory": memory(found, plan),
    }


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What the student's matrix products are computed in."""
    return getattr(torch, recipe.student.autocast or recipe.student.dtype)


def phases(found: Steps) -> dict[str, dict[str, Any]]:
    """Seconds, share of the step and response tokens a second of each phase; `other` is metrics and bookkeeping."""
    seconds = {name: found.phase(name) for name in PHASES}
    seconds["other"] = [max(0.0, s - sum(each)) for s, *each in zip(found.seconds, *seconds.values(), strict=True)]
    seconds["step"] = found.seconds
    whole = statistics.median(found.seconds)
    out: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        out[name] = {"seconds": summary(values), "share": round(statistics.median(values) / whole, 4)}
        # What takes next to no time has no rate.
        if name != "other" and statistics.median(values) > 1e-3 * whole:
            rates = [n / s for n, s in zip(found.tokens, values, strict=True) if s > 0]
            out[name]["tokens_per_s"] = summary(rates)
    return out


def update(found: Steps, dtype: torch.dtype) -> dict[str, Any]:
    """Operations a second of the update, against a large matrix product here and, on a known GPU, its data sheet."""
    if not found.counted_flops:
        return {"flops": None}
    rates = [flops / s for flops, s in zip(found.flops, found.phase("update"), strict=True)]
    product, sheet = matmul_flops(found.device, dtype), peak_flops(found.device)
    out: dict[str, Any] = {
        "flops": summary(found.flops),
        "flops_per_s": summary(rates),
        "matmul_flops_per_s": float(f"{product:.4g}"),
        "of_matmul": round(statistics.median(rates) / product, 4),
    }
    if sheet is not None and dtype == torch.bfloat16:
        out["mfu"] = round(statistics.median(rates) / sheet, 4)
    return out


def memory(found: Steps, plan: MemoryPlan) -> dict[str, Any]:
    """Peak beside the plan's, without what a plan counts for libraries where the device counts tensors alone."""
    planned = plan.peak
    if torch.device(found.device).type == "cuda":
        planned -= sum(item.bytes for item in plan.items if item.name == "libraries")
    ratio = None if found.peak_bytes is None else round(found.peak_bytes / planned, 3)
    return {"peak_bytes": found.peak_bytes, "plan_bytes": planned, "plan_phase": plan.peak_phase, "of_plan": ratio}


def phase_table(result: dict[str, Any]) -> Table:
    """The phases for the terminal."""
    table = Table(title=f"{result['steps']} steps on {result['device']}")
    for column in ("phase", "seconds", "least", "greatest", "share", "tokens/s"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, phase in result["phases"].items():
        if name == "step":
            table.add_section()
        cells = [f"{phase['seconds'][key]:.3f}" for key in ("median", "min", "max")]
        rate = phase.get("tokens_per_s")
        table.add_row(name, *cells, f"{phase['share']:.0%}", "" if rate is None else f"{rate['median']:,.0f}")
    return table


def sentences(result: dict[str, Any]) -> list[str]:
    """What stands below the table."""
    tokens, responses = statistics.median(result["tokens"]), statistics.median(result["responses"])
    lines = [f"a step: {responses:g} responses, {tokens:,.0f} response tokens, which every rate is of (medians)"]
    found = result["update"]
    if found["flops"] is None:
        lines.append("update: operations of a mixture of experts are not counted")
    else:
        share = f"{found['of_matmul']:.0%} of a large {result['student']['autocast'] or result['student']['dtype']}"
        sheet = f", {found['mfu']:.1%} of the data sheet (MFU)" if "mfu" in found else ""
        rate = found["flops_per_s"]["median"]
        lines.append(f"update: {_rate(rate)}, {share} matrix product's {_rate(found['matmul_flops_per_s'])}{sheet}")
    kept = result["memory"]
    if kept["peak_bytes"] is not None:
        lines.append(
            f"memory: {kept['peak_bytes'] / 1e9:.2f} GB at the peak, {kept['of_plan']:.2f} of the plan's "
            f"{kept['plan_bytes'] / 1e9:.2f} GB ({kept['plan_phase']})"
        )
    return lines


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"
