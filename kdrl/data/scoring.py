"""How likely a model finds given responses: log-probabilities of texts in batches, by the chunked head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdrl.batch import Response, Rollouts
from kdrl.data.rows import Row
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.teachers import LocalTeacher

# Responses whose tokens are held flat at once.
_SLAB = 512


@dataclass(frozen=True)
class TextScores:
    """Per row: `nats`, minus the log-probability of the response given the prompt, and its `tokens`; None unscored.

    The end token is not counted. Empty responses and rows longer than the model's context have no score.
    """

    nats: list[float | None]
    tokens: list[int]

    @property
    def unscored(self) -> int:
        """Rows without a score."""
        return sum(value is None for value in self.nats)


def score_rows(
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    budget: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> TextScores:
    """Score the response of every row, `budget` tokens at a time; `progress(done, total)` follows.

    Prompt and response are tokenized apart, as training does it. Raises UserError for a row without a response and for
    text that the tokenizer cannot write.
    """
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    encoded = [_encode(loaded, row, i) for i, row in enumerate(rows)]
    # The last token is never read.
    longest = context + 1 if isinstance(context, int) else math.inf
    ready = [r for r in encoded if r.token_ids and len(r.prompt_ids) + len(r.token_ids) <= longest]
    nats: list[float | None] = [None] * len(rows)
    ready.sort(key=lambda r: (len(r.prompt_ids) + len(r.token_ids), r.group))
    teacher = LocalTeacher(loaded, budget)
    for start in range(0, len(ready), _SLAB):
        slab = ready[start : start + _SLAB]
        rollouts = Rollouts.of(slab, loaded.device)
        evidence = teacher.score(rollouts, torch.ones_like(rollouts.trained_N), "token", 1.0)
        sums_B = torch.zeros(rollouts.rows, dtype=torch.float64)
        sums_B.index_add_(0, rollouts.row_N.cpu(), evidence.logp_N.double().cpu())
        for response, total in zip(slab, sums_B.tolist(), strict=True):
            nats[response.group] = -total
        if progress is not None:
            progress(start + len(slab), len(ready))
    return TextScores(nats, [len(response.token_ids) for response in encoded])


def response_ids(tokenizer: Any, row: Row) -> list[int]:
    """Token ids of a row's response; raises UserError when it has none or the tokenizer cannot write it."""
    text = row.wanted()
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # the Rust encoder raises a bare Exception
        raise UserError(f"{row.where}: the tokenizer cannot write {text[:80]!r}: {error}") from error


def _encode(loaded: LoadedModel, row: Row, number: int) -> Response:
    ids = response_ids(loaded.tokenizer, row)
    prompt = encode_prompt(loaded, row.problem.prompt)
    return Response(row.problem, number, prompt, ids, "gold", True, row.response or "")
