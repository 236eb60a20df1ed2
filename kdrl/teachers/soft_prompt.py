"""PromptKD (arXiv 2402.12842): learned vectors before the prompt make the teacher easier to follow for its student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from kdrl.errors import UserError
from kdrl.objectives.base import ScheduleField
from kdrl.objectives.logspace import relative_entropy
from kdrl.objectives.schedules import Schedule
from kdrl.seeds import derive
from kdrl.teachers.prepare import PREPARATIONS, Preparation, PreparationConfig, Views

if TYPE_CHECKING:
    from kdrl.models import LoadedModel


class SoftPromptConfig(PreparationConfig):
    """Vectors in front of the prompt that only the teacher reads."""

    tokens: int = Field(default=7, ge=1)
    """Number of learned vectors (PromptKD: 7)."""
    weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Coefficient c of the pull back to the bare teacher; it is multiplied by 1 - step / steps (PromptKD: 1)."""
    init: str | None = None
    """Text whose embeddings the vectors start from, repeated to their number (PromptKD: "Suppose you are a student.");
    default: the embeddings of tokens drawn from the run's seed."""


@PREPARATIONS.add("soft_prompt")
class SoftPrompt(Preparation[SoftPromptConfig]):
    """Vectors before the prompt, fitted by KL(p' || q) + (1 - step / steps) c KL(p' || p), p' the prompted teacher."""

    Config = SoftPromptConfig

    def __init__(self, config: SoftPromptConfig, teacher: LoadedModel, seed: int) -> None:
        """Raises UserError for an architecture that cannot read embeddings instead of token ids."""
        from kdrl.models.heads import causal_lm, decoder_of

        super().__init__(config, teacher, seed)
        lm: Any = causal_lm(teacher.model)
        self._decoder: Any = decoder_of(lm)
        self._embed: Any = lm.get_input_embeddings()
        self._check()
        with torch.no_grad():
            ids = torch.tensor(self._first_ids(), device=teacher.device)
            start_PD = self._embed(ids).detach().to(torch.promote_types(self._embed.weight.dtype, torch.float32))
        self.vectors_PD = Parameter(start_PD.clone())

    def _first_ids(self) -> list[int]:
        count, teacher = self.config.tokens, self.teacher
        if self.config.init is None:
            generator = torch.Generator().manual_seed(derive(self.seed, "soft prompt"))
            return torch.randint(teacher.vocab_size, (count,), generator=generator).tolist()
        ids: Any = teacher.tokenizer(self.config.init, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError("teacher.prepare.soft_prompt.init has no tokens; give some text, or leave it out.")
        return [ids[i % len(ids)] for i in range(count)]

    @torch.no_grad()
    def _check(self) -> None:
        from kdrl.models.heads import accepts, hidden_states

        generator = torch.Generator().manual_seed(0)
        ids_BL = torch.randint(self.teacher.vocab_size, (2, 5), generator=generator).to(self.teacher.device)
        mask_BL = torch.ones_like(ids_BL)
        if accepts(type(self._decoder), "inputs_embeds"):
            with self.teacher.autocast():
                want = hidden_states(self.teacher, ids_BL, mask_BL).float()
                found = self._run(self._embed(ids_BL), mask_BL).float()
            if bool((found - want).norm() <= (1e-3 if self.teacher.config.autocast is None else 5e-2) * want.norm()):
                return
        raise UserError(
            f"teacher.prepare.soft_prompt: {type(self._decoder).__name__} does not read embeddings as it reads tokens, "
            "so nothing can stand before its prompt; leave teacher.prepare out."
        )

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The vectors."""
        return {"vectors": self.vectors_PD}

    @property
    def more_tokens(self) -> int:
        """The vectors take places in the context."""
        return self.config.tokens

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Hidden states at the places of the tokens, with the vectors before them."""
        embedded_BLD = self._embed(input_ids_BL)
        rows, count = len(input_ids_BL), self.config.tokens
        soft_BPD = self.vectors_PD.to(embedded_BLD.dtype).expand(rows, -1, -1)
        mask = torch.cat([attention_mask_BL.new_ones(rows, count), attention_mask_BL], 1)
        return self._run(torch.cat([soft_BPD, embedded_BLD], 1), mask)[:, count:]

    def _run(self, embedded_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        from kdrl.models.attention import training_attention
        from kdrl.models.heads import accepts, causal_lm

        given: dict[str, Any] = {"inputs_embeds": embedded_BLD, "attention_mask": mask_BL, "use_cache": False}
        if accepts(type(self._decoder), "position_ids"):
            given["position_ids"] = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)
        with training_attention(causal_lm(self.teacher.model)):
            return self._decoder(**given).last_hidden_state

    def loss(self, views: Views) -> Tensor:
        """KL(p' || q) + (1 - step / steps) c KL(p' || p)."""
        moment = views.moment
        pull = (1.0 - moment.step / max(1, moment.total)) * self.config.weight.at(moment)
        loss_C = relative_entropy(views.adapted_CV, views.student_CV)
        return loss_C + pull * relative_entropy(views.adapted_CV, views.teacher_CV)
