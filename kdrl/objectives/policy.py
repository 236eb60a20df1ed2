"""Advantages, importance ratios and clipping: GRPO and its variants, one definition each."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from kdrl.config import Config

EPSILON = 1.0e-6

NAMED_ADVANTAGES: dict[str, dict[str, str]] = {
    "grpo": {"baseline": "group_mean", "scale": "group_std"},  # 2402.03300
    "dr_grpo": {"baseline": "group_mean", "scale": "none"},  # 2503.20783
    "rloo": {"baseline": "leave_one_out", "scale": "none"},  # 2402.14740
    "reinforce": {"baseline": "none", "scale": "none"},
    "batch_std": {"baseline": "group_mean", "scale": "batch_std"},  # CISPO / ScaleRL, 2510.13786
}


class Advantage(Config):
    """`grpo`, `dr_grpo`, `rloo`, `reinforce`, `batch_std`, or `{baseline: ..., scale: ..., calibrate: ...}`."""

    baseline: Literal["group_mean", "leave_one_out", "batch_mean", "none"] = "group_mean"
    """What is subtracted from a reward: its group's mean, the mean of the others in the group, or the batch's."""
    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """What it is then divided by: the sample standard deviation (n - 1) of its group or of the batch."""
    calibrate: float | None = None
    """Replace a reward by exp(t u), its sign that of t: u is the share of its group at or below it (2412.19792)."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            if raw not in NAMED_ADVANTAGES:
                raise ValueError(f"an advantage is one of {', '.join(NAMED_ADVANTAGES)}, or {{baseline, scale}}")
            return NAMED_ADVANTAGES[raw]
        return raw

    @model_validator(mode="after")
    def _check(self) -> Advantage:
        if self.calibrate == 0.0:
            raise ValueError(
                "advantage.calibrate 0 makes every reward the same; leave it out, or give 10 for best-of-n"
            )
        return self

    @model_serializer
    def _write(self) -> Any:
        mine: dict[str, Any] = {"baseline": self.baseline, "scale": self.scale}
        if self.calibrate is not None:
            return mine | {"calibrate": self.calibrate}
        return next((name for name, spec in NAMED_ADVANTAGES.items() if spec == mine), mine)


def calibrated(rewards: Tensor, tilt: float) -> Tensor:
    """sign(t) exp(t u) of one group's rewards, u the share of the group at or below each (InfAlign, 2412.19792).

    Left out: quantiles under the initial policy; the group is the present one's.
    """
    share = (rewards[None, :] <= rewards[:, None]).to(rewards.dtype).mean(1)
    return math.copysign(1.0, tilt) * torch.exp(tilt * share)


def _scaled(values: Tensor, rewards: Tensor) -> Tensor:
    """Divide by the rewards' sample standard deviation; rewards that do not differ teach nothing."""
    if len(rewards) < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(values)
    return values / (rewards.std(unbiased=True) + EPSILON)


