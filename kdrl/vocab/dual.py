"""Dual-space distillation as a term: the teacher's hidden states read by the student's head, and the other way round.

DSKD (2406.17328) and DSKDv2 (2504.11426). What is trained beside the student is in `spaces`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from kdrl.objectives.base import TERMS, Needs, TokenView
from kdrl.objectives.specs import Divergence
from kdrl.vocab.terms import VocabConfig, VocabTerm


class DualConfig(VocabConfig):
    """Divergences in the student's and the teacher's space, through projectors trained beside the student."""

    divergence: Divergence = Divergence(kind="forward_kl")
    """In the student's space, from the projected teacher (data) to the student: forward_kl, reverse_kl, tv, {jsd: b}
    and the others of `distill`, without gates."""
    in_teacher: Divergence = Divergence(kind="forward_kl")
    """In the teacher's space, from the teacher to the projected student."""
    temperature: float = Field(default=2.0, gt=0.0)
    """Divides the logits of both sides of both divergences, on top of the policy's temperature."""
    align: Literal["exact", "attention"] = "exact"
    """`exact`: tokens that both tokenizations have, all of them with one tokenizer; `attention`: every token looks at
    all of the other model's tokens of the response (cross-model attention, with a third projector)."""
    label: Literal["text", "teacher"] = "text"
    """What the projected teacher is trained to predict: the written token, or (v2, exact alignment alone) the
    teacher's likeliest one, and nothing where the student has no such token."""
    agree: bool = False
    """Learn in the student's space only where the projected teacher's likeliest token is that label."""
    start: Literal["random", "heads"] = "random"
    """Projectors from the seed, or (v2) by least squares so that the other model's logits of the shared tokens come out
    as they are."""
    lr_scale: float = Field(default=1.0, gt=0.0)
    """The projectors' learning rate over that of the student; their weights do not decay."""

    @model_validator(mode="after")
    def _check(self) -> DualConfig:
        for name in ("divergence", "in_teacher"):
            spec = getattr(self, name)
            if spec.kind == "rank" or any(gate.constant is None for gate in spec.gates):
                raise ValueError(f"{name} of projected distributions has no ranks and no gates; use `scale` or a mask")
        if self.align == "attention" and self.label == "teacher":
            raise ValueError("label: teacher is the teacher's likeliest token at that place, which needs align: exact")
        return self


@TERMS.add("dual_distill")
class DualDistill(VocabTerm[DualConfig]):
    """Dual-space distillation (DSKD, 2406.17328): both models compared in the space of each, by learned projectors.

    With one tokenizer, heads alike and identities for projectors it is the plain divergence, and the teacher's own loss
    on the text, which is constant. Projectors are saved with checkpoints and left out of final/.
    """

    name, Config = "dual_distill", DualConfig

    @property
    def needs(self) -> Needs:
        """The teacher's hidden states, and a pass of its own outside the chunked head of the others."""
        return Needs(teacher="distribution", vocabulary=True, projectors=True)

    @property
    def compared(self) -> bool:
        """Its loss is not made where the others compare."""
        return False

    def usable_N(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Tokens that both have, or all that have an alignment."""
        return columns["chunk_single"] if self.config.align == "exact" else columns["chunk_size"] > 0

    def loss(self, view: TokenView) -> Tensor:
        """What `Spaces` found."""
        assert view.divergence_N is not None
        return view.divergence_N
