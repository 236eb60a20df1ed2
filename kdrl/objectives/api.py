"""`kdrl.divergence`: a distillation loss on plain logits, the same arithmetic that a run uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kdrl.errors import UserError
from kdrl.objectives.estimators import token_loss
from kdrl.objectives.terms import DistillConfig, distribution_loss
from kdrl.problems import explain_validation

# What a run does before the per-token loss and single tokens cannot show: only what changes nothing is taken.
_WHOLE_RUN = {"mask": "all", "skip_eos": False}


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: Mapping[str, Any],
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Per-token loss `[..., T]` in nats that a run would reduce, differentiable in the student's logits `[..., T, V]`.

    `spec` is a recipe's `distill` mapping; its weight, reduce, on and teacher act on the loss that is given back, so
    they are checked and change nothing here; `tokens` `[..., T]` are the sampled
    tokens, which `{token: ...}` support needs; where `mask` `[..., T]` is false the loss is 0.
    Raises UserError for a spec that cannot teach, for shapes that differ, and for a mask or skip_eos in the spec.
    Logits are never padded: slice both to the tokenizer's size first.
    """
    if not isinstance(spec, Mapping):
        raise UserError(f"spec is a mapping such as {{'divergence': 'reverse_kl', 'support': 'full'}}, not {spec!r}")
    for key, harmless in _WHOLE_RUN.items():
        if spec.get(key, harmless) != harmless:
            raise UserError(
                f"kdrl.divergence sees single tokens and not a run, so it cannot apply {key}: {spec[key]!r}; "
                "give the tokens to keep as mask=."
            )
    try:
        config = DistillConfig.model_validate(dict(spec))
    except ValidationError as error:
        raise UserError("; ".join(explain_validation(error, DistillConfig, ""))) from None
    for name, given in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise UserError(f"{name} is a floating-point tensor [..., T, V], not {type(given).__name__}")
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ; "
            "slice padded vocabulary rows off both, so that they cover the same tokens"
        )
    for name, given in (("tokens", tokens), ("mask", mask)):
        if given is not None and given.shape != student_logits.shape[:-1]:
            raise UserError(
                f"{name} has shape {tuple(given.shape)}, and the logits' positions {tuple(student_logits.shape[:-1])}; "
                "they must be the same"
            )
    wide = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    logq = student_logits.to(wide).log_softmax(-1)
    logp = teacher_logits.detach().to(wide).log_softmax(-1)
    if config.support.kind != "token":
        loss = distribution_loss(config, logp, logq)
    else:
        if tokens is None:
            raise UserError("support {token: ...} needs tokens=, the sampled token ids [..., T]")
        if tokens.is_floating_point() or (
            tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < logq.shape[-1]
        ):
            raise UserError(f"tokens are integer ids from 0 to {logq.shape[-1] - 1}, the vocabulary of the logits")
        index = tokens.long().unsqueeze(-1)
        student, teacher = (logits.gather(-1, index).squeeze(-1) for logits in (logq, logp))
        loss = token_loss(config.support, student, teacher, config.clamp)
    return loss if mask is None else torch.where(mask.bool(), loss, 0.0)
