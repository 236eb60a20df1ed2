"""What a run shows while it goes: metrics.jsonl, sample rollouts, live progress, and trackers switched on by flags.

Left out: alerts and system metrics (the trackers have their own).
"""

from __future__ import annotations

import netrc
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from kdrl.config import Config
from kdrl.errors import UserError
from kdrl.jsonlines import JsonLines, plain


class LogConfig(Config):
    """What a run writes and shows besides its metrics.jsonl, which is always written."""

    progress: Literal["auto", "live", "plain", "off"] = "auto"
    """`live` redraws one line, `plain` prints lines; `auto` is live on a terminal and plain elsewhere."""
    plain_every_s: float = Field(default=5.0, ge=0)
    """Seconds between plain lines; the first and the last step are always printed."""
    rollouts_every: int = Field(default=10, ge=0)
    """Save sample rollouts every this many steps; 0 saves none."""
    rollouts: int = Field(default=4, ge=1)
    """How many rollouts of such a step are saved."""
    gradients_every: int = Field(default=10, ge=0)
    """Every this many steps, norm ratio and cosine of the terms' gradients (costs a backward per term); 0 never."""
    tensorboard: bool = False
    """Also write TensorBoard events under RUN/tensorboard (extra `tensorboard`)."""
    wandb: bool = False
    """Also log to Weights & Biases; without a login it runs offline under RUN/wandb (extra `wandb`)."""
    trackio: bool = False
    """Also log to a local trackio project (extra `trackio`)."""
    project: str | None = None
    """Project name for wandb and trackio; `kdrl` when unset."""

    @model_validator(mode="after")
    def _used_or_refused(self) -> LogConfig:
        if self.project is not None and not (self.wandb or self.trackio):
            raise ValueError(
                "log.project names a project for wandb or trackio, and neither is on; set log.wandb or remove it"
            )
        return self


class Metrics(JsonLines):
    """metrics.jsonl: one object a step with at least `step`, flushed every step; see JsonLines for resume."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one step; raises ValueError for a row without a step and UserError when the disk is full."""
        if "step" not in row:
            raise ValueError("a row of metrics needs its step")
        super().write(row)


class Sink(Protocol):
    """A tracker that numbers of a step are sent to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of one step."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class TensorBoardSink:
    """TensorBoard events under RUN/tensorboard; what lies beyond the resumed step is purged from view."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(_missing("log.tensorboard", "tensorboard")) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandbSink:
    """Weights & Biases; offline unless WANDB_MODE says otherwise or somebody is logged in, so that nothing asks."""

    def __init__(self, run_dir: Path, project: str, recipe: Mapping[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError as error:
            raise UserError(_missing("log.wandb", "wandb")) from error
        mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_login() else "offline")
        name = _tracking_name(run_dir)
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=name,
            resume="allow",
            dir=str(run_dir),
            config=dict(recipe),
            mode=mode,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All metrics of the step at once."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _wandb_login() -> bool:
    """Whether a key for api.wandb.ai is known; asking wandb itself may prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TrackioSink:
    """A local trackio project (or the Space or server that its own environment variables name)."""

    def __init__(self, run_dir: Path, project: str, recipe: Mapping[str, Any]) -> None:
        try:
            import trackio  # type: ignore[import-not-found]
        except ImportError as error:
            raise UserError(_missing("log.trackio", "trackio")) from error
        self._trackio = trackio
        trackio.init(project=project, name=_tracking_name(run_dir), resume="allow", config=plain(recipe), embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All metrics of the step at once."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()


def _missing(option: str, extra: str) -> str:
    return f"{option} needs the package {extra}; install it with: pip install 'kdrl[{extra}]'"


def _tracking_name(run_dir: Path) -> str:
    """A name that is this run's alone and stays the same when it is resumed."""
    path = run_dir / "tracking_id"
    try:
        if not path.exists():
            path.write_text(f"{run_dir.name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def build_sinks(config: LogConfig, run_dir: Path, start_step: int, recipe: Mapping[str, Any]) -> list[Sink]:
    """The trackers that the flags ask for; raises UserError naming the extra of a missing one."""
    project = config.project or "kdrl"
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoardSink(run_dir, start_step))
    if config.wandb:
        sinks.append(WandbSink(run_dir, project, recipe))
    if config.trackio:
        sinks.append(TrackioSink(run_dir, project, recipe))
    return sinks


# What the progress line shows: key of the step's row, word, format.
_SHOWN = [
    ("reward", "reward", ".3f"),
    ("accuracy", "acc", ".3f"),
    ("loss", "loss", ".4g"),
    ("kl_teacher", "KL", ".3f"),
    ("eval/accuracy", "dev", ".3f"),
    ("tokens_per_second", "tok/s", ",.0f"),
]


def step_line(row: Mapping[str, Any]) -> str:
    """The step's numbers as one line of words, without those the row lacks."""
    parts = [f"{word} {row[key]:{spec}}" for key, word, spec in _SHOWN if isinstance(row.get(key), (int, float))]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as 42s, 3:07 or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("left", ""), style="cyan")


