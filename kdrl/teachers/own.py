"""The student as its own teacher: as it is, a running mean, an earlier state, or the start; with more context or none.

OPSD (arXiv 2601.18734), SDPO (2601.20802), SDFT (2601.19897), HDPO (2603.23871), PS-KD (2006.12000), BitDistiller
(2402.10631). Left out: a mean or copy kept on another device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.models import LoadedModel, encode_prompt
from kdrl.models.quantise import full_precision
from kdrl.objectives.head import Head
from kdrl.objectives.schedules import Moment
from kdrl.teachers.base import Evidence, Need
from kdrl.teachers.config import SelfTeacherConfig
from kdrl.teachers.context import context_prompt
from kdrl.teachers.copies import WeightCopy
from kdrl.teachers.local import LocalTeacher

LIVE = SelfTeacherConfig()


class SelfTeacher(LocalTeacher):
    """Scores responses under the prompt in their `privileged_ids`; `dress` fills it in, `reach_N` says where it is."""

    privileged = True

    def __init__(self, loaded: LoadedModel, budget: int, config: SelfTeacherConfig = LIVE) -> None:
        super().__init__(loaded, budget)
        self.config = config
        adapters = hasattr(loaded.model, "disable_adapter")
        copied = config.kind in ("ema", "past") or (config.kind == "initial" and not adapters)
        self.copy = WeightCopy(loaded.model, wide=config.kind == "ema") if copied else None

    def dress(self, responses: Sequence[Response]) -> int:
        """Give a step's verified responses the prompt that is read for them; how many have none.

        A response of the privileged source has its own. A context longer than the model reads counts as none.
        """
        missing = 0
        for response in responses:
            if response.origin != "privileged":
                response.privileged_ids = self._prompt(response, responses)
            missing += response.privileged_ids is None
        return missing

    def _prompt(self, response: Response, responses: Sequence[Response]) -> list[int] | None:
        if self.config.context is None:
            return response.prompt_ids
        prompt = context_prompt(self.config.context, response, responses)
        ids = None if prompt is None else encode_prompt(self.loaded, prompt)
        return None if ids is None or len(ids) + len(response.token_ids) - 1 > self.longest else ids

    def reach_N(self, rollouts: Rollouts) -> Tensor:
        """Tokens of responses that the self-teacher has a prompt for, bool `[N]`."""
        known = [r.privileged_ids is not None for r in rollouts.responses]
        return torch.tensor(known, dtype=torch.bool, device=rollouts.row_N.device)[rollouts.row_N]

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Score tokens of responses that have a prompt; raises ValueError for any other."""
        if bool((keep_N & ~self.reach_N(rollouts)).any()):
            raise ValueError("the self-teacher was asked about responses that it has no prompt for; see reach_N")
        return super().score(rollouts, keep_N, need, temperature)

    def after_update(self, moment: Moment) -> None:
        """After an optimizer step: the running mean follows."""
        if self.copy is not None and self.config.kind == "ema":
            self.copy.follow(self.config.rate.at(moment))

    def after_step(self, done: int) -> None:
        """After `done` training steps: the earlier state is taken anew when it is time."""
        if self.copy is not None and self.config.every is not None and done % self.config.every == 0:
            self.copy.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; the start is made again from the recipe."""
        return {} if self.copy is None or self.config.kind == "initial" else dict(self.copy.tensors)

    def state(self) -> dict[str, Any]:
        """Nothing beside the tensors."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint."""
        if self.copy is not None and self.config.kind != "initial":
            self.copy.restore(tensors)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.copy is not None:
                stack.enter_context(self.copy.in_place())
            if self.config.kind == "initial":
                stack.enter_context(full_precision(self.loaded.model))
                if self.copy is None:
                    stack.enter_context(self.loaded.model.disable_adapter())
            yield

    def _keep(self, head: Head) -> Head:
        # The student's own head moves with every update of the step, and so does a running mean of it.
        moves = self.config.kind in ("live", "ema")

        def held(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if moves else tensor.detach()

        return head.map(held)
