"""What stands between a recipe and a good run: every check that training makes, then a few measured samples.

Each finding is one line with a verdict: `ok`, `note` (works, and is worth a look) or `wrong` (training would refuse it,
or could not learn from it). Left out: several processes, and what only shows after many steps.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kdrl.build import Builder, Check, resolve_device
from kdrl.checks import needs_rewards
from kdrl.doctor_samples import measure
from kdrl.doctor_verdicts import judge
from kdrl.errors import UserError
from kdrl.explain import explain_objective
from kdrl.models import LoadedModel, encode_prompt
from kdrl.planning import memory_plan
from kdrl.recipe import Recipe, load_recipe
from kdrl.tasks import Problem, ResponseInfo
from kdrl.tasks.base import take
from kdrl.tasks.config import ExtractConfig
from kdrl.teachers.cache_rehearsal import Rehearsal
from kdrl.teachers.checks import check_named_models
from kdrl.teachers.served_parity import AGREES

Verdict = Literal["ok", "note", "wrong"]

# What a check of the builder says when it finds nothing.
_FINE = {
    "tokenizer": "the teacher has the student's tokens, by content, under the same ids",
    "end token": "student and teacher end a response alike",
    "chat template": "student and teacher have the same one",
    "vocabulary": "student and teacher have equally many rows",
    "context length": "the longest prompt and rollout.max_new_tokens fit every model",
    "stored responses": "those of the first steps are in the cache",
    "held-out problems": "the splits that are evaluated are there",
}
# Checks of what most recipes do not have.
_QUIET = {"scores", "optimizer.kind", "numbers", "routes", "self-teacher's context", "memory"}


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<5}  {self.what}: {self.text}"


Say = Callable[[Finding], None]


class Doctor:
    """Collects findings; `say` is told each at once."""

    def __init__(self, say: Say | None = None) -> None:
        self.findings: list[Finding] = []
        self._say = say

    def find(self, what: str, verdict: Verdict, text: str) -> None:
        """Write one down."""
        self.findings.append(Finding(what, verdict, text))
        if self._say is not None:
            self._say(self.findings[-1])

    def observe(self, what: str, check: Check) -> None:
        """Run one of the checks that training makes: its error is wrong, what it returns are notes."""
        try:
            notes = list(check() or [])
        except UserError as error:
            self.find(what, "wrong", str(error))
            return
        for note in notes:
            self.find(what, "ok" if note.startswith(AGREES) else "note", note)
        kind = what.partition(" (")[0]
        if not notes and kind not in _QUIET:
            fine = "enough for every term that asks it" if kind.startswith("what ") else "nothing amiss"
            self.find(what, "ok", _FINE.get(kind, fine))

    @property
    def wrong(self) -> bool:
        """Whether anything is wrong."""
        return any(f.verdict == "wrong" for f in self.findings)


@dataclass(frozen=True)
class Effort:
    """How much is measured: problems for accuracy and verifier, and prompts x group responses that are written."""

    problems: int = 16
    prompts: int = 4
    group: int = 4


def examine(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    effort: Effort | None = None,
    say: Say | None = None,
) -> list[Finding]:
    """Examine a recipe: what training would refuse, then measured samples. Raises UserError for no finding at all."""
    doctor, effort = Doctor(say), effort or Effort()
    try:
        resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    except UserError as error:
        doctor.find("recipe", "wrong", str(error))
        return doctor.findings
    doctor.find("recipe", "ok", _in_a_line(resolved))
    try:
        check_named_models(resolved)
    except UserError as error:
        doctor.find("loading", "wrong", str(error))
        return doctor.findings
    doctor.observe("memory", lambda: _memory(doctor, resolved))
    if doctor.wrong and resolve_device(resolved.device) == "cpu":
        doctor.find(
            "loading", "note", "nothing is loaded until what is wrong above is mended: the kernel would kill it"
        )
        return doctor.findings
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            builder = Builder(_smaller(resolved, effort), Path(folder), stack, doctor.observe, Rehearsal)
        except UserError as error:
            doctor.find("loading", "wrong", str(error))
            return doctor.findings
        _static(doctor, builder, effort)
        try:
            parts = builder.parts()
            for name, teacher in parts.teachers.items():
                doctor.find(name, "ok", f"gives {teacher.gives}")
            if doctor.wrong:
                doctor.find("samples", "note", "nothing is written or measured until what is wrong above is mended")
                return doctor.findings
            measured = measure(builder, parts, effort.problems)
        except UserError as error:
            if str(error) not in {f.text for f in doctor.findings}:
                doctor.find("samples", "wrong", str(error))
            return doctor.findings
        judge(doctor, resolved, measured)
    return doctor.findings


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as JSON: `wrong` says whether there is any such, `findings` holds what, verdict and text."""
    wrong = any(f.verdict == "wrong" for f in findings)
    return json.dumps({"wrong": wrong, "findings": [asdict(f) for f in findings]}, indent=2, ensure_ascii=False)


def _in_a_line(recipe: Recipe) -> str:
    explain_objective(recipe)
    terms = " + ".join(entry.name for entry in recipe.objective)
    return f"{recipe.method or 'own objective'} ({terms}), source {recipe.source.kind}, {recipe.steps} steps"


def _smaller(recipe: Recipe, effort: Effort) -> Recipe:
    """The recipe with few prompts a step; a group only where the student alone writes it."""
    change: dict[str, Any] = {"prompts": min(effort.prompts, recipe.rollout.prompts), "dynamic_sampling": 0}
    if recipe.source.kind == "student":
        change["group"] = min(effort.group, recipe.rollout.group)
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=change)})


