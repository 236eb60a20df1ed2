"""Pairings that cannot work, refused before anything is loaded: each with what to do instead."""

from __future__ import annotations

from kdrl.errors import UserError
from kdrl.objectives.masks import mask_names, reads_entropy
from kdrl.objectives.objective import Objective
from kdrl.objectives.terms import TERMS, ChunkKL, Distill, PolicyGradient, Preference, ReferenceKL, SequenceKL, Term
from kdrl.recipe import Recipe
from kdrl.score_checks import check_scores, reads_rewards
from kdrl.sources.checks import check_filtered_rewards, check_source, foreign_reason, own_samples
from kdrl.teachers.cache_checks import check_cache
from kdrl.teachers.checks import check_self_teacher, check_several, teacher_of
from kdrl.teachers.elsewhere import check_served
from kdrl.vocab.checks import check_vocabulary_terms

OF_CORRECTNESS = {"wrong_response", "right_response", "wrong_group"}


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's terms, ready to run."""
    terms = [TERMS.get(entry.name)(entry.config) for entry in recipe.objective]
    return Objective(terms, drop_flat=recipe.rollout.dynamic_sampling > 0)


def teacher_terms(objective: Objective) -> list[Term]:
    """Terms that ask the teacher called `teacher`."""
    return [t for t in objective.terms if teacher_of(t) == "teacher"]


def self_terms(objective: Objective) -> list[Term]:
    """Terms that ask the student itself."""
    return [t for t in objective.terms if isinstance(t, Distill) and t.config.teacher == "self"]


