"""How a distillation loss is written in a recipe: divergence and support, read, checked and written back."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from kdrl.config import Config

Estimator = Literal["k1", "k2", "k3"]
Placement = Literal["loss", "advantage", "straight_through"]

DEFAULT_PLACEMENT: dict[str, Placement] = {"k1": "advantage", "k2": "loss", "k3": "straight_through"}


def _only_key(raw: Any, allowed: set[str], what: str) -> tuple[str, Any]:
    if isinstance(raw, dict) and len(raw) == 1 and (key := next(iter(raw))) in allowed:
        value = raw[key]
        if isinstance(value, bool) or (isinstance(value, dict) and "kind" in value):
            raise ValueError(f"{key} takes no {'kind' if isinstance(value, dict) else value!r}")
        return key, value
    raise ValueError(f"{what} is one of {', '.join(sorted(allowed))} with its value, not {raw!r}")


class Divergence(Config):
    """`forward_kl`, `reverse_kl`, `{jsd: beta}` or `{jsd: {beta: b, scale: paper}}`."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """Which divergence of teacher p and student q: KL(p||q), KL(q||p), or the generalised Jensen-Shannon."""
    beta: float | None = None
    """Mixture weight of the teacher in m = beta p + (1 - beta) q (jsd only)."""
    scale: Literal["limits", "paper"] = "limits"
    """`limits` divides J_beta by beta(1-beta), so its ends are forward and reverse KL; `paper` is J_beta as in GKD."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"kind": raw}
        if isinstance(raw, dict) and raw and "kind" not in raw:
            _, value = _only_key(raw, {"jsd"}, "a divergence mapping")
            inner = value if isinstance(value, dict) else {"beta": value}
            # At its ends the scaled divergence is a plain KL, and goes by that name.
            beta = inner.get("beta")
            if beta in (0, 1) and inner in ({"beta": beta}, {"beta": beta, "scale": "limits"}):
                return {"kind": "reverse_kl" if beta == 1 else "forward_kl"}
            return {"kind": "jsd", **inner}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Divergence:
        if self.kind != "jsd":
            if self.beta is not None or self.scale != "limits":
                raise ValueError(f"beta and scale belong to jsd, not to {self.kind}")
            return self
        if self.beta is None or not 0.0 <= self.beta <= 1.0:
            raise ValueError("jsd needs a beta between 0 and 1, as in {jsd: 0.5}")
        if self.scale == "paper" and self.beta in (0.0, 1.0):
            raise ValueError(
                f"the paper's J_beta is zero for every student at beta {self.beta:g}; "
                "write forward_kl (beta 0) or reverse_kl (beta 1)"
            )
        return self

    @model_serializer
    def _write(self) -> Any:
        if self.kind != "jsd":
            return self.kind
        return {"jsd": self.beta if self.scale == "limits" else {"beta": self.beta, "scale": self.scale}}


class Support(Config):
    """`full`, `{topk: K}`, `{token: ESTIMATOR}` or `{token: {estimator: ESTIMATOR, as: loss | advantage}}`."""

    kind: Literal["full", "topk", "token"] = "full"
    """Over which part of the vocabulary the divergence is taken."""
    k: int | None = Field(default=None, ge=1)
    """How many of the teacher's most likely tokens; what is left is one tail outcome (topk only)."""
    estimator: Estimator | None = None
    """Estimate from the sampled token: k1 = -R, k2 = R^2/2, k3 = e^R - R - 1 with R = log p - log q (token only)."""
    placement: Placement | None = Field(default=None, alias="as")
    """Where the estimate stands: differentiated as a `loss`, or as the `advantage` of a score function (token only)."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"kind": raw}
        if isinstance(raw, dict) and raw and "kind" not in raw:
            key, value = _only_key(raw, {"topk", "token"}, "a support mapping")
            if key == "topk":
                return {"kind": "topk", **(value if isinstance(value, dict) else {"k": value})}
            inner = value if isinstance(value, dict) else {"estimator": value}
            usual = DEFAULT_PLACEMENT.get(str(inner.get("estimator")))
            return {"kind": "token", "as": usual, **inner}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Support:
        if (self.kind == "topk") != (self.k is not None):
            raise ValueError("k belongs to topk: write {topk: 64}")
        if (self.kind == "token") != (self.estimator is not None):
            raise ValueError("an estimator belongs to token support: write {token: k2}")
        if self.placement is not None and self.kind != "token":
            raise ValueError("`as` belongs to token support: write {token: {estimator: k1, as: advantage}}")
        return self

    @property
    def place(self) -> Placement:
        """The placement in force: what the recipe says, else the one that teaches for this estimator."""
        assert self.placement is not None
        return self.placement

    @model_serializer
    def _write(self) -> Any:
        if self.kind == "topk":
            return {"topk": self.k}
        if self.kind == "token":
            return {"token": {"estimator": self.estimator, "as": self.place}}
        return self.kind


def refuse_untaught(divergence: Divergence, support: Support) -> None:
    """Raise ValueError, saying why, for an estimator where it cannot give the divergence's gradient (2510.01555)."""
    if support.kind != "token":
        return
    estimator, place = support.estimator, support.place
    if divergence.kind == "jsd":
        raise ValueError("jsd has no sampled-token estimator here: use `support: full` or `support: {topk: K}`")
    if estimator == "k1" and place != "advantage":
        raise ValueError(
            "k1 cannot be differentiated as a loss: its expected gradient is zero and holds no teacher. "
            "Write {token: {estimator: k1, as: advantage}} or {token: k2}"
        )
    if place == "advantage" and estimator != "k1":
        raise ValueError(
            f"{estimator} as an advantage is a biased gradient of every KL. Write {{token: k1}} for the advantage form"
        )
    if divergence.kind == "forward_kl" and (estimator, place) != ("k3", "loss"):
        raise ValueError(
            f"{estimator} placed as {place} on student samples descends the reverse KL. Under forward_kl write "
            "{token: {estimator: k3, as: loss}}, `full` or {topk: K}; or ask for `divergence: reverse_kl`"
        )
    if divergence.kind == "reverse_kl" and (estimator, place) == ("k3", "loss"):
        raise ValueError(
            "k3 differentiated as a loss descends the forward KL, not the reverse one. Write {token: k3} "
            "(value k3, gradient k2), {token: k2}, or `divergence: forward_kl`"
        )
    if estimator == "k2" and place == "straight_through":
        raise ValueError("k2 needs no straight-through form: write {token: k2}")
