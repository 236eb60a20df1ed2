"""One optimizer step of a method's terms on logits made by hand: value and gradient, as training would take them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrl.methods import get_method
from kdrl.objectives.base import Term, TokenView
from kdrl.objectives.objective import view_tokens
from kdrl.objectives.reduce import token_weights
from kdrl.objectives.schedules import Memory, Moment
from kdrl.objectives.scores import Score, Tokens, column, measure
from kdrl.objectives.terms import TERMS
from kdrl.sources.config import SourceConfig

from .numerics import GAMMA, SHARE, TAID, Step

MEMORIES = {"taid": TAID, "trend": SHARE, "calibrated": 1.0 - GAMMA}
# The vocabulary of these tests is smaller than what the methods cut out of a real one.
SMALLER = {"mixed-kl-topk": 3, "eopd": 4, "ptkd": 5, "sdft": 4, "sdpo": 4, "pld": 4}
LENGTHS = (3, 1, 4)


def made_step(name: str, seed: int, vocabulary: int = 9) -> tuple[Step, np.ndarray]:
    """Three responses of random logits, written by each of the source's origins in turn, and the student's logits."""
    draw = np.random.default_rng([seed, *map(ord, name)])
    origins = SourceConfig.model_validate(get_method(name).recipe.get("source", "student")).origins
    row_N = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    size = (len(row_N), vocabulary)
    step = Step(
        teacher_NV=draw.normal(size=size) * draw.uniform(0.8, 3.0, (len(row_N), 1)),
        initial_NV=draw.normal(size=size) * 1.5,
        token_N=draw.integers(vocabulary, size=len(row_N)),
        row_N=row_N,
        origin_N=np.array(origins)[row_N % len(origins)],
        uniform_NK=draw.uniform(size=(len(row_N), 12)),
    )
    return step, draw.normal(size=size) * 1.7


def terms_of(name: str) -> list[Term[Any]]:
    """A method's terms, with k cut down where it exceeds the vocabulary."""
    entries = copy.deepcopy(get_method(name).recipe["objective"])
    for entry in entries:
        for given in entry.values():
            topk = given.get("support", {})
            if name in SMALLER and "topk" in topk:
                old = topk["topk"]
                topk["topk"] = old | {"k": SMALLER[name]} if isinstance(old, dict) else SMALLER[name]
    pairs = [next(iter(entry.items())) for entry in entries]
    return [TERMS.get(kind)(TERMS.get(kind).Config.model_validate(given)) for kind, given in pairs]


def moment_of(step: Step, terms: Sequence[Term[Any]]) -> Moment:
    """The step's moment, with every scalar that has a memory at its value of `MEMORIES`."""
    memory = Memory.within([term.config for term in terms])
    for path, schedule in memory.schedules.items():
        (kind,) = schedule.spec
        memory.states[path] = {**memory.states[path], "value": MEMORIES[kind]}
    return Moment(step.step, step.total, memory)


def loss_of(name: str, step: Step, logits_NV: Tensor, only: str | None = None) -> Tensor:
    """The step's loss under a method (or its terms of one kind), differentiable in the student's logits."""
    terms = terms_of(name)
    moment = moment_of(step, terms)
    total = logits_NV.sum() * 0.0
    for term in terms:
        if only is None or term.name == only:
            total = total + term.config.weight.at(moment) * _term_loss(name, term, step, logits_NV, moment)
    return total


def _term_loss(name: str, term: Term[Any], step: Step, logits_NV: Tensor, moment: Moment) -> Tensor:
    keep_N = torch.from_numpy(np.isin(step.origin_N, term.config.on))
    row_N = torch.from_numpy(step.row_N)
    weight_N = token_weights(term.config.reduce, keep_N, row_N, len(LENGTHS), torch.float64)
    temperature = get_method(name).recipe.get("rollout", {}).get("temperature", 1.0)
    tokens = _tokens(step, logits_NV, moment, temperature)
    tokens = replace(tokens, measured=_measured(term, tokens, keep_N, row_N, moment))
    if term.needs.teacher == "distribution":
        logq_NV = torch.log_softmax(logits_NV / temperature, -1)
        loss_N = term.compare(tokens, logq_NV)[:, 0]
    else:
        view = _view(step, logits_NV, tokens, keep_N, moment, temperature)
        loss_N = term.loss(view)
        loss_N = loss_N * column(term.config.scale(view_tokens(view)), loss_N)
    return (torch.where(keep_N, weight_N, 0.0) * loss_N).sum()


def _logp(logits: np.ndarray, temperature: float) -> Tensor:
    return torch.log_softmax(torch.from_numpy(logits) / temperature, -1)


def _tokens(step: Step, logits_NV: Tensor, moment: Moment, temperature: float) -> Tokens:
    token_N1 = torch.from_numpy(step.token_N)[:, None]
    logp_NV = _logp(step.teacher_NV, temperature)
    logq_NV = torch.log_softmax(logits_NV.detach() / temperature, -1)
    return Tokens(
        data={"block": torch.from_numpy(step.row_N)},
        logq_C=logq_NV.gather(-1, token_N1)[:, 0],
        logp_C=logp_NV.gather(-1, token_N1)[:, 0],
        token_C=token_N1[:, 0],
        logp_CV=logp_NV,
        logq_CV=logq_NV,
        reference_CV=_logp(step.initial_NV, temperature),
        uniform_CK=torch.from_numpy(step.uniform_NK),
        temperature=temperature,
        moment=moment,
    )


def _measured(term: Term[Any], tokens: Tokens, keep_N: Tensor, row_N: Tensor, moment: Moment) -> dict[str, Tensor]:
    """Whole-step scores over the kept tokens."""
    found: dict[str, Tensor] = {}

    def spread(values_K: Tensor) -> Tensor:
        return torch.zeros(len(keep_N), dtype=values_K.dtype).masked_scatter(keep_N, values_K)

    def evaluate(inner: Score, known: Mapping[str, Tensor]) -> Tensor:
        here = replace(tokens, measured={key: spread(value) for key, value in known.items()})
        return column(inner(here), tokens.logq_C).expand(len(keep_N))[keep_N]

    for score in term.expressions:
        found |= {k: spread(v) for k, v in measure(score, evaluate, row_N[keep_N], moment).items()}
    return found


def _view(
    step: Step, logits_NV: Tensor, tokens: Tokens, keep_N: Tensor, moment: Moment, temperature: float
) -> TokenView:
    token_N1 = torch.from_numpy(step.token_N)[:, None]
    zeros_N = torch.zeros(len(keep_N), dtype=torch.float64)
    assert tokens.reference_CV is not None
    return TokenView(
        logq_N=torch.log_softmax(logits_NV / temperature, -1).gather(-1, token_N1)[:, 0],
        row_N=torch.from_numpy(step.row_N),
        rows=len(LENGTHS),
        last_N=torch.zeros(len(keep_N), dtype=torch.bool),
        keep_N=keep_N,
        reward_N=zeros_N,
        correct_N=zeros_N.bool(),
        teacher_N=tokens.logp_C,
        reference_N=tokens.reference_CV.gather(-1, token_N1)[:, 0],
        measured=tokens.measured,
        moment=moment,
    )
