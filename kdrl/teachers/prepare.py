"""Teachers that are adapted to the student between its steps: what a preparation is, and how one's own is added.

The teacher's weights stay frozen; what is learned stands around them (vectors before the prompt, a residual after the
last layer) and is fitted on each step's rollouts before the student's update. Imports no transformers: a recipe is read
without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import Field, ValidationError
from torch import Tensor
from torch.nn import Parameter

from kdrl.config import Config
from kdrl.errors import nearest
from kdrl.objectives.base import ScheduleField
from kdrl.objectives.schedules import Moment, Schedule
from kdrl.problems import explain_validation
from kdrl.registry import Registry

if TYPE_CHECKING:
    from kdrl.models import LoadedModel


class PreparationConfig(Config):
    """What every preparation has: the rate of its AdamW and a bound on its gradient."""

    lr: ScheduleField = Field(default_factory=lambda: Schedule(5.0e-5))
    """Learning rate of what is learned around the teacher: a number or a schedule."""
    clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of its gradient; null for no clipping."""


@dataclass(frozen=True)
class Views:
    """Log-probs `[C, V]` of some response tokens: `adapted` with gradient, the bare teacher's and the student's.

    The bare teacher's are empty where a preparation says that it does not read them.
    """

    adapted_CV: Tensor
    teacher_CV: Tensor
    student_CV: Tensor
    moment: Moment


ConfigT = TypeVar("ConfigT", bound=Config)


class Preparation(Generic[ConfigT]):
    """Something learned around a frozen teacher; subclasses give `parameters`, `hidden` and `loss`."""

    Config: ClassVar[type[Config]] = PreparationConfig
    through_teacher: ClassVar[bool] = True
    """Whether the gradient passes through the teacher's layers, which then keep their activations (memory plan)."""
    reads_bare: ClassVar[bool] = True
    """Whether `loss` reads the bare teacher's log-probs, which cost a pass of the teacher."""

    def __init__(self, config: ConfigT, teacher: LoadedModel, seed: int) -> None:
        self.config, self.teacher, self.seed = config, teacher, seed

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether anything is learned with these settings."""
        return True

    @property
    def fit(self) -> PreparationConfig | None:
        """Rate and bound of the optimizer; None where nothing is learned."""
        return self.config if isinstance(self.config, PreparationConfig) else None

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """What is learned, by name; the names go into checkpoints."""
        raise NotImplementedError

    @property
    def more_tokens(self) -> int:
        """Positions of the teacher's context that are taken beside prompt and response."""
        return 0

    def begin(self, moment: Moment) -> None:
        """Called before anything else of a step."""

    @property
    def surveys(self) -> bool:
        """Whether `survey` is to see a pass over all asked tokens of the step before the loss is taken."""
        return False

    def survey(self, place_M: Tensor) -> None:
        """Look at the pass that `hidden` has just made without gradient; `place_M` are its asked places of `B * L`."""

    def aside(self, place_M: Tensor) -> Tensor | None:
        """A loss beside `loss`, summed over the asked places of the pass that `hidden` has just made."""
        return None

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Hidden states `[B, L, D]` of the adapted teacher before its head, differentiable in `parameters`."""
        raise NotImplementedError

    def loss(self, views: Views) -> Tensor:
        """Per-token loss `[C]` to minimise, averaged over the tokens that some term asks the teacher for."""
        raise NotImplementedError


PREPARATIONS: Registry[type[Preparation[Any]]] = Registry("preparation")
register_preparation = PREPARATIONS.add


@dataclass(frozen=True)
class Prepare:
    """A preparation with its settings, as a recipe writes it: `{name: {settings}}`."""

    name: str
    config: Config

    def parts(self) -> dict[str, Config]:
        """The settings by name."""
        return {self.name: self.config}

    def build(self, teacher: LoadedModel, seed: int) -> Preparation[Any]:
        """The preparation for a teacher."""
        return PREPARATIONS.get(self.name)(self.config, teacher, seed)


def read_prepare(raw: Any) -> Prepare:
    """A preparation from its recipe form; raises ValueError saying what is wrong."""
    if isinstance(raw, Prepare):
        return raw
    if isinstance(raw, str):
        raw = {raw: {}}
    if not (isinstance(raw, dict) and len(raw) == 1):
        raise ValueError(
            f"prepare is one preparation with its settings, as {{soft_prompt: {{tokens: 7}}}}, not {raw!r}"
        )
    name, settings = next(iter(raw.items()))
    if name not in PREPARATIONS:
        raise ValueError(f"no preparation is called {name!r}{nearest(str(name), PREPARATIONS)}")
    kind = PREPARATIONS.get(name).Config
    try:
        return Prepare(name, kind.model_validate(settings or {}))
    except ValidationError as error:
        raise ValueError("; ".join(explain_validation(error, kind, f"{name}."))) from None


def write_prepare(prepare: Prepare) -> dict[str, Any]:
    """The recipe form of a preparation."""
    return {prepare.name: prepare.config.model_dump(mode="json")}
