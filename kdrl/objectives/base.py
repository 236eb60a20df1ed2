"""What a term of an objective is: its settings, what it needs, the tokens it sees, and how a user adds one.

A term never averages: `reduce.token_weights` does that for all of them. Terms see flat tokens of whole responses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, PlainSerializer, PlainValidator, create_model, field_validator, model_serializer
from torch import Tensor

from kdrl.batch import Origin
from kdrl.config import Config
from kdrl.errors import UserError
from kdrl.objectives.masks import check_mask, reads_verdicts
from kdrl.objectives.reduce import Reduce
from kdrl.objectives.schedules import START, Moment, Schedule
from kdrl.objectives.scores import Score, ScoreField, Tokens
from kdrl.registry import Registry

ScheduleField = Annotated[
    Schedule, PlainValidator(lambda v: v if isinstance(v, Schedule) else Schedule(v)), PlainSerializer(lambda v: v.spec)
]


@dataclass(frozen=True)
class TokenView:
    """The trained response tokens of a micro-batch, N of them in whole responses, as a term sees them.

    `logq_N` (and `entropy_N` for a term that asks) carry gradient; everything else is data. `foreign_N` marks tokens
    that the present policy did not sample, `coupled_N` is what `Term.couple` gave.
    """

    logq_N: Tensor
    row_N: Tensor
    rows: int
    last_N: Tensor
    keep_N: Tensor
    reward_N: Tensor
    correct_N: Tensor
    advantage_N: Tensor | None = None
    old_N: Tensor | None = None
    teacher_N: Tensor | None = None
    reference_N: Tensor | None = None
    divergence_N: Tensor | None = None
    entropy_N: Tensor | None = None
    group_N: Tensor | None = None
    foreign_N: Tensor | None = None
    coupled_N: Tensor | None = None
    data: Mapping[str, Tensor] = field(default_factory=dict)
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    moment: Moment = START


@dataclass(frozen=True)
class Needs:
    """What a term must be given beside the student's own log-probs."""

    teacher: Literal["token", "distribution"] | None = None
    few: Literal["topk", "draws"] | None = None
    """What of the teacher would do in place of its distribution, `few_count` of them."""
    few_count: int = 0
    reference: Literal["token", "distribution"] | None = None
    entropy: bool = False
    rewards: bool = False
    features: bool = False
    vocabulary: bool = False
    """The teacher reads the response in tokens of its own."""
    projectors: bool = False
    """Something is trained beside the student between its space and the teacher's."""


class TermConfig(Config):
    """What every term has: a weight that may move, a mask, a reduction and the responses that it reads."""

    weight: ScheduleField = Field(default_factory=lambda: Schedule(1.0))
    """Coefficient of the term: a number or a schedule such as {linear: {from: 5.0e-3, to: 1.0e-3, steps: 80}}."""
    scale: ScoreField = Field(default_factory=lambda: Score(1.0))
    """Factor of each token's loss: a number or a score such as {early: {of: log_ratio}}; it enters no count."""
    mask: Any = "all"
    """Tokens the term applies to: a mask's name, a list that must all hold, {not: m}, {any: []}, {top_entropy: s}."""
    reduce: Reduce = Reduce()
    """How the per-token losses are averaged; counts are taken once over the global batch."""
    on: tuple[Origin, ...] = ("student",)
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if k not in self.unsaid}

    @property
    def unsaid(self) -> set[str]:
        """Settings that a written recipe leaves out, because they change nothing as they are."""
        return {"scale"} if self.scale.constant == 1.0 else set()

    @field_validator("mask")
    @classmethod
    def _mask(cls, spec: Any) -> Any:
        check_mask(spec)
        return spec


ConfigT = TypeVar("ConfigT", bound=TermConfig)


