"""What is checked of a served teacher before the first step: who answers, tokenizer, limits, temperature, parity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdrl.available import available_bytes
from kdrl.batch import Response, Rollouts
from kdrl.engines.base import Engine
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt, load_model
from kdrl.models.loading import load_without_weights
from kdrl.objectives.objective import Objective
from kdrl.pairing import pairing_checks
from kdrl.seeds import derive
from kdrl.tasks import Problem
from kdrl.teachers.client import Client
from kdrl.teachers.config import TeacherConfig
from kdrl.teachers.local import LocalTeacher
from kdrl.teachers.served import Asked, ServedTeacher
from kdrl.teachers.served_config import ServedConfig
from kdrl.vocab.teacher import VocabTeacher, Vocabularies

Check = Callable[[], list[str]]

PIECE = 2048
"""Tokens that a server is asked to spell at once."""
AGREES = "served against local"
"""How the note of a parity check that found nothing amiss begins."""
PARITY_TOKENS = 64
PARITY_BUDGET = 4096


@dataclass(frozen=True)
class Plan:
    """What a run will ask of a served teacher: problems to try it on, lengths, temperature, and who writes samples."""

    problems: Sequence[Problem]
    max_new_tokens: int
    temperature: float
    engine: Engine
    seed: int


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
    name = _served_name(section.served, {url: _names(answer) for url, answer in answers.items()})
    return ServedTeacher(client, name, student.vocab_size, k, _context(answers, name))


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


def _context(answers: Mapping[str, Any], name: str) -> int | None:
    """Tokens that the shortest replica reads at most, where they say so."""
    entries = [entry for answer in answers.values() for entry in answer["data"] if entry["id"] == name]
    lengths = [n for entry in entries if isinstance(n := entry.get("max_model_len"), int)]
    return min(lengths, default=None)


def _names(answer: Any) -> list[str]:
    try:
        return [str(entry["id"]) for entry in answer["data"]]
    except (KeyError, TypeError):
        raise UserError(
            "the teacher server's /v1/models is not OpenAI's; kdrl needs a server such as vLLM's."
        ) from None


def served_checks(
    section: TeacherConfig, teacher: ServedTeacher, student: LoadedModel, plan: Plan, own: LoadedModel | None = None
) -> dict[str, Check]:
    """The checks by name, in order; each raises UserError or returns notes. A text-only API is not asked to score.

    `own` is the teacher's tokenizer where it reads responses in its own tokens.
    """
    checks: dict[str, Check] = {"server": partial(_check_replicas, teacher)}
    if teacher.config.text_only or not plan.problems:
        return checks
    reader = own or student
    prompts = [encode_prompt(reader, problem.prompt) for problem in plan.problems]
    checks["served context"] = partial(_check_context, teacher, max(map(len, prompts)) + plan.max_new_tokens)
    checks["served tokenizer"] = partial(_check_tokenizer, section, teacher, reader)
    checks["served top-k"] = partial(check_top_k, teacher, prompts[0])
    if plan.temperature != 1.0:
        checks["served temperature"] = partial(_check_temperature, teacher, prompts[0], plan.temperature)
    if teacher.config.parity:
        checks["parity"] = partial(_check_parity, section, teacher, student, plan, own)
    return checks


def writing_checks(teacher: ServedTeacher, reader: LoadedModel) -> list[str]:
    """Notes on a teacher that is only to write; raises UserError where its token ids are not the reader's."""
    return _check_replicas(teacher) + ([] if teacher.config.text_only else _check_spelling(teacher, reader))


def _check_replicas(teacher: ServedTeacher) -> list[str]:
    silent = [r for r in teacher.client.replicas if r.why]
    return [f"the teacher server {r.url} does not answer ({r.why}); it is left out until it does" for r in silent]


def _check_context(teacher: ServedTeacher, need: int) -> list[str]:
    # One token more, because the server must write one.
    if teacher.context is not None and need + 1 > teacher.context:
        raise UserError(
            f"the teacher server reads at most {teacher.context} tokens, its own one included, and the longest prompt "
            f"with rollout.max_new_tokens makes {need + 1}; start it with a longer --max-model-len, lower "
            "rollout.max_new_tokens or set task.max_prompt_tokens."
        )
    return []


def _check_tokenizer(section: TeacherConfig, teacher: ServedTeacher, student: LoadedModel) -> list[str]:
    """By content: the local tokenizer's vocabulary where there is one, and how the server spells every token."""
    notes: list[str] = []
    try:
        local = load_without_weights(section)
    except UserError as error:
        return [f"the teacher's end tokens are not compared: {error}", *_check_spelling(teacher, student)]
    for name, check in pairing_checks(student, local).items():
        notes += check() if name != "vocabulary" else []
    return notes + _check_spelling(teacher, student)


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
                f"the served teacher spells tokens {piece[0]} to {piece[-1]} otherwise than the student's tokenizer "
                f"({odd}). A same-tokenizer loss would compare unrelated tokens; serve a teacher of "
                "the student's family, or use its text: source teacher."
            )
    return []


