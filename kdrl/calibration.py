"""Scalars that are measured once, before the first update: the mean of a token score over some batches (CAKLD)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kdrl.errors import UserError
from kdrl.measuring import evaluate_score
from kdrl.objectives.adaptive import Calibrated
from kdrl.objectives.objective import Active
from kdrl.objectives.schedules import Memory
from kdrl.objectives.scores import Score
from kdrl.update import Scored, Updater


def unmeasured(memory: Memory) -> dict[str, Calibrated]:
    """Scalars that wait for their measurement, by path."""
    found = {path: schedule.adaptive for path, schedule in memory.schedules.items()}
    return {p: a for p, a in found.items() if isinstance(a, Calibrated) and memory.states[p]["value"] is None}


def calibrate(memory: Memory, batch: Callable[[int], Scored], updater: Updater) -> None:
    """Measure what waits: `batch(i)` writes and scores responses that nothing is trained on.

    The mean is over the response tokens that the term keeps; BitDistiller's code also counts prompts and padding.
    """
    waiting = unmeasured(memory)
    if not waiting:
        return
    sums, counts = dict.fromkeys(waiting, 0.0), dict.fromkeys(waiting, 0)
    for number in range(max(a.batches for a in waiting.values())):
        scored = batch(number)
        active = _comparing(scored)
        if active is None:
            continue
        for path, adaptive in waiting.items():
            if number < adaptive.batches:
                values_N = evaluate_score(updater, scored, active, Score(adaptive.of), None, {})
                keep_N = active.keep_N & scored.evidence[active.teacher or ""].scored_N
                sums[path] += float(values_N[keep_N].sum(dtype=torch.float64))
                counts[path] += int(keep_N.sum())
    for path, adaptive in waiting.items():
        if not counts[path]:
            raise UserError(
                f"{path} is measured on the first responses, and no term compares a token of them with the teacher; "
                "give the distill term a weight above 0 at the first step and a mask that keeps something."
            )
        memory.states[path] = adaptive.update(memory.states[path], sums[path] / counts[path], 0, 0)


def _comparing(scored: Scored) -> Active | None:
    """The first term that compares distributions at this step."""
    return next((a for a in scored.active if a.term.compared), None)
