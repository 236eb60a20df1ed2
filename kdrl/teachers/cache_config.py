"""How a recipe says where a teacher's scores are stored. No torch import, for a recipe is read before all else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from kdrl.config import Config

CacheKind = Literal["topk", "draws", "hidden"]
TOP_K, DRAWS = 64, 12


class Stored(Config):
    """What is stored of every response token beside the log-prob of the token itself."""

    kind: CacheKind = "topk"
    """`topk`: the likeliest tokens and the mass of the rest; `draws`: unbiased draws; `hidden`: last hidden states."""
    k: int | None = Field(default=None, ge=1)
    """topk: how many (64)."""
    draws: int | None = Field(default=None, ge=1, le=255)
    """draws: how many a token (12)."""
    tau: float | None = Field(default=None, gt=0.0)
    """draws: they come from the teacher's p^tau, re-weighted to p (1)."""

    @model_validator(mode="after")
    def _own_settings(self) -> Stored:
        for name, kind in (("k", "topk"), ("draws", "draws"), ("tau", "draws")):
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(f"{name} belongs to kind {kind}; leave it out of kind {self.kind}")
        return self

    def settings(self) -> dict[str, Any]:
        """Kind and what belongs to it, defaults filled in."""
        if self.kind == "topk":
            return {"kind": "topk", "k": self.k or TOP_K}
        if self.kind == "draws":
            return {"kind": "draws", "draws": self.draws or DRAWS, "tau": self.tau or 1.0}
        return {"kind": "hidden"}

    def options(self) -> str:
        """The same as options of `kdrl cache-teacher`."""
        return " ".join(f"--{name} {value:g}" if name == "tau" else f"--{name} {value}" for name, value in self._said())

    def _said(self) -> list[tuple[str, Any]]:
        return [(n, v) for n, v in self.settings().items() if (n, v) != ("tau", 1.0)]


class CacheConfig(Stored):
    """A folder of stored scores: FOLDER alone to read it, or {path: FOLDER, write: true, kind: topk, k: 64}."""

    path: str
    """The folder, as `kdrl cache-teacher` or a run that writes made it."""
    write: bool = False
    """Score with the teacher what the folder lacks, and store it; otherwise no teacher is loaded."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        return {"path": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _kind_is_stored(self) -> CacheConfig:
        given = {"kind", "k", "draws", "tau"} & self.model_fields_set
        if given and not self.write:
            raise ValueError(
                f"{min(given)} belongs to a cache that is written (write: true); one that is read says itself what it "
                "holds"
            )
        return self

    @model_serializer
    def _write(self) -> Any:
        return {"path": self.path, "write": True, **self.settings()} if self.write else self.path
