"""Scalars that follow what a run measures: their state is plain numbers, saved with every checkpoint.

Each reads one number of the step's metrics (a name of metrics.jsonl) and sets its value for the next step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from kdrl.config import Config
from kdrl.registry import Registry

State = dict[str, Any]  # numbers, and None for what was not yet seen


class Adaptive(Config):
    """Settings of a scalar with a memory; subclasses say how its state starts, is read and moves."""

    metric: str
    """Number of metrics.jsonl that it follows; a step without it changes nothing."""

    def begin(self) -> State:
        """The state before the first step."""
        raise NotImplementedError

    def value(self, state: State, step: int, total: int) -> float:
        """The scalar at a step (from 0)."""
        return state["value"]

    def update(self, state: State, found: float, step: int, total: int) -> State:
        """The state after a step at which the metric was `found`."""
        raise NotImplementedError


ADAPTIVE: Registry[type[Adaptive]] = Registry("adaptive schedule")


@ADAPTIVE.add("taid")
class Taid(Adaptive):
    """From `start` to `end` at least linearly, faster while the loss falls (TAID's t, 2501.16937)."""

    metric: str = "divergence/distill"
    """The loss whose relative fall sets the pace; TAID reads it without the target's entropy, this with it."""
    start: float = 0.4
    """Value at the first step."""
    end: float = 1.0
    """Value at the last step."""
    alpha: float = Field(default=5.0e-4, ge=0.0)
    """Largest extra move of a step, before the factor 1 - value."""
    decay: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Memory of the running mean of relative falls."""

    def begin(self) -> State:
        """At `start`, with no loss seen."""
        return {"value": self.start, "momentum": 0.0, "previous": None}

    def update(self, state: State, found: float, step: int, total: int) -> State:
        """delta = (L_prev - L)/L_prev; mu its running mean; t = min(end, max(line, t + alpha sigmoid(mu)(1-t)))."""
        line = self.start + (self.end - self.start) * min(1.0, (step + 1) / max(1, total - 1))
        previous, momentum, extra = state["previous"], state["momentum"], 0.0
        if previous:
            momentum = self.decay * momentum + (1.0 - self.decay) * (previous - found) / previous
            extra = self.alpha * (1.0 - state["value"]) / (1.0 + math.exp(-max(-60.0, min(60.0, momentum))))
        return {"value": min(self.end, max(line, state["value"] + extra)), "momentum": momentum, "previous": found}


@ADAPTIVE.add("on_rise")
class OnRise(Adaptive):
    """Up by `by` whenever the metric is `margin` above the stored one (DistiLLM's replay share, 2402.03898)."""

    metric: str = "eval/loss"
    """What must not rise; `eval/loss` is the likelihood loss of the development solutions."""
    start: float = 0.0
    """Value at the first step."""
    by: float = 0.1
    """Each rise adds this."""
    margin: float = Field(default=0.1, ge=0.0)
    """How far above the stored value counts as a rise."""
    cap: float = 1.0
    """Largest value."""

    def begin(self) -> State:
        """At `start`; the first measurement is only stored."""
        return {"value": self.start, "stored": None}

    def update(self, state: State, found: float, step: int, total: int) -> State:
        """The stored value moves only on a rise, as in the original."""
        if state["stored"] is None:
            return {**state, "stored": found}
        if found >= state["stored"] + self.margin:
            return {"value": min(self.cap, state["value"] + self.by), "stored": found}
        return state


@ADAPTIVE.add("calibrated")
class Calibrated(Adaptive):
    """Mean of a token score over the first batches, measured before the first update (CAKLD's gamma, 2402.10631)."""

    metric: str = "calibration"
    """Set by the run itself; leave it."""
    of: Any = "max_p"
    """The token score, see the registry of scores."""
    batches: int = Field(default=10, ge=1)
    """Batches of responses that are written and scored for it; they are not trained on."""
    complement: bool = False
    """Take 1 - mean instead."""

    def begin(self) -> State:
        """Not measured."""
        return {"value": None}

    def value(self, state: State, step: int, total: int) -> float:
        """The measurement; any use before it is NaN and shows."""
        return math.nan if state["value"] is None else state["value"]

    def update(self, state: State, found: float, step: int, total: int) -> State:
        """The measurement, once."""
        return {"value": 1.0 - found if self.complement else found} if state["value"] is None else state


@ADAPTIVE.add("trend")
class Trend(Adaptive):
    """Down by a factor while the loss falls and up while it rises (AdaKD's token share, 2510.11615)."""

    metric: str = "divergence/distill"
    """The loss that is followed."""
    start: float = 1.0
    """Value at the first step."""
    sigma: float = Field(default=0.05, gt=0.0, lt=1.0)
    """The value is multiplied by 1 - sigma or 1 + sigma."""
    decay: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Memory of the running mean of the loss."""
    eps: float = Field(default=0.05, gt=0.0)
    """Relative move of the running mean that counts as a trend."""
    floor: float = 0.1
    """Smallest value."""
    cap: float = 1.0
    """Largest value."""

    def begin(self) -> State:
        """At `start`, with no loss seen."""
        return {"value": self.start, "mean": None, "anchor": None}

    def update(self, state: State, found: float, step: int, total: int) -> State:
        """The anchor is the running mean at the last move; the next trend is counted from there."""
        if state["mean"] is None:
            return {**state, "mean": found, "anchor": found}
        mean = self.decay * state["mean"] + (1.0 - self.decay) * found
        if abs(mean - state["anchor"]) <= self.eps * abs(state["anchor"]):
            return {**state, "mean": mean}
        factor = 1.0 - self.sigma if mean < state["anchor"] else 1.0 + self.sigma
        return {"value": min(self.cap, max(self.floor, state["value"] * factor)), "mean": mean, "anchor": mean}


@ADAPTIVE.add("target_kl")
class TargetKL(Adaptive):
    """A distillation weight that holds the KL to the teacher near a target (the controller of 1909.08593)."""

    metric: str = "kl_teacher"
    """The divergence that is held."""
    target: float = Field(gt=0.0)
    """Nats per token to hold it at."""
    start: float = Field(default=1.0, gt=0.0)
    """Weight at the first step."""
    rate: float = Field(default=0.1, gt=0.0)
    """Gain: a relative error of e multiplies the weight by 1 + rate clip(e, +-clip)."""
    clip: float = Field(default=0.2, gt=0.0)
    """Bound of the relative error."""
    floor: float = Field(default=1.0e-4, gt=0.0)
    """Smallest weight."""
    cap: float = Field(default=1.0e2, gt=0.0)
    """Largest weight."""

    def begin(self) -> State:
        """At `start`."""
        return {"value": self.start}

    def update(self, state: State, found: float, step: int, total: int) -> State:
        """Too far from the teacher raises the weight, too near lowers it."""
        error = max(-self.clip, min(self.clip, found / self.target - 1.0))
        return {"value": min(self.cap, max(self.floor, state["value"] * (1.0 + self.rate * error)))}


@ADAPTIVE.add("balance")
class Balance(Adaptive):
    """A weight that holds the ratio of distillation to reward gradient norms at a set value."""

    metric: str = "kd_rl_norm_ratio"
    """Norm of the distillation gradient over that of the reward gradient, as weighted; measured at every step."""
    ratio: float = Field(default=1.0, gt=0.0)
    """The ratio to hold."""
    start: float = Field(default=1.0, gt=0.0)
    """Weight at the first step."""
    rate: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the (logarithmic) error that one step mends."""
    floor: float = Field(default=1.0e-4, gt=0.0)
    """Smallest weight."""
    cap: float = Field(default=1.0e4, gt=0.0)
    """Largest weight."""

    def begin(self) -> State:
        """At `start`."""
        return {"value": self.start}

    def update(self, state: State, found: float, step: int, total: int) -> State:
        """weight x (ratio / found)^rate; a step without one of the gradients changes nothing."""
        if not (math.isfinite(found) and found > 0.0):
            return state
        return {"value": min(self.cap, max(self.floor, state["value"] * (self.ratio / found) ** self.rate))}


def followed(config: Adaptive, row: Mapping[str, Any]) -> float | None:
    """The metric that a scalar follows, when this step has it as a finite number."""
    found = row.get(config.metric)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None
