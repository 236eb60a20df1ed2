"""A teacher in the same process: another model, or the student at the start."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import MicroBatch, Rollouts
from kdrl.errors import UserError
from kdrl.models import LoadedModel, head_of
from kdrl.models.packing import micro_batches, wanted_states
from kdrl.objectives.head import Head, score_tokens
from kdrl.teachers.base import Evidence, Gives, Need


class LocalTeacher:
    """A frozen model that reads the same token ids as the student, `budget` tokens at a time."""

    privileged = False
    padded = False
    gives = Gives()

    def __init__(self, loaded: LoadedModel, budget: int) -> None:
        self.loaded = loaded
        self.budget = budget

    def _mode(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @torch.no_grad()
    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Log-probs of the kept tokens at the policy's temperature, and on request the hidden states behind them."""
        count = int(keep_N.sum())
        where_N = torch.full_like(rollouts.tokens_N, -1)
        where_N[keep_N] = torch.arange(count, device=where_N.device)
        logp_N = torch.zeros(rollouts.tokens, device=where_N.device)
        rows = rollouts.row_N[keep_N].unique().tolist()
        options = {"padded": self.padded, "privileged": self.privileged}
        hidden_MD: Tensor | None = None
        with self._mode():
            head = head_of(self.loaded)
            for micro in micro_batches(self.loaded, rollouts, rows, keep_N, self.budget, **options):
                chosen_MD = self._hidden(micro)
                targets_M = rollouts.tokens_N[micro.index_M]
                logp = score_tokens(head, chosen_MD, targets_M, temperature=temperature).logp_N
                logp_N[micro.index_M] = logp.to(logp_N.dtype)
                if need == "distribution":
                    if hidden_MD is None:
                        hidden_MD = chosen_MD.new_empty(count, chosen_MD.shape[-1])
                    hidden_MD[where_N[micro.index_M]] = chosen_MD
            if need == "token":
                return Evidence(logp_N, where_N, len(rows), temperature=temperature)
            if hidden_MD is None:
                hidden_MD = head.weight_VD.new_empty(0, head.weight_VD.shape[1])
            return Evidence(logp_N, where_N, len(rows), hidden_MD, self._keep(head), temperature)

    def _keep(self, head: Head) -> Head:
        return head

    def _hidden(self, micro: MicroBatch) -> Tensor:
        """Hidden states `[M, D]` that predict a micro-batch's wanted tokens."""
        self._check_context(micro.longest)
        return wanted_states(self.loaded, micro)

    @property
    def longest(self) -> float:
        """Tokens that the model reads at most."""
        context = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        return math.inf if context is None else context

    def _check_context(self, length: int) -> None:
        if length > self.longest:
            raise UserError(
                f"the teacher reads at most {self.longest} tokens, and a prompt with its response has {length}; lower "
                "rollout.max_new_tokens or set task.max_prompt_tokens."
            )


class ReferenceTeacher(LocalTeacher):
    """The student as training found it: the LoRA base with adapters off, or a frozen copy of all weights."""

    def __init__(self, loaded: LoadedModel, budget: int) -> None:
        self._adapter = loaded.model if hasattr(loaded.model, "disable_adapter") else None
        if self._adapter is None:
            frozen = copy.deepcopy(loaded.model)
            loaded = copy.copy(loaded)
            loaded.model = frozen.requires_grad_(False)
        super().__init__(loaded, budget)

    def _mode(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._adapter is None else self._adapter.disable_adapter()
