"""How a recipe says over which part of the vocabulary a divergence is taken, and which estimators can teach."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from kdrl.config import Config
from kdrl.objectives.specs import Divergence

Estimator = Literal["k1", "k2", "k3"]
Placement = Literal["loss", "advantage", "straight_through"]
Rest = Literal["tail", "renormalise_teacher", "renormalise", "partial"]

DEFAULT_PLACEMENT: dict[str, Placement] = {"k1": "advantage", "k2": "loss", "k3": "straight_through"}
FIELDS = {"topk": ("k", "of", "rest", "top_p"), "draws": ("n", "tau"), "token": ("estimator", "as")}


class Support(Config):
    """`full`, `{topk: K}`, `{draws: n}` or `{token: ESTIMATOR}`, the last three also with settings."""

    kind: Literal["full", "topk", "draws", "token"] = "full"
    """Over which part of the vocabulary the divergence is taken."""
    k: int | None = Field(default=None, ge=1)
    """topk: how many of the likeliest tokens."""
    of: Literal["teacher", "student"] = "teacher"
    """topk: whose likeliest tokens."""
    rest: Rest = "tail"
    """topk: what becomes of all others: `tail` is one outcome more (unbiased on the head and on the tail's mass);
    `renormalise_teacher` spreads the teacher over the k tokens (over-sharp student); `partial` drops their part of the
    sum (as over-sharp, smaller steps); `renormalise` does it to both sides (student mass outside is free)."""
    top_p: float | None = Field(default=None, gt=0.0, lt=1.0)
    """topk of the teacher: of the k, only the fewest whose mass reaches this."""
    n: int | None = Field(default=None, ge=1)
    """draws: samples per token, drawn anew each step; unbiased for KL(p||q) (RS-KD, 2503.16870)."""
    tau: float = Field(default=1.0, gt=0.0)
    """draws: they come from the teacher's p^tau, re-weighted to p."""
    estimator: Estimator | None = None
    """token: estimate from the sampled token: k1 = -R, k2 = R^2/2, k3 = e^R - R - 1 with R = log p - log q."""
    placement: Placement | None = Field(default=None, alias="as")
    """token: differentiated as a `loss`, or the `advantage` of a score function."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"kind": raw}
        if not isinstance(raw, dict) or not raw or "kind" in raw:
            return raw
        key, value = next(iter(raw.items()))
        if len(raw) > 1 and key in FIELDS:
            inside = ", ".join(f"{FIELDS[key][0] if k == key else k}: {v}" for k, v in raw.items())
            raise ValueError(f"settings of a support go inside it: {{{key}: {{{inside}}}}}")
        if len(raw) != 1 or key not in FIELDS:
            raise ValueError(f"a support is full, or one of {', '.join(FIELDS)} with its value, not {raw!r}")
        if isinstance(value, bool) or (isinstance(value, dict) and "kind" in value):
            raise ValueError(f"{key} takes no {'kind' if isinstance(value, dict) else value!r}")
        inner = dict(value) if isinstance(value, dict) else {FIELDS[key][0]: value}
        if unknown := sorted(inner.keys() - set(FIELDS[key])):
            raise ValueError(f"support {key} has no setting {unknown[0]!r}; it takes {', '.join(FIELDS[key])}")
        if key == "token":
            inner = {"as": DEFAULT_PLACEMENT.get(str(inner.get("estimator"))), **inner}
        return {"kind": key, **inner}

    @model_validator(mode="after")
    def _check(self) -> Support:
        if (self.kind == "topk") != (self.k is not None):
            raise ValueError("k belongs to topk: write {topk: 64}")
        if (self.kind == "draws") != (self.n is not None):
            raise ValueError("n belongs to draws: write {draws: 12}")
        if (self.kind == "token") != (self.estimator is not None):
            raise ValueError("an estimator belongs to token support: write {token: k2}")
        if self.placement is not None and self.kind != "token":
            raise ValueError("`as` belongs to token support: write {token: {estimator: k1, as: advantage}}")
        if self.top_p is not None and self.of != "teacher":
            raise ValueError("top_p cuts the teacher's likeliest tokens; it does not go with `of: student`")
        return self

    @property
    def place(self) -> Placement:
        """The placement in force: what the recipe says, else the one that teaches for this estimator."""
        assert self.placement is not None
        return self.placement

    @property
    def measure(self) -> bool:
        """Whether teacher and student no longer sum to one over it."""
        return self.kind == "topk" and self.rest in ("renormalise_teacher", "partial")

    @model_serializer
    def _write(self) -> Any:
        if self.kind == "token":
            return {"token": {"estimator": self.estimator, "as": self.place}}
        if self.kind == "draws":
            return {"draws": self.n if self.tau == 1.0 else {"n": self.n, "tau": self.tau}}
        if self.kind == "topk":
            more = {"of": self.of, "rest": self.rest, "top_p": self.top_p}
            plain = {"of": "teacher", "rest": "tail", "top_p": None}
            changed = {name: value for name, value in more.items() if value != plain[name]}
            return {"topk": {"k": self.k, **changed} if changed else self.k}
        return self.kind


def refuse_untaught(divergence: Divergence, support: Support) -> None:
    """Raise ValueError, saying why, for a support where the divergence's gradient cannot be had (2510.01555)."""
    if support.kind == "draws" and divergence.kind != "forward_kl":
        raise ValueError(
            f"draws are samples of the teacher: they estimate forward_kl without bias, and {divergence.kind} not. Use "
            "`divergence: forward_kl`, `support: full` or {topk: K}"
        )
    if divergence.kind == "rank" and support.kind != "topk":
        raise ValueError("rank orders the teacher's likeliest tokens: give it `support: {topk: K}`")
    if support.kind == "topk":
        _refuse_topk(divergence, support)
    if support.kind == "token":
        _refuse_estimator(divergence, support)


def _refuse_topk(divergence: Divergence, support: Support) -> None:
    if divergence.kind == "preference":
        raise ValueError("preference compares two tokens, the two argmaxes; leave `support` at full")
    if divergence.kind == "pair" and support.rest != "partial":
        raise ValueError("pair compares logits of single tokens, a tail has none; use {topk: {k: K, rest: partial}}")
    if divergence.kind == "pair" and support.top_p is not None:
        raise ValueError("pair weighs the k tokens themselves and top_p would leave holes among them; give k alone")
    if divergence.kind == "rank" and (support.of, support.rest, support.top_p) != ("teacher", "tail", None):
        raise ValueError("rank reads only k of its support: the label and the teacher's k likeliest")
    if support.measure and divergence.kind in ("reverse_kl", "symmetric"):
        raise ValueError(
            f"under rest: {support.rest} {divergence.kind} sums q log(q/p) over part of the vocabulary, which is least "
            "where the student keeps 1/e of its mass there and not at the teacher; use `tail` or `renormalise`"
        )
    if support.measure and divergence.kind not in ("forward_kl", "tv", "pair"):
        raise ValueError(
            f"under rest: {support.rest} the two sides no longer sum to one, and {divergence.kind} needs "
            "distributions; use `tail` or `renormalise`"
        )


def _refuse_estimator(divergence: Divergence, support: Support) -> None:
    estimator, place = support.estimator, support.place
    if divergence.kind not in ("forward_kl", "reverse_kl"):
        raise ValueError(
            f"{divergence.kind} has no sampled-token estimator here: use `support: full` or `support: {{topk: K}}`"
        )
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