def needs_rewards(recipe: Recipe, objective: Objective) -> bool:
    """Whether anything in the recipe looks at a verdict."""
    masks = set().union(*(mask_names(t.config.mask) for t in objective.terms)) if objective.terms else set()
    return (
        any(t.needs.rewards for t in objective.terms)
        or bool(masks & OF_CORRECTNESS)
        or recipe.source.settings.judges
        or recipe.self_teacher.needs_verdicts
        or recipe.rollout.dynamic_sampling > 0
        or any(reads_rewards(t) for t in objective.terms)
    )


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for the first pairing in the recipe that cannot work."""
    if not recipe.objective:
        raise UserError("the recipe has no objective: name a method (`kdrl methods` lists them) or give `objective`.")
    objective = build_objective(recipe)
    check_several(recipe, objective)
    check_vocabulary_terms(recipe, objective)
    check_served(recipe, objective)
    check_cache(recipe, objective)
    _check_teacher(recipe, objective)
    check_self_teacher(recipe, self_terms(objective))
    check_source(recipe)
    _check_rollouts(recipe, objective)
    check_scores(recipe, objective)
    rates = [recipe.optimizer.lr(step, recipe.steps) for step in (0, max(0, recipe.steps - 1))]
    if min(rates) < 0.0:
        raise UserError(f"optimizer.lr is {min(rates):g} at one end of the run, and would undo what it should learn.")
    _check_optimizer(recipe)
    for name, term in zip(objective.names, objective.terms, strict=True):
        _check_term(recipe, name, term)
    _check_readers(recipe, objective)


def _check_optimizer(recipe: Recipe) -> None:
    optimizer = recipe.optimizer
    if optimizer.master_weights and (recipe.student.dtype == "float32" or recipe.student.lora is not None):
        what = "adapters" if recipe.student.lora is not None else "weights"
        raise UserError(
            f"optimizer.master_weights keeps float32 copies of bfloat16 weights, and the {what} that are trained here "
            "are float32 already; leave it out."
        )
    if optimizer.extragradient and optimizer.kind.startswith("paged"):
        raise UserError(
            f"optimizer.extragradient copies the moments, and copies are not paged; use optimizer.kind=adamw_8bit or "
            f"adamw in place of {optimizer.kind}."
        )
    if optimizer.extragradient and recipe.steps % 2:
        raise UserError(
            f"optimizer.extragradient takes steps in pairs, and {recipe.steps} steps would end on a look-ahead; make "
            "them even."
        )
    if optimizer.extragradient and optimizer.minibatches * optimizer.epochs > 1:
        raise UserError("optimizer.extragradient looks ahead once a step; set optimizer.minibatches and epochs to 1.")


def _check_teacher(recipe: Recipe, objective: Objective) -> None:
    asking = teacher_terms(objective)
    writes = recipe.source.settings.asks_teacher
    combined = "teacher" in recipe.teachers
    if combined and recipe.teacher is not None:
        raise UserError("teacher and teachers.teacher are two teachers of one name; give one of them another.")
    if combined and writes:
        raise UserError("the source has the teacher write, and several cannot write at once; let `teacher` be a model.")
    if recipe.teacher is None and not combined and (asking or writes):
        who = f"{asking[0].name} term asks it" if asking else "source has it write"
        raise UserError(f"there is no teacher, but the {who}; add teacher.model=PATH_OR_ID.")
    if recipe.teacher is not None and recipe.teacher.prepare is not None and not asking:
        raise UserError(
            f"teacher.prepare={recipe.teacher.prepare.name} adapts what the teacher scores, but no term asks it; leave "
            "it out, or add a distill term."
        )
    watched = any(t.needs.features for t in objective.terms)
    if watched and recipe.teacher is not None and recipe.teacher.prepare is not None:
        raise UserError(
            f"teacher.prepare={recipe.teacher.prepare.name} changes what the teacher answers, and a feature term reads "
            "the inside of the teacher as it was loaded; leave one of them out."
        )


def _check_rollouts(recipe: Recipe, objective: Objective) -> None:
    rollout = recipe.rollout
    if (rollout.top_p < 1.0 or rollout.top_k > 0) and not rollout.filtered:
        raise UserError(
            "rollout.top_p and rollout.top_k cut the policy's distribution, so samples and importance ratios are no "
            "longer its own; leave them out, or accept the bias by rollout.filtered=true."
        )
    if rollout.filtered and rollout.top_p == 1.0 and rollout.top_k == 0:
        raise UserError("rollout.filtered=true has nothing to allow; set rollout.top_p or rollout.top_k, or remove it.")
    if rollout.dynamic_sampling and not any(isinstance(t, PolicyGradient) for t in objective.terms):
        raise UserError(
            "rollout.dynamic_sampling drops groups of equal rewards, but no policy_gradient term uses rewards."
        )


def _check_readers(recipe: Recipe, objective: Objective) -> None:
    """Refuse a source that writes what no term reads, as `other: teacher` under terms that are on: [gold]."""
    read = {origin for term in objective.terms for origin in term.config.on}
    # The untouched gold text beside its corrupted copy is there for a likelihood term, which may be left out.
    unread = set(recipe.source.origins) - read - ({"gold"} if recipe.source.kind == "corrupt" else set())
    if unread:
        raise UserError(
            f"source {recipe.source.kind} writes {', '.join(sorted(unread))} responses, and no term of the objective "
            "reads them: add a term, widen a term's `on`, or choose another source."
        )


def _check_term(recipe: Recipe, name: str, term: Term) -> None:
    origins, config = recipe.source.origins, term.config
    if not set(config.on) & set(origins):
        raise UserError(
            f"objective.{name} reads responses of {', '.join(config.on)}, but source {recipe.source.kind} writes only "
            f"{', '.join(origins)}; change source or objective.{name}.on."
        )
    read = set(config.on) & set(origins)
    if isinstance(term, Preference):
        _check_preference(recipe, name, term, read)
    if isinstance(term, PolicyGradient):
        _check_writers(recipe, name, term, read)
        grouped = config.advantage.baseline in ("group_mean", "leave_one_out")
        if grouped and recipe.rollout.group < 2:
            raise UserError(
                "a group of one response has no group baseline, so every advantage is zero; set rollout.group to 2 or "
                f"more, or objective.{name}.advantage to reinforce."
            )
        if config.advantage.baseline == "none" and config.advantage.scale == "group_std" and recipe.rollout.group < 2:
            raise UserError("a group of one response has no standard deviation; set rollout.group to 2 or more.")
    sampled = isinstance(term, Distill) and config.support.kind == "token"
    foreign = read - own_samples(recipe)
    if (sampled or isinstance(term, ReferenceKL | SequenceKL | ChunkKL)) and foreign:
        exact = "use chunk_distill" if isinstance(term, ChunkKL) else "support: full"
        raise UserError(
            f"objective.{name} estimates a KL from the student's own samples; on {', '.join(sorted(foreign))} "
            f"text that is not its gradient. Set on: [student], or {exact}.{foreign_reason(foreign)}"
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


def _check_writers(recipe: Recipe, name: str, term: PolicyGradient, read: set[str]) -> None:
    """Whose responses a policy gradient may read: the student's, and with `off_policy` the teacher's beside them."""
    off_policy = term.config.off_policy
    check_filtered_rewards(recipe, name)
    if off_policy is None and not read <= own_samples(recipe):
        raise UserError(
            f"objective.{name} is a gradient of the student's own samples: set on: [student], or "
            "off_policy: {shape: 0.1} for a teacher's responses in the same group."
            f"{foreign_reason(read - own_samples(recipe))}"
        )
    if off_policy is not None and read != {"student", "teacher"}:
        raise UserError(
            f"objective.{name}.off_policy learns from a teacher's responses beside the student's own, but the term "
            f"reads {', '.join(sorted(read))} here; set on: [student, teacher] and a source such as {{guided: 1}}."
        )


def _check_preference(recipe: Recipe, name: str, term: Preference, read: set[str]) -> None:
    config, kind = term.config, recipe.source.kind
    if recipe.optimizer.minibatches > 1:
        raise UserError(
            f"objective.{name} compares the responses of a group, and optimizer.minibatches would tear groups apart; "
            "set it to 1 (optimizer.epochs may still be more)."
        )
    if config.loss == "kto" and "student" not in read:
        raise UserError(f"objective.{name} measures the policy's drift on the student's own responses; read them too.")
    if config.by == "origin" and not ("student" in read and read & {"teacher", "gold", "privileged"}):
        raise UserError(
            f"objective.{name} prefers another writer's text to the student's own, but reads only that of "
            f"{', '.join(sorted(read))}; set source: {{pair: {{chosen: teacher, rejected: student}}}}, or by: reward."
        )
    if config.by == "origin" and "buffer" in read:
        raise UserError(f"objective.{name} would prefer the student's own replayed text; leave buffer out of its `on`.")
    if config.loss != "kto" and kind in ("student", "teacher", "guided") and recipe.rollout.group < 2:
        raise UserError(f"a group of one response holds no pair for objective.{name}; set rollout.group to 2 or more.")
