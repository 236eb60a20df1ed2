"""A device out of memory: the work that failed is done anew in halves, and the run is the one with the smaller number.

There is no such error on a CPU, so it is raised by hand, after the work was done: whatever that left behind is there.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optimizers import stop_at
from test_resume import assert_same_run, files_of, timeless
from tiny import parts_of, raw_recipe, rows_of, run, with_teacher

from kdrl.checkpoint import Checkpoints
from kdrl.engines import TorchEngine
from kdrl.engines.joint import JointEngine
from kdrl.errors import RunError
from kdrl.limits import Limit, Limits, told
from kdrl.recipe import load_recipe
from kdrl.run import resume
from kdrl.teachers import LocalTeacher, ReferenceTeacher, SelfTeacher
from kdrl.update import Updater

TOKENS, ROWS = "optimizer.micro_batch_tokens", "rollout.rows"
ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"


def out_of_memory(patch: pytest.MonkeyPatch, kind: type, name: str, *at: int) -> list[int]:
    """Have calls of a method, counted from 1, fail at their end; returns the list that their numbers are put in."""
    plain, calls = getattr(kind, name), []

    def method(self: Any, *given: Any, **named: Any) -> Any:
        done = plain(self, *given, **named)
        calls.append(len(calls) + 1)
        if calls[-1] in at:
            raise torch.OutOfMemoryError(ERROR)
        return done

    patch.setattr(kind, name, method)
    return calls


def without_halving(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("halved/")} for row in timeless(run_dir)]


def recipes(world: Path) -> dict[str, dict[str, Any]]:
    often: dict[str, Any] = {"steps": 3, "optimizer": {"micro_batch_tokens": 48}}
    teacher = with_teacher(world)
    return {
        "grpo": raw_recipe(world, "grpo", **often),
        "kdrl": raw_recipe(world, "kdrl", **often, **teacher),
        "balance": raw_recipe(world, "kdrl", log={"gradients_every": 1}, **often, **teacher),
        "several": raw_recipe(world, "grpo", steps=3, optimizer={"micro_batch_tokens": 48, "minibatches": 2}),
    }


CASES = [
    ("grpo", Updater, "accumulate", TOKENS),
    ("kdrl", LocalTeacher, "score", TOKENS),
    ("several", Updater, "score_policy", TOKENS),
    ("kdrl", TorchEngine, "generate", ROWS),
]


@pytest.mark.parametrize(("name", "kind", "method", "option"), CASES)
def test_the_run_is_the_one_with_half_of_it(
    name: str, kind: type, method: str, option: str, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To the byte: gradients and sums of the attempt that failed are gone."""
    raw = recipes(world)[name]
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "kdrl"):
        calls = out_of_memory(patch, kind, method, 1)
        run(raw, tmp_path / "disturbed")
    rows = rows_of(tmp_path / "disturbed")
    half = rows[0][f"halved/{option}"]
    assert [row[f"halved/{option}"] for row in rows] == [half] * 3
    assert half == (24 if option == TOKENS else 6)
    assert f"{option} is {half} from now on, which changes no result" in caplog.text
    assert len(calls) > 2
    section, key = option.split(".")
    run(raw | {section: raw[section] | {key: half}}, tmp_path / "calm")
    assert without_halving(tmp_path / "disturbed") == without_halving(tmp_path / "calm")
    assert files_of(tmp_path / "disturbed" / "final") == files_of(tmp_path / "calm" / "final")


def test_the_balance_of_two_gradients_is_halved_too(world: Path, tmp_path: Path) -> None:
    """To rounding: the teacher had scored in whole micro-batches before."""
    raw = recipes(world)["balance"]
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, Updater, "accumulate", 2)
        run(raw, tmp_path / "disturbed")
    run(raw, tmp_path / "calm")
    for one, other in zip(rows_of(tmp_path / "disturbed"), rows_of(tmp_path / "calm"), strict=True):
        for key in ("loss", "kd_norm", "rl_norm", "grad_norm", "entropy", "kd_rl_cosine"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)


