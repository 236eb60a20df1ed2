"""The numbers of one step, from what the step already computed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdrl.bench.turns import synchronize
from kdrl.objectives.terms import Distill
from kdrl.recipe import Recipe
from kdrl.rollouts import Collected
from kdrl.update import Scored, Tally, Updater

if TYPE_CHECKING:
    from kdrl.trainer import Progress


@dataclass
class Phases:
    """Seconds spent in each phase of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Any:
        """Time a phase."""
        start = time.perf_counter()
        yield
        synchronize()  # else what a GPU has yet to do would count to the next phase
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _outcomes(collected: Collected) -> dict[str, Any]:
    own = [r for r in collected.responses if r.origin == "student"] or collected.responses
    groups: dict[int, set[float]] = {}
    for r in own:
        groups.setdefault(r.group, set()).add(r.reward)
    return {
        "reward": _mean([r.reward for r in own]),
        "accuracy": _mean([float(r.correct) for r in own]),
        "tokens": _mean([len(r.token_ids) for r in own]),
        "truncated": _mean([float(not r.ended) for r in own]),
        "zero_advantage_share": _mean([float(len(seen) == 1) for seen in groups.values()]),
        "groups_without_right": 1.0 - len({r.group for r in own if r.correct}) / max(1, len(groups)),
        "batch_responses": len(collected.responses),
        "dropped_groups": collected.dropped_groups,
    }


def _origins(recipe: Recipe, collected: Collected) -> dict[str, float]:
    """Share of the step's responses of each writer that the source has."""
    counts = Counter(r.origin for r in collected.responses)
    return {f"origin/{name}": counts[name] / max(1, counts.total()) for name in recipe.source.origins}


def _teacher_gap(scored: Scored, logq_N: Tensor | None) -> dict[str, float | None]:
    """Mean R = log p - log q over the student's tokens that the teacher scored, and its share beyond the clamp."""
    evidence = next((e for e in (scored.evidence.get(n) for n in ("teacher", *scored.evidence)) if e), None)
    nothing: dict[str, float | None] = {"log_ratio_mean": None, "log_ratio_beyond_clamp": None, "kl_teacher": None}
    if evidence is None or logq_N is None:
        return nothing
    both_N = evidence.scored_N & ~logq_N.isnan()
    if not bool(both_N.any()):
        return nothing
    ratio = (evidence.logp_N - logq_N)[both_N]
    bounds = [a.term.config.clamp for a in scored.active if isinstance(a.term, Distill) and a.term.config.clamp]
    beyond = float((ratio.abs() > bounds[0]).float().mean()) if bounds else 0.0
    mean = float(ratio.mean())
    return {"log_ratio_mean": mean, "log_ratio_beyond_clamp": beyond, "kl_teacher": -mean}


def _gaps_of_several(scored: Scored, progress: Progress) -> dict[str, float | None]:
    """For each of several teachers, the student's KL to it on the tokens that it scored, and its calls."""
    row: dict[str, float | None] = {}
    if len(progress.calls_of) < 2:
        return row
    logq_N = scored.sampled_N
    for name, evidence in scored.evidence.items():
        for part, its in evidence.parts(name).items():
            both_N = its.scored_N if logq_N is None else its.scored_N & ~logq_N.isnan()
            known = logq_N is not None and bool(both_N.any())
            row[f"kl_teacher/{part}"] = float((logq_N - its.logp_N)[both_N].mean()) if known else None  # type: ignore[operator]
    return row | {f"teacher_calls/{name}": calls for name, calls in progress.calls_of.items()}


def _shares(scored: Scored) -> dict[str, float]:
    """For a teacher chosen among several, the share of the scored tokens that each of them scores."""
    return {f"chosen/{part}": share for each in scored.evidence.values() for part, share in each.shares().items()}


