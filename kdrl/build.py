"""Recipe to live objects; the only module that knows every room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from kdrl.checkpoint import Checkpoints
from kdrl.checks import build_objective, needs_rewards, self_terms
from kdrl.engines import Engine
from kdrl.errors import UserError
from kdrl.evaluation import EvaluateConfig, EvaluationResult, evaluate_loaded, pick_problems
from kdrl.features.live import make_features
from kdrl.held_out import solution_loss
from kdrl.limits import Limits, SparingEngine, SparingUpdater
from kdrl.models import LoadedModel, encode_prompt, load_model
from kdrl.models.loading import load_without_weights
from kdrl.objectives.schedules import Memory
from kdrl.optimizers import build_optimizer, check_kind
from kdrl.pairing import check_contexts, check_gives, check_lengths, check_numbers, pairing_checks
from kdrl.recipe import Recipe
from kdrl.rollouts import Collector
from kdrl.score_checks import unset_rate, warnings_of
from kdrl.sources.base import Judge
from kdrl.sources.build import Writers
from kdrl.sources.served import ServedEngine, reader_of
from kdrl.tasks import Problem, Task, VerifierPool, build_task
from kdrl.tasks.base import take
from kdrl.teachers import LocalTeacher, PreparedTeacher, ReferenceTeacher, SelfTeacher, Teacher
from kdrl.teachers.cache_ahead import check_ahead, lookups
from kdrl.teachers.cache_checks import check_draws
from kdrl.teachers.cache_store import CacheStore
from kdrl.teachers.cached import CachedTeacher, open_cached, open_writing
from kdrl.teachers.checks import (
    asked_models,
    asked_teachers,
    check_routes,
    place_of,
    same_model,
    section_of,
    shares_student,
    the_teacher,
)
from kdrl.teachers.combined import CombinedConfig
from kdrl.teachers.offloaded import OffloadedTeacher, check_offload
from kdrl.teachers.served import ServedTeacher
from kdrl.teachers.served_checks import Plan, most_asked, open_served, served_checks
from kdrl.trainer import Parts
from kdrl.update import Updater
from kdrl.vocab.checks import in_chunks, reads_own
from kdrl.vocab.pairing import check_alignment, check_vocabularies, checks_of, reading
from kdrl.vocab.spaces import make_spaces

Check = Callable[[], Sequence[str] | None]
Observe = Callable[[str, Check], None]
"""Runs a named check, which raises UserError or returns notes: the doctor writes down what training stops at."""


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

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        stack: ExitStack,
        observe: Observe | None = None,
        caches: type[CacheStore] = CacheStore,
    ) -> None:
        self.recipe, self.run_dir, self._caches = recipe, run_dir, caches
        self.device = resolve_device(recipe.device)
        self.limits = Limits.of(recipe)
        self.notes: list[str] = []
        self._observe = observe or self._note
        self.objective = build_objective(recipe)
        self._observe("optimizer.kind", lambda: check_kind(recipe.optimizer.kind, [torch.device(self.device).type]))
        self._observe("scores", lambda: [*warnings_of(self.objective), *unset_rate(recipe)])
        self.student = load_model(recipe.student, self.device, trainable=True, seed=recipe.seed)
        self.served: dict[str, ServedTeacher] = {}
        self.cached: dict[str, CachedTeacher] = {}
        self.readers: dict[str, LoadedModel] = {}
        self._stack = stack
        self.models = self._load_teachers()
        self.teacher = self.models.get("teacher")
        self.task = self._task()
        self.pool = stack.enter_context(VerifierPool(recipe.task))
        self._observe("numbers", lambda: check_numbers(recipe))
        self.engine = SparingEngine(self.student, self.limits.rows, filtered_ok=recipe.rollout.filtered)
        self.writers = self._writers()
        self.stream = self.writers.problems(recipe.source)
        self._check_lengths()
        self._check_evaluation()

    def _note(self, name: str, check: Check) -> None:
        self.notes += check() or []

    def _load_teachers(self) -> dict[str, LoadedModel]:
        """The models of the teachers that are asked, by name, each checkpoint loaded once."""
        recipe = self.recipe
        found: dict[str, LoadedModel] = {}
        asked = asked_models(recipe, self.objective)
        if recipe.teacher is not None and "teacher" not in asked:
            self.notes.append("the teacher is not loaded: no term asks it and it writes nothing")
        for name in asked:
            section = section_of(recipe, name)
            own, where = reads_own(recipe, self.objective, name), place_of(name)
            if own and (section.reads_cache or section.served is not None):
                # Its weights are elsewhere, and its tokens are its own.
                self.readers[name] = load_without_weights(section)
                note = partial(check_vocabularies, self.student, self.readers[name], the_teacher(where))
                self._observe("vocabularies" if name == "teacher" else f"vocabularies ({name})", note)
            if section.reads_cache:
                who = f"{where}.model" if own else "the student"
                self.cached[name] = open_cached(section, self.reader(name), recipe.rollout.temperature, who, where)
                self.notes.append(f"{name} is not loaded: its scores are read from {self.cached[name].store.folder}")
                continue
            if section.served is not None:
                stored = 0 if section.cache is None else section.cache.settings().get("k", 0)
                self.served[name] = open_served(section, self.reader(name), max(stored, most_asked(self.objective)))
                continue
            if shares_student(recipe, self.objective, name):
                self.notes.append(f"{name} is the student's own base model: its weights are shared, adapters off")
                continue
            if section.offload:
                self._observe(f"offload ({name})", partial(check_offload, self.device, section.load is not None, where))
            alike = [n for n in found if in_chunks(self.objective, n) == in_chunks(self.objective, name)]
            twin = next((n for n in alike if same_model(section_of(recipe, n), section)), None)
            if twin is not None:
                self.notes.append(f"{name} is the same checkpoint as {twin} and is loaded once")
                found[name] = found[twin]
                continue
            found[name] = load_model(section, self.device, trainable=False, seed=recipe.seed)
            pair = (self.student, found[name])
            for what, check in checks_of(recipe, self.objective, name, pair, pairing_checks(*pair, where)).items():
                self._observe(what if name == "teacher" else f"{what} ({name})", check)
        return found

    def reader(self, name: str) -> LoadedModel:
        """Whose tokens a teacher is asked about: its own where its terms go by chunks, else the student's."""
        known = self.readers | getattr(self, "models", {})
        return known.get(name, self.student) if reads_own(self.recipe, self.objective, name) else self.student

    def read_by(self, name: str, teacher: Teacher) -> Teacher:
        """A teacher as its terms read it."""
        return reading(self.objective, name, teacher, self.student, (self.readers | self.models).get(name))

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
        models = {"student": self.student} | self.models
        stream = self.stream
        # A generated task goes on for ever, so a sample has to do; of a file every problem is measured.
        problems = take(stream, 64 if stream.size is None else stream.size)
        own = [name for name in self.models if in_chunks(self.objective, name)]
        self._observe("context length", lambda: check_lengths(models, problems, self.recipe, own))
        for name in [*own, *self.readers]:
            found = partial(check_alignment, name, self.student, self.reader(name), problems)
            self._observe(f"alignment ({name})", found)
        self._observe("self-teacher's context", lambda: check_contexts(self.student, problems, self.recipe))
        self._check_served(problems)
        self._observe("routes", lambda: check_routes(self.recipe, problems))
        if stream.skipped:
            counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in stream.skipped.items())
            self.notes.append(f"training problems left out: {counts}")

    def _check_served(self, problems: Sequence[Problem]) -> None:
        rollout = self.recipe.rollout
        plan = Plan(problems, rollout.max_new_tokens, rollout.temperature, self.engine, self.recipe.seed)
        for name, teacher in self.served.items():
            section, own = section_of(self.recipe, name), self.readers.get(name)
            checks = served_checks(section, teacher, self.student, plan, own)
            for what, check in checks.items():
                self._observe(what if name == "teacher" else f"{what} ({name})", check)

    def _check_evaluation(self) -> None:
        self._observe("held-out problems", self._look_for_splits)

    def _look_for_splits(self) -> None:
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
            served=self.served.get("teacher"),
        )

    def teachers(self) -> tuple[dict[str, Teacher], Teacher | None]:
        """The teachers that terms ask by name, and the frozen initial student where a term needs it."""
        budget = self.recipe.optimizer.micro_batch_tokens
        recipe = self.recipe
        members = self.members()
        found = {name: members[name] for name in asked_teachers(self.objective) if name in members}
        for name in asked_teachers(self.objective):
            section = recipe.teachers.get(name)
            if isinstance(section, CombinedConfig):
                found[name] = section.build(name, members)
        if self_terms(self.objective):
            found["self"] = self.limits.tokens.follow(SelfTeacher(self.student, budget, recipe.self_teacher))
        found = {name: self.read_by(name, each) for name, each in found.items()}
        for name, each in found.items():
            check = partial(check_gives, name, each.gives, self.objective, stored=name in self.cached)
            self._observe(f"what {name} gives", check)
        leashed = any(t.needs.reference for t in self.objective.terms)
        return found, self.limits.tokens.follow(ReferenceTeacher(self.student, budget)) if leashed else None

    def members(self) -> dict[str, Teacher]:
        """The teachers that are models, by name."""
        return {name: self._scoring_teacher(name) for name in asked_models(self.recipe, self.objective)}

    def _scoring_teacher(self, name: str) -> Teacher:
        section = section_of(self.recipe, name)
        found = self.cached[name] if name in self.cached else self._live_teacher(name)
        if section.cache is not None and section.cache.write:
            recipe, cache = self.recipe, section.cache
            model, where = self.models.get(name), Path(cache.path).expanduser()
            given: dict[str, Any] = {"temperature": recipe.rollout.temperature, "seed": recipe.seed}
            given |= {"own": reads_own(recipe, self.objective, name), "kind": self._caches}
            found = open_writing(found, section, model, self.reader(name), where, cache, **given)
            self._stack.enter_context(found.store)
            self.notes += found.store.notes
        if isinstance(found, CachedTeacher):
            check_draws(found.store.manifest.get("tau"), name, self.objective)
        return found

    def _live_teacher(self, name: str) -> Teacher:
        return self.served[name] if name in self.served else self.limits.tokens.follow(self._local_teacher(name))

    def _local_teacher(self, name: str) -> LocalTeacher:
        section, budget = section_of(self.recipe, name), self.recipe.optimizer.micro_batch_tokens
        if name not in self.models:
            return ReferenceTeacher(self.student, budget)
        if section.offload:
            return OffloadedTeacher(self.models[name], budget)
        if section.prepare is None:
            return LocalTeacher(self.models[name], budget)
        return PreparedTeacher(
            self.models[name], budget, section.prepare.build(self.models[name], self.recipe.seed), self.student
        )

    def optimizer(self, updater: Updater) -> torch.optim.Optimizer:
        """The recipe's optimizer, with decay on matrices only."""
        config = self.recipe.optimizer
        matrices = [p for p in updater.parameters if p.ndim >= 2]
        vectors = [p for p in updater.parameters if p.ndim < 2]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            if params
        ]
        groups += [] if updater.features is None else updater.features.groups()
        groups += [] if updater.spaces is None else updater.spaces.groups()
        return build_optimizer(
            groups,
            config.kind,
            betas=config.betas,
            eps=config.eps,
            extragradient=config.extragradient,
            master_weights=config.master_weights,
        )

    def writes(self, who: str) -> bool:
        """Whether `who` (student or a teacher) is a model that can be evaluated: here, or on a server."""
        return who == "student" or who in self.models or who in self.served

    def silent(self) -> str | None:
        """Why `teacher` cannot be evaluated, where there is one that does not write."""
        if self.writes("teacher"):
            return None
        if "teacher" in self.cached:
            return f"the teacher's scores are read from {self.cached['teacher'].store.folder}, which writes no answers"
        if isinstance(self.recipe.teachers.get("teacher"), CombinedConfig):
            return "teacher is made of several, which cannot write at once"
        return None if self.recipe.teacher is None else "the teacher is the student as it starts"

    def evaluate_model(self, who: str, config: EvaluateConfig) -> EvaluationResult:
        """Responses of the student or a teacher on a split's first problems, scored by the run's verifiers."""
        problems = pick_problems(self.task, config)
        if who in self.served:
            loaded = reader_of(section_of(self.recipe, who), self.student)
            engine: Engine = ServedEngine(self.served[who], loaded, problems)
        else:
            loaded = self.student if who == "student" else self.models[who]
            engine = SparingEngine(loaded, self.limits.rows, filtered_ok=True)
        rollout = self.recipe.rollout
        # One seed for every run: evaluations of different runs must differ by the model alone.
        return evaluate_loaded(
            engine, loaded, problems, self.pool, config, 0, max_new_tokens=rollout.max_new_tokens, stop=rollout.stop
        )

    def development(self, updater: Updater) -> dict[str, float | None]:
        """The evaluation of a training run, as metrics; the likelihood of solutions where a schedule follows it."""
        recipe = self.recipe
        result = self.evaluate_model("student", recipe.evaluate)
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
        updater = SparingUpdater(self.student, self.limits.tokens, features)
        teachers, reference = self.teachers()
        for teacher in lookups(recipe, self.objective, teachers):
            source, problem = self.writers.source(recipe.source), self.stream.__getitem__
            self._observe("stored responses", partial(check_ahead, recipe, source, problem, teacher))
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
        updater.attach(make_spaces(self.objective, self.student, self.models, recipe.seed))
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
            limits=self.limits,
            skipped=lambda: self.stream.skipped,
        )