def test_two_writers_together_write_the_same_in_halves(world: Path, tmp_path: Path) -> None:
    raw = raw_recipe(world, "gkd", source={"speculative": 4}, **with_teacher(world))
    run(raw, tmp_path / "calm")
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, JointEngine, "generate", 1)
        run(raw, tmp_path / "disturbed")
    assert rows_of(tmp_path / "disturbed")[0][f"halved/{ROWS}"] == 6
    texts = [
        [json.loads(x)["response"] for x in (tmp_path / n / "rollouts.jsonl").open()] for n in ("calm", "disturbed")
    ]
    assert texts[0] == texts[1]


def test_resuming_goes_on_with_half(world: Path, tmp_path: Path) -> None:
    """Both numbers, halved at different steps; the stopped run is as the whole one to the byte."""
    raw = recipes(world)["grpo"] | {"steps": 4, "checkpoint": {"every": 1, "keep": 9}}
    for name in ("whole", "stopped"):
        with pytest.MonkeyPatch.context() as patch:
            out_of_memory(patch, Updater, "accumulate", 1)
            out_of_memory(patch, TorchEngine, "generate", 2)
            run(raw, tmp_path / name)
    assert [ROWS in str(row.keys()) for row in rows_of(tmp_path / "whole")] == [False, True, True, True]
    stop_at(tmp_path / "stopped", 2)
    resume(tmp_path / "stopped", say=lambda text: None)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("at", [(3, 4), (2, 7)])
def test_a_second_time_ends_the_run_and_keeps_what_is_saved(at: tuple[int, int], world: Path, tmp_path: Path) -> None:
    """At once, or steps later."""
    raw = recipes(world)["grpo"] | {"steps": 8, "checkpoint": {"every": 1, "keep": 9}}
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, Updater, "accumulate", *at)
        with pytest.raises(RunError, match=r"micro_batch_tokens was halved to 24 before.*kdrl train --resume") as told:
            run(raw, tmp_path / "run")
    assert "more lines" not in str(told.value)
    checkpoints = Checkpoints(tmp_path / "run", load_recipe(raw).checkpoint)
    saved = checkpoints.latest()
    checkpoints.close()
    assert saved is not None
    assert saved.step == at[1] - 2
    resume(tmp_path / "run", say=lambda text: None)
    assert rows_of(tmp_path / "run")[-1]["step"] == 8


def test_a_smaller_number_in_the_recipe_stands(world: Path) -> None:
    limits = Limits.of(load_recipe(recipes(world)["grpo"]))
    limits.restore({TOKENS: 96, ROWS: 3})
    assert (limits.tokens.value, limits.rows.value) == (48, 3)
    assert limits.state() == {ROWS: 3}


def test_half_of_what_was_used() -> None:
    """A limit far above the work at hand would be halved in vain."""
    limit, seen = Limit("x", 1000, "size"), []

    class Part:
        size = 0

    part = limit.follow(Part())

    def work() -> int:
        seen.append(part.size)
        if len(seen) == 1:
            raise torch.OutOfMemoryError(ERROR)
        return part.size

    assert limit.run(work, 30) == 15
    assert seen == [1000, 15]
    assert limit.follow(Part()).size == 15
    with pytest.raises(RunError, match="is 1 and cannot be halved"):
        Limit("x", 1, "size").run(fail, 1)


def fail() -> Any:
    raise torch.OutOfMemoryError(ERROR)


def test_elsewhere_it_is_a_sentence() -> None:
    with pytest.raises(RunError, match=r"optimizer\.kind=adamw_8bit"), told():
        fail()


def test_every_part_of_a_run_follows(world: Path, tmp_path: Path) -> None:
    """Teachers, the reference, what writes and what updates: none keeps the number it was made with."""
    terms = [{"reference_kl": {}}, {"distill": {}}, {"distill": {"teacher": "self"}}]
    raw = raw_recipe(
        world,
        None,
        objective=terms,
        source={"mixture": {"other": "teacher", "share": 0.5}},
        self_teacher={"kind": "ema"},
    )
    with parts_of(raw | with_teacher(world), tmp_path / "r") as parts:
        parts.limits.tokens.set(7)
        parts.limits.rows.set(5)
        asked = [*parts.teachers.values(), parts.reference]
        assert {type(t) for t in asked} == {LocalTeacher, SelfTeacher, ReferenceTeacher}
        assert {t.budget for t in asked} == {7}  # type: ignore[union-attr]
        assert parts.updater.budget == 7
        source = parts.collector.source
        assert [part.engine.max_rows for part in (source.student, source.other)] == [5, 5]  # type: ignore[attr-defined]
