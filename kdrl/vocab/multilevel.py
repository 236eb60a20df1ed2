"""MultiLevelOT: a teacher's probability profile over a stretch of text, transported onto the student's (2412.14528).

As released: logits over their deviation, softmax, each side's vocabulary in the order of its own mass over the stretch,
the largest kept. Left out: the released option that matches the student's columns to the teacher's one by one (f = 2).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kdrl.objectives.base import TERMS
from kdrl.objectives.blocks import sinkhorn
from kdrl.objectives.logspace import finite
from kdrl.objectives.scores import Tokens
from kdrl.vocab.terms import Distributions, VocabConfig, sides_of


class MultilevelConfig(VocabConfig):
    """Distances between two profiles over a block of chunks."""

    top: int = Field(default=50, ge=1)
    """How many of each side's vocabulary are kept, the heaviest over the block."""
    block: int = Field(default=64, ge=1)
    """Most chunks of one response whose order and transport are common; the original takes the whole batch."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Divides both sides' logits after they were divided by their deviation."""
    cross: float = Field(default=0.1, ge=0.0)
    """Weight of the cross-entropy between the two profiles, beside the L1 distance's 1."""
    transport: float = Field(default=1.0e-4, ge=0.0)
    """Weight of the transport cost between the tokens of the block, a sum over them."""
    epsilon: float = Field(default=0.1, gt=0.0)
    """How much the transport plan is smoothed."""
    iterations: int = Field(default=10, ge=1)
    """Rounds of scaling the plan's rows and columns."""


def profile(logp_CV: Tensor, top: int, temperature: float) -> Tensor:
    """Probabilities `[C, top]` of the standardised logits, the vocabulary in falling order of its mass over all C."""
    logits_CV = finite(logp_CV)
    p_CV = (logits_CV / (logits_CV.std(-1, keepdim=True) + 1e-4) / temperature).softmax(-1)
    order_V = p_CV.detach().sum(0).argsort(descending=True, stable=True)
    return p_CV[:, order_V[:top]]


def multilevel(logp_CV: Tensor, logq_CU: Tensor, config: MultilevelConfig) -> Tensor:
    """L1 + cross C + transport sinkhorn of one block, `[C]`; the last is the block's sum at every token.

    C = -sum softmax(Q) log softmax(P), a second softmax over the kept probabilities with the student as the weight, as
    released; Sinkhorn's rows are the teacher's, at its temperature of 2.
    """
    p_CK, q_CK = (profile(x, config.top, config.temperature) for x in (logp_CV, logq_CU))
    # A vocabulary of fewer tokens is filled up with zeros.
    width = max(p_CK.shape[-1], q_CK.shape[-1])
    p_CK, q_CK = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (p_CK, q_CK))
    loss_C = (p_CK - q_CK).abs().sum(-1)
    if config.cross:
        loss_C = loss_C - config.cross * (q_CK.softmax(-1) * p_CK.log_softmax(-1)).sum(-1)
    if config.transport:
        cost_C = sinkhorn(q_CK, p_CK, config.epsilon, config.iterations)
        loss_C = loss_C + config.transport * cost_C.sum()
    return loss_C


@TERMS.add("multilevel_distill")
class MultilevelDistill(Distributions[MultilevelConfig]):
    """MultiLevelOT (2412.14528): profiles in an order common to a stretch of text, and their optimal transport.

    Blind to which token is likely, as `sorted_distill`, but a token keeps its place over the block. Compared at the
    first tokens of chunks, where the original goes by position and drifts.
    """

    name, Config = "multilevel_distill", MultilevelConfig

    @property
    def block(self) -> int:
        """Chunks of one response that are compared together."""
        return self.config.block

    def compare(self, tokens: Tokens, logq_CV: Tensor) -> Tensor:
        """The distance at the first tokens of chunks, `[C, 3]`."""
        logp_CV, logq_CV, _, _ = sides_of(tokens, logq_CV)
        block_C = tokens.data["block"]
        loss_C = logq_CV.new_zeros(len(logq_CV))
        for block in block_C[block_C >= 0].unique().tolist():
            mine_K = (block_C == block).nonzero().squeeze(1)
            loss_C = loss_C.index_put((mine_K,), multilevel(logp_CV[mine_K], logq_CV[mine_K], self.config))
        return self.scaled(tokens, loss_C)
