"""A recipe: YAML in, a frozen typed configuration out; the method is expanded and unknown keys are errors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, PlainSerializer, PlainValidator, ValidationError, field_validator, model_validator

from kdrl.checkpoint import CheckpointConfig
from kdrl.config import Config
from kdrl.errors import UserError, nearest
from kdrl.evaluation import EvaluateConfig
from kdrl.methods import get_method
from kdrl.models.config import ModelConfig
from kdrl.objectives.schedules import Schedule
from kdrl.objectives.scores import Score
from kdrl.objectives.terms import TERMS, ScheduleField, TermConfig
from kdrl.optimizers import OptimizerKind
from kdrl.overrides import assign, parse_override
from kdrl.plugins import load_plugins
from kdrl.problems import explain_validation
from kdrl.sources import SOURCES, SourceConfig
from kdrl.tasks.config import TaskConfig
from kdrl.teachers.combined import CombinedConfig, TeacherEntry, is_combined
from kdrl.teachers.config import SelfTeacherConfig, TeacherConfig
from kdrl.teachers.prepare import PREPARATIONS
from kdrl.watch import LogConfig
from kdrl.yamls import read_recipe


@dataclass(frozen=True)
class Entry:
    """One term of an objective, as a recipe writes it: `{name: {settings}}`."""

    name: str
    config: TermConfig

    def parts(self) -> dict[str, TermConfig]:
        """The settings by the term's name."""
        return {self.name: self.config}


def read_entry(raw: Any) -> Entry:
    """One objective entry from its recipe form; raises ValueError saying what is wrong."""
    if isinstance(raw, Entry):
        return raw
    if isinstance(raw, str):
        raw = {raw: {}}
    if not (isinstance(raw, dict) and len(raw) == 1):
        raise ValueError(f"an objective entry is one term with its settings, as `- distill: {{...}}`, not {raw!r}")
    name, settings = next(iter(raw.items()))
    if name not in TERMS:
        raise ValueError(f"no objective term is called {name!r}{nearest(str(name), TERMS)}")
    try:
        return Entry(name, TERMS.get(name).Config.model_validate(settings or {}))
    except ValidationError as error:
        lines = explain_validation(error, TERMS.get(name).Config, f"{name}.")
        raise ValueError("; ".join(lines)) from None


def _write_entry(entry: Entry) -> dict[str, Any]:
    return {entry.name: plain(entry.config)}


Share = Annotated[float, Field(ge=0.0, lt=1.0)]
EntryField = Annotated[Entry, PlainValidator(read_entry), PlainSerializer(_write_entry)]


def plain(config: Config) -> dict[str, Any]:
    """A section as plain data; a null stays only where the default is something else."""
    out: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        live = getattr(config, key, None)
        if value is None and type(config).model_fields[key].default is None:
            continue
        sectioned = isinstance(live, Config) and isinstance(value, dict) and "_read" not in type(live).__dict__
        out[key] = plain(live) if sectioned else value  # type: ignore[arg-type]
    return out


class RolloutConfig(Config):
    """How responses are written."""

    prompts: int = Field(default=16, ge=1)
    """Problems per step."""
    group: int = Field(default=8, ge=1)
    """Responses per problem."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Length limit of a response in tokens; a longer one is cut and counts as truncated."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Temperature of the policy: it samples, is scored and is compared with the teacher at this one temperature."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling; below 1 the samples are not the policy's own, so `filtered` must ask for it by name."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens (0: all); like top_p it needs `filtered`."""
    filtered: bool = False
    """Allow top_p and top_k in training although importance ratios and KL estimates are then biased."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    rows: int = Field(default=256, ge=1)
    """Responses decoded at once."""
    dynamic_sampling: int = Field(default=0, ge=0)
    """Extra rounds of sampling to replace groups of equal rewards (DAPO, 2503.14476); 0 switches it off."""


class OptimizerConfig(Config):
    """AdamW and what surrounds it."""

    kind: OptimizerKind = "adamw"
    """`adamw` is fused; of bitsandbytes (extra `gpu`): `adamw_8bit` holds moments in 8 bits, a quarter of the memory,
    and `paged_adamw_32bit` and `paged_adamw_8bit` have them paged out where a GPU is short of memory."""
    master_weights: bool = False
    """Step on float32 copies of bfloat16 weights, so that small updates add up; 4 bytes a weight, and float32 moments.
    """
    lr: ScheduleField = Field(default_factory=lambda: Schedule(1.0e-6))
    """Learning rate: a number or a schedule such as {cosine: {from: 1e-4, to: 0}}."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1.0e-8, gt=0.0)
    """AdamW's denominator offset."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; null for no clipping."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per batch of rollouts; more than one uses old log-probs and importance ratios."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each batch of rollouts."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens per forward pass, a prompt counted once for the responses that share it, or padded where a model cannot be
    packed; changes memory and speed, never the result."""
    stop_after_bad: int = Field(default=5, ge=1)
    """Stop after this many updates in a row whose gradient was not finite; each is skipped and counted."""
    extragradient: bool = False
    """Every second step starts from where the one before it did, with the gradient on text written after that one,
    which only looked ahead (EGPO, 2503.08942); weights and moments are held twice."""


