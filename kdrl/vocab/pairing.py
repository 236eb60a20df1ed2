"""What must hold of a student and a teacher that reads its own tokens, and the teacher as its terms read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kdrl.errors import UserError
from kdrl.models import LoadedModel
from kdrl.objectives.objective import Objective
from kdrl.objectives.terms import VocabTerm
from kdrl.recipe import Recipe
from kdrl.tasks import Problem
from kdrl.teachers.base import Teacher
from kdrl.teachers.checks import place_of, teacher_of, the_teacher
from kdrl.vocab.align import HALF, align
from kdrl.vocab.checks import in_chunks, reads_own
from kdrl.vocab.teacher import VocabTeacher, Vocabularies


def check_vocabularies(student: LoadedModel, teacher: LoadedModel, who: str = "the teacher") -> list[str]:
    """A note on how much the two vocabularies share; UserError when tokens of one are no fixed bytes."""
    both = Vocabularies(student, teacher)
    shared, small = both.shared_2K.shape[1], min(student.vocab_size, teacher.vocab_size)
    return [
        f"{who} reads its own tokens: {shared} of {student.vocab_size} student and {teacher.vocab_size} teacher "
        f"tokens stand for the same text ({shared / small:.0%} of the smaller vocabulary)"
    ]


def checks_of(
    recipe: Recipe,
    objective: Objective,
    name: str,
    models: tuple[LoadedModel, LoadedModel],
    same: dict[str, Callable[[], list[str]]],
) -> dict[str, Callable[[], list[str]]]:
    """The checks of student and teacher: `same` where they must have one tokenizer, else that they can be aligned."""
    if not reads_own(recipe, objective, name):
        return same
    vocabularies = partial(check_vocabularies, *models, the_teacher(place_of(name)))
    return {"vocabularies": vocabularies, "ranks": partial(warn_of_ranks, objective, name)}


def warn_of_ranks(objective: Objective, name: str) -> list[str]:
    """A note where a teacher is followed by its sorted probabilities alone."""
    asking = [n for n, t in zip(objective.names, objective.terms, strict=True) if teacher_of(t) == name]
    if not all(n.startswith(("sorted_distill", "multilevel_distill")) for n in asking):
        return []
    return [
        f"objective.{asking[0]} compares sorted probabilities and cannot tell which token is likely: a student with "
        "its tokens permuted has no loss; overlap_distill and chunk_distill can"
    ]


def check_alignment(who: str, student: LoadedModel, teacher: LoadedModel, problems: Sequence[Problem]) -> list[str]:
    """A note on how the solutions (or prompts) of some problems are cut by both; UserError when nothing matches."""
    both = Vocabularies(student, teacher)
    solutions = [p.solution for p in problems[:64] if p.solution]
    prompts = [p.prompt for p in problems[:64] if not p.solution and isinstance(p.prompt, str) and p.prompt]
    mine = teachers = groups = covered = 0
    for text in [*solutions, *prompts]:
        ids, pieces = both.mine.encode(text.encode())
        others, theirs = both.theirs.encode(text.encode())
        found = align(pieces, theirs)
        mine, teachers, groups = mine + len(ids), teachers + len(others), groups + len(found)
        covered += found[-1].student[1] if found else 0
    if not mine:
        return []
    read = " and ".join(f"{len(t)} {what}" for t, what in ((solutions, "solutions"), (prompts, "prompts")) if t)
    if covered < HALF * mine:
        raise UserError(
            f"{who} cannot be aligned with the student: of {mine} student tokens of {read} of the problems only "
            f"{covered} stand for text that both can write. Its tokenizer lacks their characters; choose another."
        )
    warned = "" if solutions else "; what the student will write is not known yet (vocabulary/covered counts it)"
    return [
        f"{who}: {covered / mine:.0%} of the student's tokens aligned in {read} of the problems, "
        f"{mine / max(1, groups):.2f} student and {teachers / max(1, groups):.2f} teacher tokens a chunk{warned}"
    ]


def reading(
    objective: Objective, name: str, teacher: Teacher, student: LoadedModel, loaded: LoadedModel | None
) -> Teacher:
    """The teacher as its terms read it: in its own tokens where all of them go by chunks."""
    if not in_chunks(objective, name):
        return teacher
    asking = [t for t in objective.terms if isinstance(t, VocabTerm) and teacher_of(t) == name]
    # Without a model of its own it is the student's base.
    return VocabTeacher(teacher, Vocabularies(student, loaded or student), spaces=any(t.spaces for t in asking))
