"""Refusals of scores and schedules that a recipe cannot serve: what a score reads must be there, and stay in range."""

from __future__ import annotations

from kdrl.errors import UserError, nearest
from kdrl.objectives.adaptive import Adaptive, Calibrated
from kdrl.objectives.base import Term
from kdrl.objectives.distill import Distill
from kdrl.objectives.masks import mask_scores
from kdrl.objectives.objective import Objective
from kdrl.objectives.schedules import Memory, Moment
from kdrl.objectives.scores import Score
from kdrl.recipe import Recipe

# What a row of metrics.jsonl always holds, and the kinds of number that depend on the recipe.
METRICS = (
    *("loss", "grad_norm", "lr", "reward", "accuracy", "tokens", "truncated", "entropy", "zero_advantage_share"),
    *(
        "groups_without_right",
        "log_ratio_mean",
        "log_ratio_beyond_clamp",
        "kl_teacher",
        "masked_share",
        "clipped_share",
    ),
    *("sampling_mismatch", "kd_norm", "rl_norm", "kd_rl_norm_ratio", "kd_rl_cosine", "dropped_groups"),
)
MEASURED = {
    "eval",
    "loss",
    "divergence",
    "weight",
    "support",
    "source",
    "origin",
    "prepare",
    "preference",
    "kl_teacher",
}
OF_REWARD = {"reward", "correct", "group_rate", "signed", "dads", "stcr"}


def names_in(score: Score) -> set[str]:
    """Every score's name inside an expression."""
    own = set() if score.number is not None else {score.name}
    return own.union(*(names_in(inner) for inner in score.inner))


def reads_rewards(term: Term) -> bool:
    """Whether a score of the term looks at a verdict."""
    scores = [*term.expressions, *mask_scores(term.config.mask)]
    return any(names_in(score) & OF_REWARD for score in scores)


def unset_rate(recipe: Recipe) -> list[str]:
    """A note where nobody chose the learning rate."""
    if "lr" in recipe.optimizer.model_fields_set:
        return []
    return ["optimizer.lr is the default, 1e-6, which suits large models; small ones distil at 1e-5 to 5e-4"]


def warnings_of(objective: Objective) -> list[str]:
    """What is allowed and yet seldom meant, a sentence each."""
    free = [
        name
        for name, term in zip(objective.names, objective.terms, strict=True)
        if isinstance(term, Distill)
        and term.config.support.kind == "topk"
        and term.config.support.rest == "renormalise"
    ]
    if free and len(free) == sum(t.family == "kd" for t in objective.terms):
        return [
            f"objective.{free[0]}.support renormalises both sides inside the top-k, and no term holds the "
            "student's mass outside it, which may grow freely; rest: tail does hold it"
        ]
    return []


def check_scores(recipe: Recipe, objective: Objective) -> None:
    """Raise UserError for the first score or schedule that this recipe cannot serve."""
    for name, term in zip(objective.names, objective.terms, strict=True):
        for score in term.expressions:
            _check_reads(f"objective.{name}", term, score)
        if isinstance(term, Distill):
            _check_scalars(f"objective.{name}.divergence", term, recipe)
            _check_target(f"objective.{name}.target", term, recipe)
    for path, schedule in Memory.within(recipe).schedules.items():
        assert schedule.adaptive is not None
        _check_metric(recipe, objective, path, schedule.adaptive)


def _check_reads(where: str, term: Term, score: Score) -> None:
    need = term.needs.teacher
    if score.reads & {"distributions", "entries"} and need != "distribution":
        raise UserError(
            f"{where}: the score {score.spec!r} compares whole distributions, and this term does not have them; use a "
            "score of single tokens (ce_q, log_ratio, position, ...), or a distill term with full or topk support."
        )
    if "teacher" in score.reads and need is None:
        raise UserError(f"{where}: the score {score.spec!r} asks the teacher, and this term has none.")


def _check_scalars(where: str, term: Distill, recipe: Recipe) -> None:
    """Evaluate scheduled scalars at every step: a value out of range must not be met in the middle of a run."""
    divergence = term.config.divergence
    for name, schedule in divergence.scalars().items():
        if schedule.adaptive is not None or isinstance(schedule.spec, int | float):
            continue
        for step in range(recipe.steps):
            value = schedule.at(Moment(step, recipe.steps))
            try:
                divergence.check_scalar(name, value)
            except ValueError as error:
                raise UserError(f"{where}, at step {step + 1}: {error}") from None


def _check_calibrated(path: str, adaptive: Calibrated) -> None:
    try:
        score = Score(adaptive.of)
    except ValueError as error:
        raise UserError(f"{path}.calibrated.of: {error}") from None
    if score.reads & {"batch", "entries"}:
        raise UserError(
            f"{path}.calibrated.of is averaged over tokens, so {adaptive.of!r} cannot be; name a token score."
        )


def _check_target(where: str, term: Distill, recipe: Recipe) -> None:
    """Temperatures and powers stay above 0 and label mixes between 0 and 1, at every step."""
    target = term.config.target
    above = {name: getattr(target, name) for name in ("teacher_temperature", "student_temperature", "power")}
    for name, value in (above | {"label_mix": target.label_mix}).items():
        schedule = value.number if isinstance(value, Score) else value
        if schedule is None or schedule.adaptive is not None:
            continue
        for step in range(max(1, recipe.steps)):
            found = schedule.at(Moment(step, recipe.steps))
            if name == "label_mix" and not 0.0 <= found <= 1.0:
                raise UserError(f"{where}.label_mix is {found:g} at step {step + 1}; it is a share between 0 and 1.")
            if name != "label_mix" and found <= 0.0:
                raise UserError(f"{where}.{name} is {found:g} at step {step + 1}; it must be above 0.")


def _check_metric(recipe: Recipe, objective: Objective, path: str, adaptive: Adaptive) -> None:
    metric = adaptive.metric
    if isinstance(adaptive, Calibrated):
        compared = [t for t in objective.terms if isinstance(t, Distill) and t.needs.teacher == "distribution"]
        if not compared:
            raise UserError(
                f"{path} is measured on distributions, so it needs a distill term with full or topk support."
            )
        _check_calibrated(path, adaptive)
        return
    if metric.startswith("eval/") and not recipe.evaluate.every:
        raise UserError(f"{path} follows {metric}, which is never measured; set evaluate.every.")
    families = {t.family for t in objective.terms}
    if metric == "kd_rl_norm_ratio" and not {"kd", "rl"} <= families:
        raise UserError(f"{path} balances distillation against reward, and the objective has only one of them.")
    if metric == "kl_teacher" and "kd" not in families:
        raise UserError(f"{path} follows the KL to the teacher, and no term asks a teacher.")
    kind, _, name = metric.partition("/")
    if metric not in METRICS and kind not in MEASURED:
        raise UserError(f"{path} follows {metric!r}, which no step measures{nearest(metric, METRICS)}")
    if kind in ("divergence", "loss", "weight") and name not in objective.names:
        raise UserError(
            f"{path} follows {metric}, and the terms are called {', '.join(objective.names)}; set its metric."
        )
    if kind == "divergence":
        term = objective.terms[objective.names.index(name)]
        if term.needs.teacher != "distribution":
            raise UserError(f"{path} follows {metric}, which only a term over distributions has; follow loss/{name}.")
