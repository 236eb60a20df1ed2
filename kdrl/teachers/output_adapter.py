"""A low-rank residual on the teacher's last hidden states that makes it about as sharp as its student.

In the spirit of PESF-KD (an adapter on the teacher's output that follows the student's sharpness); its own loss was not
found in any source read here, so this one is kdrl's and goes by its own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from kdrl.objectives.base import ScheduleField
from kdrl.objectives.logspace import entropy, relative_entropy
from kdrl.objectives.schedules import Schedule
from kdrl.seeds import derive
from kdrl.teachers.prepare import PREPARATIONS, Preparation, PreparationConfig, Views

if TYPE_CHECKING:
    from kdrl.models import LoadedModel


class OutputAdapterConfig(PreparationConfig):
    """A residual h + (h A) B before the teacher's head, B starting at zero."""

    rank: int = Field(default=8, ge=1)
    """Rank of the residual."""
    weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Coefficient c of the pull back to the bare teacher."""


@PREPARATIONS.add("output_adapter")
class OutputAdapter(Preparation[OutputAdapterConfig]):
    """A low-rank residual before the head, fitted by (H(p') - H(q))^2 + c KL(p' || p), p' the adapted teacher."""

    Config = OutputAdapterConfig
    through_teacher = False

    def __init__(self, config: OutputAdapterConfig, teacher: LoadedModel, seed: int) -> None:
        super().__init__(config, teacher, seed)
        width = teacher.model.get_output_embeddings().weight.shape[1]
        generator = torch.Generator().manual_seed(derive(seed, "output adapter"))
        down_DR = torch.randn(width, config.rank, generator=generator) / width**0.5
        self.down_DR = Parameter(down_DR.to(teacher.device))
        self.up_RD = Parameter(torch.zeros(config.rank, width, device=teacher.device))

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Both factors."""
        return {"down": self.down_DR, "up": self.up_RD}

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """The teacher's hidden states with the residual; no gradient passes through the teacher."""
        from kdrl.models.heads import hidden_states

        with torch.no_grad():
            hidden_BLD = hidden_states(self.teacher, input_ids_BL, attention_mask_BL)
        wide = hidden_BLD.to(torch.promote_types(hidden_BLD.dtype, self.up_RD.dtype))
        with torch.autocast(wide.device.type, enabled=False):
            return wide + wide @ self.down_DR.to(wide.dtype) @ self.up_RD.to(wide.dtype)

    def loss(self, views: Views) -> Tensor:
        """(H(p') - H(q))^2 + c KL(p' || p)."""
        gap_C = entropy(views.adapted_CV) - entropy(views.student_CV)
        pull = self.config.weight.at(views.moment)
        return gap_C.square() + pull * relative_entropy(views.adapted_CV, views.teacher_CV)
