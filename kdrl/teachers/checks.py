"""Which teachers a recipe asks, and those that could teach nothing, refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kdrl.errors import UserError, nearest
from kdrl.models.config import TeacherModelConfig
from kdrl.models.sources import check_named
from kdrl.objectives.base import Term
from kdrl.objectives.objective import Objective
from kdrl.objectives.terms import Distill, VocabTerm
from kdrl.recipe import Recipe
from kdrl.tasks.base import Problem
from kdrl.teachers.combined import CombinedConfig
from kdrl.teachers.config import SelfTeacherConfig, TeacherConfig
from kdrl.teachers.route import route_of


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


def teacher_of(term: Term[Any]) -> str | None:
    """The name of the teacher that a term asks: one of `teachers`, `teacher`, `self`, or none."""
    if term.needs.features:
        return "teacher"
    if term.needs.teacher is None:
        return None
    return term.config.teacher if isinstance(term, Distill | VocabTerm) else "teacher"


def place_of(name: str) -> str:
    """Where a recipe describes the teacher called `name`."""
    return name if name == "teacher" else f"teachers.{name}"


def the_teacher(where: str) -> str:
    """The teacher that is described at `where` in a recipe, in words."""
    return "the teacher" if where == "teacher" else where


def asked_teachers(objective: Objective) -> list[str]:
    """Names of the teachers that terms ask, each once, the student itself left out."""
    names = [teacher_of(term) for term in objective.terms]
    return list(dict.fromkeys(name for name in names if name not in (None, "self")))


def section_of(recipe: Recipe, name: str) -> TeacherConfig:
    """The section of a teacher that is a model."""
    section = recipe.teachers.get(name, recipe.teacher)
    assert isinstance(section, TeacherConfig)
    return section


def check_named_models(recipe: Recipe) -> None:
    """Raise UserError for a model or tokenizer whose path is not there, before anything else takes its time.

    Of a teacher that is elsewhere the name may be that of another machine.
    """
    sections: dict[str, Any] = {"student": recipe.student, "teacher": recipe.teacher}
    sections |= {place_of(name): section for name, section in recipe.teachers.items()}
    for where, section in sections.items():
        away = isinstance(section, TeacherConfig) and (section.served is not None or section.reads_cache)
        if not isinstance(section, TeacherModelConfig) or away:
            continue
        for key in ("model", "tokenizer"):
            named = getattr(section, key)
            if isinstance(named, str) and not named.endswith(".gguf"):
                check_named(named, f"{where}.{key}")


def asked_models(recipe: Recipe, objective: Objective) -> list[str]:
    """Names of the models that score, write, or are measured beside the student, combinations resolved."""
    names: list[str] = []
    for name in asked_teachers(objective):
        section = recipe.teachers.get(name)
        names += section.members if isinstance(section, CombinedConfig) else [name]
    if recipe.teacher is not None and (recipe.source.settings.asks_teacher or recipe.evaluate.baselines):
        names.insert(0, "teacher")
    return list(dict.fromkeys(names))


def same_model(a: TeacherModelConfig, b: TeacherModelConfig) -> bool:
    """Whether two sections load the same weights, tokenizer and number formats."""
    kept = set(TeacherModelConfig.model_fields) - {"model"}
    return _resolved(a) == _resolved(b) and all(getattr(a, name) == getattr(b, name) for name in kept)


def _resolved(section: TeacherModelConfig) -> Any:
    named = section.model
    if isinstance(named, str) and Path(named).expanduser().exists():
        return str(Path(named).expanduser().resolve())
    return named


def shares_student(recipe: Recipe, objective: Objective, name: str) -> bool:
    """Whether a teacher that only scores is the base of the student's adapters, so that no second copy is needed."""
    section = section_of(recipe, name)
    inside = name == "teacher" and (
        recipe.source.settings.asks_teacher or any(term.needs.features for term in objective.terms)
    )
    plain = section.model_dump(exclude_defaults=True).keys() <= set(TeacherModelConfig.model_fields)
    return recipe.student.lora is not None and plain and not inside and same_model(recipe.student, section)


def check_several(recipe: Recipe, objective: Objective) -> None:
    """Raise UserError for a teacher that is not there, that nothing asks, or that cannot be combined."""
    known = {*recipe.teachers, *(["teacher"] if recipe.teacher is not None else [])}
    for term in objective.terms:
        name = teacher_of(term)
        if name is not None and name not in known | {"self", "teacher"}:
            raise UserError(f"objective.{term.name}.teacher: no teacher is called {name!r}{nearest(name, known)}")
    if "self" in recipe.teachers:
        raise UserError("teachers.self: the student itself is called so; choose another name.")
    asked = set(asked_teachers(objective))
    members: set[str] = set()
    for name, section in recipe.teachers.items():
        if isinstance(section, CombinedConfig):
            _check_members(recipe, name, section, known)
            members |= set(section.members) if name in asked else set()
    unused = sorted(recipe.teachers.keys() - asked - members)
    if unused:
        raise UserError(
            f"teachers.{unused[0]} is asked by no term; set objective.distill.teacher={unused[0]}, or leave it out."
        )
    _check_offload(recipe, objective)
    combined = isinstance(recipe.teachers.get("teacher"), CombinedConfig)
    if combined and any(term.needs.features for term in objective.terms):
        raise UserError("a feature term reads the inside of one model, and teacher is a combination; name one model.")


def _check_offload(recipe: Recipe, objective: Objective) -> None:
    inside = recipe.source.settings.asks_teacher or any(term.needs.features for term in objective.terms)
    if recipe.teacher is not None and recipe.teacher.offload and inside:
        raise UserError("teacher.offload is for a teacher that only scores, and this one writes or is looked into.")
    moved = [s for s in recipe.teachers.values() if isinstance(s, TeacherConfig)]
    moved += [recipe.teacher] if recipe.teacher is not None else []
    for i, one in enumerate(moved):
        if any(one.offload != other.offload and same_model(one, other) for other in moved[:i]):
            raise UserError("two teachers are one checkpoint, and only one is offloaded; set offload on both or none.")


def _check_members(recipe: Recipe, name: str, section: CombinedConfig, known: set[str]) -> None:
    for member in section.members:
        if member not in known:
            raise UserError(f"teachers.{name} names {member!r}, which is no teacher{nearest(member, known)}")
        one = recipe.teachers.get(member, recipe.teacher)
        if isinstance(one, CombinedConfig):
            raise UserError(f"teachers.{name} combines {member!r}, which is a combination itself; name its members.")
        if one is not None and one.prepare is not None:
            raise UserError(
                f"teachers.{member}.prepare is fitted to the student for a term of its own, and {name} combines it "
                "with others; leave one of them out."
            )


def check_routes(recipe: Recipe, problems: Iterable[Problem]) -> None:
    """Raise UserError for a problem that a routed teacher has no member for."""
    for name, section in recipe.teachers.items():
        if isinstance(section, CombinedConfig) and section.route is not None:
            for problem in problems:
                route_of(section.route, problem, place_of(name))
