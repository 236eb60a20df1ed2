"""What is checked of a served teacher before the first step: who answers, tokenizer, limits, temperature, parity.

Each replica that answers is checked alone, and one that comes later before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from kdrl.errors import RunError, UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.models.loading import load_without_weights
from kdrl.objectives.objective import Objective
from kdrl.pairing import pairing_checks
from kdrl.teachers.client import Client
from kdrl.teachers.config import TeacherConfig
from kdrl.teachers.served import Asked, ServedTeacher
from kdrl.teachers.served_config import ServedConfig
from kdrl.teachers.served_parity import Parity, Plan

Check = Callable[[], list[str]]
Look = Callable[[ServedTeacher], list[str]]
"""A check of one replica: notes, or a UserError."""

PIECE = 2048
"""Tokens that a server is asked to spell at once."""


def most_asked(objective: Objective) -> int:
    """The largest number of likeliest tokens that a term asks of a teacher."""
    return max((t.needs.few_count for t in objective.terms if t.needs.few == "topk"), default=0)


def open_served(section: TeacherConfig, student: LoadedModel, k: int) -> ServedTeacher:
    """The teacher that a section names, `k` likeliest tokens of it wanted; raises UserError when no server answers."""
    assert section.served is not None
    client = Client(section.served)
    if section.served.text_only and section.served.model is not None:
        return ServedTeacher(client, section.served.model, student.vocab_size)
    answers = client.ask_each("/v1/models")
    name = _served_name(section.served, {url: _names(url, answer) for url, answer in answers.items()})
    for replica in client.replicas:
        replica.context = _context(answers.get(replica.url), name)
    lengths = [r.context for r in client.replicas if r.context is not None]
    return ServedTeacher(client, name, student.vocab_size, k, min(lengths, default=None))


def _served_name(config: ServedConfig, found: Mapping[str, list[str]]) -> str:
    """The model's name on all replicas; raises UserError when they serve others, or several and none is named."""
    for url, names in found.items():
        told = ", ".join(map(repr, names)) or "nothing"
        if config.model is not None and config.model not in names:
            raise UserError(f"the server {url} serves {told} and not {config.model!r}; mend teacher.served.model.")
        if config.model is None and len(names) != 1:
            raise UserError(f"the server {url} serves {told}; name one by teacher.served.model.")
    name = config.model or next(iter(found.values()))[0]
    if any(name not in names for names in found.values()):
        told = "; ".join(f"{url}: {', '.join(names)}" for url, names in found.items())
        raise UserError(f"the replicas serve different models ({told}); start all with one --served-model-name.")
    return name


def _context(answer: Any, name: str) -> int | None:
    """Tokens that a replica reads at most, where it says so."""
    entries = [entry for entry in (answer or {}).get("data", []) if entry["id"] == name]
    return next((n for entry in entries if isinstance(n := entry.get("max_model_len"), int)), None)


def _names(url: str, answer: Any) -> list[str]:
    try:
        return [str(entry["id"]) for entry in answer["data"]]
    except (KeyError, TypeError):
        raise UserError(
            f"/v1/models of the teacher server {url} is not OpenAI's; kdrl needs a server such as vLLM's."
        ) from None


def served_checks(
    section: TeacherConfig, teacher: ServedTeacher, student: LoadedModel, plan: Plan, own: LoadedModel | None = None
) -> dict[str, Check]:
    """The checks by name, in order; each raises UserError or returns notes. A text-only API is not asked to score.

    `own` is the teacher's tokenizer where it reads responses in its own tokens. The same looks are taken at a replica
    that comes later.
    """
    checks: dict[str, Check] = {"server": partial(_check_replicas, teacher)}
    if teacher.config.text_only or not plan.problems:
        return checks
    reader = own or student
    prompts = [encode_prompt(reader, problem.prompt) for problem in plan.problems]
    looks: dict[str, Look] = {
        "served context": partial(_check_context, need=max(map(len, prompts)) + plan.max_new_tokens),
        "served tokenizer": partial(_check_spelling, student=reader),
        "served top-k": partial(_look_top_k, prompt=prompts[0]),
    }
    parity = Parity(section, teacher, student, plan, own)
    if plan.temperature != 1.0:
        looks["served temperature"] = partial(_check_temperature, prompt=prompts[0], temperature=plan.temperature)
    if teacher.config.parity:
        looks["parity"] = parity.look
    checks |= {name: partial(_each, teacher, look) for name, look in looks.items()}
    checks["served tokenizer"] = partial(_check_tokenizer, section, teacher, reader)
    if plan.temperature != 1.0:
        checks["served temperature"] = partial(_warm, teacher, looks["served temperature"], parity)
    if teacher.config.parity:
        checks["parity"] = lambda: parity.begin() + ([] if parity.skipped else _each(teacher, parity.look))
    teacher.client.examine = partial(_examine, teacher, looks)
    return checks


