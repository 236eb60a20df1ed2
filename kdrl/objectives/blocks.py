"""Losses that couple the tokens of a response: plug-ins that see whole blocks of teacher and student distributions.

A block is a run of at most `block` kept tokens of one response, so that micro-batches and chunks cut none of them. The
originals of this kind couple the samples of a classifier's batch; a language model's batch is a response here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kdrl.batch import Origin
from kdrl.errors import nearest
from kdrl.objectives.base import TERMS, Needs, Term, TermConfig, TokenView
from kdrl.objectives.logspace import finite
from kdrl.objectives.scores import Tokens, column
from kdrl.registry import Registry

# fn(logp_CV, logq_CV, **settings) -> loss_C for the C tokens of one block.
BlockLoss = Callable[..., Tensor]
BLOCK_LOSSES: Registry[BlockLoss] = Registry("block loss")


def register_block_loss(name: str) -> Callable[[BlockLoss], BlockLoss]:
    """Register `fn(logp_CV, logq_CV, **settings) -> loss [C]` for the `batch_distill` term, C tokens of one block."""
    return BLOCK_LOSSES.add(name)


@register_block_loss("sinkhorn")
def sinkhorn(
    logp_CV: Tensor, logq_CV: Tensor, epsilon: float = 0.1, iterations: int = 20, temperature: float = 2.0
) -> Tensor:
    """Transport cost of q's rows onto p's under L1, C x the mean of sum_j P_ij W_ij (SinKD, 2402.17110).

    K = exp(-W/epsilon), then `iterations` rounds of row and column normalisation, as released; here the rows are the
    tokens of a block. The plan is differentiated through, as in the original.
    """
    p_CV, q_CV = ((finite(x) / temperature).softmax(-1) for x in (logp_CV, logq_CV))
    cost_CC = torch.stack([(row_V - p_CV).abs().sum(-1) for row_V in q_CV])
    log_plan_CC = -cost_CC / epsilon
    for _ in range(int(iterations)):
        log_plan_CC = log_plan_CC - log_plan_CC.logsumexp(-1, keepdim=True)
        log_plan_CC = log_plan_CC - log_plan_CC.logsumexp(-2, keepdim=True)
    return (log_plan_CC.exp() * cost_CC).sum(-1)


@register_block_loss("standardised_kl")
def standardised_kl(logp_CV: Tensor, logq_CV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p||q) of logits that were standardised per vocabulary entry over the block (LumiNet); 0 in a block of one."""
    if len(logp_CV) < 2:
        return logq_CV.sum(-1) * 0.0
    p, q = (_over_rows(finite(x)) / temperature for x in (logp_CV, logq_CV))
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def _over_rows(logits_CV: Tensor) -> Tensor:
    mean_V, variance_V = logits_CV.mean(0), logits_CV.var(0, unbiased=False)
    return (logits_CV - mean_V) / (variance_V + 1e-6).sqrt()


class BatchDistillConfig(TermConfig):
    """A loss over blocks of tokens."""

    loss: Any = "sinkhorn"
    """A block loss by name or {name: {settings}}: sinkhorn, standardised_kl, or one's own."""
    block: int = Field(default=64, ge=1)
    """Most tokens in a block; memory of sinkhorn grows as its square and as block x vocabulary."""
    on: tuple[Origin, ...] = ("student", "gold", "teacher", "buffer", "speculative", "mixed", "corrupt")
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""

    @field_validator("loss")
    @classmethod
    def _known(cls, loss: Any) -> Any:
        name, settings = read_loss(loss)
        known = list(inspect.signature(BLOCK_LOSSES.get(name)).parameters)[2:]
        for key in settings:
            if key not in known:
                raise ValueError(f"block loss {name} has no setting {key!r}{nearest(str(key), known)}")
        return loss


def read_loss(loss: Any) -> tuple[str, dict[str, Any]]:
    """Name and settings; raises ValueError for what is no block loss."""
    name, settings = (loss, {}) if isinstance(loss, str) else next(iter(loss.items())) if loss else ("", {})
    if not isinstance(name, str) or name not in BLOCK_LOSSES:
        raise ValueError(f"no block loss is called {name!r}{nearest(str(name), BLOCK_LOSSES)}")
    return name, dict(settings or {})


def block_ids(keep_N: Tensor, row_N: Tensor, block: int) -> Tensor:
    """A number `[N]` for every run of `block` kept tokens of one response; tokens between them take the one before."""
    kept_N = keep_N.long()
    rank_N = kept_N.cumsum(0)
    rows = int(row_N.max()) + 1 if len(row_N) else 0
    count_B = torch.zeros(rows, dtype=torch.long, device=row_N.device).index_add(0, row_N, kept_N)
    before_B = count_B.cumsum(0) - count_B
    place_N = (rank_N - before_B[row_N] - 1).clamp(min=0) // block
    return row_N * (len(keep_N) + 1) + place_N


@TERMS.add("batch_distill")
class BatchDistill(Term[BatchDistillConfig]):
    """A distillation loss that couples the tokens of a response, in blocks (SinKD, LumiNet, or one's own)."""

    name, family, Config = "batch_distill", "kd", BatchDistillConfig

    @property
    def needs(self) -> Needs:
        """The teacher's distributions."""
        return Needs(teacher="distribution")

    @property
    def block(self) -> int:
        """Tokens of one response that must be compared together."""
        return self.config.block

    def compare(self, tokens: Tokens, logq_CV: Tensor) -> Tensor:
        """The block loss of each block among the chunk's tokens, `[C, 3]`."""
        name, settings = read_loss(self.config.loss)
        logp_CV, _ = tokens.both()
        block_C = tokens.data["block"]
        loss_C = logq_CV.new_zeros(len(logq_CV))
        for block in block_C[block_C >= 0].unique().tolist():
            mine_K = (block_C == block).nonzero().squeeze(1)
            loss_K = BLOCK_LOSSES.get(name)(logp_CV[mine_K], logq_CV[mine_K], **settings)
            loss_C = loss_C.index_put((mine_K,), loss_K)
        loss_C = loss_C * column(self.config.scale(tokens), loss_C)
        return torch.stack([loss_C, torch.ones_like(loss_C), torch.ones_like(loss_C)], -1)

    def loss(self, view: TokenView) -> Tensor:
        """The block losses."""
        assert view.divergence_N is not None
        return view.divergence_N
