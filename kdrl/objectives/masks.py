"""Which responses and tokens a term applies to; each mask is a function of the whole step's rollouts.

A recipe writes a name, `{not: mask}`, `{any: [masks]}`, `{top_entropy: share}`, or a list that must all hold.
A registered mask with settings is written `{name: value}` or `{name: {setting: value}}`; `{score: EXPRESSION}` keeps
tokens whose score (see `scores`) exceeds one half, as `{score: {above: {of: position, value: 0.3}}}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kdrl.errors import UserError, nearest
from kdrl.objectives.schedules import START, Moment, schedules_in
from kdrl.objectives.scores import Score, Tokens, column, measure
from kdrl.registry import Registry


@dataclass(frozen=True)
class MaskContext:
    """What a mask may look at: outcomes per response `[B]`, and tokens `[N]` with their response `row_N`."""

    correct_B: Tensor
    reward_B: Tensor
    group_B: Tensor
    truncated_B: Tensor
    row_N: Tensor
    last_N: Tensor
    entropy_N: Tensor | None
    logq_N: Tensor | None = None
    data: Mapping[str, Tensor] = field(default_factory=dict)
    moment: Moment = START

    @property
    def rows(self) -> int:
        """Number of responses B."""
        return len(self.correct_B)


# fn(context) -> bool tensor: [B] for a mask per response, [N] for a mask per token.
MaskFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Mask:
    """A registered mask, whether it judges responses or tokens, and whether it reads token entropies and verdicts."""

    function: MaskFunction
    per: Literal["response", "token"]
    entropy: bool = False
    verdicts: bool = True


MASKS: Registry[Mask] = Registry("mask")


def register_mask(
    name: str, per: Literal["response", "token"] = "response", entropy: bool = False, verdicts: bool = True
) -> Callable[[MaskFunction], MaskFunction]:
    """Register `fn(context: MaskContext, **settings) -> bool tensor`, `[B]` or with `per="token"` `[N]`, for recipes.

    `entropy` asks for `context.entropy_N`, the rollout policy's entropies in nats. `verdicts=False` says that the mask
    reads no reward and no verdict, so that a teacher can be asked before they are known.
    """

    def register(function: MaskFunction) -> MaskFunction:
        if name in ("not", "any"):
            raise UserError(f"{name!r} combines masks and cannot name one; choose another name.")
        MASKS.add(name, of=function)(Mask(function, per, entropy, verdicts))
        return function

    return register


@register_mask("all", verdicts=False)
def everything(context: MaskContext) -> Tensor:
    """Every response."""
    return torch.ones_like(context.truncated_B)


@register_mask("wrong_response")
def wrong_response(context: MaskContext) -> Tensor:
    """Responses that the verifier rejects (KDRL's response-level mask, 2506.02208)."""
    return ~context.correct_B


@register_mask("right_response")
def right_response(context: MaskContext) -> Tensor:
    """Responses that the verifier accepts."""
    return context.correct_B


@register_mask("wrong_group")
def wrong_group(context: MaskContext) -> Tensor:
    """Responses of groups with no right answer (KDRL's group-level mask, 2506.02208)."""
    return ~torch.isin(context.group_B, context.group_B[context.correct_B])


@register_mask("truncated", verdicts=False)
def truncated(context: MaskContext) -> Tensor:
    """Responses cut off at the length limit; `{not: truncated}` is DAPO's over-length filter (2503.14476)."""
    return context.truncated_B


@register_mask("top_entropy", per="token", entropy=True, verdicts=False)
def top_entropy(context: MaskContext, share: float) -> Tensor:
    """The `share` of the step's tokens where the rollout policy is least certain, ties included (2506.01939)."""
    if context.entropy_N is None:
        raise ValueError("top_entropy needs token entropies, which this batch does not carry")
    count = round(share * len(context.entropy_N))
    if count == 0:
        return torch.zeros_like(context.row_N, dtype=torch.bool)
    # Ties with the last one are all kept: first tokens of a group are alike, and the order of rows must not choose.
    return context.entropy_N >= context.entropy_N.topk(count).values[-1]


@register_mask("score", per="token", verdicts=False)
def by_score(context: MaskContext, expression: Any) -> Tensor:
    """Tokens whose score exceeds one half; it may read data and the rollout policy, not the teacher."""
    score = expression if isinstance(expression, Score) else Score(expression)
    nothing_N = torch.zeros(len(context.row_N), device=context.row_N.device)
    logq_N = nothing_N if context.logq_N is None else context.logq_N
    tokens = Tokens(context.data, logq_N, entropy_C=context.entropy_N, moment=context.moment)

    def evaluate(inner: Score, known: Mapping[str, Tensor]) -> Tensor:
        return column(inner(replace(tokens, measured=known)), logq_N).expand(len(logq_N))

    measured = measure(score, evaluate, context.row_N, context.moment)
    return column(score(replace(tokens, measured=measured)), logq_N).expand(len(logq_N)) > 0.5


def _check_score(expression: Any) -> None:
    score = Score(expression)
    reads = score.reads
    if any(schedule.adaptive is not None for _, schedule in schedules_in(score)):
        raise ValueError(
            f"mask score {expression!r} has a scalar with a memory, which a mask does not keep; put it into the term's "
            "`scale`"
        )
    if foreign := sorted(reads - {"data", "student", "batch"}):
        raise ValueError(
            f"mask score {expression!r} looks at {foreign[0]}, but masks are chosen before the teacher is asked; "
            "put it into the term's `scale`"
        )


def check_mask(spec: Any) -> None:
    """Raise ValueError with the nearest right name when `spec` is no mask."""
    if isinstance(spec, str):
        if spec not in MASKS:
            raise ValueError(f"no mask is called {spec!r}{nearest(spec, MASKS)}")
        if spec == "top_entropy":
            raise ValueError("top_entropy needs a share: write {top_entropy: 0.2}")
        _bind(spec, ())
    elif isinstance(spec, list) and spec:
        for part in spec:
            check_mask(part)
    elif isinstance(spec, dict) and len(spec) == 1:
        key, value = next(iter(spec.items()))
        if key == "not" or (key == "any" and isinstance(value, list) and value):
            check_mask(value)
        elif key == "top_entropy":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"top_entropy takes a share of tokens between 0 and 1, not {value!r}")
        elif key == "score":
            _check_score(value)
        elif key in MASKS and _settings(key):
            _bind(key, value)
        elif key not in MASKS and key != "any" and (hint := nearest(str(key), MASKS)):
            raise ValueError(f"{key!r} is no mask{hint}")
        else:
            raise ValueError(f"{key!r} with {value!r} is no mask; write {{not: mask}}, {{any: [masks]}} or a name")
    else:
        raise ValueError(f"{spec!r} is no mask; write a name, a list, {{not: mask}}, {{any: [...]}}")


