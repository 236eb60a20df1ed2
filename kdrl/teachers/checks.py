"""Self-teachers that could teach nothing, refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdrl.errors import UserError
from kdrl.objectives.base import Term
from kdrl.recipe import Recipe
from kdrl.teachers.config import SelfTeacherConfig


def check_self_teacher(recipe: Recipe, asking: Sequence[Term[Any]]) -> None:
    """Raise UserError for a self-teacher that the terms `asking` it could learn nothing from, or that none asks."""
    config = recipe.self_teacher
    if not asking:
        if config != SelfTeacherConfig():
            raise UserError("self_teacher is described, but no term asks it; set distill.teacher=self or leave it out.")
        return
    read = set().union(*(set(t.config.on) for t in asking)) & set(recipe.source.origins)
    own = read - {"privileged"}
    if config.kind == "live" and config.context is None and own:
        raise UserError(
            f"the live student without more context is the student itself, so on {', '.join(sorted(own))} responses "
            "there is nothing to learn from it: set self_teacher.context, or self_teacher.kind to ema, past or "
            "initial, or on: [privileged]."
        )
    if config.context is not None and read and not own:
        raise UserError(
            "self_teacher.context is for responses to the ordinary prompt, and the terms that ask the self-teacher "
            "read privileged ones, which bring their own; leave it out."
        )
    _check_context(recipe, own)
    rates = [config.rate(step, recipe.steps) for step in (0, max(0, recipe.steps - 1))]
    if config.kind == "ema" and not 0.0 <= min(rates) <= max(rates) <= 1.0:
        raise UserError(f"self_teacher.rate is a share between 0 and 1, not {min(rates):g} to {max(rates):g}.")


def _check_context(recipe: Recipe, own: set[str]) -> None:
    config = recipe.self_teacher
    if "sibling" in config.shows and recipe.rollout.group < 2:
        raise UserError("self_teacher.context shows {sibling}, and a group of one has none; set rollout.group to 2.")
    if config.needs_verdicts and "gold" in own:
        raise UserError(
            "self_teacher.context shows {feedback} or {sibling}, and gold text is not verified; leave gold out of the "
            "`on` of the terms that ask the self-teacher."
        )