def _memory(doctor: Doctor, recipe: Recipe) -> list[str]:
    plan = memory_plan(recipe)
    if not plan.fits:
        raise UserError(f"{plan.verdict}. `kdrl train RECIPE --dry-run` shows the whole plan.")
    doctor.find("memory", "ok", plan.verdict)
    return []


def _static(doctor: Doctor, builder: Builder, effort: Effort) -> None:
    """What is known of the models and the task before anything is written."""
    recipe, student = builder.recipe, builder.student
    problems = list(take(builder.stream, effort.problems))
    for note in builder.notes:
        doctor.find("recipe", "note", note)
    for name, loaded in ({"student": student} | builder.models).items():
        _model(doctor, name, loaded)
    for name, loaded in builder.models.items():
        _rendered(doctor, name, student, loaded, problems[0])
    temperature = recipe.rollout.temperature
    cold = any(f.what.startswith("served temperature") and f.verdict == "wrong" for f in doctor.findings)
    warm = "samples and policy are taken at it, a served teacher is not" if cold else "samples, policy and teacher are"
    warm = f"{temperature:g}: {warm}" + ("" if cold else " all taken at it")
    doctor.find("temperature", "ok" if temperature == 1.0 else "note", warm)
    _verifier(doctor, builder, problems)


def _model(doctor: Doctor, name: str, loaded: LoadedModel) -> None:
    config, model = loaded.config, loaded.model
    ends = " ".join(str(loaded.tokenizer.convert_ids_to_tokens(i)) for i in loaded.eos_ids)
    pad = loaded.tokenizer.convert_ids_to_tokens(loaded.pad_id)
    rows = int(model.get_output_embeddings().weight.shape[0])
    cut = f", {rows - loaded.vocab_size} padded rows left out" if rows > loaded.vocab_size else ""
    numbers = config.dtype + (f", products in {config.autocast}" if config.autocast else "")
    text = (
        f"{sum(p.numel() for p in model.parameters()):,} parameters in {numbers} on {loaded.device}; end {ends}, pad "
        f"{pad}; {loaded.vocab_size} tokens{cut}; its logits are its head on its hidden states"
    )
    doctor.find(name, "ok", text)
    if loaded.pad_id in loaded.eos_ids and loaded.tokenizer.pad_token_id is not None:
        doctor.find(name, "note", f"{pad} both pads and ends; padding is masked by position, so nothing is lost")


def _rendered(doctor: Doctor, name: str, student: LoadedModel, teacher: LoadedModel, problem: Problem) -> None:
    """One prompt as both models would be given it."""
    try:
        mine, theirs = (encode_prompt(loaded, problem.prompt) for loaded in (student, teacher))
    except UserError as error:
        doctor.find(f"prompt ({name})", "note", f"the teacher's own template cannot show it: {error}")
        return
    shown, other = (str(m.tokenizer.decode(ids)) for m, ids in ((student, mine), (teacher, theirs)))
    tail, other_tail = repr(shown[-40:]), repr(other[-40:])
    if shown == other:
        doctor.find(f"prompt ({name})", "ok", f"both models would be shown the same text, ending {tail}")
        return
    doctor.find(
        f"prompt ({name})",
        "note",
        f"the student's ends {tail}, the teacher's own would end {other_tail}; the teacher scores after the "
        "student's: if it was trained on its own template, set both chat_template to one text",
    )


def _answers(problem: Problem, how: ExtractConfig) -> list[str]:
    """Responses that state the problem's answer and nothing else, in the forms that verifiers look for."""
    answer = str(problem.answer)
    forms = {
        "boxed": "\\boxed{{{0}}}",
        "after": f"{how.argument} {{0}}",
        "tag": f"<{how.argument}>{{0}}</{how.argument}>",
    }
    first = forms[how.how].format(answer) if how.how in forms else answer
    return list(dict.fromkeys([first, answer, f"\\boxed{{{answer}}}", f"#### {answer}", f"The answer is {answer}."]))


def _verifier(doctor: Doctor, builder: Builder, problems: Sequence[Problem]) -> None:
    """Right responses must score right, and empty or idle ones wrong."""
    pool, limit = builder.pool, builder.recipe.rollout.max_new_tokens
    info = ResponseInfo(1, False, limit)
    solved = [p for p in problems if p.solution is not None and not p.untrained_spans]
    texts = {p.id: [str(p.solution)] if p in solved else _answers(p, pool.scorer.extraction) for p in problems}
    idle = ["", "I do not know."]
    try:
        right = [any(v.correct for v in pool.score([(t, p, info) for t in texts[p.id]])) for p in problems]
        lazy = [any(v.correct for v in pool.score([(t, p, info) for t in idle])) for p in problems]
    except UserError as error:
        doctor.find("verifier", "wrong", str(error))
        return
    bad: Verdict = "wrong" if needs_rewards(builder.recipe, builder.objective) else "note"
    what = "worked solutions" if solved else "stated answers"
    missed = [p for p, good in zip(problems, right, strict=True) if not good]
    text = f"{len(problems) - len(missed)} of {len(problems)} {what} score right"
    if missed:
        shown = f"such as {texts[missed[0].id][0][-60:]!r} to {str(missed[0].prompt)[-40:]!r}"
        advice = "look at task.extract, task.verifier and task.reference_extract"
        doctor.find("verifier", bad if len(missed) * 5 > len(problems) else "note", f"{text}, not {shown}; {advice}")
    if any(lazy):
        doctor.find("verifier", bad, f"{sum(lazy)} of {len(lazy)} empty or idle responses score right; mend it")
    if not missed and not any(lazy):
        doctor.find("verifier", "ok", f"{text}, and none of the empty and idle responses")
