"""A run from start to end: its folder, what is said at the start, training or resuming, the final evaluation."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrl.build import Builder, resolve_device
from kdrl.environment import write_environment
from kdrl.errors import UserError
from kdrl.evaluation import EvaluationResult
from kdrl.explain import explain_objective
from kdrl.heap import settle
from kdrl.limits import told
from kdrl.models import save_final
from kdrl.planning import memory_plan
from kdrl.recipe import Recipe, load_recipe
from kdrl.repeatable import repeatable
from kdrl.teachers.checks import check_named_models
from kdrl.trainer import InterruptedRunError, Trainer
from kdrl.watch import Watch
from kdrl.yamls import load_yaml

log = logging.getLogger("kdrl")

Say = Callable[[Any], None]


@dataclass(frozen=True)
class RunResult:
    """What a finished run left: its folder and its held-out evaluations (`final`, `start`, `teacher`), if any."""

    run_dir: Path
    evaluations: dict[str, EvaluationResult] = field(repr=False)

    @property
    def model(self) -> Path:
        """The trained model, an ordinary Hugging Face folder."""
        return self.run_dir / "final"


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    say: Say | None = None,
    force: bool = False,
) -> RunResult:
    """Train by a recipe (a Recipe, a YAML path or a mapping) into a new folder `output` (default: under runs/).

    `force` starts a run that its memory plan does not fit. Raises UserError for a mistake in recipe, data or models,
    RunError when the numbers break or the device's memory does not do, InterruptedRunError after a Ctrl-C.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise UserError("overrides belong to a recipe file or mapping; give them to load_recipe.")
        resolved, name = recipe, recipe.method or "run"
    else:
        resolved = load_recipe(recipe, overrides)
        name = Path(recipe).stem if isinstance(recipe, str | Path) else (resolved.method or "run")
    run_dir = Path(output) if output is not None else Path("runs") / name
    with _claimed(run_dir):
        return _run(resolved, run_dir, say or print, resume=False, force=force)


def resume(run_dir: str | Path, *, say: Say | None = None, force: bool = False) -> RunResult:
    """Go on with a run that was stopped or killed; the result equals the uninterrupted one."""
    folder = Path(run_dir)
    stored = folder / "recipe.yaml"
    if not stored.is_file():
        raise UserError(f"{folder} is no run to resume: it has no recipe.yaml. Give the folder of an earlier --output.")
    raw = load_yaml(stored.read_text(encoding="utf-8"), str(stored))
    if not isinstance(raw, dict):
        raise UserError(f"{stored} is not a recipe any more; put back the file that the run wrote.")
    recipe = load_recipe(raw)
    return _run(recipe, folder, say or print, resume=True, force=force)


def check_output(run_dir: Path) -> None:
    """Raise UserError unless the folder is new or empty."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if (run_dir / "recipe.yaml").exists():
            raise UserError(
                f"{run_dir} already holds a run. Go on with it by `kdrl train --resume {run_dir}`, or choose another "
                "--output."
            )
        raise UserError(f"{run_dir} exists and is not an empty folder; choose another --output.")


@contextmanager
def _claimed(run_dir: Path) -> Iterator[None]:
    """Make the folder before anything takes its time; what ends before a run began leaves no empty ones behind."""
    check_output(run_dir)
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {run_dir} cannot be made: {error.strerror}.") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first that is not empty, and with it those that hold it
            for folder in made:
                folder.rmdir()
        raise


def _run(recipe: Recipe, run_dir: Path, say: Say, *, resume: bool, force: bool) -> RunResult:
    check_named_models(recipe)
    with ExitStack() as stack, _stopped_at_once(run_dir), told(), repeatable():
        if not resume:
            say(explain_objective(recipe))
        _check_memory(recipe, say, force)
        builder = Builder(recipe, run_dir, stack)
        # Before anything is written: what is refused leaves the folder free for another try.
        parts = builder.parts()
        stack.callback(parts.checkpoints.close)
        for note in builder.notes:
            say(f"note: {note}")
        if not resume:
            part = run_dir / ".recipe.part"
            part.write_text(recipe.to_yaml(), encoding="utf-8")
            part.replace(run_dir / "recipe.yaml")
            write_environment(run_dir / "environment.json")
        parts.checkpoints.claim()
        trainer = Trainer(parts)
        evaluations = _Evaluations(run_dir / "evaluation.json", resume)
        saved = parts.checkpoints.latest() if resume else None
        _measure_baselines(builder, evaluations, say)
        offsets: dict[str, int] = {"metrics": 0, "rollouts": 0}
        if saved is not None:
            offsets = trainer.restore(saved)
            say(f"resuming {run_dir} after step {saved.step}")
        elif resume:
            say(f"{run_dir} has no checkpoint yet, so it starts from step 0")
        watch = Watch(
            run_dir,
            recipe.log,
            recipe.steps,
            start_step=trainer.progress.step,
            offsets=offsets if resume else None,
            recipe=recipe.model_dump(mode="json"),
        )
        with watch:
            trainer.run(watch)
        _finish(builder, run_dir, evaluations, say)
    return RunResult(run_dir, dict(evaluations.results))


@contextmanager
def _stopped_at_once(run_dir: Path) -> Iterator[None]:
    """A Ctrl-C outside the steps, or the second one within: what is saved is whole, and the text says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if not (run_dir / "recipe.yaml").exists():
            raise
        raise InterruptedRunError(
            f"stopped at once; the last checkpoint is whole. Go on with: kdrl train --resume {run_dir}"
        ) from None


