"""A local teacher with something learned around it that is fitted to the student before each of its updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import MicroBatch, Rollouts
from kdrl.models import LoadedModel, head_of
from kdrl.models.packing import micro_batches, wanted_states
from kdrl.objectives.head import Comparison, Head, score_tokens
from kdrl.objectives.schedules import Moment
from kdrl.optimizer_state import flatten_optimizer, restore_optimizer
from kdrl.teachers.local import LocalTeacher
from kdrl.teachers.prepare import Preparation, Views


class PreparedTeacher(LocalTeacher):
    """Scores with what `preparation` has learned; no gradient is kept for the teacher's own weights.

    A preparation reads a response a row: vectors may stand before it.
    """

    padded = True

    def __init__(self, loaded: LoadedModel, budget: int, preparation: Preparation[Any], student: LoadedModel) -> None:
        super().__init__(loaded, budget)
        self.preparation, self.student = preparation, student
        self._parameters = list(preparation.parameters.values())
        self.optimizer = torch.optim.AdamW(self._parameters, lr=0.0, weight_decay=0.0) if self._parameters else None

    def _hidden(self, micro: MicroBatch) -> Tensor:
        self._check_context(micro.longest + self.preparation.more_tokens)
        with self.loaded.autocast():
            hidden_BLD = self.preparation.hidden(micro.input_ids_BL, micro.attention_mask_BL)
        return hidden_BLD.flatten(0, 1)[micro.place_M]

    def prepare(self, rollouts: Rollouts, keep_N: Tensor, temperature: float, moment: Moment) -> dict[str, Any]:
        """One optimizer step on the tokens that `keep_N` marks, the student as it is now; metrics of the step."""
        count, fit = int(keep_N.sum()), self.preparation.fit
        self.preparation.begin(moment)
        if not count or fit is None or self.optimizer is None:
            return {}
        rows = rollouts.row_N[keep_N].unique().tolist()
        batches = list(micro_batches(self.loaded, rollouts, rows, keep_N, self.budget, padded=True))
        if self.preparation.surveys:
            for micro in batches:
                self._survey(micro)
        total = 0.0
        for micro in batches:
            loss = self._loss(rollouts, micro, temperature, moment)
            (loss / count).backward()
            total += float(loss.detach()) / count
        clip = fit.clip
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, math.inf if clip is None else clip))
        sound = math.isfinite(norm) and math.isfinite(total)
        if sound:
            for group in self.optimizer.param_groups:
                group["lr"] = fit.lr.at(moment)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"prepare/loss": total if sound else None, "prepare/grad_norm": norm if sound else None}

    @torch.no_grad()
    def _survey(self, micro: MicroBatch) -> None:
        self._hidden(micro)
        self.preparation.survey(micro.place_M)

    def _loss(self, rollouts: Rollouts, micro: MicroBatch, temperature: float, moment: Moment) -> Tensor:
        """The preparation's loss summed over a micro-batch's tokens."""
        with torch.no_grad():
            teacher_MD = wanted_states(self.loaded, micro) if self.preparation.reads_bare else None
            student_MD = wanted_states(self.student, micro)
        with torch.enable_grad():
            heads = head_of(self.loaded), head_of(self.student)
            compare = self._comparison(heads, (teacher_MD, student_MD), temperature, moment)
            targets_M = rollouts.tokens_N[micro.index_M]
            scores = score_tokens(
                heads[0], self._hidden(micro), targets_M, temperature=temperature, comparisons=[compare]
            )
            loss, aside = scores.losses_N[0].sum(), self.preparation.aside(micro.place_M)
            return loss if aside is None else loss + aside

    def _comparison(
        self, heads: tuple[Head, Head], hidden: tuple[Tensor | None, Tensor], temperature: float, moment: Moment
    ) -> Comparison:
        def compare(adapted_CV: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                bare, student = (
                    adapted_CV.new_empty(0)
                    if states is None
                    else head.logp(states[part], temperature).to(adapted_CV.dtype)
                    for head, states in zip(heads, hidden, strict=True)
                )
            return self.preparation.loss(Views(adapted_CV, bare, student, moment))

        return compare

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, and its optimizer's moments."""
        learned = {name: p.detach() for name, p in self.preparation.parameters.items()}
        if self.optimizer is None:
            return learned
        return learned | flatten_optimizer(self.optimizer, self.preparation.parameters)[0]

    def state(self) -> dict[str, Any]:
        """The optimizer's options."""
        if self.optimizer is None:
            return {}
        return flatten_optimizer(self.optimizer, self.preparation.parameters)[1]

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint; raises UserError when it is of other parameters."""
        if self.optimizer is None:
            return
        names = self.preparation.parameters
        moments = {name: tensor for name, tensor in tensors.items() if "|" in name}
        restore_optimizer(self.optimizer, names, moments, state)
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(tensors[name])