class Term(Generic[ConfigT]):
    """One entry of an objective; subclasses give `loss` and, where they need something, `needs`."""

    name: str
    family: Literal["rl", "kd", "other"] = "other"
    Config: type[TermConfig] = TermConfig
    couples = False
    """Whether a token's loss depends on other responses of the optimizer step, through `couple`."""
    idle_at_zero = False
    """Whether responses whose advantage is zero have neither loss nor gradient."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        """What the trainer must provide in the view."""
        return Needs()

    @property
    def asks_by_verdict(self) -> bool:
        """Whether rewards or verdicts decide which tokens the teacher and the reference are asked about."""
        return reads_verdicts(self.config.mask)

    @property
    def whole_rows(self) -> bool:
        """Whether a token's loss depends on every token of its response, kept by the mask or not."""
        return False

    @property
    def compared(self) -> bool:
        """Whether `compare` gives the per-token loss itself, with the term's scale, and the masses that it saw."""
        return self.needs.teacher == "distribution"

    def couple(self, view: TokenView) -> Tensor:
        """Data `[N]` or `[N, k]` for every micro-batch's `view.coupled_N`, from all rows of the step (no gradient)."""
        raise TypeError(f"{self.name} looks at each response alone")

    def count(self, view: TokenView) -> dict[str, float]:
        """What a coupling term reports of an optimizer step in the metrics, from the view that `couple` had."""
        return {}

    def keep(self, last_N: Tensor) -> Tensor | None:
        """Tokens that the term leaves out beside its mask, as a bool to keep `[N]`, or None."""
        return None

    @property
    def expressions(self) -> list[Score]:
        """Every score that the term evaluates."""
        return [self.config.scale]

    @property
    def block(self) -> int | None:
        """Tokens of one response that must be compared together, at most; None where each stands alone."""
        return None

    @property
    def draws(self) -> int:
        """Random numbers that the term wants for each token."""
        return 0

    def compare(self, tokens: Tokens, logq_CV: Tensor) -> Tensor:
        """Per-token loss and the mass of p and q that it saw, `[C, 3]`, inside the chunked head when `needs` asks."""
        raise TypeError(f"{self.name} compares no distributions")

    def loss(self, view: TokenView) -> Tensor:
        """Per-token loss `[N]` to minimise, differentiable in the student."""
        raise NotImplementedError(self.name)


TERMS: Registry[type[Term[Any]]] = Registry("objective term")


LossFunction = Callable[..., Tensor]


def _setting_fields(name: str, function: LossFunction) -> dict[str, Any]:
    """The keyword arguments of a term's function as configuration fields."""
    fields: dict[str, Any] = {}
    for p in list(inspect.signature(function).parameters.values())[1:]:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise UserError(f"the term {name!r} takes *{p.name}; name its settings one by one.")
        if p.name in TermConfig.model_fields:
            raise UserError(f"the term {name!r} has a setting {p.name!r}, which every term has; call it otherwise.")
        fields[p.name] = (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default)
    return fields


def _per_token(name: str, loss_N: Any, view: TokenView) -> Tensor:
    """The loss of a user's term; raises UserError unless it is one number per token, since a term never averages."""
    shape = tuple(loss_N.shape) if isinstance(loss_N, Tensor) else type(loss_N).__name__
    if shape != tuple(view.logq_N.shape):
        raise UserError(
            f"the term {name!r} must return one loss per token, {tuple(view.logq_N.shape)}, but gave {shape}; "
            "the recipe's `reduce` averages."
        )
    return loss_N


def register_term(name: str, *, teacher: bool = False, entropy: bool = False) -> Callable[[LossFunction], LossFunction]:
    """Register `fn(view: TokenView, **settings) -> loss [N]` as a term of one's own.

    Its keyword arguments become recipe keys beside weight, mask, reduce and on, checked by their annotations;
    `teacher` and `entropy` ask for `view.teacher_N` (log-probs of the sampled tokens) and `view.entropy_N` (with
    gradient).
    """

    def register(function: LossFunction) -> LossFunction:
        fields = _setting_fields(name, function)
        config = create_model(
            f"{name}_config", __base__=TermConfig, __doc__=function.__doc__, __module__=function.__module__, **fields
        )

        class Registered(Term[TermConfig]):
            family, Config = ("kd" if teacher else "other"), config

            @property
            def needs(self) -> Needs:
                return Needs(teacher="token" if teacher else None, entropy=entropy)

            def loss(self, view: TokenView) -> Tensor:
                loss_N = function(view, **{key: getattr(self.config, key) for key in fields})
                return _per_token(name, loss_N, view)

        Registered.name = name
        Registered.__doc__ = function.__doc__
        TERMS.add(name, of=function)(Registered)
        return function

    return register
