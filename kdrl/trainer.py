"""The one loop: write, verify, ask the teacher, update, record, save. Every method is this loop with other terms.

The verifier works beside writing, and beside teachers whose questions need no verdicts. Left out: writing the next step
during an update, several processes.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kdrl.asking import Answers, Asking
from kdrl.batch import Response, Rollouts
from kdrl.calibration import calibrate, unmeasured
from kdrl.checkpoint import Checkpoints, Loaded, flatten_optimizer, restore_optimizer
from kdrl.errors import RunError, UserError
from kdrl.limits import Limits
from kdrl.measuring import measure_scores
from kdrl.metrics import Phases, balance, step_row
from kdrl.models import LoadedModel
from kdrl.objectives.blocks import block_ids
from kdrl.objectives.objective import Active, Objective, token_data
from kdrl.objectives.schedules import Memory, Moment
from kdrl.recipe import Recipe
from kdrl.rollouts import Collected, Collector
from kdrl.seeds import derive
from kdrl.teachers import Teacher
from kdrl.teachers.beside import Beside
from kdrl.update import Scored, Tally, Updater
from kdrl.vocab.teacher import chunk_blocks
from kdrl.watch import Watch


class InterruptedRunError(Exception):
    """Ctrl-C: everything is saved; the text says how to go on. Exit status 1."""


@dataclass
class Progress:
    """All of a run's state beside weights and optimizer: plain numbers, stored as JSON."""

    step: int = 0
    position: int = 0
    responses: int = 0
    teacher_calls: int = 0
    teacher_calls_saved: int = 0
    calls_of: dict[str, int] = field(default_factory=dict)
    skipped_updates: int = 0
    bad_in_a_row: int = 0
    best_score: float | None = None
    verdicts: dict[str, int] = field(default_factory=lambda: {"timeout": 0, "crash": 0, "printed": 0})


@dataclass
class Parts:
    """The live objects of a run, as `build` makes them from a recipe."""

    recipe: Recipe
    run_dir: Path
    student: LoadedModel
    objective: Objective
    collector: Collector
    teachers: Mapping[str, Teacher]
    reference: Teacher | None
    updater: Updater
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    evaluate: Callable[[], Mapping[str, float | None]]
    device: str
    limits: Limits
    skipped: Callable[[], Mapping[str, int]] = dict


