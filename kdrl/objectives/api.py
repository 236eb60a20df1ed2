"""`kdrl.divergence`: a distillation loss on plain logits, the same arithmetic that a run uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kdrl.errors import UserError
from kdrl.objectives.distill import Distill, DistillConfig
from kdrl.objectives.estimators import token_loss
from kdrl.objectives.scores import Score, Tokens, column, measure
from kdrl.objectives.target import sampled_target
from kdrl.problems import explain_validation

# What a run does before the per-token loss and single tokens cannot show: only what changes nothing is taken.
_WHOLE_RUN = {"mask": "all", "skip_eos": False}


@dataclass(frozen=True)
class _Inputs:
    """Checked logits as log-probs `[N, V]`, tokens `[N]`, and the shape `[..., T]` they came in."""

    logq_NV: Tensor
    logp_NV: Tensor
    token_N: Tensor | None
    reference_NV: Tensor | None
    shape: torch.Size


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spec: Mapping[str, Any],
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    reference_logits: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Per-token loss `[..., T]` in nats that a run would reduce, differentiable in the student's logits `[..., T, V]`.

    `spec` is a recipe's `distill` mapping; its weight, reduce, on and teacher act on the loss that is given back, so
    they are checked and change nothing here. `tokens` `[..., T]` are the responses' tokens, which token support, label
    targets and some scores need, `reference_logits` the initial student's, which a product needs; where `mask` is false
    the loss is 0; `seed` is for support {draws: n}. Schedules stand at their first step.
    Raises UserError for a spec that cannot teach, for shapes that differ, and for a mask or skip_eos in the spec.
    Logits are never padded: slice both to the tokenizer's size first.
    """
    config = _config(spec)
    inputs = _checked(student_logits, teacher_logits, tokens, mask, reference_logits)
    _check_needs(config, inputs)
    if config.support.kind == "token":
        loss = _sampled(config, inputs)
    else:
        loss = _over_vocabulary(config, inputs, seed)
    loss = loss.reshape(inputs.shape)
    return loss if mask is None else torch.where(mask.bool(), loss, 0.0)


def _config(spec: Mapping[str, Any]) -> DistillConfig:
    if not isinstance(spec, Mapping):
        raise UserError(f"spec is a mapping such as {{'divergence': 'reverse_kl', 'support': 'full'}}, not {spec!r}")
    for key, harmless in _WHOLE_RUN.items():
        if spec.get(key, harmless) != harmless:
            raise UserError(
                f"kdrl.divergence sees single tokens and not a run, so it cannot apply {key}: {spec[key]!r}; "
                "give the tokens to keep as mask=."
            )
    try:
        return DistillConfig.model_validate(dict(spec))
    except ValidationError as error:
        raise UserError("; ".join(explain_validation(error, DistillConfig, ""))) from None


def _checked(
    student: Tensor, teacher: Tensor, tokens: Tensor | None, mask: Tensor | None, reference: Tensor | None
) -> _Inputs:
    given = {"student_logits": student, "teacher_logits": teacher}
    given |= {} if reference is None else {"reference_logits": reference}
    for name, logits in given.items():
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise UserError(f"{name} is a floating-point tensor [..., T, V], not {type(logits).__name__}")
        if logits.shape != student.shape:
            raise UserError(
                f"student logits {tuple(student.shape)} and {name.replace('_', ' ')} {tuple(logits.shape)} differ; "
                "slice padded vocabulary rows off both, so that they cover the same tokens"
            )
    for name, values in (("tokens", tokens), ("mask", mask)):
        if values is not None and values.shape != student.shape[:-1]:
            raise UserError(
                f"{name} has shape {tuple(values.shape)}, and the logits' positions {tuple(student.shape[:-1])}; "
                "they must be the same"
            )
    size = student.shape[-1]
    if tokens is not None and (
        tokens.is_floating_point() or (tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size)
    ):
        raise UserError(f"tokens are integer ids from 0 to {size - 1}, the vocabulary of the logits")
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    flat = [None if x is None else x.to(wide).log_softmax(-1).reshape(-1, size) for x in (student, teacher, reference)]
    assert flat[0] is not None
    assert flat[1] is not None
    token_N = None if tokens is None else tokens.reshape(-1).long()
    reference_NV = None if flat[2] is None else flat[2].detach()
    return _Inputs(flat[0], flat[1].detach(), token_N, reference_NV, student.shape[:-1])


