"""Scores that rank or average tokens, measured over a whole step before its update: splitting changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kdrl.objectives.objective import Active
from kdrl.objectives.scores import Score, Tokens, column, measure
from kdrl.update import Scored, Updater


def measure_scores(updater: Updater, scored: Scored) -> dict[str, dict[str, Tensor]]:
    """For each term, its whole-step scores `[N]` by key, over the tokens that its mask keeps (0 elsewhere)."""
    found: dict[str, dict[str, Tensor]] = {}
    flat: Tokens | None = None
    for active in scored.active:
        wanting = [e for e in active.term.expressions if next(e.batch_parts(), None) is not None]
        if not wanting:
            continue
        if flat is None and any(e.reads & {"student", "teacher"} for e in wanting):
            flat = _flat(updater, scored)
        found[active.name] = {}
        for expression in wanting:
            found[active.name] |= _of_term(updater, scored, active, expression, flat)
    return found


def _flat(updater: Updater, scored: Scored) -> Tokens:
    logq_N, entropy_N = updater.score_policy(scored.rollouts, scored.temperature)
    return Tokens(data=scored.data, logq_C=logq_N, entropy_C=entropy_N)


def _of_term(
    updater: Updater, scored: Scored, active: Active, expression: Score, flat: Tokens | None
) -> dict[str, Tensor]:
    keep_N = active.keep_N
    row_K = scored.rollouts.row_N[keep_N]

    def spread(values_K: Tensor) -> Tensor:
        out_N = torch.zeros(len(keep_N), dtype=values_K.dtype, device=keep_N.device)
        out_N[keep_N] = values_K
        return out_N

    def evaluate(inner: Score, known: Mapping[str, Tensor]) -> Tensor:
        measured = {key: spread(values_K) for key, values_K in known.items()}
        return evaluate_score(updater, scored, active, inner, flat, measured)[keep_N]

    return {key: spread(values_K) for key, values_K in measure(expression, evaluate, row_K, active.moment).items()}


@torch.no_grad()
def evaluate_score(
    updater: Updater,
    scored: Scored,
    active: Active,
    score: Score,
    flat: Tokens | None,
    measured: Mapping[str, Tensor],
) -> Tensor:
    """A score at every token of the step `[N]`; a pass over the head where it reads distributions."""
    if score.reads & {"distributions", "entries"}:
        evidence = scored.evidence[active.teacher or ""]
        given = replace(scored.given(active), measured=measured)

        def probe(tokens: Tokens, logq_CV: Tensor) -> Tensor:
            return column(score(tokens), logq_CV).expand(len(logq_CV))[:, None]

        return updater.probe(scored, active.keep_N, lambda index_M: evidence.comparison(probe, index_M, given, 1))
    evidence = scored.evidence.get(active.teacher or "")
    base = flat or Tokens(data=scored.data, logq_C=torch.zeros(scored.rollouts.tokens, device=active.keep_N.device))
    tokens = replace(base, logp_C=None if evidence is None else evidence.logp_N, measured=measured)
    return column(score(replace(tokens, moment=active.moment)), base.logq_C).expand(scored.rollouts.tokens)
