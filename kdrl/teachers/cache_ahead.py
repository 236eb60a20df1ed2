"""The first steps' responses looked up in a cache before the first step, where they are text that is there already.

Left out: sources that are fixed in part, combinations of teachers, and terms with a mask, which may ask for less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kdrl.batch import Response
from kdrl.objectives.objective import Objective
from kdrl.recipe import Recipe
from kdrl.seeds import derive
from kdrl.sources import kinds
from kdrl.sources.base import Request, Source
from kdrl.tasks import Problem
from kdrl.teachers.base import Teacher
from kdrl.teachers.cached import CachedTeacher, WritingTeacher, check_there
from kdrl.teachers.checks import teacher_of
from kdrl.vocab.teacher import VocabTeacher

AHEAD = 256
"""Responses that are looked up at most, whole steps and at least one."""


def lookups(recipe: Recipe, objective: Objective, teachers: Mapping[str, Teacher]) -> list[Teacher]:
    """The cached teachers that are asked about every response of a source whose text is there."""
    if not isinstance(recipe.source.settings, kinds.Gold | kinds.Traces):
        return []
    asked = {teacher_of(term) for term in objective.terms if term.config.mask == "all"}
    return [teacher for name, teacher in teachers.items() if name in asked and _cached(teacher) is not None]


def check_ahead(recipe: Recipe, source: Source, problem: Callable[[int], Problem], teacher: Teacher) -> None:
    """Raise UserError where the first steps meet a response that the teacher's cache lacks."""
    cached, count, found = _cached(teacher), recipe.rollout.prompts, list[Response]()
    steps = 0
    while steps < recipe.steps and (steps == 0 or len(found) < AHEAD):
        positions = tuple(range(steps * count, (steps + 1) * count))
        seed = derive(recipe.seed, "rollout", steps, 0)
        found += source.write(Request.of([problem(p) for p in positions], 0, seed, positions=positions))
        steps += 1
    if isinstance(teacher, VocabTeacher):
        found = [read for response in found if (read := teacher.as_read(response)) is not None]
    if cached is not None:
        check_there(cached.store, found, "the first step" if steps == 1 else f"the first {steps} steps")


def _cached(teacher: Teacher) -> CachedTeacher | None:
    inner = teacher.inner if isinstance(teacher, VocabTeacher) else teacher
    return inner if isinstance(inner, CachedTeacher) and not isinstance(inner, WritingTeacher) else None
