"""Rows told apart by what a teacher would answer: its distribution after the prompt (PCoreSet, arXiv 2506.00910)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.data.rows import Row
from kdrl.models import LoadedModel, encode_prompt
from kdrl.teachers import LocalTeacher

# Prompts whose hidden states, and whose distributions, are held at once.
_SLAB, _CHUNK = 512, 16


def first_token_probabilities(
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    outcomes: int = 256,
    budget: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[int], NDArray[np.float64]]:
    """Places of the rows whose prompt fits the context, and each one's probabilities of the response's first token.

    `[N, outcomes + 1]`: the tokens that are likeliest on average, and all others as one; the prompts are read twice.
    """
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", math.inf)
    prompts = [encode_prompt(loaded, row.problem.prompt) for row in rows]
    places = [i for i, ids in enumerate(prompts) if len(ids) <= context]
    ready = [Response(rows[i].problem, i, prompts[i], [0], "gold", True, "") for i in places]

    def told(share: int) -> Iterator[tuple[int, Tensor]]:
        for at, p_CV in _distributions(loaded, ready, budget):
            yield at, p_CV
            if progress is not None:
                progress(share * len(ready) + at + len(p_CV), 2 * len(ready))

    mean_V = sum((p_CV.sum(0) for _, p_CV in told(0)), torch.zeros(loaded.vocab_size, dtype=torch.float64))
    likeliest = mean_V.topk(min(outcomes, len(mean_V))).indices
    parts = [torch.cat([p[:, likeliest], 1.0 - p[:, likeliest].sum(-1, keepdim=True)], -1) for _, p in told(1)]
    return places, torch.cat(parts).numpy() if parts else np.zeros((0, len(likeliest) + 1))


def _distributions(loaded: LoadedModel, ready: Sequence[Response], budget: int) -> Iterator[tuple[int, Tensor]]:
    teacher = LocalTeacher(loaded, budget)
    for start in range(0, len(ready), _SLAB):
        rollouts = Rollouts.of(ready[start : start + _SLAB], loaded.device)
        evidence = teacher.score(rollouts, torch.ones_like(rollouts.trained_N), "distribution", 1.0)
        for index_C in torch.arange(rollouts.tokens, device=loaded.device).split(_CHUNK):
            p_CV = evidence.logp(index_C, torch.zeros(1, device=loaded.device)).exp()
            yield start + int(index_C[0]), p_CV.double().cpu()
