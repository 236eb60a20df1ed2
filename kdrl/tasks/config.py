"""The `task` section of a recipe."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from kdrl.config import Config
from kdrl.errors import UserError, nearest

ExtractHow = Literal["whole", "last_number", "boxed", "regex", "after", "tag"]
_EXTRACTS = ("whole", "last_number", "boxed", "regex", "after", "tag")
_WITH_ARGUMENT = {
    "regex": "a pattern whose first group (or whole match) is the answer",
    "after": "the text after which the answer stands",
    "tag": "the tag's name",
}


class ExtractConfig(Config):
    """Which part of a text is the answer: `boxed`, `{after: "####"}`, `{regex: "= (\\d+)$"}`, `{tag: answer}`."""

    how: ExtractHow = "whole"
    """`whole`, `last_number`, `boxed` (last complete \\boxed{}), `regex` (last match), `after` (the rest of the line
    after the last occurrence of a text) or `tag` (the last <tag>...</tag>)."""
    argument: str | None = None
    """Pattern, text or tag of `regex`, `after` and `tag`."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"how": value}
        elif isinstance(value, dict) and len(value) == 1 and (name := next(iter(value))) not in ("how", "argument"):
            value = {"how": name, "argument": value[name]}
        if isinstance(value, dict) and (how := value.get("how", "whole")) not in _EXTRACTS:
            raise UserError(f"task: no extraction is called {how!r}{nearest(str(how), _EXTRACTS)}")
        return value

    @model_validator(mode="after")
    def _argument_fits(self) -> Self:
        if self.how in _WITH_ARGUMENT and not self.argument:
            wanted = _WITH_ARGUMENT[self.how]
            raise UserError(f"task: extraction {self.how!r} needs {wanted}; write `{{{self.how}: ...}}`.")
        if self.how not in _WITH_ARGUMENT and self.argument is not None:
            raise UserError(f"task: extraction {self.how!r} takes no argument, but {self.argument!r} was given.")
        return self


class VerifierConfig(Config):
    """Who decides whether a response is right; a bare name stands for `{name: ...}`."""

    name: str | None = None
    """`exact`, `numeric`, `math`, `regex`, `reasoning_gym`, a registered name, `module:function` or `file.py:function`;
    null: the task's own for reasoning_gym, else `exact`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the verifier, e.g. `{tolerance: 0.01}` for `numeric`."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds one verification may run before it is stopped and scores 0; waiting for a free worker does not count."""
    workers: int = Field(default=2, ge=1)
    """Worker processes."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class HoldoutConfig(Config):
    """Shares of all problem texts that are kept from training; which text falls where depends on the text alone."""

    development: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share for tuning decisions."""
    test: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share for the final evaluation."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.development + self.test > 1.0:
            raise UserError("task.holdout: development and test together are more than 1.")
        return self


class FormatConfig(Config):
    """A bonus for responses that have a form, whether right or wrong."""

    pattern: str
    """Regular expression that the whole response must contain (search, with `.` matching line ends)."""
    bonus: float = 0.1
    """What a response of that form gains."""


class OverlongConfig(Config):
    """Soft over-length punishment, arXiv 2503.14476 eq. 13: 0 up to max_tokens - buffer, then linear to -penalty."""

    buffer: int = Field(gt=0)
    """Tokens before the response limit over which the punishment grows (the paper: 4,096 of 20,480)."""
    penalty: float = Field(default=1.0, ge=0)
    """What a response at the limit loses."""


class RewardConfig(Config):
    """What is added to the verifier's score; `correct` is never changed by it."""

    format: FormatConfig | None = None
    """Bonus for a form."""
    overlong: OverlongConfig | None = None
    """Punishment near the response limit."""