def mask_names(spec: Any) -> set[str]:
    """Every mask name that `spec` mentions."""
    if isinstance(spec, str):
        return {spec}
    if isinstance(spec, list):
        return set().union(*(mask_names(part) for part in spec))
    key, value = next(iter(spec.items()))
    return mask_names(value) if key in ("not", "any") else {key}


def reads_entropy(spec: Any) -> bool:
    """Whether a mask in `spec` looks at token entropies."""
    named = any(MASKS.get(name).entropy for name in mask_names(spec))
    return named or any("student" in score.reads for score in mask_scores(spec))


def reads_verdicts(spec: Any) -> bool:
    """Whether a mask in `spec` looks at rewards or verdicts, or does not say that it looks at none."""
    named = any(MASKS.get(name).verdicts for name in mask_names(spec))
    return named or any(score.reads_verdicts for score in mask_scores(spec))


def mask_scores(spec: Any) -> list[Score]:
    """Every score expression in `spec`."""
    if isinstance(spec, str):
        return []
    if isinstance(spec, list):
        return [score for part in spec for score in mask_scores(part)]
    key, value = next(iter(spec.items()))
    return [Score(value)] if key == "score" else mask_scores(value) if key in ("not", "any") else []


def _settings(name: str) -> dict[str, inspect.Parameter]:
    """The settings of a mask: its parameters after the context."""
    return dict(list(inspect.signature(MASKS.get(name).function).parameters.items())[1:])


def _bind(name: str, value: Any) -> dict[str, Any]:
    """Settings of `{name: value}` as keyword arguments (`()`: none); raises ValueError for unknown or missing ones."""
    known = _settings(name)
    if name == "score":
        return {"expression": value}
    given = value if isinstance(value, dict) else {} if value == () else {next(iter(known), "value"): value}
    for key in given:
        if key not in known:
            raise ValueError(f"mask {name} has no setting {key!r}{nearest(str(key), known)}")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in given]
    if missing:
        raise ValueError(f"mask {name} needs {', '.join(missing)}: write {{{name}: {{{missing[0]}: ...}}}}")
    return given


def _apply(name: str, context: MaskContext, value: Any = ()) -> Tensor:
    mask = MASKS.get(name)
    found = mask.function(context, **_bind(name, value))
    size = context.rows if mask.per == "response" else len(context.row_N)
    if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != (size,):
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"the mask {name!r} must return one bool per {mask.per}, a tensor ({size},), but gave {what}.")
    return found[context.row_N] if mask.per == "response" else found


def evaluate_mask(spec: Any, context: MaskContext) -> Tensor:
    """The mask as bool tokens `[N]`."""
    if isinstance(spec, str):
        return _apply(spec, context)
    if isinstance(spec, list):
        return torch.stack([evaluate_mask(part, context) for part in spec]).all(0)
    key, value = next(iter(spec.items()))
    if key == "not":
        return ~evaluate_mask(value, context)
    if key == "any":
        return torch.stack([evaluate_mask(part, context) for part in value]).any(0)
    return _apply(key, context, value)
