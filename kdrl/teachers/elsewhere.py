"""What a recipe may not ask of a teacher on a server, whose inside and weights are not here."""

from __future__ import annotations

from kdrl.errors import UserError
from kdrl.objectives.objective import Objective
from kdrl.recipe import Recipe
from kdrl.sources.keep import Filtered
from kdrl.teachers.checks import asked_teachers
from kdrl.teachers.combined import CombinedConfig
from kdrl.teachers.config import TeacherConfig


def check_served(recipe: Recipe, objective: Objective) -> None:
    """Raise UserError for a served teacher that a term, a source or a combination could not use."""
    teacher = recipe.teacher
    settings = recipe.source.settings
    if teacher is not None and teacher.served is not None:
        if any(term.needs.features for term in objective.terms):
            raise UserError("a feature term reads the inside of the teacher, which no server gives; load it locally.")
        if settings.joint:
            raise UserError(
                f"source {recipe.source.kind} draws every token with the teacher's logits, which no server gives; load "
                "it locally, or use source teacher."
            )
        if teacher.served.text_only and settings.asks_teacher and recipe.rollout.top_k:
            raise UserError(
                f"rollout.top_k is no option of teacher.served.api={teacher.served.api}; set it to 0, or serve the "
                "teacher for api tokens."
            )
        if isinstance(settings, Filtered) and settings.scores & {"teacher_logp", "logp_gap"}:
            raise UserError(
                "source filtered scores responses by a local teacher only; load it, or keep by other scores."
            )
    asked = asked_teachers(objective)
    members = {m for n in asked if isinstance(c := recipe.teachers.get(n), CombinedConfig) for m in c.members}
    for name in {*asked, *members}:
        section = recipe.teachers.get(name, teacher)
        if isinstance(section, TeacherConfig) and section.served is not None and section.served.text_only:
            raise UserError(
                f"a term asks {name} for log-probs, and teacher.served.api={section.served.api} gives text alone: it "
                "may write (source teacher with a cross_entropy term), never score. Serve it with vLLM for api tokens."
            )