class TaskConfig(Config):
    """Where prompts come from and how responses are judged."""

    name: str | None = None
    """`reasoning_gym`, `data`, a registered task, `module:function` or `file.py:function`; null means `data`."""
    dataset: str | None = None
    """The reasoning-gym task (`chain_sum`), or a `datasets` folder or hub id."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """reasoning-gym difficulty, arguments of a registered task, or `name`/`revision`/`data_dir` of a hub data set."""
    path: str | list[str] | None = None
    """JSONL, JSON (a list), Parquet or CSV file(s) with the training problems."""
    development_path: str | list[str] | None = None
    """File(s) with the development problems; may share no prompt with the training problems."""
    test_path: str | list[str] | None = None
    """File(s) with the test problems; may share no prompt with the others."""
    columns: dict[Literal["prompt", "messages", "answer", "solution", "weight"], str] = Field(default_factory=dict)
    """Which column is the prompt, messages, answer or solution, where the column is not called so. `weight` names a
    column of numbers: training then meets each problem in proportion to it (without it, each once an epoch)."""
    template: str | None = None
    """User text as a format string over the item's columns or metadata, e.g. `"{expression}="`; a name with `_compact`
    added is that field without white space; null: the question or prompt as it is."""
    split_by: str | None = None
    """Format string for the text that decides the split; null: the rendered user text. Recipes whose templates differ
    share their splits when this is the same."""
    system_prompt: str | None = None
    """System message; prompts are then chat messages."""
    limit: int | None = Field(default=None, ge=1)
    """Train on the first n training problems only, in reshuffled epochs."""
    solution: str | None = None
    """Writer of worked solutions: `chain_sum`, `chain_sum_spoken`, ... or `module:function`."""
    corrupt: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of training solutions with one wrong intermediate result, from which the solution then goes on."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens, after the chat template."""
    on_long: Literal["skip", "refuse"] = "skip"
    """What to do with a longer one: leave it out (counted), or stop with an error that names it."""
    holdout: HoldoutConfig | None = None
    """Shares kept from training; null: 0.1 and 0.1 for reasoning_gym, none for data."""
    held_out_seed: int = 0
    """Seed of generated development and test problems: apart from the run's, so that all runs are measured alike."""
    on_shared: Literal["refuse", "drop"] = "refuse"
    """A held-out file's prompt that is in the training file too: stop, or `drop` it from training (counted)."""
    verifier: VerifierConfig = VerifierConfig()
    """Who decides whether a response is right."""
    reasoning_tag: str | None = "think"
    """Everything up to the last closing tag of this name is reasoning and not looked at; null: no such tag."""
    extract: ExtractConfig | None = None
    """Which part of a response is the answer; null: the last number for `numeric`, else the whole response."""
    reference_extract: ExtractConfig = ExtractConfig()
    """Which part of the data's answer column is the answer, e.g. `{after: "####"}` for GSM8K."""
    rewards: RewardConfig = RewardConfig()
    """Format bonus and over-length punishment."""

    @property
    def kind(self) -> str:
        """The task's name with the default filled in."""
        return self.name or "data"

    def changed(self, *keys: str) -> list[str]:
        """Those of `keys` whose value is not the default."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default(call_default_factory=True)]

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        # What says the default is not refused: a resolved recipe states every key.
        data_only = self.changed("path", "development_path", "test_path", "on_shared")
        if self.kind != "data" and (extra := sorted(data_only)):
            raise UserError(f"task.{extra[0]} is for data files, but task.name is {self.kind!r}; drop one of the two.")
        if self.kind == "reasoning_gym":
            self._check_generated()
        if self.corrupt and not self.solution:
            raise UserError("task.corrupt needs task.solution, the writer whose solutions are to be corrupted.")
        if self.on_long != "skip" and self.max_prompt_tokens is None:
            raise UserError("task.on_long does nothing without task.max_prompt_tokens; set both.")
        if self.kind == "data":
            self._check_data()
        return self

    def _check_generated(self) -> None:
        if not self.dataset:
            raise UserError("task.dataset is missing: the reasoning-gym task, for example `dataset: chain_sum`.")
        if self.columns or self.reference_extract.how != "whole":
            raise UserError("task.columns and task.reference_extract are for data files, not for reasoning_gym.")

    def _check_data(self) -> None:
        if self.dataset and self.path:
            raise UserError("task.path and task.dataset are both given; keep the one with the training problems.")
        if not (self.dataset or self.path or self.development_path or self.test_path):
            raise UserError("the task is empty: give task.path (a file), task.dataset, or task.name (reasoning_gym).")
        if self.settings and not self.dataset:
            raise UserError("task.settings has no meaning for data files; drop it.")
        for split in ("development", "test"):
            if getattr(self, f"{split}_path") and self.holdout and getattr(self.holdout, split):
                raise UserError(f"task.{split}_path and task.holdout.{split} are both given; keep one of the two.")
