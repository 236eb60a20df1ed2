"""A teacher on a server (vLLM's OpenAI-compatible API): token ids in, log-probs of the response's tokens out.

The server's softmax runs over all rows of its head, the local one over the tokenizer's; padding rows make a difference
of the mass they hold. Left out: whole distributions, log-probs of a text (that would be tokenised twice).
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Asked:
    """A response as it is sent: prompt and tokens up to the last one that is kept, and the places to be scored."""

    ids: list[int]
    places: list[int]
    index: list[int]


@dataclass(frozen=True)
class Scores:
    """One response's answer: the sampled token's log-prob at each place, and the likeliest tokens in falling order."""

    logp: list[float]
    ids: list[list[int]]
    top: list[list[float]]


class ServedTeacher:
    """Scores by `/v1/completions` with `prompt_logprobs`; `name` is the model's on the server, `k` what terms ask,
    `context` the tokens that it reads at most, where it says so.

    The answer is the same whatever replica gave it and however often it was asked for; only vLLM's own batching may
    move the last digits. Raises UserError for what the server refuses, RunError when none answers any more.
    """

    def __init__(self, client: Client, name: str, vocab_size: int, k: int = 0, context: int | None = None) -> None:
        self.client, self.name, self.vocab_size, self.k, self.context = client, name, vocab_size, k, context

    @property
    def config(self) -> ServedConfig:
        """Its settings."""
        return self.client.config

    @property
    def gives(self) -> Gives:
        """Log-probs of tokens and the likeliest ones; of a text-only API nothing."""
        return Gives(distribution=False, topk=self.config.top_k or self.vocab_size)

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
        """Scores of texts, `config.batch` in one request."""
        size = self.config.batch
        packs = [asked[i : i + size] for i in range(0, len(asked), size)]
        bodies = [self._body([a.ids for a in pack], k, temperature) for pack in packs]
        found = self.client.map(
            "/v1/completions", bodies, lambda answer, i: read_scores(answer, packs[i], k, self.vocab_size)
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


def read_scores(answer: Any, asked: Sequence[Asked], k: int, vocab_size: int) -> list[Scores]:
    """The scores in a server's answer to a batch; UnusableError for another shape, UserError for a wrong server."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [c["index"] for c in choices] != list(range(len(asked))):
        raise UnusableError(f"{len(choices)} answers to {len(asked)} responses")
    return [_read_one(choice, each, k, vocab_size) for choice, each in zip(choices, asked, strict=True)]


def _read_one(choice: Any, asked: Asked, k: int, vocab_size: int) -> Scores:
    rows = choice.get("prompt_logprobs")
    if rows is None:
        raise UserError(
            "the teacher server gives no prompt_logprobs, so it cannot score; use vLLM (`kdrl serve-teacher MODEL`), "
            "or only its text: teacher.served.api=completions with source teacher."
        )
    if len(rows) != len(asked.ids):
        raise UnusableError(f"log-probs of {len(rows)} tokens for a text of {len(asked.ids)}")
    out = Scores([], [], [])
    for place in asked.places:
        entries = {int(token): float(entry["logprob"]) for token, entry in rows[place].items()}
        if not all(math.isfinite(logp) for logp in entries.values()):
            raise UnusableError("log-probs that are no numbers")
        if max(entries.values()) > 1e-3:
            raise UserError(
                "the teacher server gives numbers above 0 for log-probs: it runs with --logprobs-mode raw_logits or "
                "processed_logits; start it without."
            )
        out.logp.append(entries[asked.ids[place]])
        if k:
            _add_top(out, entries, k, vocab_size)
    return out


def _add_top(out: Scores, entries: dict[int, float], k: int, vocab_size: int) -> None:
    # The sampled token stands beside the k likeliest when it is none of them. Equal ones go by their number.
    top = sorted(entries.items(), key=lambda item: (-item[1], item[0]))[:k]
    if len(top) < k:
        raise UnusableError(f"{len(top)} likeliest tokens instead of {k}")
    if any(token >= vocab_size for token, _ in top):
        raise UserError(
            f"the served teacher holds a padding row of its vocabulary (token {max(t for t, _ in top)}; the tokenizer "
            f"has {vocab_size}) for one of its {k} likeliest tokens, and the student cannot follow; ask for fewer, or "
            "use support: {token: k2}."
        )
    out.ids.append([token for token, _ in top])
    out.top.append([logp for _, logp in top])
