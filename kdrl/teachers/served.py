"""A teacher on a server (vLLM's OpenAI-compatible API): token ids in, log-probs of the response's tokens out.

Padding rows of its vocabulary are left out of its likeliest tokens. Its softmax runs over all rows of its head, the
local one over the tokenizer's, which makes a difference of the mass on padding rows. Left out: whole distributions,
log-probs of a text (that would be tokenised twice).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Rollouts
from kdrl.errors import UserError
from kdrl.objectives.support import Few
from kdrl.teachers.base import Evidence, Gives, Need
from kdrl.teachers.client import Client, UnusableError
from kdrl.teachers.served_config import ServedConfig

log = logging.getLogger("kdrl")


@dataclass(frozen=True)
class Asked:
    """A response as it is sent: prompt and tokens up to the last one that is kept, and the places to be scored."""

    ids: list[int]
    places: list[int]
    index: list[int]


@dataclass(frozen=True)
class Scores:
    """One response's answer: the sampled token's log-prob at each place, and the likeliest tokens in falling order.

    `padded` padding rows stood among the likeliest of a place, which so has fewer than were asked.
    """

    logp: list[float]
    ids: list[list[int]]
    top: list[list[float]]
    padded: int = 0


class ServedTeacher:
    """Scores by `/v1/completions` with `prompt_logprobs`; `name` is the model's on the server, `k` what terms ask,
    `context` the tokens that it reads at most, where it says so.

    The answer is the same whatever replica gave it and however often it was asked for; only vLLM's own batching may
    move the last digits. Raises UserError for what the server refuses, RunError when none answers any more.
    """

    def __init__(self, client: Client, name: str, vocab_size: int, k: int = 0, context: int | None = None) -> None:
        self.client, self.name, self.vocab_size, self.k, self.context = client, name, vocab_size, k, context
        self._spare = 0

    @property
    def config(self) -> ServedConfig:
        """Its settings."""
        return self.client.config

    @property
    def longest(self) -> float:
        """Tokens of a prompt and its response that it can score: one more, which it must write, fits its context."""
        return math.inf if self.context is None else self.context - 1

    @property
    def gives(self) -> Gives:
        """Log-probs of tokens and the likeliest ones; of a text-only API nothing."""
        return Gives(distribution=False, topk=self.config.top_k or self.vocab_size)

    def giving(self, k: int) -> ServedTeacher:
        """The same teacher, asked for `k` likeliest tokens at least, or as many as it may be asked."""
        most = max(self.k, min(k, self.gives.topk))
        return ServedTeacher(self.client, self.name, self.vocab_size, most, self.context)

    def at(self, client: Client) -> ServedTeacher:
        """The same teacher at the one replica that a client speaks with, read as far as that one reads."""
        return ServedTeacher(client, self.name, self.vocab_size, self.k, client.replicas[0].context)

    @property
    def where(self) -> str:
        """Its addresses, for a sentence."""
        return ", ".join(self.config.urls)

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Log-probs of the kept tokens, and with need `few` the `k` likeliest of each; other responses are not sent."""
        k = min(self.k, self.vocab_size) if need == "few" else 0
        if need == "distribution":
            raise TypeError("a served teacher gives no distribution")
        device = rollouts.tokens_N.device
        asked = _asked(rollouts, keep_N.cpu())
        found = self.ask(asked, k, temperature)
        index = torch.tensor([i for a in asked for i in a.index], dtype=torch.long, device=device)
        where_N = torch.full_like(rollouts.tokens_N, -1)
        where_N[index] = torch.arange(len(index), device=device)
        logp_N = torch.zeros(rollouts.tokens, device=device)
        logp_N[index] = torch.tensor([x for s in found for x in s.logp], device=device)
        few = None
        if need == "few":
            ids = torch.tensor([row for s in found for row in s.ids], dtype=torch.long, device=device)
            top = torch.tensor([row for s in found for row in s.top], dtype=torch.float32, device=device)
            few = Few(ids.reshape(-1, k), top.reshape(-1, k))
        return Evidence(logp_N, where_N, len(asked), temperature=temperature, few=few)

    def ask(self, asked: Sequence[Asked], k: int, temperature: float) -> list[Scores]:
        """Scores of texts, `config.batch` in one request; asked again for more where padding rows took places."""
        found = self._ask(asked, k, temperature)
        while short := [i for i, scores in enumerate(found) if scores.padded]:
            if not self._spare:
                log.warning("rows of the served teacher's vocabulary beyond the tokenizer's are left out")
            self._spare = max(self._spare + 1, *(found[i].padded for i in short))
            try:
                again = self._ask([asked[i] for i in short], k, temperature)
            except UserError as error:
                raise UserError(
                    f"padding rows of the served teacher's vocabulary are among its {k} likeliest tokens, and it does "
                    f"not give {k + self._spare}: {error} Start it with --max-logprobs {k + 2 * self._spare} (`kdrl "
                    f"serve-teacher MODEL --top-k {k + 2 * self._spare}`), or lower K in support: {{topk: K}}."
                ) from None
            for i, scores in zip(short, again, strict=True):
                found[i] = scores
        return found

    def _ask(self, asked: Sequence[Asked], k: int, temperature: float) -> list[Scores]:
        size, wanted = self.config.batch, k + self._spare if k else 0
        packs = [asked[i : i + size] for i in range(0, len(asked), size)]
        bodies = [self._body([a.ids for a in pack], wanted, temperature) for pack in packs]
        found = self.client.map(
            "/v1/completions", bodies, lambda answer, i: read_scores(answer, packs[i], k, wanted, self.vocab_size)
        )
        return [scores for pack in found for scores in pack]

    def _body(self, prompts: list[list[int]], k: int, temperature: float) -> dict[str, Any]:
        # One token must be written; the temperature is for servers whose log-probs follow it.
        return {
            "model": self.name,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": temperature,
            "prompt_logprobs": k,
        }


