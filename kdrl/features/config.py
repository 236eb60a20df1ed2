"""How a feature term is written in a recipe: what is compared, by which loss, between which layers, through what."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_serializer, model_validator

from kdrl.batch import Origin
from kdrl.config import Config
from kdrl.errors import nearest
from kdrl.objectives.base import TermConfig

Part = Literal["hidden", "embedding", "attention", "attention_scores", "attention_output", "queries", "keys", "values"]
MAPS = ("attention", "attention_scores")
LossKind = Literal["mse", "l1", "cosine", "kl", "nd", "infonce", "mi_alpha", "sinkhorn"]
ProjectorKind = Literal["none", "linear", "orthogonal", "mlp", "head_map"]
LayerMap = dict[int, int] | Literal["uniform", "last", "all"]


def _named(raw: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    """A name, or `{name: {settings}}`, as settings with the name under `kind`."""
    if isinstance(raw, str):
        raw = {raw: {}}
    if raw == {}:
        return raw
    if not isinstance(raw, dict) or (len(raw) != 1 and "kind" not in raw):
        raise ValueError(f"{what} is a name or {{name: {{settings}}}}, not {raw!r}")
    if "kind" in raw:
        return raw
    kind, settings = next(iter(raw.items()))
    if kind not in names:
        raise ValueError(f"{what} {kind!r} is not known{nearest(str(kind), names)}")
    if not isinstance(settings or {}, dict):
        raise ValueError(f"{what} {kind} takes settings by name, as {{{kind}: {{...}}}}, not {settings!r}")
    return {"kind": kind, **(settings or {})}


def _refuse_foreign(config: Config, allowed: dict[str, tuple[str, ...]], kind: str) -> None:
    """Raise ValueError for a setting of another kind; `allowed` gives the kinds that each setting belongs to."""
    for name, kinds in allowed.items():
        if kind not in kinds and getattr(config, name) != type(config).model_fields[name].default:
            raise ValueError(f"{name} belongs to {' and '.join(kinds)}, not to {kind}")


class Feature(Config):
    """`hidden`, `embedding`, `attention`, ... or `{relation: hidden}`, `{relation: {of: queries, heads: 12}}`."""

    kind: Part = "hidden"
    """Hidden states, attention maps (rows of softmax), their scores, attention's output, queries, keys or values."""
    relation: bool = False
    """Compare not the vectors but their products with those of the other kept tokens of the response."""
    heads: int = Field(default=1, ge=1)
    """Into how many relation heads the vectors are cut (MiniLMv2, 2012.15828)."""
    scale: Literal["dot", "cosine"] = "cosine"
    """`cosine` of two tokens, or their `dot` product over the square root of the head's width."""
    neighbours: int | None = Field(default=None, ge=1)
    """Only the k other tokens nearest in the teacher, instead of all tokens."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            _named(raw, get_args(Part), "of")
            return {"kind": raw}
        if isinstance(raw, dict) and list(raw) == ["relation"] and not isinstance(raw["relation"], bool):
            inner = raw["relation"]
            inner = {"of": inner} if isinstance(inner, str) else dict(inner or {})
            return {"kind": inner.pop("of", "hidden"), "relation": True, **inner}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Feature:
        if self.relation and self.kind in MAPS:
            raise ValueError(f"a relation is of vectors (hidden, queries, keys, values, ...), not of {self.kind}")
        if not self.relation and (self.heads, self.scale, self.neighbours) != (1, "cosine", None):
            raise ValueError("heads, scale and neighbours belong to {relation: {of: ..., heads: ...}}")
        return self

    @model_serializer
    def _write(self) -> Any:
        if not self.relation:
            return self.kind
        more = {"heads": self.heads, "scale": self.scale, "neighbours": self.neighbours}
        changed = {k: v for k, v in more.items() if v != type(self).model_fields[k].default}
        return {"relation": {"of": self.kind, **changed} if changed else self.kind}

    @property
    def is_map(self) -> bool:
        """Whether rows over keys are compared, not vectors."""
        return self.relation or self.kind in MAPS


VECTOR_LOSSES = ("mse", "l1", "cosine", "nd", "infonce", "mi_alpha", "sinkhorn")
MAP_LOSSES = ("mse", "l1", "cosine", "kl")


class FeatureLoss(Config):
    """`mse`, `l1`, `cosine`, `kl`, `nd`, `infonce`, `mi_alpha`, `sinkhorn`, or `{kl: {temperature: 4}}`."""

    kind: LossKind = "mse"
    """What is minimised; see docs/methods.md for the formulas."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Divides the scores of kl, or the cosines of infonce and mi_alpha."""
    centre: Literal["label", "batch"] = "label"
    """nd: mean teacher feature of the tokens with the same label in the optimizer step, or of all its tokens."""
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """mi_alpha: share of the batch's own normaliser; 1 is InfoNCE, 0 the bound of Nguyen, Wainwright and Jordan."""
    entropy: float = Field(default=0.05, gt=0.0)
    """sinkhorn: how much the transport plan is smoothed."""
    iterations: int = Field(default=50, ge=1)
    """sinkhorn: rounds of scaling rows and columns."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        return _named(raw, get_args(LossKind), "loss")

    @model_validator(mode="after")
    def _check(self) -> FeatureLoss:
        belongs = {
            "temperature": ("kl", "infonce", "mi_alpha"),
            "centre": ("nd",),
            "alpha": ("mi_alpha",),
            "entropy": ("sinkhorn",),
            "iterations": ("sinkhorn",),
        }
        _refuse_foreign(self, belongs, self.kind)
        return self

    @model_serializer
    def _write(self) -> Any:
        fields = type(self).model_fields
        changed = {k: getattr(self, k) for k in fields if k != "kind" and getattr(self, k) != fields[k].default}
        return {self.kind: changed} if changed else self.kind


class ProjectorSpec(Config):
    """`none`, `linear`, `orthogonal`, `mlp` or `head_map`, or `{linear: {shared: true, lr_scale: 10}}`."""

    kind: ProjectorKind = "none"
    """What is learned to bring the student's width (or heads) to the teacher's; trained with it, left out of final/."""
    shared: bool = False
    """One projector for all layer pairs instead of one for each."""
    width: int | None = Field(default=None, ge=1)
    """Inner width of an mlp; the teacher's when null."""
    lr_scale: float = Field(default=1.0, gt=0.0)
    """Its learning rate over that of the student; its weights do not decay."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        return _named(raw, get_args(ProjectorKind), "projector")

    @model_validator(mode="after")
    def _check(self) -> ProjectorSpec:
        learned = ("linear", "orthogonal", "mlp", "head_map")
        _refuse_foreign(self, {"width": ("mlp",), "shared": learned, "lr_scale": learned}, self.kind)
        return self

    @model_serializer
    def _write(self) -> Any:
        fields = type(self).model_fields
        changed = {k: getattr(self, k) for k in fields if k != "kind" and getattr(self, k) != fields[k].default}
        return {self.kind: changed} if changed else self.kind


class FeatureConfig(TermConfig):
    """A comparison of what student and teacher hold inside."""

    of: Feature = Feature()
    """hidden, embedding, attention, attention_scores, attention_output, queries, keys, values, or {relation: ...}."""
    loss: FeatureLoss = FeatureLoss()
    """mse, l1, cosine, kl, nd, infonce, mi_alpha or sinkhorn, with settings as {kl: {temperature: 4}}."""
    layers: LayerMap = "uniform"
    """{student layer: teacher layer} (1 to L; 0 embedding; -1 last), uniform, last, or all (with head_map)."""
    projector: ProjectorSpec = ProjectorSpec()
    """none, linear, orthogonal, mlp or head_map, with settings as {linear: {shared: true, lr_scale: 10}}."""
    normalise: Literal["none", "token", "batch", "whiten"] = "none"
    """Teacher vectors: as they are; each to mean 0, deviation 1; each dimension over the step's tokens; whitened."""
    bits: int | None = Field(default=None, ge=2, le=16)
    """Round teacher vectors to this many bits, by the largest entry of each (QFD, 2307.10638); null: not rounded."""
    on: tuple[Origin, ...] = ("student", "gold", "teacher", "privileged", "buffer", "speculative", "mixed", "corrupt")
    """Whose responses the term reads: student, gold, teacher, privileged, buffer, speculative, mixed, corrupt."""

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw:
            try:
                return {int(k): int(v) for k, v in raw.items()}
            except (TypeError, ValueError):
                raise ValueError(f"layers maps student layers to teacher layers, as {{2: 6}}, not {raw!r}") from None
        if raw in ("uniform", "last", "all"):
            return raw
        raise ValueError(f"layers is {{student layer: teacher layer}}, uniform, last or all, not {raw!r}")

    @model_validator(mode="after")
    def _check(self) -> FeatureConfig:
        self._check_loss()
        of, kind = self.of, self.projector.kind
        if kind == "head_map" and (of.relation or not of.is_map):
            raise ValueError("projector head_map maps attention heads: it belongs to `of: attention` and its scores")
        if of.is_map and kind not in ("none", "head_map"):
            raise ValueError(f"projector {kind} maps vectors, and {self._what} has none to map; leave it out")
        if (self.layers == "all") != (kind == "head_map" and self.layers == "all"):
            raise ValueError("layers: all joins the heads of all layers and belongs to projector head_map")
        if of.kind == "embedding" and "layers" in self.model_fields_set and self.layers != "uniform":
            raise ValueError("there is one embedding: leave `layers` out")
        if of.kind not in ("hidden", "embedding") and isinstance(self.layers, dict) and 0 in self._layer_numbers():
            raise ValueError(f"layers: layer 0 is the embedding, which has no {of.kind}; attention begins at layer 1")
        if of.is_map and (self.normalise != "none" or self.bits is not None):
            raise ValueError("normalise and bits change the teacher's vectors; a map or relation takes neither")
        if self.loss.kind == "nd" and (self.normalise != "none" or self.bits is not None):
            raise ValueError("nd compares norms, which normalise and bits would change; leave them out")
        return self

    @property
    def _what(self) -> str:
        return f"a relation of {self.of.kind}" if self.of.relation else self.of.kind

    def _layer_numbers(self) -> set[int]:
        assert isinstance(self.layers, dict)
        return {*self.layers, *self.layers.values()}

    def _check_loss(self) -> None:
        known = MAP_LOSSES if self.of.is_map else VECTOR_LOSSES
        if self.loss.kind not in known:
            raise ValueError(f"loss {self.loss.kind} cannot compare {self._what}; it takes {', '.join(known)}")
        if self.loss.kind == "kl" and self.of.kind == "attention_scores":
            raise ValueError("kl compares distributions: use `of: attention`, which is the softmax of the scores")

    @property
    def teacher_statistics(self) -> bool:
        """Whether the loss needs means of the teacher's features over the whole optimizer step."""
        return self.normalise in ("batch", "whiten") or self.loss.kind == "nd"


def layer_pairs(config: FeatureConfig, student: int, teacher: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Which student layers meet which teacher layers, for models of that many layers; ValueError where one is not.

    `uniform` is TinyBERT's map (1909.10351): student layer l meets teacher layer l x L_teacher / L_student, rounded.
    """
    if config.of.kind == "embedding":
        return [((0,), (0,))]
    if config.layers == "all":
        return [(tuple(range(1, student + 1)), tuple(range(1, teacher + 1)))]
    if config.layers == "last":
        return [((student,), (teacher,))]
    if config.layers == "uniform":
        return [((i,), (max(1, (2 * i * teacher + student) // (2 * student)),)) for i in range(1, student + 1)]
    assert isinstance(config.layers, dict)
    return [((_at(s, student, "student"),), (_at(t, teacher, "teacher"),)) for s, t in config.layers.items()]


def _at(layer: int, count: int, who: str) -> int:
    found = layer + count + 1 if layer < 0 else layer
    if not 0 <= found <= count:
        raise ValueError(f"layers: the {who} has layers 1 to {count} (0 is its embedding), not {layer}")
    return found
