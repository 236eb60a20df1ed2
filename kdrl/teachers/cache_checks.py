"""What a recipe may not ask of a teacher whose scores are read from a cache, refused before anything is loaded."""

from __future__ import annotations

from kdrl.batch import Origin
from kdrl.errors import UserError
from kdrl.objectives.objective import Objective
from kdrl.objectives.terms import Distill
from kdrl.recipe import Recipe
from kdrl.sources import kinds
from kdrl.sources.config import SourceSettings
from kdrl.sources.keep import Filtered
from kdrl.teachers.checks import asked_models, asked_teachers, place_of, teacher_of
from kdrl.teachers.combined import CombinedConfig
from kdrl.teachers.config import TeacherConfig

WRITE_FIRST = (
    "have it write first (`kdrl generate RECIPE --output traces.jsonl`), and set source: {traces: traces.jsonl} for "
    "both `kdrl cache-teacher` and the run"
)


def fixed_text(settings: SourceSettings) -> tuple[Origin, ...]:
    """Origins of a source whose responses are there before training, so that they can be scored beforehand."""
    if isinstance(settings, Filtered):
        return fixed_text(settings.source.settings)
    if isinstance(settings, kinds.Traces) or (isinstance(settings, kinds.Guided) and settings.traces is not None):
        return ("teacher",)
    other = getattr(settings, "other", getattr(settings, "chosen", None))
    gold = isinstance(settings, kinds.Gold | kinds.Corrupt) or other == "gold"
    return ("gold",) if gold else ()


def check_cache(recipe: Recipe, objective: Objective) -> None:
    """Raise UserError for a cached teacher that would have to write, show its inside, or score new text."""
    cached = {name for name in _models(recipe, objective) if _read_only(recipe, name)}
    if not cached:
        return
    if "teacher" in cached and recipe.source.settings.asks_teacher:
        raise UserError(
            f"source {recipe.source.kind} needs the teacher itself, and teacher.cache holds scores; {WRITE_FIRST}."
        )
    if "teacher" in cached and any(term.needs.features for term in objective.terms):
        raise UserError("a feature term reads the inside of the teacher, which no cache holds; remove teacher.cache.")
    there = fixed_text(recipe.source.settings)
    for name, term in zip(objective.names, objective.terms, strict=True):
        asked = teacher_of(term)
        read = [] if asked is None else [member for member in _members(recipe, asked) if member in cached]
        if not read:
            continue
        new = (set(term.config.on) & set(recipe.source.origins)) - set(there)
        if new:
            fits = f"set on: [{', '.join(there)}]" if there else "choose source gold or traces"
            raise UserError(
                f"objective.{name} reads {', '.join(sorted(new))} responses, which are not written before training, so "
                f"no cache holds them; {fits}, or have the run score and store them: {place_of(read[0])}.cache="
                "{path: FOLDER, write: true}."
            )


def check_draws(tau: float | None, who: str, objective: Objective) -> None:
    """Raise UserError for a term that asks for draws of another power of the teacher than the stored ones.

    `tau` is None of a cache without draws.
    """
    if tau is None:
        return
    for name, term in zip(objective.names, objective.terms, strict=True):
        drawn = isinstance(term, Distill) and term.config.support.kind == "draws" and teacher_of(term) == who
        if drawn and term.config.support.tau != tau:
            raise UserError(
                f"objective.{name}.support draws from p^{term.config.support.tau:g}, and the stored draws are from "
                f"p^{tau:g}; set tau: {tau:g}, or cache with --tau {term.config.support.tau:g}."
            )


def _members(recipe: Recipe, name: str) -> tuple[str, ...]:
    section = recipe.teachers.get(name)
    return section.members if isinstance(section, CombinedConfig) else (name,)


def _models(recipe: Recipe, objective: Objective) -> set[str]:
    members = {m for name in asked_teachers(objective) for m in _members(recipe, name)}
    return members | set(asked_models(recipe, objective))


def _read_only(recipe: Recipe, name: str) -> bool:
    section = recipe.teachers.get(name, recipe.teacher)
    return isinstance(section, TeacherConfig) and section.reads_cache
