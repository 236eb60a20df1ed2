"""Pairings that cannot work, refused before anything is loaded: each with what to do instead."""

from __future__ import annotations

from kdrl.errors import UserError
from kdrl.objectives.masks import mask_names, reads_entropy
from kdrl.objectives.objective import Objective
from kdrl.objectives.terms import TERMS, Distill, PolicyGradient, Term
from kdrl.recipe import Recipe

OF_CORRECTNESS = {"wrong_response", "right_response", "wrong_group"}


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's terms, ready to run."""
    terms = [TERMS.get(entry.name)(entry.config) for entry in recipe.objective]
    return Objective(terms, drop_flat=recipe.rollout.dynamic_sampling > 0)


def teacher_terms(objective: Objective) -> list[Term]:
    """Terms that ask the external teacher."""
    return [
        t
        for t in objective.terms
        if t.needs.teacher is not None and not (isinstance(t, Distill) and t.config.teacher == "self")
    ]


def needs_rewards(recipe: Recipe, objective: Objective) -> bool:
    """Whether anything in the recipe looks at a verdict."""
    masks = set().union(*(mask_names(t.config.mask) for t in objective.terms)) if objective.terms else set()
    return (
        any(t.needs.rewards for t in objective.terms)
        or bool(masks & OF_CORRECTNESS)
        or recipe.source.kind == "privileged"
        or recipe.rollout.dynamic_sampling > 0
    )


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for the first pairing in the recipe that cannot work."""
    if not recipe.objective:
        raise UserError("the recipe has no objective: name a method (`kdrl methods` lists them) or give `objective`.")
    objective = build_objective(recipe)
    _check_teacher(recipe, objective)
    _check_rollouts(recipe, objective)
    rates = [recipe.optimizer.lr(step, recipe.steps) for step in (0, max(0, recipe.steps - 1))]
    if min(rates) < 0.0:
        raise UserError(f"optimizer.lr is {min(rates):g} at one end of the run, and would undo what it should learn.")
    for name, term in zip(objective.names, objective.terms, strict=True):
        _check_term(recipe, name, term)


def _check_teacher(recipe: Recipe, objective: Objective) -> None:
    asking = teacher_terms(objective)
    writes = "teacher" in recipe.source.origins
    if recipe.teacher is None and (asking or writes):
        who = f"{asking[0].name} term asks it" if asking else "source has it write"
        raise UserError(f"there is no teacher, but the {who}; add teacher.model=PATH_OR_ID.")


def _check_rollouts(recipe: Recipe, objective: Objective) -> None:
    rollout, kind = recipe.rollout, recipe.source.kind
    if (rollout.top_p < 1.0 or rollout.top_k > 0) and not rollout.filtered:
        raise UserError(
            "rollout.top_p and rollout.top_k cut the policy's distribution, so samples and importance ratios are no "
            "longer its own; leave them out, or accept the bias by rollout.filtered=true."
        )
    if rollout.filtered and rollout.top_p == 1.0 and rollout.top_k == 0:
        raise UserError("rollout.filtered=true has nothing to allow; set rollout.top_p or rollout.top_k, or remove it.")
    if rollout.dynamic_sampling and "student" not in recipe.source.origins:
        raise UserError(f"rollout.dynamic_sampling resamples the student, who writes nothing under source {kind}.")
    if rollout.dynamic_sampling and not any(isinstance(t, PolicyGradient) for t in objective.terms):
        raise UserError(
            "rollout.dynamic_sampling drops groups of equal rewards, but no policy_gradient term uses rewards."
        )


def _check_term(recipe: Recipe, name: str, term: Term) -> None:
    origins, config = recipe.source.origins, term.config
    if not set(config.on) & set(origins):
        raise UserError(
            f"objective.{name} reads responses of {', '.join(config.on)}, but source {recipe.source.kind} writes only "
            f"{', '.join(origins)}; change source or objective.{name}.on."
        )
    read = set(config.on) & set(origins)
    if isinstance(term, PolicyGradient):
        if read != {"student"}:
            raise UserError(f"objective.{name} is a gradient of the student's own samples: set on: [student].")
        grouped = config.advantage.baseline in ("group_mean", "leave_one_out")
        if grouped and recipe.rollout.group < 2:
            raise UserError(
                "a group of one response has no group baseline, so every advantage is zero; set rollout.group to 2 or "
                f"more, or objective.{name}.advantage to reinforce."
            )
        if config.advantage.baseline == "none" and config.advantage.scale == "group_std" and recipe.rollout.group < 2:
            raise UserError("a group of one response has no standard deviation; set rollout.group to 2 or more.")
    sampled = isinstance(term, Distill) and config.support.kind == "token"
    foreign = ", ".join(sorted(read - {"student"}))
    if (sampled or term.needs.reference) and foreign:
        raise UserError(
            f"objective.{name} estimates a KL from the student's own samples; on {foreign} "
            "text that is not its gradient. Set on: [student], or support: full."
        )
    judged = mask_names(config.mask) & OF_CORRECTNESS
    if read == {"gold"} and judged:
        raise UserError(
            f"objective.{name}.mask {min(judged)} looks at verdicts, and gold text is right by definition, so it keeps "
            "all or nothing; leave it out."
        )
    if term.name == "cross_entropy" and recipe.rollout.temperature != 1.0:
        raise UserError("cross_entropy is the likelihood at temperature 1; set rollout.temperature to 1.")
    if reads_entropy(config.mask) and "student" not in read:
        raise UserError(f"objective.{name}.mask looks at the entropy of the student's own rollouts; set on: [student].")
