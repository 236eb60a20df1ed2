from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from kdrl import watch
from kdrl.errors import UserError
from kdrl.jsonlines import read_lines
from kdrl.watch import LogConfig, Metrics, StepProgress, Watch, clock


def silent(**fields: Any) -> LogConfig:
    return LogConfig(progress="off", **fields)


def test_watch_writes_metrics_and_the_first_rollouts_of_due_steps(tmp_path: Path):
    with Watch(tmp_path, silent(rollouts_every=2, rollouts=2), 5) as seen:
        for step in range(1, 6):
            seen.step({"step": step, "reward": 0.5}, [{"response": f"{step}.{i}"} for i in range(3)])
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")[0]] == [1, 2, 3, 4, 5]
    rollouts = [row["response"] for row in read_lines(tmp_path / "rollouts.jsonl")[0]]
    assert rollouts == ["1.0", "1.1", "2.0", "2.1", "4.0", "4.1"]


def test_rollouts_can_be_switched_off(tmp_path: Path):
    with Watch(tmp_path, silent(rollouts_every=0), 1) as seen:
        seen.step({"step": 1}, [{"response": "x"}])
    assert (tmp_path / "rollouts.jsonl").read_bytes() == b""


def test_resume_cuts_both_files_back_to_the_checkpoint(tmp_path: Path):
    config = silent(rollouts_every=1)

    def steps(seen: Watch, first: int, last: int) -> None:
        for step in range(first, last + 1):
            seen.step({"step": step, "loss": step / 7}, [{"response": "é" * step}])

    with Watch(tmp_path / "whole", config, 6) as seen:
        steps(seen, 1, 6)
    with Watch(tmp_path / "cut", config, 6) as seen:
        steps(seen, 1, 3)
        offsets = seen.offsets()
        steps(seen, 4, 5)
    with Watch(tmp_path / "cut", config, 6, start_step=3, offsets=offsets) as seen:
        steps(seen, 4, 6)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_row_of_metrics_has_a_step(tmp_path: Path):
    with pytest.raises(ValueError, match="step"):
        Metrics(tmp_path / "m").write({"loss": 1.0})


def run_plain(config: LogConfig, rows: list[dict[str, Any]], total: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(watch.time, "monotonic", lambda: float(next(now)))
    out = io.StringIO()
    progress = StepProgress(config, total, console=Console(file=out, width=40))
    for row in rows:
        progress.update(row)
    progress.close()
    return out.getvalue().splitlines()


def test_plain_lines_come_every_few_seconds_and_first_and_last(monkeypatch: pytest.MonkeyPatch):
    rows = [{"step": i, "reward": 0.25, "kl_teacher": 0.5, "tokens_per_second": 1234.0} for i in range(1, 11)]
    lines = run_plain(LogConfig(plain_every_s=6), rows, 10, monkeypatch)
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[0] == "step 1/10  reward 0.250  KL 0.500  tok/s 1,234  18s left", "not wrapped at the width of a pipe"
    assert "left" not in lines[-1]


def test_an_evaluation_is_always_printed(monkeypatch: pytest.MonkeyPatch):
    rows: list[dict[str, Any]] = [{"step": i} for i in range(1, 5)]
    rows[2]["eval/accuracy"] = 0.5
    lines = run_plain(LogConfig(plain_every_s=100), rows, 9, monkeypatch)
    assert [line.split()[1] for line in lines] == ["1/9", "3/9"]
    assert "dev 0.500" in lines[1]


def test_off_prints_nothing_and_absent_or_null_numbers_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    rows = [{"step": 1}, {"step": 2, "reward": None, "loss": None}]
    assert run_plain(LogConfig(progress="off"), rows, 2, monkeypatch) == []
    assert len(run_plain(LogConfig(plain_every_s=0), rows, 2, monkeypatch)) == 2


def test_live_line_keeps_the_last_evaluation_in_view():
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    progress = StepProgress(LogConfig(), 3, console=console)
    assert progress.mode == "live"
    progress.update({"step": 1, "eval/accuracy": 0.75})
    progress.update({"step": 2, "reward": 0.5})
    progress.note("a [bracketed] note")
    progress.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "dev 0.750" in text.splitlines()[-1] or "dev 0.750" in text[text.rfind("2/3") :]
    assert "a [bracketed] note" in text


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4s"), (187, "3:07"), (3723, "1:02:03"), (59.7, "1:00")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_names_its_extra_before_any_file_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UserError, match=rf"kdrl\[{name}\]"):
        Watch(tmp_path / "run", silent(**{name: True}), 1)
    assert not (tmp_path / "run").exists()


def test_project_without_a_tracker_is_refused():
    with pytest.raises(ValidationError, match="neither is on"):
        LogConfig(project="x")
    assert LogConfig(project="x", trackio=True).project == "x"


class FakeTracker(SimpleNamespace):
    """Stands for wandb's and trackio's module at once, and for wandb's run."""

    def __init__(self) -> None:
        super().__init__(inits=[], logs=[], closed=0)

    def init(self, **kwargs: Any) -> FakeTracker:
        self.inits.append(kwargs)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logs.append((step, values))

    def finish(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_numbers_only_and_keep_their_run_on_resume(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    run = tmp_path / "run"
    run.mkdir()
    config = silent(**{name: True}, project="mine")
    with Watch(run, config, 2, recipe={"seed": 1}) as seen:
        seen.step({"step": 1, "loss": 0.5, "bad": float("nan"), "word": "x", "flag": True})
        offsets = seen.offsets()
    with Watch(run, config, 2, start_step=1, offsets=offsets) as seen:
        seen.step({"step": 2, "loss": 0.25})
    assert fake.logs == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert fake.closed == 2
    first, second = fake.inits
    key = "id" if name == "wandb" else "name"
    assert first[key] == second[key]
    assert (first["project"], first["resume"], first["config"]) == ("mine", "allow", {"seed": 1})
    assert first.get("mode", "offline") == "offline"


def test_tensorboard_events_are_written(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Watch(tmp_path, silent(tensorboard=True), 1) as seen:
        seen.step({"step": 1, "eval/accuracy": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/accuracy")] == [(1, 0.5)]