class StepProgress:
    """Progress of a run: one live line on a terminal, else a plain line every few seconds."""

    def __init__(self, config: LogConfig, total: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout)
        auto = "live" if self.console.is_terminal else "plain"
        self.mode = auto if config.progress == "auto" else config.progress
        self._every, self._total, self._last_line = config.plain_every_s, total, -1.0
        # Time left follows the last steps: the first ones carry compilation and cold caches.
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), start)], maxlen=30)
        self._seen: dict[str, Any] = {}
        self._bar = self._make_bar(start) if self.mode == "live" else None

    def _make_bar(self, start: int) -> Progress:
        columns = [
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(20),
            TextColumn("{task.fields[line]}"),
            _TimeLeft(),
        ]
        bar = Progress(*columns, console=self.console, transient=False)
        self._task = bar.add_task("", total=self._total, completed=start, line="", left="")
        bar.start()
        return bar

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a finished step."""
        now, step = time.monotonic(), int(row["step"])
        # The development score is measured now and then; the last one stays in view.
        self._seen.update({key: value for key, value in row.items() if key.startswith("eval/")})
        line = step_line({**self._seen, **row} if self._bar else row)
        self._marks.append((now, step))
        left = self._time_left()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line, left=left)
        elif self.mode == "plain" and self._due(now, step, row):
            self._last_line = now
            self._print(f"step {step}/{self._total}  {line}  {left}".rstrip())

    def _due(self, now: float, step: int, row: Mapping[str, Any]) -> bool:
        first = self._last_line < 0
        evaluated = any(key.startswith("eval/") for key in row)
        return first or evaluated or step >= self._total or now - self._last_line >= self._every

    def _time_left(self) -> str:
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        if s1 <= s0 or s1 >= self._total:
            return ""
        return f"{clock((t1 - t0) / (s1 - s0) * (self._total - s1))} left"

    def note(self, text: str) -> None:
        """A sentence between the steps; shown in every mode but `off`."""
        if self.mode != "off":
            self._print(text)

    def _print(self, text: str) -> None:
        # Markup and highlighting off: a metric or a path may hold brackets. Plain lines are not wrapped for a pipe.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()


class Watch:
    """All of a run's output of one step in one call; a context manager that closes it.

    On resume give `start_step` and the `offsets` that `offsets()` returned when the checkpoint was saved.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: LogConfig,
        total_steps: int,
        *,
        start_step: int = 0,
        offsets: Mapping[str, int] | None = None,
        recipe: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        self.run_dir, self.config = Path(run_dir), config
        offsets = offsets or {}
        # First, so that a missing package is said before any file is made.
        self._sinks = build_sinks(config, self.run_dir, start_step, recipe or {})
        self.metrics = Metrics(self.run_dir / "metrics.jsonl", offsets.get("metrics"))
        self.rollouts = JsonLines(self.run_dir / "rollouts.jsonl", offsets.get("rollouts"))
        self.progress = StepProgress(config, total_steps, start_step, console)

    def wants_rollouts(self, step: int) -> bool:
        """Whether this step's rollouts are to be saved (the first step, and every `rollouts_every`)."""
        every = self.config.rollouts_every
        return every > 0 and (step == 1 or step % every == 0)

    def step(self, row: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any]] = ()) -> None:
        """Record one finished step; of `rollouts` the first `config.rollouts` are saved when the step wants them."""
        row = plain(row)
        self.metrics.write(row)
        if self.wants_rollouts(row["step"]):
            for rollout in rollouts[: self.config.rollouts]:
                self.rollouts.write({"step": row["step"], **rollout})
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for sink in self._sinks:
            sink.log(row["step"], numbers)
        self.progress.update(row)

    def note(self, text: str) -> None:
        """Say a sentence above the progress line."""
        self.progress.note(text)

    def offsets(self) -> dict[str, int]:
        """Bytes of metrics.jsonl and rollouts.jsonl, synced to disk: to be stored in a checkpoint."""
        return {"metrics": self.metrics.offset(), "rollouts": self.rollouts.offset()}

    def close(self) -> None:
        """Close files, trackers and the progress line."""
        self.progress.close()
        for sink in self._sinks:
            sink.close()
        self.metrics.close()
        self.rollouts.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