def _check_needs(config: DistillConfig, inputs: _Inputs) -> None:
    target = config.target
    reads = set().union(*(score.reads for score in config.expressions))
    labelled = target.label_mix is not None or target.label_boost is not None or target.decouple is not None
    if inputs.token_N is None and config.support.kind == "token":
        raise UserError("support {token: ...} needs tokens=, the sampled token ids [..., T]")
    if inputs.token_N is None and (labelled or config.divergence.kind == "rank" or reads & {"student", "teacher"}):
        raise UserError("this spec reads the responses' tokens: give their ids [..., T] as tokens=")
    if inputs.reference_NV is None and target.product is not None:
        raise UserError("target.product needs reference_logits=, the initial student's")


def _view(inputs: _Inputs, seed: int, draws: int) -> Tokens:
    count, length = len(inputs.logq_NV), inputs.shape[-1] if inputs.shape else 1
    token_N = inputs.token_N
    at_N1 = torch.zeros(count, 1, dtype=torch.long) if token_N is None else token_N[:, None]
    at_N1 = at_N1.to(inputs.logq_NV.device)
    logq_N, logp_N = (x.detach().gather(-1, at_N1).squeeze(-1) for x in (inputs.logq_NV, inputs.logp_NV))
    index_N = torch.arange(count, device=logq_N.device)
    uniform_NK = torch.rand(count, draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Tokens(
        data={"index": index_N % max(1, length), "length": torch.full_like(index_N, length)},
        logq_C=logq_N,
        logp_C=logp_N,
        token_C=token_N,
        logp_CV=inputs.logp_NV,
        logq_CV=inputs.logq_NV.detach(),
        reference_CV=inputs.reference_NV,
        uniform_CK=uniform_NK.to(logq_N.device),
    )


def _measured(config: DistillConfig, tokens: Tokens, length: int) -> Tokens:
    """The tokens with every whole-step score, taken over all tokens given."""
    row_N = torch.arange(len(tokens.logq_C), device=tokens.logq_C.device) // max(1, length)
    found: dict[str, Tensor] = {}

    def evaluate(inner: Score, known: Mapping[str, Tensor]) -> Tensor:
        return column(inner(replace(tokens, measured={**found, **known})), tokens.logq_C).expand(len(row_N))

    try:
        for score in config.expressions:
            found |= measure(score, evaluate, row_N, tokens.moment)
            if "entries" not in score.reads:
                score(replace(tokens, measured=found))
    except KeyError as missing:
        raise UserError(f"a score reads {missing}, which plain logits do not have; it needs a run") from None
    return replace(tokens, measured=found)


def _over_vocabulary(config: DistillConfig, inputs: _Inputs, seed: int) -> Tensor:
    tokens = _measured(config, _view(inputs, seed, config.support.n or 0), inputs.shape[-1] if inputs.shape else 1)
    return Distill(config).compare(tokens, inputs.logq_NV)[:, 0]


def _sampled(config: DistillConfig, inputs: _Inputs) -> Tensor:
    tokens = _measured(config, _view(inputs, 0, 0), inputs.shape[-1] if inputs.shape else 1)
    assert inputs.token_N is not None
    logq_N = inputs.logq_NV.gather(-1, inputs.token_N[:, None]).squeeze(-1)
    assert tokens.logp_C is not None
    reference_NV, at_N1 = inputs.reference_NV, inputs.token_N[:, None]
    reference_N = None if reference_NV is None else reference_NV.gather(-1, at_N1).squeeze(-1)
    target_N = sampled_target(config.target, tokens.logp_C, reference_N, tokens.moment)
    return column(config.scale(tokens), logq_N) * token_loss(config.support, logq_N, target_N, config.clamp)
