"""Tiny models of two tokenizers, responses of both, and what a step would hand to the updater."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from tiny import MODEL, objective_of, sharpen
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.models import LoadedModel, ModelConfig, NewModel, encode_prompt, load_model
from kdrl.objectives.blocks import block_ids
from kdrl.objectives.objective import token_data
from kdrl.objectives.schedules import Moment
from kdrl.tasks import Problem
from kdrl.teachers import LocalTeacher
from kdrl.teachers.beside import Beside
from kdrl.update import Scored, Updater
from kdrl.vocab.teacher import VocabTeacher, Vocabularies, chunk_blocks

from .tokenizers import tokenizer_of

TEXTS = [
    "the answer is 43.",
    "12 + 31 - 4 = 39, so the answer is 39.",
    "1000",
    "is is the sum of merci",
    "return a + b\n",
    "0",
]


@lru_cache
def folder_of(kind: str) -> str:
    """A tokenizer in a folder."""
    folder = Path(mkdtemp())
    tokenizer_of(kind).save_pretrained(folder)
    return str(folder)


def model_of(kind: str, seed: int, *, trainable: bool = False, sharp: float = 10.0, **change: Any) -> LoadedModel:
    """A random float64 model with a tokenizer of that kind."""
    config = ModelConfig(model=NewModel(**(MODEL | change)), tokenizer=folder_of(kind))
    loaded = load_model(config, "cpu", trainable=trainable, seed=seed)
    sharpen(loaded, sharp)
    loaded.model.double()
    return loaded


def written(student: LoadedModel, texts: Sequence[str] = TEXTS, origin: Any = "student") -> list[Response]:
    """Responses with these texts, every other one ended, in the student's tokens."""
    out = []
    for i, text in enumerate(texts):
        problem = Problem(f"p{i // 2}", f"12 + {i // 2} = ", "3")
        ids = student.tokenizer(text, add_special_tokens=False)["input_ids"]
        ended = i % 2 == 0
        ids = [*ids, student.eos_ids[0]] if ended else list(ids)
        response = Response(problem, i // 2, encode_prompt(student, problem.prompt), ids, origin, ended, text)
        response.logp = (torch.randn(len(ids), generator=torch.Generator().manual_seed(i)) * 0.3).tolist()
        response.reward = float(i % 2)
        out.append(response)
    return out


def teacher_of(student: LoadedModel, teacher: LoadedModel, *, spaces: bool = False) -> VocabTeacher:
    return VocabTeacher(LocalTeacher(teacher, 4096), Vocabularies(student, teacher), spaces=spaces)


def scored(
    student: LoadedModel,
    teacher: Any,
    responses: Sequence[Response],
    entries: Sequence[Mapping[str, Any]],
    *,
    stale: bool = False,
    temperature: float = 1.0,
) -> Scored:
    """What the trainer would hand over, the teacher a VocabTeacher or a plain one."""
    rollouts = Rollouts.of(responses, student.device)
    logp_N, entropy_N = Updater(student, 4096).score_policy(rollouts, temperature)
    active = objective_of([dict(e) for e in entries]).activate(rollouts, Moment(0, 100), entropy_N, logp_N)
    active = Beside({"teacher": teacher}).narrowed(active, rollouts)
    wanted_N = torch.stack([a.wanted_N(rollouts.row_N, rollouts.rows) for a in active]).any(0)
    whole = any(a.term.needs.teacher == "distribution" for a in active)
    evidence = {"teacher": teacher.score(rollouts, wanted_N, "distribution" if whole else "token", temperature)}
    noise_N = torch.tensor([x for r in responses for x in (r.logp or [])], device=student.device)
    return Scored(
        rollouts,
        active,
        evidence,
        None,
        logp_N + noise_N if stale else None,
        None,
        temperature,
        token_data(rollouts),
        blocks={a.name: block_ids(a.keep_N, rollouts.row_N, a.term.block) for a in active if a.term.block}
        | chunk_blocks(active, evidence),
    )


def logits_of(loaded: LoadedModel, prompt: list[int], ids: list[int]) -> Tensor:
    """Log-probs `[T, V]` of a plain forward pass."""
    logits = loaded.model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits[:, : loaded.vocab_size].log_softmax(-1)
