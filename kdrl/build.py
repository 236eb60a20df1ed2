"""Recipe to live objects; the only module that knows every room."""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from kdrl.checkpoint import Checkpoints
from kdrl.checks import build_objective, needs_rewards, self_terms, teacher_terms
from kdrl.engines import TorchEngine
from kdrl.errors import UserError
from kdrl.evaluation import EvaluateConfig, EvaluationResult, evaluate_loaded, pick_problems
from kdrl.extragradient import ExtragradientAdamW
from kdrl.features.live import make_features
from kdrl.held_out import solution_loss
from kdrl.models import LoadedModel, encode_prompt, load_model
from kdrl.objectives.schedules import Memory
from kdrl.pairing import check_contexts, check_gives, check_lengths, check_pairing
from kdrl.recipe import Recipe
from kdrl.rollouts import Collector
from kdrl.score_checks import warnings_of
from kdrl.sources.base import Judge
from kdrl.sources.build import Writers
from kdrl.tasks import Problem, Task, VerifierPool, build_task
from kdrl.tasks.base import take
from kdrl.teachers import LocalTeacher, PreparedTeacher, ReferenceTeacher, SelfTeacher, Teacher
from kdrl.trainer import Parts
from kdrl.update import Updater


def resolve_device(name: str) -> str:
    """`auto` to cuda where there is one, else cpu; raises UserError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name} was asked for, but this torch sees no CUDA device; use device=cpu or auto.")
    return name


class Builder:
    """Everything of one run, each part made once; verifier workers live until `stack` closes."""

    def __init__(self, recipe: Recipe, run_dir: Path, stack: ExitStack) -> None:
        self.recipe, self.run_dir = recipe, run_dir
        self.device = resolve_device(recipe.device)
        self.notes: list[str] = []
        self.objective = build_objective(recipe)
        self.notes += warnings_of(self.objective)
        self.student = load_model(recipe.student, self.device, trainable=True, seed=recipe.seed)
        self.teacher = self._load_teacher()
        self.task = self._task()
        self.pool = stack.enter_context(VerifierPool(recipe.task))
        if recipe.student.dtype == "bfloat16" and recipe.student.lora is None:
            self.notes.append(
                "bfloat16 weights round small updates away (a step below 1/256 of a weight is lost); float32 with "
                "student.autocast=bfloat16, or student.lora, learns at small rates too"
            )
        self.engine = TorchEngine(self.student, recipe.rollout.rows, filtered_ok=recipe.rollout.filtered)
        self.writers = self._writers()
        self.stream = self.writers.problems(recipe.source)
        self._check_lengths()
        self._check_evaluation()

    def _load_teacher(self) -> LoadedModel | None:
        recipe = self.recipe
        if recipe.teacher is None:
            return None
        asked = teacher_terms(self.objective) or recipe.source.settings.asks_teacher or recipe.evaluate.baselines
        if not asked:
            self.notes.append("the teacher is not loaded: no term asks it and it writes nothing")
            return None
        teacher = load_model(recipe.teacher, self.device, trainable=False, seed=recipe.seed)
        self.notes += check_pairing(self.student, teacher)
        return teacher

    def _task(self) -> Task:
        @lru_cache(maxsize=4096)
        def length(prompt: str) -> int:
            return len(encode_prompt(self.student, prompt))

        def tokens(problem: Problem) -> int:
            if isinstance(problem.prompt, str):
                return length(problem.prompt)
            return len(encode_prompt(self.student, problem.prompt))

        return build_task(self.recipe.task, self.recipe.seed, tokens)

    def _check_lengths(self) -> None:
        models = {"student": self.student} | ({"teacher": self.teacher} if self.teacher else {})
        stream = self.stream
        # A generated task goes on for ever, so a sample has to do; of a file every problem is measured.
        problems = take(stream, 64 if stream.size is None else stream.size)
        check_lengths(models, problems, self.recipe)
        check_contexts(self.student, problems, self.recipe)
        if stream.skipped:
            counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in stream.skipped.items())
            self.notes.append(f"training problems left out: {counts}")

    def _check_evaluation(self) -> None:
        # A missing split must not be found out after the training.
        config = self.recipe.evaluate
        for asked, split in ((config.every, config.split), (config.final_problems, "test")):
            if asked:
                self.task.problems(split)

    def _writers(self) -> Writers:
        """What the recipe's source is built from."""
        recipe, rollout = self.recipe, self.recipe.rollout
        sampling: dict[str, Any] = {
            "max_new_tokens": rollout.max_new_tokens,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "stop": rollout.stop,
        }
        asked = needs_rewards(recipe, self.objective) or recipe.source.kind != "gold"
        return Writers(
            engine=self.engine,
            student=self.student,
            teacher=self.teacher,
            judge=Judge(self.pool if asked else None, rollout.max_new_tokens),
            stream=self.task.problems("train"),
            run_dir=self.run_dir,
            seed=recipe.seed,
            group=rollout.group,
            sampling=sampling,
            budget=recipe.optimizer.micro_batch_tokens,
        )

    def teachers(self) -> tuple[dict[str, Teacher], Teacher | None]:
        """The teachers that terms ask by name, and the frozen initial student where a term needs it."""
        budget = self.recipe.optimizer.micro_batch_tokens
        found: dict[str, Teacher] = {}
        if self.teacher is not None:
            found["teacher"] = self._scoring_teacher(self.teacher, budget)
        if self_terms(self.objective):
            found["self"] = SelfTeacher(self.student, budget, self.recipe.self_teacher)
        for name, each in found.items():
            check_gives(name, each.gives, self.objective)
        leashed = any(t.needs.reference for t in self.objective.terms)
        return found, ReferenceTeacher(self.student, budget) if leashed else None

    def _scoring_teacher(self, teacher: LoadedModel, budget: int) -> Teacher:
        prepare = None if self.recipe.teacher is None else self.recipe.teacher.prepare
        if prepare is None:
            return LocalTeacher(teacher, budget)
        return PreparedTeacher(teacher, budget, prepare.build(teacher, self.recipe.seed), self.student)

    def optimizer(self, updater: Updater) -> torch.optim.Optimizer:
        """AdamW with decay on matrices only; fused, which on a CPU takes a quarter of the time."""
        config = self.recipe.optimizer
        matrices = [p for p in updater.parameters if p.ndim >= 2]
        vectors = [p for p in updater.parameters if p.ndim < 2]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            if params
        ]
        groups += [] if updater.features is None else updater.features.groups()
        kind = ExtragradientAdamW if config.extragradient else torch.optim.AdamW
        return kind(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)

    def evaluate_model(self, loaded: LoadedModel, config: EvaluateConfig) -> EvaluationResult:
        """Responses of a model on a split's first problems, scored by the run's verifiers."""
        problems = pick_problems(self.task, config)
        engine = TorchEngine(loaded, self.recipe.rollout.rows, filtered_ok=True)
        limit = self.recipe.rollout.max_new_tokens
        # One seed for every run: evaluations of different runs must differ by the model alone.
        return evaluate_loaded(
            engine, loaded, problems, self.pool, config, 0, max_new_tokens=limit, stop=self.recipe.rollout.stop
        )

    def development(self, updater: Updater) -> dict[str, float | None]:
        """The evaluation of a training run, as metrics; the likelihood of solutions where a schedule follows it."""
        recipe = self.recipe
        result = self.evaluate_model(self.student, recipe.evaluate)
        row = {f"eval/{key}": value for key, value in result.headline().items()}
        if Memory.within(recipe).follows("eval/loss"):
            problems = pick_problems(self.task, recipe.evaluate)
            row["eval/loss"] = solution_loss(self.student, updater, problems, recipe.rollout.max_new_tokens)
        return row

    def parts(self) -> Parts:
        """Everything the trainer needs."""
        recipe = self.recipe
        budget = recipe.optimizer.micro_batch_tokens
        features = make_features(self.objective, self.student, self.teacher, budget, recipe.seed)
        updater = Updater(self.student, budget, features)
        teachers, reference = self.teachers()
        collector = Collector(
            self.writers.source(recipe.source),
            self.stream.__getitem__,
            self.writers.judge,
            prompts=recipe.rollout.prompts,
            rounds=recipe.rollout.dynamic_sampling,
            seed=recipe.seed,
            device=self.device,
            privileged=self.writers.privileged(recipe.source),
        )
        return Parts(
            recipe=recipe,
            run_dir=self.run_dir,
            student=self.student,
            objective=self.objective,
            collector=collector,
            teachers=teachers,
            reference=reference,
            updater=updater,
            optimizer=self.optimizer(updater),
            checkpoints=Checkpoints(self.run_dir, recipe.checkpoint),
            evaluate=partial(self.development, updater),
            device=self.device,
            skipped=lambda: self.stream.skipped,
        )