class Trainer:
    """Runs a recipe's steps from wherever the last checkpoint left off."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.recipe = parts.recipe
        self.progress = Progress()
        self.memory = Memory.within(parts.recipe)
        self.beside = Beside(parts.teachers)
        self.asking = Asking(parts, self.beside)
        self._interrupted = False

    def restore(self, saved: Loaded) -> dict[str, int]:
        """Go back to a checkpoint; returns the metric files' byte offsets at that moment."""
        names = self.parts.updater.named_parameters
        # First, because it refuses a checkpoint of other parameters than the recipe's.
        restore_optimizer(self.parts.optimizer, names, saved.tensors["optimizer"], saved.state["optimizer"])
        with torch.no_grad():
            for name, value in saved.tensors["student"].items():
                if names[name].shape != value.shape:
                    raise UserError(
                        f"{saved.path} holds {name} of shape {list(value.shape)}, and the student's is "
                        f"{list(names[name].shape)}; put back the model that the run was started with."
                    )
                names[name].copy_(value)
        self.progress = Progress(**saved.state["progress"])
        self.memory.states = saved.state["schedules"]
        kept = saved.tensors.get("source", {})
        self.parts.collector.restore(self.progress.position, saved.state["source"], kept)
        self.beside.restore(saved)
        self.parts.limits.restore(saved.state.get("limits", {}))
        return saved.state["offsets"]

    def save(self, watch: Watch, score: float | None) -> Path:
        """Write a checkpoint of everything that the next step depends on."""
        names = self.parts.updater.named_parameters
        trained = {name: p.detach() for name, p in names.items() if p.requires_grad}
        tensors, optimizer = flatten_optimizer(self.parts.optimizer, names)
        state = {"progress": vars(self.progress), "optimizer": optimizer, "offsets": watch.offsets()}
        state |= {"schedules": self.memory.states, "limits": self.parts.limits.state()}
        state["source"], kept = self.parts.collector.state()
        state["beside"], beside = self.beside.save()
        groups = {"student": trained, "optimizer": tensors} | ({"source": kept} if kept else {}) | beside
        return self.parts.checkpoints.save(self.progress.step, groups, state, score=score)

    def run(self, watch: Watch) -> None:
        """All remaining steps; raises InterruptedRunError after a Ctrl-C and RunError when the numbers break."""
        every, evaluate_every = self.recipe.checkpoint.every, self.recipe.evaluate.every
        with self._listen(watch):
            self._calibrate()
            while self.progress.step < self.recipe.steps:
                row, responses = self._step()
                done = self.progress.step
                last = done == self.recipe.steps
                score = None
                if evaluate_every and (done % evaluate_every == 0 or last):
                    row |= self.parts.evaluate()
                    score = row.get("eval/accuracy")
                self.memory.update(row, done - 1, self.recipe.steps)
                watch.step(row, [_sample(r) for r in responses])
                for warning in self.beside.warnings():
                    watch.note(f"note: {warning}")
                self._stop_if_broken()
                best = self._is_best(score)
                if (every and done % every == 0) or best or last or self._interrupted:
                    self.save(watch, score)
                if self._interrupted and not last:
                    raise InterruptedRunError(
                        f"stopped after step {done}; all of it is saved. Go on with: kdrl train --resume "
                        f"{self.parts.run_dir}"
                    )

    def _calibrate(self) -> None:
        """Measure what must be known before the first update, on the problems that training begins with."""
        if unmeasured(self.memory):
            collector = self.parts.collector
            before = (collector.position, *collector.state())
            calibrate(self.memory, self.trial, self.parts.updater)
            collector.restore(*before)

    def trial(self, number: int, phases: Phases | None = None) -> Scored:
        """Responses that are written and scored but not trained on, of the problems that training begins with."""
        moment, phases = Moment(-1 - number, self.recipe.steps, self.memory), phases or Phases()
        position = self.parts.collector.position
        with phases.of("rollout"):
            collected = self.parts.collector.collect(moment, lambda rollouts: set())
        self.parts.collector.position = position
        # Weights and shares stand as at the first step: a warm-up has no value before it.
        return self._score(Rollouts.of(collected.responses, self.parts.device), replace(moment, step=0), phases)

    def _is_best(self, score: float | None) -> bool:
        """Whether this step is the best so far and is to be kept for it."""
        best = self.progress.best_score
        if score is None or not self.recipe.checkpoint.keep_best or (best is not None and score <= best):
            return False
        self.progress.best_score = score
        return True

    def _stop_if_broken(self) -> None:
        if self.progress.bad_in_a_row >= self.recipe.optimizer.stop_after_bad:
            last = self.parts.checkpoints.latest()
            kept = "No checkpoint was saved yet." if last is None else f"The last good checkpoint is {last.path}."
            raise RunError(
                f"loss or gradient was not finite in {self.progress.bad_in_a_row} updates in a row, up to step "
                f"{self.progress.step}; none of them was applied. {kept} Lower optimizer.lr, or look at the rollouts."
            )

    @contextmanager
    def _listen(self, watch: Watch) -> Any:
        """Ctrl-C and SIGTERM end the run after the step in progress; a second one ends it at once."""

        def stop(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            watch.note("stopping: this step is finished and saved first (once more to stop at once)")

        try:
            old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, as in some notebooks
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @property
    def moment(self) -> Moment:
        """Where the run stands."""
        return Moment(self.progress.step, self.recipe.steps, self.memory)

    def _step(self) -> tuple[dict[str, Any], list[Response]]:
        moment, phases = self.moment, Phases()
        start = time.perf_counter()
        with phases.of("rollout"):
            collected = self.parts.collector.begin(moment, lambda rollouts: self._wanted_groups(rollouts, moment))
        phases.seconds["rollout"] -= collected.verify_seconds
        rollouts = Rollouts.of(collected.responses, self.parts.device)
        fitted: dict[str, Any] = {}
        scored = self._score(rollouts, moment, phases, fitted, waiting=collected)
        phases.seconds["verify"] = collected.verify_seconds
        with phases.of("update"):
            tally, norms, balanced = self._update(scored, moment)
        self.progress.step += 1
        self.beside.after_step(self.progress.step)
        self.progress.position = self.parts.collector.position
        self.progress.responses += collected.generated
        self._count_calls(scored)
        for status in self.progress.verdicts:
            self.progress.verdicts[status] += collected.statuses[status]
        phases.seconds["step"] = time.perf_counter() - start
        row = step_row(self.recipe, self.progress, collected, scored, tally, norms, phases.seconds)
        row |= {"lr": self._lr(moment)} | balanced | fitted | self.beside.numbers(collected.responses)
        row |= {
            f"weight/{n}": w
            for n, w in zip(self.parts.objective.names, self.parts.objective.weights(moment), strict=True)
        }
        row |= {f"verifier/{k}": v for k, v in self.progress.verdicts.items()}
        row |= {f"skipped/{reason}": count for reason, count in self.parts.skipped().items()}
        row |= {f"halved/{option}": value for option, value in self.parts.limits.state().items()}
        return row, collected.responses

    def _wanted_groups(self, rollouts: Rollouts, moment: Moment) -> set[int]:
        """Groups in which a distillation term keeps a token (for dynamic sampling)."""
        logq_N = entropy_N = None
        if self.parts.objective.wants_entropy_mask:
            logq_N, entropy_N = self.parts.updater.score_policy(rollouts, self.recipe.rollout.temperature)
        active = self.beside.narrowed(self.parts.objective.activate(rollouts, moment, entropy_N, logq_N), rollouts)
        kept: set[int] = set()
        for each in active:
            if each.term.family == "kd":
                kept |= set(rollouts.group_B[rollouts.row_N[each.keep_N]].tolist())
        return kept

    def _score(
        self,
        rollouts: Rollouts,
        moment: Moment,
        phases: Phases,
        fitted: dict[str, Any] | None = None,
        waiting: Collected | None = None,
    ) -> Scored:
        """What every update needs; with `fitted`, teachers are fitted to the student first and tell it their loss.

        Verdicts that are still to come are those of `waiting`; what needs none of them is done first.
        """
        temperature = self.recipe.rollout.temperature
        several = self.recipe.optimizer.minibatches * self.recipe.optimizer.epochs > 1
        old_N = entropy_N = None
        if several or self.parts.objective.wants_entropy_mask:
            with phases.of("update"):
                old_N, entropy_N = self.parts.updater.score_policy(rollouts, temperature)
        known: Answers = {}
        if waiting is not None and not all(r.judged for r in waiting.responses):
            with phases.of("teacher"):
                known = self.asking.early(rollouts, moment, entropy_N, old_N)
            self.parts.collector.settle(waiting)
            rollouts.take_verdicts()
        active = self.beside.narrowed(self.parts.objective.activate(rollouts, moment, entropy_N, old_N), rollouts)
        with phases.of("teacher"):
            if fitted is not None:
                fitted |= self.beside.prepare(active, rollouts, temperature, moment)
            evidence, reference = self.asking.ask(rollouts, active, known)
        scored = Scored(
            rollouts,
            active,
            evidence,
            reference,
            old_N if several else None,
            _sampled(rollouts),
            temperature,
            token_data(rollouts),
            self._uniforms(rollouts, active, moment),
            blocks={a.name: block_ids(a.keep_N, rollouts.row_N, a.term.block) for a in active if a.term.block}
            | chunk_blocks(active, evidence),
        )
        with phases.of("update"):
            return replace(scored, measured=measure_scores(self.parts.updater, scored))

    def _uniforms(self, rollouts: Rollouts, active: list[Active], moment: Moment) -> dict[str, torch.Tensor]:
        """Random numbers of the terms that draw, a function of seed, step and term alone."""
        found = {}
        for each in active:
            if each.term.draws:
                seed = derive(self.recipe.seed, "draws", moment.step, each.name)
                generator = torch.Generator().manual_seed(seed)
                # In float64: float32 has 2^24 numbers, and a vocabulary holds tokens rarer than that.
                found[each.name] = torch.rand(
                    rollouts.tokens, each.term.draws, generator=generator, dtype=torch.float64
                )
        return {name: values.to(self.parts.device) for name, values in found.items()}

    def _count_calls(self, scored: Scored) -> None:
        """Responses that the teacher was asked about, and those that a mask kept from it."""
        for name, evidence in scored.evidence.items():
            asking = [a.eligible_N for a in scored.active if a.teacher == name]
            eligible = scored.rollouts.row_N[torch.stack(asking).any(0)].unique()
            self.progress.teacher_calls += evidence.calls
            self.progress.teacher_calls_saved += evidence.fan * len(eligible) - evidence.calls
            for part, its in evidence.parts(name).items():
                self.progress.calls_of[part] = self.progress.calls_of.get(part, 0) + its.calls
        # Feature terms pass the teacher once more, inside the update.
        watching = [a for a in scored.active if a.term.needs.features]
        if watching:
            kept, eligible = (
                len(scored.rollouts.row_N[torch.stack(masks).any(0)].unique())
                for masks in ([a.keep_N for a in watching], [a.eligible_N for a in watching])
            )
            self.progress.teacher_calls += kept
            self.progress.teacher_calls_saved += eligible - kept

    def _lr(self, moment: Moment) -> float:
        config = self.recipe.optimizer
        rise = min(1.0, (moment.step + 1) / config.warmup) if config.warmup else 1.0
        return rise * config.lr.at(moment)

    def _update(self, scored: Scored, moment: Moment) -> tuple[Tally, list[float], dict[str, float | None]]:
        config, updater, step = self.recipe.optimizer, self.parts.updater, moment.step
        for group in self.parts.optimizer.param_groups:
            group["lr"] = self._lr(moment) * group.get("lr_scale", 1.0)
        tally, norms = Tally(), list[float]()
        balanced: dict[str, float | None] = {}
        # A scalar that follows the balance must see it at every step.
        every = 1 if self.memory.follows("kd_rl_norm_ratio") else self.recipe.log.gradients_every
        for epoch in range(config.epochs):
            for rows in self._minibatches(scored.rollouts.rows, step, epoch):
                first = not norms
                if first and every and (step % every == 0):
                    balanced = balance(updater, scored, rows)
                loss = updater.accumulate(scored, rows, tally if epoch == 0 else None)
                norm, applied = updater.step(self.parts.optimizer, config.clip, loss)
                norms.append(norm)
                if applied:
                    self.beside.after_update(moment)
                self.progress.bad_in_a_row = 0 if applied else self.progress.bad_in_a_row + 1
                self.progress.skipped_updates += not applied
        return tally, norms, balanced

    def _minibatches(self, rows: int, step: int, epoch: int) -> list[list[int]]:
        count = min(self.recipe.optimizer.minibatches, rows)
        if count <= 1:
            return [list(range(rows))]
        generator = torch.Generator().manual_seed(derive(self.recipe.seed, "minibatch", step, epoch))
        order = torch.randperm(rows, generator=generator).tolist()
        return [sorted(order[i::count]) for i in range(count)]


def _sampled(rollouts: Rollouts) -> torch.Tensor:
    """Log-probs that the engine sampled at, NaN for text that no engine wrote, `[N]`."""
    values = [x for r in rollouts.responses for x in (r.logp or [math.nan] * len(r.token_ids))]
    return torch.tensor(values, device=rollouts.tokens_N.device)


def _sample(response: Response) -> dict[str, Any]:
    return {
        "prompt": response.problem.prompt,
        "response": response.text,
        "reward": response.reward,
        "correct": response.correct,
        "origin": response.origin,
        "tokens": len(response.token_ids),
        "truncated": not response.ended,
        "answer": response.problem.answer,
    }


__all__ = ["Collected", "InterruptedRunError", "Parts", "Progress", "RunError", "Trainer"]
