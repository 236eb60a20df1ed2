"""Contract 4: a run that was killed with -9 and resumed has the same bytes as the one that was not."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import attempt, command, kill_until_done, server
from safetensors import safe_open
from tiny import raw_recipe, rows_of, run, with_teacher

from kdrl.errors import UserError
from kdrl.run import resume

TIMED = ("time/", "tokens_per_second", "rollout_tokens_per_second")


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return server()


def recipes(world: Path) -> dict[str, dict[str, Any]]:
    often: dict[str, Any] = {"steps": 6, "checkpoint": {"every": 1, "keep": 2}, "log": {"rollouts_every": 2}}
    teacher = with_teacher(world)
    judge = f"{world / 'judge.py'}:breaks"
    return {
        # A verifier that crashes on a third of the responses: its count is part of the state.
        "kdrl": raw_recipe(world, "kdrl", task={"verifier": {"name": judge}}, **often, **teacher),
        "gspo-lora": raw_recipe(world, "gspo", student={"lora": {"rank": 2}}, **often)
        | {"evaluate": {"every": 2, "problems": 3, "final_problems": 3}},
        "dapo": raw_recipe(world, "dapo", rollout={"group": 2, "dynamic_sampling": 3}, **often),
        "seqkd": raw_recipe(world, "sft", source="teacher", task={"limit": 11}, **often, **teacher),
        "gkd": raw_recipe(world, "gkd", rollout={"group": 2}, **often, **teacher),
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows_of(run_dir)]


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                found[f"{file.name}/{name}"] = stored.get_tensor(name).flatten().view(torch.uint8).numpy().tobytes()
    return found


def assert_same_run(one: Path, other: Path) -> None:
    assert timeless(one) == timeless(other)
    assert files_of(one / "final") == files_of(other / "final")
    checkpoints = [sorted(p.name for p in (r / "checkpoints").glob("*")) for r in (one, other)]
    assert checkpoints[0] == checkpoints[1], "the same checkpoints, and nothing half done is left"
    last = sorted((one / "checkpoints").glob("step-*"))[-1].name
    tensors = [tensors_of(r / "checkpoints" / last) for r in (one, other)]
    assert tensors[0] == tensors[1]
    assert any("exp_avg" in name or "state1" in name for name in tensors[0]), "the optimizer's state is part of it"
    assert (one / "rollouts.jsonl").read_bytes() == (other / "rollouts.jsonl").read_bytes()
    for name in ("teacher_text.jsonl", "evaluation.json"):
        if (one / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("name", ["kdrl", "gspo-lora", "dapo", "seqkd", "gkd"])
def test_killed_and_resumed_equals_undisturbed(name: str, world: Path, tmp_path: Path, context: ForkServerContext):
    raw = recipes(world)[name]
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    died, torn = kill_until_done(context, raw, tmp_path / "killed", seed=len(name), kills=3)
    assert (died, torn) >= (2, 1), "the test must have killed something, and a save in its middle"
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    rows = rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 7))
    if name == "kdrl":
        assert rows[-1]["verifier/crash"] > 0
    if name == "dapo":
        assert sum(row["dropped_groups"] for row in rows) > 0


def begin(context: ForkServerContext, folder: Path, arguments: list[str]) -> tuple[BaseProcess, Path]:
    said = folder / "said.txt"
    process = context.Process(target=command, args=(arguments, str(said)))
    process.start()
    return process, said


def wait_for(found: Callable[[], bool], process: BaseProcess) -> None:
    end = time.monotonic() + 60
    while not found():
        assert process.is_alive(), "the run ended before it could be stopped"
        assert time.monotonic() < end
        time.sleep(0.01)


def interrupt(process: BaseProcess) -> None:
    """Ctrl-C as a terminal sends it: to the whole process group, verifier workers included."""
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(world: Path, tmp_path: Path, context: ForkServerContext):
    raw = recipes(world)["kdrl"] | {"steps": 12, "checkpoint": {"every": 0}}
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    out = tmp_path / "stopped"
    process, said = begin(context, tmp_path, ["train", str(tmp_path / "recipe.yaml"), "--output", str(out)])
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    interrupt(process)
    process.join(60)
    assert process.exitcode == 1
    done = len(rows_of(out))
    assert 2 <= done < 12
    assert f"stopped after step {done}" in said.read_text()
    assert f"kdrl train --resume {out}" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert (out / "checkpoints" / f"step-{done:06d}").is_dir()
    assert attempt(context, raw, out, None, 60.0) == 0
    assert timeless(tmp_path / "whole") == timeless(out)
    assert files_of(tmp_path / "whole" / "final") == files_of(out / "final")


def test_a_second_ctrl_c_ends_at_once(world: Path, tmp_path: Path, context: ForkServerContext):
    (tmp_path / "slow.py").write_text("import time\n\n\ndef slow(response, problem):\n    time.sleep(50)\n")
    judge = {"name": f"{tmp_path / 'slow.py'}:slow", "timeout_s": 60.0}
    raw = raw_recipe(world, "grpo", task={"verifier": judge}, log={"progress": "plain"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    out = tmp_path / "stopped"
    process, said = begin(context, tmp_path, ["train", str(tmp_path / "recipe.yaml"), "--output", str(out)])
    wait_for(lambda: (out / "rollouts.jsonl").exists(), process)
    time.sleep(0.3)
    interrupt(process)
    wait_for(lambda: "stopping: this step is finished" in said.read_text(), process)
    interrupt(process)
    process.join(20)
    assert process.exitcode == 1
    assert "stopped at once; the last checkpoint is whole" in said.read_text()
    assert f"kdrl train --resume {out}" in said.read_text()
    assert "Traceback" not in said.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["kdrl", "gspo-lora", "dapo", "seqkd", "gkd"])
def test_killed_many_times(name: str, seed: int, world: Path, tmp_path: Path, context: ForkServerContext):
    raw = recipes(world)[name]
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    kill_until_done(context, raw, tmp_path / "killed", seed=100 + seed, kills=12)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_killed_from_outside_by_the_clock(world: Path, tmp_path: Path, context: ForkServerContext):
    raw = recipes(world)["kdrl"]
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    codes = [attempt(context, raw, tmp_path / "killed", None, seconds) for seconds in (0.9, 0.7, 60.0)]
    if 0 not in codes:
        codes.append(attempt(context, raw, tmp_path / "killed", None, 60.0))
    assert codes[-1] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_killed_before_the_first_checkpoint_starts_over(world: Path, tmp_path: Path, context: ForkServerContext):
    raw = recipes(world)["seqkd"]
    raw["checkpoint"] = {"every": 0}
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    assert attempt(context, raw, tmp_path / "killed", 16, 60.0) == -9
    left = (tmp_path / "killed" / "teacher_text.jsonl").read_text()
    assert left, "the kill must have left something to cut back"
    assert not list((tmp_path / "killed" / "checkpoints").glob("step-*"))
    said: list[str] = []
    resume(tmp_path / "killed", say=lambda text: said.append(str(text)))
    assert any("no checkpoint yet" in text for text in said)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    raw = recipes(world)["kdrl"]
    run(raw, tmp_path / "whole")
    run(raw, tmp_path / "torn")
    newest = tmp_path / "torn" / "checkpoints" / "step-000006"
    file = newest / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    said: list[str] = []
    resume(tmp_path / "torn", say=lambda text: said.append(str(text)))
    assert f"resuming {tmp_path / 'torn'} after step 5" in said
    assert any(str(newest) in record.message and "damaged" in record.message for record in caplog.records)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


def test_resuming_a_finished_run_changes_nothing(world: Path, tmp_path: Path):
    run(recipes(world)["gspo-lora"], tmp_path / "run")
    before = files_of(tmp_path / "run")
    resume(tmp_path / "run", say=lambda text: None)
    after = files_of(tmp_path / "run")
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {"report.html"}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no run to resume: it has no recipe.yaml"), ("[1]", "not a recipe any more"), ("a: [", "is not YAML")],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, words: str):
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=words):
        resume(tmp_path)


def test_another_recipe_than_the_checkpoints_is_refused(world: Path, tmp_path: Path):
    run(recipes(world)["seqkd"] | {"steps": 1}, tmp_path / "run")
    stored = tmp_path / "run" / "recipe.yaml"
    written = stored.read_text()
    for old, new, words in [
        ("gradient_checkpointing: false", "lora: {rank: 2}", "another list of trained parameters"),
        ("intermediate_size: 24", "intermediate_size: 28", r"of shape \[16, 24\], and the student's is \[16, 28\]"),
    ]:
        stored.write_text(written.replace(old, new))
        with pytest.raises(UserError, match=words):
            resume(tmp_path / "run", say=lambda text: None)


def test_state_is_plain_json(world: Path, tmp_path: Path):
    """What a checkpoint holds beside tensors can be read by a person."""
    run(recipes(world)["kdrl"] | {"steps": 1}, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state["progress"]["position"] == 3
    assert state["offsets"]["metrics"] == (tmp_path / "run" / "metrics.jsonl").stat().st_size
