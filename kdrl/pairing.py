"""Pairings of student, teacher and task that would train on nonsense, refused before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.objectives.objective import Objective
from kdrl.objectives.terms import Distill
from kdrl.recipe import Recipe
from kdrl.sources.student import privileged_prompt
from kdrl.tasks import Problem
from kdrl.tasks.base import Prompt
from kdrl.teachers.base import Gives
from kdrl.teachers.checks import place_of, teacher_of, the_teacher
from kdrl.teachers.context import assumed_context


def check_pairing(student: LoadedModel, teacher: LoadedModel) -> list[str]:
    """Raise UserError when the teacher reads other tokens than the student writes; return what is only worth a note."""
    return [note for check in pairing_checks(student, teacher).values() for note in check()]


def pairing_checks(
    student: LoadedModel, teacher: LoadedModel, where: str = "teacher"
) -> dict[str, Callable[[], list[str]]]:
    """The checks of a pair by name, in order; each raises UserError or returns notes. `where` names the teacher."""
    checks = {"tokenizer": _check_tokens, "end token": _check_ends, "chat template": _templates, "vocabulary": _cut}
    return {name: partial(check, student, teacher, where) for name, check in checks.items()}


def _check_tokens(student: LoadedModel, teacher: LoadedModel, where: str) -> list[str]:
    mine, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    differing = sorted(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
    if differing:
        shown = ", ".join(repr(t) for t in differing[:3])
        raise UserError(
            f"{the_teacher(where)} has another tokenizer than the student: {len(differing)} tokens differ (such as "
            f"{shown}). A same-tokenizer loss would compare unrelated tokens; choose a teacher of the student's "
            "family; or let it read its own tokens by chunk_kl, chunk_distill, overlap_distill or another term of "
            "docs/teachers.md in place of the terms that ask it; or use its text: kdrl generate, then source traces "
            "with cross_entropy."
        )
    return []


def _check_ends(student: LoadedModel, teacher: LoadedModel, where: str) -> list[str]:
    if set(student.eos_ids).isdisjoint(teacher.eos_ids):
        names = [_tokens(m) for m in (student, teacher)]
        raise UserError(
            f"student and {where} end a response differently ({names[0]} and {names[1]}), so the teacher would punish "
            f"every ending. Set {where}.eos or student.eos to a common token, or choose another pair."
        )
    if student.eos_ids != teacher.eos_ids:
        return [f"student and {where} share only some end tokens; consider objective.distill.skip_eos=true"]
    return []


def _templates(student: LoadedModel, teacher: LoadedModel, where: str) -> list[str]:
    if student.tokenizer.chat_template != teacher.tokenizer.chat_template:
        return [f"{the_teacher(where)}'s chat template differs; it is shown prompts in the student's template"]
    return []


def _cut(student: LoadedModel, teacher: LoadedModel, where: str) -> list[str]:
    rows = [_rows(m) for m in (student, teacher)]
    if rows[0] != rows[1]:
        return [f"vocabulary rows {rows[0]} and {rows[1]} are both cut to the tokenizer's {student.vocab_size}"]
    return []


def check_gives(who: str, gives: Gives, objective: Objective, *, stored: bool = False) -> None:
    """Raise UserError when a term asks more of the teacher `who` than it can give, with what would fit.

    Where its scores are `stored` beforehand it knows nothing of what the student writes.
    """
    for name, active in zip(objective.names, objective.terms, strict=True):
        needs = active.needs
        if teacher_of(active) not in (None, who) or needs.teacher is None or gives.serves(needs):
            continue
        if needs.vocabulary:
            sampled = "" if stored else "chunk_kl on the student's own responses; "
            raise UserError(
                f"objective.{name} reads more of the teacher than {who} gives, which is {gives}. What fits of terms on "
                f"the teacher's own tokens: {sampled}chunk_distill without debias and threshold; or a local teacher, "
                "or a cache of its hidden states (kind hidden)."
            )
        fits = [] if stored else ["support: {token: k2} (reverse_kl) on the student's own responses"]
        fits += [f"support: {{topk: K}} with K up to {gives.topk}"] if gives.topk else []
        fits += [f"divergence: forward_kl with support: {{draws: {gives.draws}}}"] if gives.draws else []
        other = "a cache of its hidden states (kind hidden), or the teacher itself" if stored else "a local teacher"
        changes = sorted(active.config.target.changes) if isinstance(active, Distill) else []
        cleared = f"with objective.{name}.target={{}} (it sets {', '.join(changes)}), " if changes else ""
        raise UserError(
            f"objective.{name} reads more of the teacher than {who} gives, which is {gives}. What fits: {cleared}"
            f"{'; '.join(fits)} (without target transforms and scores of whole distributions); or {other}."
        )


def check_lengths(
    models: dict[str, LoadedModel], problems: Sequence[Problem], recipe: Recipe, own: Sequence[str] = ()
) -> None:
    """Raise UserError when prompt and response together do not fit a model's context.

    The models in `own` read the prompt in their own tokens.
    """
    prompts: list[Prompt] = [p.prompt for p in problems]
    if recipe.source.template is not None:
        prompts += [privileged_prompt(p, recipe.source.template) for p in problems]
    readers = {who: models[who] for who in ("student", *own)}
    lengths = {who: max((len(encode_prompt(m, p)) for p in prompts), default=0) for who, m in readers.items()}
    for who, loaded in models.items():
        longest = lengths.get(who, lengths["student"])
        need = longest + recipe.rollout.max_new_tokens
        config = loaded.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and need > context:
            raise UserError(
                f"{_called(who)} reads at most {context} tokens, but a prompt of {longest} and rollout.max_new_tokens "
                f"of {recipe.rollout.max_new_tokens} make {need}; lower rollout.max_new_tokens or set "
                "task.max_prompt_tokens."
            )


def _called(who: str) -> str:
    return "the student" if who == "student" else the_teacher(place_of(who))


def check_numbers(recipe: Recipe) -> list[str]:
    """Notes on the formats that the models compute in."""
    rounds = recipe.student.dtype == "bfloat16" and recipe.student.lora is None
    if rounds and not recipe.optimizer.master_weights:
        return [
            "bfloat16 weights round small updates away (a step below 1/256 of a weight is lost); float32 with "
            "student.autocast=bfloat16, optimizer.master_weights or student.lora learns at small rates too"
        ]
    return []


def check_contexts(student: LoadedModel, problems: Sequence[Problem], recipe: Recipe) -> None:
    """Raise UserError when the self-teacher could not read its context, as far as that is known before the first step.

    A verifier's own feedback may be longer than the sentence assumed here; a response whose context does not fit then
    is counted as one without context.
    """
    config, limit = recipe.self_teacher, recipe.rollout.max_new_tokens
    if config.context is None or not problems:
        return
    if "solution" in config.shows and all(problem.solution is None for problem in problems):
        raise UserError("self_teacher.context shows {solution}, and no problem has one; set task.solution or {answer}.")
    try:
        longest = max(len(encode_prompt(student, assumed_context(config.context, problem))) for problem in problems)
    except UserError as error:
        raise UserError(f"self_teacher.context, filled in, cannot be shown to the student: {error}") from None
    need = longest + limit * (1 + ("sibling" in config.shows))
    context = getattr(student.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and need > context:
        raise UserError(
            f"the self-teacher reads at most {context} tokens, but self_teacher.context, filled in, and the responses "
            f"make {need}; shorten it, lower rollout.max_new_tokens or set task.max_prompt_tokens."
        )


def _tokens(loaded: LoadedModel) -> str:
    return " ".join(str(loaded.tokenizer.convert_ids_to_tokens(i)) for i in loaded.eos_ids)


def _rows(loaded: LoadedModel) -> int:
    return int(loaded.model.get_output_embeddings().weight.shape[0])