def _masked_share(scored: Scored) -> dict[str, float | None]:
    """Share of the tokens of terms with a teacher that their masks leave out; null where no term asks one."""
    asking = [a for a in scored.active if a.teacher]
    eligible = sum(int(a.eligible_N.sum()) for a in asking)
    kept = sum(int(a.keep_N.sum()) for a in asking)
    return {"masked_share": 1.0 - kept / eligible if eligible else None}


def step_row(
    recipe: Recipe,
    progress: Progress,
    collected: Collected,
    scored: Scored,
    tally: Tally,
    norms: Sequence[float],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One line of metrics.jsonl, but for learning rate, weights, verifier counts and evaluation."""
    weights = {a.name: a.weight for a in scored.active}
    updates = max(1, min(recipe.optimizer.minibatches, scored.rollouts.rows))
    row: dict[str, Any] = {"step": progress.step} | _outcomes(collected)
    row["loss"] = sum(weights[name] * value for name, value in tally.loss.items()) / updates
    row["grad_norm"] = _mean(norms)
    row["entropy"] = tally.entropy / tally.tokens if tally.tokens else None
    row |= {f"loss/{name}": value / updates for name, value in tally.loss.items()}
    row |= {name: value / updates for name, value in tally.counts.items()}
    for name, (divergence, mass_p, mass_q, count) in tally.divergence.items():
        row[f"divergence/{name}"] = divergence / count if count else None
        row[f"support/{name}/teacher_mass"] = mass_p / count if count else None
        row[f"support/{name}/student_mass"] = mass_q / count if count else None
    if tally.policy_tokens:
        row["clipped_share"] = tally.held / tally.policy_tokens
    if tally.student_tokens:
        row["sampling_mismatch"] = tally.mismatch / tally.student_tokens
    row |= _teacher_gap(scored, scored.sampled_N) | _masked_share(scored)
    row["teacher_calls"] = progress.teacher_calls
    row["teacher_calls_saved"] = progress.teacher_calls_saved
    row |= _gaps_of_several(scored, progress) | _shares(scored)
    row["responses"] = progress.responses
    row["skipped_updates"] = progress.skipped_updates
    written = sum(len(r.token_ids) for r in collected.responses)
    row |= _origins(recipe, collected) | collected.numbers()
    row["tokens_per_second"] = written / max(1e-9, seconds["step"])
    if seconds["rollout"] > 0:
        row["rollout_tokens_per_second"] = written / seconds["rollout"]
    return row | {f"time/{name}": value for name, value in seconds.items()}


def balance(updater: Updater, scored: Scored, rows: Sequence[int]) -> dict[str, float | None]:
    """Norm ratio and cosine of the distillation and reward gradients, each as weighted in the objective.

    A pass of its own per side, so that logging never changes the bytes of the run.
    """
    terms = {family: [a for a in scored.active if a.term.family == family] for family in ("kd", "rl")}
    if not all(terms.values()):
        return {"kd_rl_norm_ratio": None, "kd_rl_cosine": None}
    sides: dict[str, list[Tensor | None]] = {}
    for family, active in terms.items():
        part = Scored(
            scored.rollouts,
            active,
            scored.evidence,
            scored.reference,
            scored.old_N,
            None,
            scored.temperature,
            scored.data,
            scored.uniform,
            scored.measured,
            scored.blocks,
        )
        updater.accumulate(part, rows)
        sides[family] = updater.gradients()
        updater.clear()
    kd, rl = sides["kd"], sides["rl"]
    kd_norm, rl_norm = _dot(kd, kd) ** 0.5, _dot(rl, rl) ** 0.5
    both = kd_norm > 0 and rl_norm > 0
    return {
        "kd_norm": kd_norm,
        "rl_norm": rl_norm,
        "kd_rl_norm_ratio": kd_norm / rl_norm if both else None,
        "kd_rl_cosine": _dot(kd, rl) / (kd_norm * rl_norm) if both else None,
    }


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """Inner product of two gradients, one parameter at a time in float64."""
    return sum(
        float(x.flatten().double() @ y.flatten().double())
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
    )