def advantages(spec: Advantage, rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """Advantage of each response from its reward and its group's index, both `[B]`; zero in a group of equal rewards.

    A group of one has no group baseline: its advantage is zero (leave_one_out, group_mean).
    """
    if spec.calibrate is not None:
        rewards_B = rewards_B.clone()
        for group in group_B.unique():
            rewards_B[group_B == group] = calibrated(rewards_B[group_B == group], spec.calibrate)
    out = torch.zeros_like(rewards_B)
    for group in group_B.unique():
        mine = group_B == group
        rewards = rewards_B[mine]
        size = len(rewards)
        if spec.baseline == "none":
            value = rewards.clone()
        elif spec.baseline == "batch_mean":
            value = rewards - rewards_B.mean()
        elif size == 1 or (rewards == rewards[0]).all():
            value = torch.zeros_like(rewards)
        else:
            # leave-one-out: r_i - (sum - r_i)/(n-1) = (r_i - mean) n/(n-1)
            loo = size / (size - 1) if spec.baseline == "leave_one_out" else 1.0
            value = (rewards - rewards.mean()) * loo
        out[mine] = _scaled(value, rewards) if spec.scale == "group_std" else value
    return _scaled(out, rewards_B) if spec.scale == "batch_std" else out


class Clip(Config):
    """How far one update may move a token: PPO's clipped minimum, CISPO's capped weight, a range, or nothing."""

    kind: Literal["ppo", "cispo", "masked", "none"] = "ppo"
    """`ppo`: min(rA, clip(r)A); `cispo`: sg(min(r, cap)) A log pi; `masked`: sg(r) A log pi in range; `none`: rA."""
    low: float = Field(default=0.2, ge=0.0, le=1.0)
    """ppo: the ratio is not rewarded below 1 - low; masked: a token below it is dropped (IcePop, MOPD 2601.02780)."""
    high: float = Field(default=0.2, ge=0.0)
    """ppo: not rewarded above 1 + high; larger than low is DAPO's clip-higher; masked: a token above it is dropped."""
    dual: float | None = None
    """For negative advantages the loss is bounded by dual * |A| (dual clip, 1912.09729; ppo); must exceed 1."""
    cap: float | None = Field(default=None, gt=0.0)
    """Largest weight of a token (cispo only): the ratio itself, not 1 + cap; 5 in the ScaleRL recipe (2510.13786)."""

    @model_validator(mode="after")
    def _check(self) -> Clip:
        if (self.kind == "cispo") != (self.cap is not None):
            raise ValueError("clip.cap belongs to `kind: cispo`, which needs it (5.0 in the ScaleRL recipe)")
        given = self.model_fields_set & ({"dual"} if self.kind == "masked" else {"low", "high", "dual"})
        if self.kind != "ppo" and given:
            raise ValueError(f"clip.{min(given)} belongs to `kind: ppo`, not to {self.kind}")
        if self.dual is not None and self.dual <= 1.0:
            raise ValueError("clip.dual must be greater than 1")
        return self

    @model_serializer
    def _write(self) -> dict[str, Any]:
        ranges = ("low", "high")
        keys = {"ppo": (*ranges, "dual"), "cispo": ("cap",), "masked": ranges, "none": ()}[self.kind]
        return {"kind": self.kind} | {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


def clipped_loss(spec: Clip, log_ratio_N: Tensor, advantage_N: Tensor, logq_N: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token loss and where the clip holds it (no gradient, or CISPO's capped weight), both `[N]`."""
    ratio_N = log_ratio_N.exp()
    if spec.kind == "none":
        return -ratio_N * advantage_N, torch.zeros_like(ratio_N, dtype=torch.bool)
    if spec.kind == "cispo":
        assert spec.cap is not None
        weight_N = ratio_N.detach().clamp(max=spec.cap)
        return -weight_N * advantage_N * logq_N, ratio_N.detach() > spec.cap
    bounded_N = ratio_N.clamp(1.0 - spec.low, 1.0 + spec.high)
    if spec.kind == "masked":
        dropped_N = bounded_N.detach() != ratio_N.detach()
        weight_N = torch.where(dropped_N, 0.0, ratio_N.detach())
        return -weight_N * advantage_N * logq_N, dropped_N
    gain_N = torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    held_N = bounded_N * advantage_N < ratio_N * advantage_N
    if spec.dual is not None:
        floor_N = spec.dual * advantage_N
        held_N = held_N | ((advantage_N < 0) & (gain_N < floor_N))
        gain_N = torch.where(advantage_N < 0, torch.maximum(gain_N, floor_N), gain_N)
    return -gain_N, held_N.detach()


def sequence_mean(values_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """Mean of `values` over the tokens of each response, given back to every one of its tokens, `[N]`."""
    total_B = values_N.new_zeros(rows).index_add(0, row_N, values_N)
    count_B = torch.bincount(row_N, minlength=rows).clamp(min=1).to(values_N.dtype)
    return (total_B / count_B)[row_N]
