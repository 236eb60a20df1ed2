"""Feature terms on toy models: a step with them, and what transformers itself shows of a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import flat, made_responses, objective_of, score, toy
from torch import Tensor

from kdrl.batch import Response
from kdrl.features.live import Features
from kdrl.models import LoadedModel
from kdrl.update import Updater

DEEP: dict[str, Any] = {"layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8}


def pair(**teacher: Any) -> tuple[LoadedModel, LoadedModel]:
    """A student and a teacher of two layers, far from each other."""
    return toy(1, trainable=True, sharp=4.0, **DEEP), toy(2, sharp=4.0, **(DEEP | teacher))


def updater_of(
    student: LoadedModel, teacher: LoadedModel, entries: Sequence[dict[str, Any]], *, budget: int = 4096, seed: int = 0
) -> Updater:
    return Updater(student, budget, Features(objective_of(entries), student, teacher, budget, seed))


def responses(count: int = 2) -> list[Response]:
    return made_responses(groups=count, size=count)


def step(
    student: LoadedModel,
    teacher: LoadedModel,
    entries: Sequence[dict[str, Any]],
    *,
    texts: Sequence[Response] | None = None,
    budget: int = 4096,
    rows: Sequence[int] | None = None,
) -> tuple[float, Tensor]:
    """Loss and gradient (student and projectors) of one optimizer step of these terms."""
    scored = score(student, responses() if texts is None else texts, entries, teacher=teacher)
    updater = updater_of(student, teacher, entries, budget=budget)
    updater.clear()
    loss = updater.accumulate(scored, list(range(scored.rollouts.rows)) if rows is None else rows)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*updater.parameters, *updater.projectors)]
    gradient = torch.cat([g.flatten() for g in grads]).clone()
    flat(updater)
    return loss, gradient


def own(loaded: LoadedModel, response: Response, *, inside: str = "hidden_states") -> list[Tensor]:
    """transformers' hidden states `[T, D]` by layer, or attention maps `[H, T, L]`, at a response's predictions."""
    model = loaded.model
    ids = torch.tensor([response.prompt_ids + response.token_ids[:-1]])
    config = model.config
    held, config._attn_implementation = config._attn_implementation, "eager"
    out = model(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    config._attn_implementation = held
    first = len(response.prompt_ids) - 1
    if inside == "hidden_states":
        return [layer[0, first:] for layer in out.hidden_states]
    return [layer[0, :, first:] for layer in out.attentions]