def writing_checks(teacher: ServedTeacher, reader: LoadedModel) -> list[str]:
    """Notes on a teacher that is only to write; raises UserError where its token ids are not the reader's."""
    if teacher.config.text_only:
        return _check_replicas(teacher)
    context = 0 if teacher.context is None else teacher.context - 1
    looks: dict[str, Look] = {
        "served context": partial(_check_context, need=context),
        "served tokenizer": partial(_check_spelling, student=reader),
    }
    teacher.client.examine = partial(_examine, teacher, looks)
    return _check_replicas(teacher) + _each(teacher, looks["served tokenizer"])


def _each(teacher: ServedTeacher, look: Look) -> list[str]:
    """A look at every replica that answers; raises UserError with what is wrong of each."""
    notes: list[str] = []
    wrong: list[str] = []
    living = [r.url for r in teacher.client.replicas if r.known]
    lost = 0
    for url in living:
        only = len(living) == 1
        try:
            notes += look(teacher.at(teacher.client.alone(url, teacher.config.wait_s if only else 0.0)))
        except UserError as error:
            wrong.append(str(error) if url in str(error) else f"{url}: {error}")
        except RunError as error:
            lost += 1
            if lost == len(living):
                raise
            teacher.client.lost(url, str(error))
            notes.append(f"the teacher server {url} answers no more; it is left out until it does, and then checked")
    if wrong:
        raise UserError("\n".join(wrong))
    return list(dict.fromkeys(notes))


def _examine(teacher: ServedTeacher, looks: Mapping[str, Look], client: Client) -> None:
    """All looks at a replica that was away; raises UserError when it will not do, RunError when it is gone again."""
    url = client.replicas[0].url
    answer = client.answers("/v1/models").get(url)
    if answer is None:
        raise RunError("it does not answer")
    names = _names(url, answer)
    if teacher.name not in names:
        raise UserError(f"it serves {', '.join(map(repr, names)) or 'nothing'} and not {teacher.name!r}.")
    client.replicas[0].context = _context(answer, teacher.name)
    for look in looks.values():
        look(teacher.at(client))


def _check_replicas(teacher: ServedTeacher) -> list[str]:
    silent = [r for r in teacher.client.replicas if not r.known]
    then = "until it does" if teacher.config.text_only else "until it does, and is checked then"
    return [f"the teacher server {r.url} does not answer ({r.why}); it is left out {then}" for r in silent]


def _check_context(teacher: ServedTeacher, need: int) -> list[str]:
    # One token more, because the server must write one.
    if teacher.context is not None and need + 1 > teacher.context:
        raise UserError(
            f"the teacher server {teacher.where} reads at most {teacher.context} tokens, its own one included, and the "
            f"longest prompt with rollout.max_new_tokens makes {need + 1}; start it with a longer --max-model-len, "
            "lower rollout.max_new_tokens or set task.max_prompt_tokens."
        )
    return []


def _check_tokenizer(section: TeacherConfig, teacher: ServedTeacher, student: LoadedModel) -> list[str]:
    """By content: the local tokenizer's vocabulary where there is one, and how the server spells every token."""
    notes: list[str] = []
    try:
        local = load_without_weights(section)
    except UserError as error:
        spelt = _each(teacher, partial(_check_spelling, student=student))
        return [f"the teacher's end tokens are not compared: {error}", *spelt]
    for name, check in pairing_checks(student, local).items():
        notes += check() if name != "vocabulary" else []
    return notes + _each(teacher, partial(_check_spelling, student=student))


