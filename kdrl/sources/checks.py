"""Sources that cannot work with the rest of a recipe, each refused with what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdrl.errors import UserError
from kdrl.objectives.schedules import Schedule
from kdrl.sources.keep import Filtered
from kdrl.sources.kinds import Guided

if TYPE_CHECKING:
    from kdrl.recipe import Recipe


def check_source(recipe: Recipe) -> None:
    """Raise UserError for a source that the recipe's rollouts or length do not allow."""
    rollout, source = recipe.rollout, recipe.source
    settings = source.settings
    if settings.joint and (rollout.top_p < 1.0 or rollout.top_k > 0):
        raise UserError(
            f"source {source.kind} draws every token from two models, and rollout.top_p or top_k would have to cut "
            "both; leave them out."
        )
    if rollout.dynamic_sampling and not settings.resamples:
        raise UserError(
            f"rollout.dynamic_sampling resamples the student, who writes nothing under source {source.kind}."
            if "student" not in source.origins
            else f"rollout.dynamic_sampling would throw groups of source {source.kind} away that a further round "
            "cannot replace by the same kind; set it to 0."
        )
    if isinstance(settings, Guided) and settings.teacher >= rollout.group:
        raise UserError(
            f"source guided puts {settings.teacher} teacher responses into a group of {rollout.group}, which leaves "
            "the student none; raise rollout.group or lower guided.teacher."
        )
    share = getattr(settings, "share", None)
    if isinstance(share, Schedule) and share.adaptive is None:
        ends = [share(step, recipe.steps) for step in (0, max(0, recipe.steps - 1))]
        if not all(0.0 <= value <= 1.0 for value in ends):
            raise UserError(f"source.{source.kind}.share goes from {ends[0]:g} to {ends[1]:g}; a share is from 0 to 1.")


def own_samples(recipe: Recipe) -> set[str]:
    """Origins whose responses stand for the student's own samples: its own, and those with importance weights."""
    return {"student", *recipe.source.settings.weighted}


def foreign_reason(foreign: set[str]) -> str:
    """What else could be done about text of these origins, as the end of a sentence."""
    if foreign != {"mixed"}:
        return ""
    return " Importance weights would make it one: set source.mixed.weights to token, prefix or sequence."


def check_filtered_rewards(recipe: Recipe, name: str) -> None:
    """Raise UserError where a filter changes what a term's advantages are taken over."""
    settings = recipe.source.settings
    if isinstance(settings, Filtered) and not all(rule.whole_groups for rule in settings.keep):
        raise UserError(
            f"objective.{name} takes advantages over all of a problem's responses, and source filtered leaves some of "
            "them out by what became of them; filter by group_rate or student_rate, or use a mask."
        )
