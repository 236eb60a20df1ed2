"""Teachers of many experts (arXiv 2502.12947): all of them, drawn ones (KA), or a router fitted to the student (SAR).

The router of every layer is taken to give a softmax over its experts, of which it keeps the largest, normalised again
or not; that is checked. Left out: routers with biases or groups of experts, and the weights of the experts, which stay
as they are. What the teacher writes, it writes as it was loaded. The second pass of KA is left out: a step reads one
draw, whose loss is in expectation that of the mean over passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import Module, Parameter

from kdrl.config import Config
from kdrl.errors import UserError
from kdrl.objectives.base import ScheduleField
from kdrl.objectives.logspace import relative_entropy
from kdrl.objectives.schedules import Moment, Schedule
from kdrl.seeds import derive
from kdrl.teachers.prepare import PREPARATIONS, Preparation, PreparationConfig, Views

if TYPE_CHECKING:
    from kdrl.models import LoadedModel


class RouterConfig(PreparationConfig):
    """SAR: copies of the routers' weights are fitted to the student before each of its updates."""

    balance: ScheduleField = Field(default_factory=lambda: Schedule(0.01))
    """Coefficient of the load balance beside KL(p || q) (SAR: 0.01)."""


class SampleConfig(Config):
    """KA: now and then a layer's experts are drawn by their router's probabilities."""

    share: ScheduleField = Field(default_factory=lambda: Schedule(0.05))
    """Probability that a layer draws its experts in a step, in place of taking the likeliest (KA: 0.05)."""


class ExpertsConfig(Config):
    """Which experts of a mixture-of-experts teacher answer when it scores."""

    use: int | Literal["all"] = "all"
    """Experts per token and layer: a number, a negative one for all but as many (-1: all but one), or `all`."""
    router: RouterConfig | None = None
    """Fit the routers to the student (SAR); null leaves them as they are."""
    sample: SampleConfig | None = None
    """Draw experts (KA); null always takes the likeliest."""

    @model_validator(mode="after")
    def _sound(self) -> ExpertsConfig:
        if self.use == 0:
            raise ValueError("`use` is a number of experts, one below zero for all but as many, or `all`; not 0")
        if self.sample is not None and self.use == "all":
            raise ValueError("`sample` draws experts, and `use: all` leaves none out; set use, as in use: -1")
        if self.sample is not None and self.router is not None:
            raise ValueError("`sample` and `router` are two ways to reach all experts; remove one")
        return self