def _spelt(teacher: ServedTeacher, pieces: Sequence[list[int]]) -> list[str]:
    bodies = [{"model": teacher.name, "tokens": piece} for piece in pieces]
    return teacher.client.map("/detokenize", bodies, lambda answer, index: str(answer["prompt"]))


def _decoded(student: LoadedModel, ids: list[int]) -> str:
    return str(student.tokenizer.decode(ids))


def check_top_k(teacher: ServedTeacher, prompt: list[int]) -> list[str]:
    """One request as the run will make them: prompt log-probs, and as many likeliest tokens as terms ask."""
    ids = [*prompt[:8], prompt[0]]
    try:
        teacher.ask([Asked(ids, [len(ids) - 1], [0])], min(teacher.k, teacher.vocab_size), 1.0)
    except UserError as error:
        if teacher.k and ("greater than max" in str(error) or "max_logprobs" in str(error)):
            raise UserError(
                f"the teacher is asked for its {teacher.k} likeliest tokens, which the server does not give: {error} "
                f"Start it with --max-logprobs {teacher.k} (`kdrl serve-teacher MODEL --top-k {teacher.k}`), or "
                "lower K in support: {topk: K} and the k of a cache."
            ) from None
        raise
    return []


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
            f"rollout.temperature is {temperature:g}, and the teacher server gives log-probs at 1 whatever is asked, "
            "as vLLM does for prompts; the two would be compared at different temperatures. Set rollout.temperature=1, "
            "or load the teacher locally."
        )
    return []


def _check_parity(
    section: TeacherConfig, teacher: ServedTeacher, student: LoadedModel, plan: Plan, own: LoadedModel | None = None
) -> list[str]:
    """The server's log-probs of the student's own samples against a local forward pass."""
    size, why = _weights(section)
    if why is not None:
        return [f"served and local log-probs are not compared: {why}"]
    device = student.device
    if 2 * size > available_bytes(device):
        return [f"served and local log-probs are not compared: weights of {size >> 20:,} MiB are large for {device}"]
    rollouts = _written(student, plan, teacher.config.parity)
    if own is not None:
        rollouts = VocabTeacher(teacher, Vocabularies(student, own)).aligned(rollouts).read
    if not rollouts.rows:
        return ["served and local log-probs are not compared: the teacher can write none of the student's samples"]
    keep_N = rollouts.trained_N
    served = teacher.score(rollouts, keep_N, "token", plan.temperature).logp_N
    local = LocalTeacher(load_model(section, device, trainable=False, seed=plan.seed), PARITY_BUDGET)
    difference = (local.score(rollouts, keep_N, "token", plan.temperature).logp_N - served).abs()
    mean, largest = float(difference.mean()), float(difference.max())
    told = f"log-probs of {rollouts.tokens} tokens differ by {mean:.2g} nats on average, {largest:.2g} at most"
    if not mean <= teacher.config.tolerance:
        raise UserError(
            f"the served teacher is not the model {section.model!r}: {told}, and teacher.served.tolerance is "
            f"{teacher.config.tolerance:g}. Serve that checkpoint, in a number format as exact as teacher.dtype, or "
            "name the one that is served."
        )
    return [f"{AGREES}: {told}"]


def _weights(section: TeacherConfig) -> tuple[int, str | None]:
    """Bytes of a local checkpoint's weights, or why there is none."""
    if not isinstance(section.model, str):
        return 0, "a new model has no stored weights"
    path = Path(section.model).expanduser()
    if path.is_file():
        return path.stat().st_size, None
    if not path.is_dir():
        return 0, f"{section.model!r} is no local folder"
    patterns = [section.gguf_file] if section.gguf_file else ["*.safetensors", "*.bin"]
    size = sum(file.stat().st_size for pattern in patterns for file in path.glob(pattern))
    return size, None if size else f"{section.model!r} holds no weights"


def _written(student: LoadedModel, plan: Plan, count: int) -> Rollouts:
    """The student's own responses to a few problems."""
    problems = plan.problems[:count]
    prompts = [encode_prompt(student, problem.prompt) for problem in problems]
    length = min(plan.max_new_tokens, PARITY_TOKENS)
    samples = plan.engine.generate(prompts, samples=1, max_new_tokens=length, seed=derive(plan.seed, "parity"))
    return Rollouts.of(
        [
            Response(problem, i, prompt, each[0].token_ids, "student", each[0].ended, "")
            for i, (problem, prompt, each) in enumerate(zip(problems, prompts, samples, strict=True))
        ],
        student.device,
    )
