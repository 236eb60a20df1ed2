"""Which teachers are read through chunks, and terms on chunks that cannot work, refused before anything is loaded."""

from __future__ import annotations

from kdrl.errors import UserError
from kdrl.objectives.objective import Objective
from kdrl.objectives.terms import VocabTerm
from kdrl.recipe import Recipe
from kdrl.teachers.checks import section_of, teacher_of
from kdrl.teachers.combined import CombinedConfig


def in_chunks(objective: Objective, name: str) -> bool:
    """Whether terms read the teacher called `name` through chunks, so that its tokenizer may be its own."""
    asking = [term for term in objective.terms if teacher_of(term) == name]
    return bool(asking) and all(isinstance(term, VocabTerm) for term in asking)


def reads_own(recipe: Recipe, objective: Objective, name: str) -> bool:
    """Whether the teacher called `name` is asked in tokens of its own: read through chunks, and not writing itself."""
    writes = name == "teacher" and recipe.source.settings.asks_teacher
    return in_chunks(objective, name) and not writes


def check_vocabulary_terms(recipe: Recipe, objective: Objective) -> None:
    """Raise UserError for a term on chunks whose teacher cannot be read so."""
    for name, term in zip(objective.names, objective.terms, strict=True):
        if not isinstance(term, VocabTerm):
            continue
        asked = term.config.teacher
        others = [
            n
            for n, t in zip(objective.names, objective.terms, strict=True)
            if teacher_of(t) == asked and not isinstance(t, VocabTerm)
        ]
        if asked == "self":
            raise UserError(f"objective.{name} compares tokenizers, and the student has its own; use a distill term.")
        if others:
            raise UserError(
                f"objective.{name} has the teacher read its own tokens, and objective.{others[0]} the student's; name "
                "the teacher twice under `teachers`, one for each, or drop one of the terms."
            )
        if isinstance(recipe.teachers.get(asked), CombinedConfig):
            raise UserError(
                f"objective.{name} asks {asked!r}, which is made of several teachers; chunks are laid out for one "
                "model, so write one term for each of them."
            )
        if recipe.teacher is None and asked not in recipe.teachers:
            continue  # said where teachers are looked for
        section = section_of(recipe, asked)
        if term.needs.projectors and (section.served is not None or section.cache is not None):
            raise UserError(
                f"objective.{name} reads the teacher's hidden states and embeddings, which no server or cache gives; "
                f"load {asked} as a local model."
            )
        if term.needs.projectors and section.offload:
            raise UserError(
                f"objective.{name} looks at {asked}'s embeddings during the update, when {asked}.offload has put its "
                "weights in main memory; leave offload out."
            )
        if section.prepare is not None:
            raise UserError(
                f"objective.{name} reads a teacher in its own tokens, and {asked}.prepare fits a teacher to the "
                "student's; remove it."
            )
