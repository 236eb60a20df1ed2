"""The one reducer: every way to average per-token losses is a fixed weight per token of the global batch.

Counts are taken once per optimizer step over the global batch, so that splitting it changes nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from kdrl.config import Config


class Reduce(Config):
    """`token_global`, `batch_tokens`, `sequence_mean`, `sum` or `{constant: L}`."""

    kind: Literal["token_global", "batch_tokens", "sequence_mean", "constant", "sum"] = "token_global"
    """Divide the sum over kept tokens by: kept tokens, all response tokens, each response's then responses', B L, 1."""
    length: float | None = Field(default=None, gt=0)
    """L of `{constant: L}`: the sum is divided by (responses x L), whatever their length (Dr. GRPO, 2503.20783)."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"kind": raw}
        if isinstance(raw, dict) and list(raw) == ["constant"]:
            return {"kind": "constant", "length": raw["constant"]}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Reduce:
        if (self.kind == "constant") != (self.length is not None):
            raise ValueError("reduce: {constant: L} needs the length L, and only it takes one")
        return self

    @model_serializer
    def _write(self) -> Any:
        return {"constant": self.length} if self.kind == "constant" else self.kind


def token_weights(spec: Reduce, keep_N: Tensor, row_N: Tensor, rows: int, dtype: Any) -> Tensor:
    """Weight of each token of an optimizer step, `[N]`: the term's loss is sum(weight x per-token loss).

    `keep_N` is what the term's mask keeps of the trained response tokens, `row_N` the response of each token.
    """
    keep = keep_N.to(dtype)
    if spec.kind == "sum":
        return keep
    if spec.kind == "constant":
        assert spec.length is not None
        return keep / (rows * spec.length)
    if spec.kind == "batch_tokens":
        return keep / max(1, len(keep_N))
    if spec.kind == "token_global":
        return keep / keep.sum().clamp(min=1)
    count_B = keep.new_zeros(rows).index_add(0, row_N, keep)
    used = (count_B > 0).sum().clamp(min=1)
    return keep / (count_B.clamp(min=1)[row_N] * used)