class Recipe(Config):
    """Everything a run is made of."""

    method: str | None = None
    """A published method by name (`kdrl methods` lists them); it fills `objective` and what belongs to it."""
    objective: tuple[EntryField, ...] = ()
    """Terms that are minimised together; replaces the list that `method` stands for."""
    source: SourceConfig = SourceConfig()
    """Who writes the responses: student, gold, teacher, or a kind with its settings, such as {mixture: 0.5},
    {buffer: {share: {on_rise: {}}}}, {speculative: 25}, {mixed: 0.2}, {corrupt: 0.3}, {pair: teacher}, {guided: 1},
    {traces: FILE}, {filtered: right}, {privileged: {template: ...}}."""
    steps: int = Field(default=100, ge=0)
    """Training steps, each with its own rollouts."""
    seed: int = 0
    """Everything random follows from it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    plugins: tuple[str, ...] = ()
    """Python files or modules to import first: one's own terms, masks, schedules, verifiers, tasks."""
    student: ModelConfig
    """The model that is trained."""
    teacher: TeacherConfig | None = None
    """The model that scores or writes; needed by distill terms and source teacher."""
    teachers: dict[str, TeacherEntry] = Field(default_factory=dict)
    """Further teachers by name, each as `teacher` or {route: ...}, {average: ...}, {best: ...} of others; a distill
    term asks one by `teacher: NAME`. `teacher` itself may be such a combination."""
    self_teacher: SelfTeacherConfig = SelfTeacherConfig()
    """The student that distill terms with `teacher: self` ask; by default as it is, under the privileged prompt."""
    task: TaskConfig
    """Prompts and their verifier."""
    rollout: RolloutConfig = RolloutConfig()
    """How responses are written."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the student is updated."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation during and after training."""
    log: LogConfig = LogConfig()
    """What is written down and shown."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    deviations: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Per method, dotted keys that this recipe sets otherwise than the method does, such as
    {kdrl: {objective.distill.weight: 0.5}}; printed as deviations at the start."""

    @field_validator("objective", mode="before")
    @classmethod
    def _terms_are_a_list(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping):
            shown = ", ".join(f"{{{name}: {{...}}}}" for name in raw) or "{distill: {...}}"
            raise ValueError(f"the terms are a list with one entry each, as [{shown}], not a mapping")
        if isinstance(raw, str):
            raise ValueError(f"the terms are a list, as [{raw}] or [{{{raw}: {{...}}}}], not the name of one alone")
        return raw

    @model_validator(mode="before")
    @classmethod
    def _combined_teacher(cls, raw: Any) -> Any:
        # `teacher: {route: ...}` is one of `teachers` that happens to be called teacher.
        if not (isinstance(raw, Mapping) and is_combined(raw.get("teacher"))):
            return raw
        return {**raw, "teacher": None, "teachers": {**(raw.get("teachers") or {}), "teacher": raw["teacher"]}}

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back to the same recipe."""
        return yaml.safe_dump(plain(self), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping; other values replace."""
    out = copy.deepcopy(dict(base))
    for key, value in over.items():
        old = out.get(key)
        # A source is one of several: two of them do not mix.
        both = isinstance(old, dict) and isinstance(value, Mapping) and key != "source"
        out[key] = merge(old, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return out


def _expand(raw: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Method below recipe, then the recipe's deviations for that method, then the command line."""
    method = raw.get("method")
    deviations = raw.get("deviations") or {}
    if not isinstance(deviations, dict) or not all(isinstance(d, dict) for d in deviations.values()):
        raise UserError("deviations maps a method to dotted keys, as {kdrl: {objective.distill.weight: 0.5}}")
    for name in deviations:
        get_method(name)
    if method is not None:
        raw = merge(get_method(str(method)).recipe, raw)
        for key, value in deviations.get(method, {}).items():
            assign(raw, key, value, f"deviations.{method}")
    for key, value in overrides:
        assign(raw, key, value, "the command line")
    raw["deviations"] = {}
    return raw


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or a mapping, with `key.sub=value` overrides; raises UserError for anything amiss."""
    if isinstance(source, Mapping):
        raw, where = copy.deepcopy(dict(source)), "the recipe"
    else:
        raw, where = read_recipe(Path(source)), str(source)
    pairs = [parse_override(text) for text in overrides]
    # The method and the plugins decide how the rest is read, so they come first.
    for key, value in pairs:
        if key in ("method", "plugins", "objective"):
            raw[key] = value
    plugins = raw.get("plugins") or ()
    if not isinstance(plugins, str | list | tuple):
        raise UserError(f"plugins is a list of Python files or modules, not {plugins!r}")
    load_plugins([plugins] if isinstance(plugins, str) else plugins, where)
    if isinstance(plugins, str):
        raw["plugins"] = [plugins]
    raw = _expand(raw, [(k, v) for k, v in pairs if k not in ("method", "plugins", "objective")])
    recipe = validate(raw, where)
    from kdrl.checks import check_recipe

    check_recipe(recipe)
    return recipe


def validate(raw: Mapping[str, Any], where: str) -> Recipe:
    """A Recipe from plain data; every problem becomes one sentence that names its key."""
    try:
        return Recipe.model_validate(dict(raw))
    except ValidationError as error:
        lines = explain_validation(error, Recipe, "")
        if is_combined(raw.get("teacher")):
            lines = [line.replace("teachers.teacher", "teacher", 1) for line in lines]
        raise UserError(f"{where} is not a valid recipe:\n  " + "\n  ".join(lines)) from None


def describe_fields(kind: type[Config] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every recipe key as (dotted name, default, documentation), for --help."""
    rows: list[tuple[str, str, str]] = []
    for name, field in kind.model_fields.items():
        inner = _section(field.annotation)
        rows.append((prefix + name, _default(field), " ".join((field.description or "").split())))
        if inner is not None:
            rows += describe_fields(inner, f"{prefix}{name}.")
    return rows


def describe_terms() -> list[tuple[str, str, str]]:
    """The settings of every objective term, as `describe_fields` gives the recipe's keys."""
    return [row for name in TERMS for row in describe_fields(TERMS.get(name).Config, f"objective.{name}.")]


def describe_sources() -> list[tuple[str, str, str]]:
    """The settings of every kind of source, below its own name."""
    return [row for name in SOURCES for row in describe_fields(SOURCES.get(name), f"source.{name}.")]


def describe_combinations() -> list[tuple[str, str, str]]:
    """The settings of a teacher that is made of several."""
    return describe_fields(CombinedConfig, "teachers.NAME.")


def describe_preparations() -> list[tuple[str, str, str]]:
    """The settings of everything that `teacher.prepare` can name."""
    return [r for n in PREPARATIONS for r in describe_fields(PREPARATIONS.get(n).Config, f"teacher.prepare.{n}.")]


def _section(annotation: Any) -> type[Config] | None:
    options = [annotation, *get_args(annotation)]
    found = [o for o in options if isinstance(o, type) and issubclass(o, Config)]
    # SourceConfig and its like are written in one word or mapping, documented at the field itself.
    written = [o for o in found if "_read" not in o.__dict__]
    return written[0] if written else None


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        dumped = value.model_dump(mode="json")
        return str(dumped) if isinstance(dumped, str | int | float) else ""
    value = value.spec if isinstance(value, Schedule | Score) else value
    # As a recipe would say it: null, true, [].
    dumped = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return dumped.strip().removesuffix("...").strip()
