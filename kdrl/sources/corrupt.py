"""Imperfect data: worked solutions in which the student refilled some tokens (KID)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.engines.sampling import inverse_cdf
from kdrl.models import LoadedModel, head_of
from kdrl.models.packing import micro_batches, wanted_states
from kdrl.objectives.head import Head, chunks, entropy_of
from kdrl.objectives.schedules import Schedule
from kdrl.seeds import derive
from kdrl.sources.base import Judge, Request, Source, by_group
from kdrl.sources.student import decoded
from kdrl.sources.text import GoldSource


class CorruptSource(Source):
    """Each problem's gold response, and one with a `share` of its tokens sampled anew (KID, 2410.11371).

    One forward pass of the student over the gold text gives every distribution, so a refilled token follows the gold
    prefix and not other refilled ones. A causal model has no mask token, so nothing is masked in the input. The final
    end token stays, none is put elsewhere, and tokens that get no loss are left alone. `pick`: at random, or where
    the student's entropy is highest (`hard`) or lowest (`easy`) within the response.
    """

    def __init__(
        self,
        gold: GoldSource,
        student: LoadedModel,
        judge: Judge,
        share: Schedule,
        pick: str,
        *,
        temperature: float,
        budget: int,
    ) -> None:
        self.gold, self.student, self.judge, self.share, self.pick = gold, student, judge, share, pick
        self.temperature, self.budget = temperature, budget

    def write(self, request: Request) -> list[Response]:
        """Gold and corrupted responses, group by group; tells the share of trained tokens that changed."""
        gold = self.gold.write(request)
        if not gold:
            return []
        share = self.share.at(request.moment)
        token_N, entropy_N = self._refill(gold, request.seed)
        rank = torch.Generator().manual_seed(request.seed)
        corrupt: list[Response] = []
        start = 0
        for response in gold:
            part = slice(start, start := start + len(response.token_ids))
            order_T = torch.rand(len(response.token_ids), generator=rank).to(entropy_N.device)
            if self.pick != "random":
                order_T = entropy_N[part] * (1 if self.pick == "hard" else -1)
            corrupt.append(self._corrupted(response, _chosen(response, order_T, share), token_N[part].tolist()))
        changed = [
            a != b for r, c in zip(gold, corrupt, strict=True) for a, b in zip(r.token_ids, c.token_ids, strict=True)
        ]
        request.out.tell("changed_tokens", sum(changed), len(changed))
        request.out.generated += len(corrupt)
        self.judge(corrupt, request.out)
        return by_group([*gold, *corrupt])

    def _corrupted(self, response: Response, chosen: list[int], refill: list[int]) -> Response:
        ids = list(response.token_ids)
        for place in chosen:
            ids[place] = refill[place]
        text = decoded(self.student, ids)
        return replace(response, token_ids=ids, origin="corrupt", text=text, reward=0.0, correct=False, judged=False)

    @torch.no_grad()
    def _refill(self, responses: list[Response], seed: int) -> tuple[Tensor, Tensor]:
        """For every response token a sample of the student given the text before it, and the entropy there, `[N]`."""
        rollouts = Rollouts.of(responses, self.student.device)
        uniform_N = torch.rand(rollouts.tokens, generator=torch.Generator().manual_seed(derive(seed, "refill"))).to(
            rollouts.tokens_N.device
        )
        token_N, entropy_N = torch.zeros_like(rollouts.tokens_N), torch.zeros_like(uniform_N)
        every_N = torch.ones_like(rollouts.trained_N)
        head = head_of(self.student)
        for micro in micro_batches(self.student, rollouts, range(rollouts.rows), every_N, self.budget):
            found = self._sample(head, wanted_states(self.student, micro), uniform_N[micro.index_M])
            token_N[micro.index_M], entropy_N[micro.index_M] = found[0], found[1].to(entropy_N.dtype)
        return token_N, entropy_N

    def _sample(self, head: Head, hidden_MD: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
        tokens, entropies = [], []
        for part in chunks(len(hidden_MD), head.vocab_size):
            logp_CV = head.logp(hidden_MD[part], self.temperature)
            prob_CV = logp_CV.exp()
            prob_CV[:, list(self.student.eos_ids)] = 0.0
            tokens.append(inverse_cdf(prob_CV, uniform_M[part, None].to(prob_CV.dtype))[:, 0])
            entropies.append(entropy_of(logp_CV))
        return torch.cat(tokens), torch.cat(entropies)


def _chosen(response: Response, order_T: Tensor, share: float) -> list[int]:
    """The places to refill: the highest in order among the trained tokens before the end, a share of them rounded."""
    last = len(response.token_ids) - int(response.ended)
    free = [i for i in range(last) if response.trained is None or response.trained[i]]
    ranked = sorted(free, key=lambda i: -float(order_T[i]))
    return sorted(ranked[: round(share * len(free))])