def _check_memory(recipe: Recipe, say: Say, force: bool) -> None:
    """On a CPU the kernel would kill the process without a word; a GPU answers, and `limits` halves."""
    plan = memory_plan(recipe)
    if not (plan.fits or force) and resolve_device(recipe.device) == "cpu":
        raise UserError(
            f"the run {plan.verdict}. `kdrl train RECIPE --dry-run` shows the whole plan; --force starts all the same."
        )
    if plan.device == "cpu":
        settle(tight=plan.tight)
    say(plan.summary)


class _Evaluations:
    """Held-out evaluations of a run, in one JSON file that a resumed run goes on with."""

    def __init__(self, path: Path, keep: bool) -> None:
        self.path = path
        self.results: dict[str, EvaluationResult] = {}
        if keep and path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self.results = {k: EvaluationResult.from_dict(v) for k, v in stored.items() if v is not None}
            except (ValueError, KeyError, TypeError, UserError):
                log.warning("%s cannot be read and is made again", path)

    def put(self, name: str, result: EvaluationResult) -> None:
        """Store one, replacing the file in one rename."""
        self.results[name] = result
        stored = {
            key: self.results[key].to_dict() if key in self.results else None for key in ("final", "teacher", "start")
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(stored), encoding="utf-8")
        part.replace(self.path)


def _measure_baselines(builder: Builder, evaluations: _Evaluations, say: Say) -> None:
    config = builder.recipe.evaluate
    if not (config.final_problems and config.baselines):
        return
    for name, who in (("start", "student"), ("teacher", "teacher")):
        if builder.writes(who) and name not in evaluations.results:
            result = builder.evaluate_model(who, config.final())
            evaluations.put(name, result)
            say(f"{name}: {_sentence(result)}")
    if "teacher" not in evaluations.results and (missing := builder.silent()) is not None:
        say(f"note: evaluate.baselines measures the student alone: {missing}")


def _finish(builder: Builder, run_dir: Path, evaluations: _Evaluations, say: Say) -> None:
    save_final(builder.student, run_dir / "final")
    if builder.recipe.evaluate.final_problems:
        result = builder.evaluate_model("student", builder.recipe.evaluate.final())
        evaluations.put("final", result)
        say(f"final: {_sentence(result)}")
    from kdrl.report import report_run

    report = report_run(run_dir)
    say(f"model:  {run_dir / 'final'}\nreport: {report}")


def _sentence(result: EvaluationResult) -> str:
    low, high = result.intervals["accuracy"]
    tokens, cut = result.metrics["tokens"], result.metrics["truncated"]
    return (
        f"accuracy {result.accuracy:.3f} [{low:.3f}, {high:.3f}] on {len(result.records)} {result.split} problems, "
        f"{tokens:.1f} tokens, {cut:.1%} truncated"
    )