def _asked(rollouts: Rollouts, keep_N: Tensor) -> list[Asked]:
    """The responses that have a kept token."""
    found = []
    for row in rollouts.row_N.cpu()[keep_N].unique().tolist():
        start, end = rollouts.span(row)
        response = rollouts.responses[row]
        kept = keep_N[start:end].nonzero().squeeze(1).tolist()
        prompt = response.prompt_ids
        found.append(
            Asked(
                prompt + response.token_ids[: kept[-1] + 1],
                [len(prompt) + t for t in kept],
                [start + t for t in kept],
            )
        )
    return found


def read_scores(answer: Any, asked: Sequence[Asked], k: int, wanted: int, vocab_size: int) -> list[Scores]:
    """The scores in a server's answer to a batch; UnusableError for another shape, UserError for a wrong server.

    `wanted` likeliest tokens were asked so that `k` of them are below `vocab_size`.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [c["index"] for c in choices] != list(range(len(asked))):
        raise UnusableError(f"{len(choices)} answers to {len(asked)} responses")
    return [_read_one(choice, each, k, wanted, vocab_size) for choice, each in zip(choices, asked, strict=True)]


def _read_one(choice: Any, asked: Asked, k: int, wanted: int, vocab_size: int) -> Scores:
    rows = choice.get("prompt_logprobs")
    if rows is None:
        raise UserError(
            "the teacher server gives no prompt_logprobs, so it cannot score; use vLLM (`kdrl serve-teacher MODEL`), "
            "or only its text: teacher.served.api=completions with source teacher."
        )
    if len(rows) != len(asked.ids):
        raise UnusableError(f"log-probs of {len(rows)} tokens for a text of {len(asked.ids)}")
    logp, ids, top, padded = [], [], [], 0
    for place in asked.places:
        entries = {int(token): float(entry["logprob"]) for token, entry in rows[place].items()}
        if not all(math.isfinite(logp) for logp in entries.values()):
            raise UnusableError("log-probs that are no numbers")
        if max(entries.values()) > 1e-3:
            raise UserError(
                "the teacher server gives numbers above 0 for log-probs: it runs with --logprobs-mode raw_logits or "
                "processed_logits; start it without."
            )
        logp.append(entries[asked.ids[place]])
        if k:
            likeliest = _likeliest(entries, wanted)
            real = [item for item in likeliest if item[0] < vocab_size][:k]
            padded = max(padded, wanted - len(real) if len(real) < k else 0)
            ids.append([token for token, _ in real])
            top.append([each for _, each in real])
    return Scores(logp, ids, top, padded)


def _likeliest(entries: dict[int, float], wanted: int) -> list[tuple[int, float]]:
    # The sampled token stands beside the likeliest when it is none of them. Equal ones go by their number.
    found = sorted(entries.items(), key=lambda item: (-item[1], item[0]))[:wanted]
    if len(found) < wanted:
        raise UnusableError(f"{len(found)} likeliest tokens instead of {wanted}")
    return found