def _check_spelling(teacher: ServedTeacher, student: LoadedModel) -> list[str]:
    size = PIECE if teacher.context is None else max(1, min(PIECE, teacher.context - 1))
    pieces = [list(range(i, min(i + size, student.vocab_size))) for i in range(0, student.vocab_size, size)]
    try:
        theirs = _spelt(teacher, pieces)
    except UserError as error:
        return [f"the server's own tokenizer is not compared: {error}"]
    for piece, text in zip(pieces, theirs, strict=True):
        if _decoded(student, piece) != text:
            alone = zip(piece, _spelt(teacher, [[token] for token in piece]), strict=True)
            odd = next(
                (f"token {t}: {s!r}, here {_decoded(student, [t])!r}" for t, s in alone if s != _decoded(student, [t])),
                "all together",
            )
            raise UserError(
                f"the served teacher {teacher.where} spells tokens {piece[0]} to {piece[-1]} otherwise than the "
                f"student's tokenizer ({odd}). A same-tokenizer loss would compare unrelated tokens; serve a teacher "
                "of the student's family, or use its text: source teacher."
            )
    return []


def _spelt(teacher: ServedTeacher, pieces: Sequence[list[int]]) -> list[str]:
    bodies = [{"model": teacher.name, "tokens": piece} for piece in pieces]
    return teacher.client.map("/detokenize", bodies, lambda answer, index: str(answer["prompt"]))


def _decoded(student: LoadedModel, ids: list[int]) -> str:
    return str(student.tokenizer.decode(ids))


def check_top_k(teacher: ServedTeacher, prompt: list[int]) -> list[str]:
    """One request to each replica as the run will make them: prompt log-probs, as many likeliest tokens as asked."""
    return _each(teacher, partial(_look_top_k, prompt=prompt))


def _look_top_k(teacher: ServedTeacher, prompt: list[int]) -> list[str]:
    ids = [*prompt[:8], prompt[0]]
    try:
        teacher.ask([Asked(ids, [len(ids) - 1], [0])], min(teacher.k, teacher.vocab_size), 1.0)
    except UserError as error:
        if teacher.k and ("greater than max" in str(error) or "max_logprobs" in str(error)):
            raise UserError(
                f"the teacher is asked for its {teacher.k} likeliest tokens, which the server does not give: "
                f"{str(error).rstrip('.')}. Start it with --max-logprobs {teacher.k} (`kdrl serve-teacher MODEL "
                f"--top-k {teacher.k}`), or lower K in support: {{topk: K}} and the k of a cache."
            ) from None
        raise
    return []


def _warm(teacher: ServedTeacher, look: Look, parity: Parity) -> list[str]:
    """The temperature; where it is wrong, log-probs could only differ from local ones."""
    try:
        return _each(teacher, look)
    except UserError:
        parity.skipped = "the temperatures differ"
        raise


def _check_temperature(teacher: ServedTeacher, prompt: list[int], temperature: float) -> list[str]:
    """Gaps between log-probs are divided by the temperature where the server heeds it."""
    ids = (prompt * 8)[: max(8, len(prompt))]
    ids = ids if teacher.context is None else ids[: teacher.context - 1]
    asked = [Asked(ids, list(range(1, len(ids))), list(range(1, len(ids))))]
    gaps = []
    for asked_t in (1.0, temperature):
        top = torch.tensor(teacher.ask(asked, min(max(2, teacher.k), teacher.vocab_size), asked_t)[0].top)
        gaps.append(top[:, 0] - top[:, 1])
    follows, ignores = (float((gaps[1] - want).abs().sum()) for want in (gaps[0] / temperature, gaps[0]))
    if follows > 0.1 * ignores:
        raise UserError(
            f"rollout.temperature is {temperature:g}, and the teacher server {teacher.where} gives log-probs at 1 "
            "whatever is asked, as vLLM does for prompts; the two would be compared at different temperatures. Set "
            "rollout.temperature=1, or load the teacher locally."
        )
    return []