@PREPARATIONS.add("experts")
class Experts(Preparation[ExpertsConfig]):
    """Experts by another number than the teacher's; `router` fits by KL(p' || q) + balance mean_l E sum_i f_i P_i.

    P_i is a layer's mean probability of expert i on the tokens that are asked for, f_i the share of those tokens whose
    own number of likeliest experts (the model's top k) holds i; with f of all experts the sum would be constant.
    """

    Config = ExpertsConfig
    reads_bare = False

    def __init__(self, config: ExpertsConfig, teacher: LoadedModel, seed: int) -> None:
        """Raises UserError for a teacher without experts, with too few of them, or with routers of another kind."""
        from kdrl.models.heads import causal_lm

        super().__init__(config, teacher, seed)
        self._routers: dict[str, Any] = _routers_of(causal_lm(teacher.model))
        self._counts = {name: _count(config, len(router.weight)) for name, router in self._routers.items()}
        self._normalised = {name: _normalises(name, router) for name, router in self._routers.items()}
        self._copies = {} if config.router is None else {n: _copy(r) for n, r in self._routers.items()}
        self._logits: dict[str, Tensor] = {}
        self._loads: dict[str, Tensor] = {}
        self._noise: dict[str, Tensor] = {}
        self._balance, self._surveyed = 0.0, 0

    @classmethod
    def fits(cls, config: ExpertsConfig) -> bool:
        """Only routers are fitted."""
        return config.router is not None

    @property
    def fit(self) -> PreparationConfig | None:
        """Rate and bound of the routers' optimizer."""
        return self.config.router

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The routers' copied weights `[E, D]` by the names of their modules."""
        return self._copies

    def begin(self, moment: Moment) -> None:
        """Draw what layers draw in this step: Gumbel noise `[E]` that all its tokens share, from (seed, step)."""
        self._loads, self._surveyed = {}, 0
        self._balance = 0.0 if self.config.router is None else self.config.router.balance.at(moment)
        self._noise = {}
        if self.config.sample is None:
            return
        generator = torch.Generator().manual_seed(derive(self.seed, "experts", moment.step))
        share = self.config.sample.share.at(moment)
        for name, router in self._routers.items():
            drawn = torch.rand((), generator=generator) < share
            noise_E = -torch.empty(len(router.weight)).exponential_(generator=generator).log()
            if drawn:
                self._noise[name] = noise_E.to(router.weight.device)

    @property
    def surveys(self) -> bool:
        """The load of the experts over the whole step stands in the gradient of every token."""
        return self._balance != 0.0

    def survey(self, place_M: Tensor) -> None:
        """Count the experts that the asked tokens of the last pass would have taken by the model's own number."""
        for name, router in self._routers.items():
            chosen = self._logits[name][place_M].topk(router.top_k, -1).indices.flatten()
            load_E = torch.bincount(chosen, minlength=len(router.weight))
            self._loads[name] = self._loads.get(name, 0) + load_E
        self._surveyed += len(place_M)

    def aside(self, place_M: Tensor) -> Tensor:
        """The load balance, summed over the asked tokens of the last pass."""
        total = torch.zeros((), device=place_M.device)
        if not self.surveys:
            return total
        for name, load_E in self._loads.items():
            logits_ME = self._logits.pop(name)[place_M]
            p_ME = logits_ME.softmax(-1, dtype=torch.promote_types(logits_ME.dtype, torch.float32))
            total = total + len(load_E) * (p_ME @ (load_E / self._surveyed).to(p_ME.dtype)).sum()
        return self._balance * total / len(self._loads)

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Hidden states through the experts asked for and the fitted routers; the model is as before afterwards."""
        from kdrl.models.heads import hidden_states

        with self._routed():
            return hidden_states(self.teacher, input_ids_BL, attention_mask_BL)

    def loss(self, views: Views) -> Tensor:
        """KL(p' || q)."""
        return relative_entropy(views.adapted_CV, views.student_CV)

    @contextmanager
    def _routed(self) -> Iterator[None]:
        """While inside, the teacher's routers have the fitted weights, take the experts asked for, and are watched."""
        with ExitStack() as stack:
            for name, router in self._routers.items():
                stack.callback(setattr, router, "top_k", router.top_k)
                router.top_k = self._counts[name]
                if name in self._copies:
                    own = router._parameters["weight"]
                    stack.callback(router._parameters.__setitem__, "weight", own)
                    router._parameters["weight"] = self._copies[name].to(own.dtype)
                stack.callback(router.register_forward_hook(self._watch(name)).remove)
            yield

    def _watch(self, name: str) -> Any:
        def hook(
            router: Module, args: Any, told: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, Tensor, Tensor] | None:
            if self.surveys:
                self._logits[name] = told[0]
            return self._draw(name, told) if name in self._noise else None

        return hook

    def _draw(self, name: str, told: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What a router tells, its experts drawn without replacement: the largest of log p + Gumbel noise."""
        logits, scores, _ = told
        logp = logits.log_softmax(-1, dtype=torch.float32)
        chosen = (logp + self._noise[name]).topk(self._counts[name], -1).indices
        p = logp.exp().gather(-1, chosen)
        if self._normalised[name]:
            p = p / p.sum(-1, keepdim=True)
        return logits, p.to(scores.dtype), chosen


def _routers_of(lm: Any) -> dict[str, Any]:
    """The routers of a model by name; raises UserError where there are none, or none of the kind that is known."""

    def known(module: Any) -> bool:
        weight, count = getattr(module, "weight", None), getattr(module, "num_experts", None)
        if not isinstance(getattr(module, "top_k", None), int) or not isinstance(weight, Tensor) or weight.ndim != 2:
            return False
        return len(weight) == count and not list(module.children()) and len(module.state_dict()) == 1

    found = {name: module for name, module in lm.named_modules() if known(module)}
    if found:
        return found
    config = lm.config.get_text_config()
    if any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise UserError(f"teacher.prepare.experts: {_UNKNOWN.format(type(lm).__name__)}")
    raise UserError(
        f"teacher.prepare.experts: {type(lm).__name__} has no experts to choose from; take a mixture-of-experts "
        "teacher, such as Mixtral or Qwen3-MoE, or leave teacher.prepare out."
    )


_UNKNOWN = (
    "{} does not choose its experts by the largest of a softmax of one weight matrix, and kdrl knows no other way; "
    "leave teacher.prepare out."
)


def _count(config: ExpertsConfig, experts: int) -> int:
    count = experts if config.use == "all" else config.use if config.use > 0 else experts + config.use
    if not 1 <= count <= experts:
        raise UserError(
            f"teacher.prepare.experts.use={config.use}: the teacher has {experts} experts in a layer; take 1 to "
            f"{experts}, a number below zero for all but as many, or all."
        )
    if config.sample is not None and count == experts:
        raise UserError(
            f"teacher.prepare.experts.sample draws from {experts} experts, and use={config.use} takes all of them; "
            "lower use, or leave sample out."
        )
    return count


@torch.no_grad()
def _normalises(name: str, router: Any) -> bool:
    """Whether a router's kept probabilities are made to sum to one; raises UserError when it is of another kind."""
    generator = torch.Generator().manual_seed(0)
    weight = router.weight
    inputs = torch.randn(5, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    told = router(inputs)
    if isinstance(told, tuple) and len(told) == 3 and told[0].shape == (5, len(weight)):
        logits, scores, chosen = told
        p, want = logits.softmax(-1, dtype=torch.float32).topk(router.top_k, -1)
        slack = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
        for normalised in (True, False):
            kept = p / p.sum(-1, keepdim=True) if normalised else p
            same = scores.shape == kept.shape and torch.allclose(scores.float(), kept, rtol=slack, atol=slack)
            if same and torch.equal(chosen, want):
                return normalised
    raise UserError(f"teacher.prepare.experts: {_UNKNOWN.format(f'{name} ({type(router).__name__})')}")


def _copy(router: Any) -> Parameter:
    weight = router.weight.detach()
    return Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True))
