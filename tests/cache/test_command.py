"""`kdrl cache-teacher` and runs over its folder: killed and resumed, added to, refused, trained from."""

from __future__ import annotations

import random
import shutil
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import attempt, kill_until_done, server
from safetensors.torch import load_file
from test_resume import assert_same_run
from tiny import raw_recipe, rows_of, run, with_teacher
from typer.testing import CliRunner

import kdrl.build
from cache.making import work
from kdrl.cli import app
from kdrl.errors import UserError
from kdrl.recipe import load_recipe
from kdrl.run import train
from kdrl.teachers import cache_ahead
from kdrl.teachers.cache_command import CacheSummary, cache_teacher
from kdrl.teachers.cache_config import Stored
from kdrl.teachers.cache_store import CacheStore

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 8},
    "draws": {"kind": "draws"},
    "hidden": {"kind": "hidden"},
}
SUPPORTS: dict[str, Any] = {"topk": {"topk": 8}, "draws": {"draws": 12}, "hidden": "full"}
CLOSE = {"topk": 0.02, "draws": 0.5, "hidden": 0.002}


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return server()


def gold(world: Path, kind: str = "topk", **change: Any) -> dict[str, Any]:
    """A recipe of a distillation on worked solutions."""
    distill = {"divergence": "forward_kl", "support": SUPPORTS[kind], "on": ["gold"]}
    raw = raw_recipe(world, None, source="gold", objective=[{"distill": distill}], steps=3, optimizer={"lr": 1e-2})
    raw["rollout"] = {"prompts": 4, "group": 1, "max_new_tokens": 20}
    return raw | with_teacher(world) | change


def fill(raw: dict[str, Any], folder: Path, kind: str = "topk", **more: Any) -> CacheSummary:
    return cache_teacher(load_recipe(raw), folder, Stored(**KINDS[kind]), say=lambda text: None, **more)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_and_given_again_ends_with_the_same_bytes(
    kind: str, world: Path, tmp_path: Path, context: ForkServerContext
):
    """kill -9 at random touches of the disk, each time resumed: nothing written is lost, and the bytes are the same."""
    raw = gold(world, kind)
    fill(raw, tmp_path / "whole", kind, shard_tokens=30)
    draw, folder, died = random.Random(kind), tmp_path / "killed", 0
    for _ in range(3):
        before = files_of(folder) if folder.exists() else {}
        process = context.Process(target=work, args=(raw, str(folder), KINDS[kind], draw.randrange(1, 20)))
        process.start()
        process.join(60)
        died += process.exitcode == -signal.SIGKILL
        after = files_of(folder)
        kept = [name for name in before if name.startswith("shard-")]
        assert all(after[name] == before[name] for name in kept)
    assert died >= 2
    process = context.Process(target=work, args=(raw, str(folder), KINDS[kind], None))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert files_of(folder) == files_of(tmp_path / "whole")
    assert len([name for name in files_of(folder) if name.startswith("shard-")]) > 4


def test_more_problems_add_to_a_cache(world: Path, tmp_path: Path):
    raw, cache = gold(world), tmp_path / "cache"
    first = fill(raw, cache, problems=7)
    assert first.responses == 7
    kept = (cache / "shard-000000.safetensors").read_bytes()
    second = fill(raw, cache)
    size = first.responses + second.responses
    assert second.found == 7
    assert (cache / "shard-000000.safetensors").read_bytes() == kept
    assert fill(raw, cache).responses == 0
    assert fill(raw, cache, split="test").responses > 0
    assert len(CacheStore.read(cache).places) > size


def final_of(folder: Path) -> torch.Tensor:
    return torch.cat([t.flatten() for _, t in sorted(load_file(folder / "final" / "model.safetensors").items())])


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_from_a_cache_is_the_run_with_the_teacher(
    kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Within bounds, with a folder that holds a tokenizer and no weights, and one model loaded: the student."""
    raw = gold(world, kind)
    fill(raw, tmp_path / "cache", kind)
    local = run(raw, tmp_path / "local")
    bare = tmp_path / "tokenizer"
    bare.mkdir()
    for file in (world / "teacher").glob("tokenizer*"):
        shutil.copy(file, bare)
    loads: list[bool] = []
    real = kdrl.build.load_model

    def spy(*args: Any, trainable: bool, **more: Any) -> Any:
        loads.append(trainable)
        return real(*args, trainable=trainable, **more)

    monkeypatch.setattr(kdrl.build, "load_model", spy)
    raw["teacher"] = {"model": str(bare), "cache": str(tmp_path / "cache")}
    cached = run(raw, tmp_path / "cached")
    assert loads == [True]
    for one, other in zip(rows_of(local.run_dir), rows_of(cached.run_dir), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=CLOSE[kind])
        assert one["teacher_calls"] == other["teacher_calls"]
    if kind == "draws":
        return  # other draws than the local run's, so other steps
    start = final_of(run(raw | {"steps": 0}, tmp_path / "start").run_dir)
    ends = [final_of(result.run_dir) for result in (local, cached)]
    moved = (ends[0] - start).norm()
    assert moved > 0
    assert (ends[0] - ends[1]).norm() < 0.1 * moved
    again = load_recipe(tmp_path / "cached" / "recipe.yaml")
    assert again.teacher is not None
    assert again.teacher.reads_cache


def test_traces_are_cached_and_read(world: Path, tmp_path: Path):
    lines = [
        f'{{"prompt": "{a}+1=", "response": "{text}", "correct": {right}}}\n'
        for a in range(2, 9)
        for text, right in ((a + 1, "true"), (f"{a}+2", "false"))
    ]
    (tmp_path / "traces.jsonl").write_text("".join(lines))
    distill = {"divergence": "forward_kl", "support": {"topk": 8}, "on": ["teacher"]}
    source = {"traces": {"path": str(tmp_path / "traces.jsonl"), "take": "pair"}}
    raw = gold(world, source=source, objective=[{"distill": distill}])
    assert fill(raw, tmp_path / "cache").responses == 14
    raw["teacher"]["cache"] = str(tmp_path / "cache")
    assert len(rows_of(run(raw, tmp_path / "run").run_dir)) == 3
    with pytest.raises(UserError, match="leave --split out"):
        fill(raw, tmp_path / "other", split="test")


def test_a_run_that_meets_other_responses_says_how_to_add_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raw = gold(world)
    fill(raw, tmp_path / "cache", problems=2)
    raw["teacher"]["cache"] = str(tmp_path / "cache")
    says = "does not hold {} responses of {}.*kdrl cache-teacher RECIPE --output .*--k 8"
    with pytest.raises(UserError, match=says.format("10 of 12", "the first 3 steps")):
        run(raw, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "found before the first step"
    # Later ones than are looked up are found when they come.
    fill(raw, tmp_path / "cache", problems=4)
    monkeypatch.setattr(cache_ahead, "AHEAD", 4)
    with pytest.raises(UserError, match=says.format("4 of 4", "this step")):
        run(raw, tmp_path / "later")
    assert len(rows_of(tmp_path / "later")) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rollout": {"prompts": 4, "temperature": 0.7}}, "at temperature 1, and the policy has 0.7"),
        (
            {"objective": [{"distill": {"support": "full", "on": ["gold"]}}]},
            "its 8 likeliest tokens. What fits: support: .topk",
        ),
        ({"objective": [{"distill": {"support": {"topk": 9}, "on": ["gold"]}}]}, "K up to 8"),
        ({"source": "student", "objective": [{"distill": {"support": {"topk": 8}}}]}, "choose source gold or traces"),
        ({"source": {"mixture": 0.5}, "objective": [{"distill": {"support": {"topk": 8}}}]}, r"set on: \[gold\]"),
        ({"source": "teacher", "objective": [{"distill": {"support": {"topk": 8}}}]}, "kdrl generate RECIPE"),
    ],
)
def test_runs_that_a_cache_cannot_serve_are_refused(change: dict[str, Any], says: str, world: Path, tmp_path: Path):
    fill(gold(world), tmp_path / "cache")
    raw = gold(world, **change)
    raw["teacher"]["cache"] = str(tmp_path / "cache")
    with pytest.raises(UserError, match=says) as refused:
        run(raw, tmp_path / "run")
    assert "the student's own responses" not in str(refused.value), "a cache that is read holds none of them"


@pytest.mark.parametrize(
    ("kind", "objective", "says"),
    [
        ("topk", None, None),
        ("hidden", None, None),
        ("topk", {"support": "full", "on": ["gold"]}, "its 8 likeliest tokens"),
        ("draws", {"divergence": "forward_kl", "support": {"draws": {"n": 12, "tau": 0.8}}, "on": ["gold"]}, "p^0.8"),
    ],
)
def test_a_cache_that_its_recipe_could_not_read_is_noted_before_it_is_scored(
    kind: str, objective: dict[str, Any] | None, says: str | None, world: Path, tmp_path: Path
):
    told: list[str] = []
    raw = gold(world) if objective is None else gold(world, objective=[{"distill": objective}])
    cache_teacher(load_recipe(raw), tmp_path / "cache", Stored(**KINDS[kind]), say=told.append, problems=2)
    notes = [text for text in told if "could not be trained from the cache" in text]
    assert len(notes) == (says is not None)
    assert says is None or says in notes[0]


def test_a_cached_teachers_missing_baseline_is_noted(world: Path, tmp_path: Path):
    raw = gold(world, evaluate={"final_problems": 2, "baselines": True}, steps=1)
    fill(raw, tmp_path / "cache")
    told: list[str] = []
    train(raw, output=tmp_path / "local", say=lambda text: told.append(str(text)))
    assert any(text.startswith("teacher: accuracy") for text in told)
    assert not any("evaluate.baselines" in text for text in told)
    raw["teacher"]["cache"] = str(tmp_path / "cache")
    told.clear()
    train(raw, output=tmp_path / "cached", say=lambda text: told.append(str(text)))
    assert not any(text.startswith("teacher: accuracy") for text in told)
    (note,) = [text for text in told if "evaluate.baselines" in text]
    assert f"read from {tmp_path / 'cache'}, which writes no answers" in note


def test_draws_of_another_power_are_refused(world: Path, tmp_path: Path):
    fill(gold(world, "draws"), tmp_path / "cache", "draws")
    tilted = {"distill": {"divergence": "forward_kl", "support": {"draws": {"n": 12, "tau": 0.8}}, "on": ["gold"]}}
    raw = gold(world, objective=[tilted])
    raw["teacher"]["cache"] = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"draws from p\^0\.8, and the stored draws are from p\^1"):
        run(raw, tmp_path / "run")


def test_a_cache_of_another_teacher_than_the_one_at_hand_is_refused(world: Path, tmp_path: Path):
    fill(gold(world), tmp_path / "cache")
    other = shutil.copytree(world / "teacher", tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    raw = gold(world, teacher={"model": str(other), "cache": str(tmp_path / "cache")})
    with pytest.raises(UserError, match="scores of another teacher"):
        run(raw, tmp_path / "run")
    raw["teacher"]["model"], raw["teacher"]["dtype"] = str(world / "teacher"), "bfloat16"
    with pytest.raises(UserError, match=r"teacher\.dtype is bfloat16"):
        run(raw, tmp_path / "second")


def test_a_cache_of_another_tokenizer_is_refused(world: Path, tmp_path: Path):
    fill(gold(world), tmp_path / "cache")
    raw = gold(world)
    raw["teacher"]["cache"] = str(tmp_path / "cache")
    raw["student"]["tokenizer"] = {"characters": "0123456789+=;#xyz-abcdefghijklmnopqrstuvw ."}
    with pytest.raises(UserError, match="another tokenizer than the student has"):
        run(raw, tmp_path / "run")


@pytest.mark.parametrize(
    ("source", "says"),
    [("student", "writes its responses during training"), ("teacher", "kdrl generate RECIPE")],
)
def test_sources_that_write_anew_cannot_be_cached(source: str, says: str, world: Path, tmp_path: Path):
    raw = gold(world, source=source, objective=[{"distill": {"support": {"topk": 8}}}])
    with pytest.raises(UserError, match=says):
        fill(raw, tmp_path / "cache")


def test_a_run_that_writes_through_and_is_killed_ends_with_the_same_bytes(
    world: Path, tmp_path: Path, context: ForkServerContext
):
    """On-policy: weights, metrics and the cache itself are those of the undisturbed run."""
    distill = {"divergence": "forward_kl", "support": SUPPORTS["topk"]}
    raw = raw_recipe(world, None, objective=[{"distill": distill}], steps=6, checkpoint={"every": 1, "keep": 2})
    raw["optimizer"] = {"lr": 1e-2}

    def with_cache(name: str) -> dict[str, Any]:
        cache = {"path": str(tmp_path / name), "write": True, **KINDS["topk"]}
        return raw | {"teacher": {"model": str(world / "teacher"), "cache": cache}}

    assert attempt(context, with_cache("one"), tmp_path / "whole", None, 60.0) == 0
    died, _ = kill_until_done(context, with_cache("two"), tmp_path / "killed", seed=5, kills=2)
    assert died >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    one, two = CacheStore.read(tmp_path / "one"), CacheStore.read(tmp_path / "two")
    assert one.places == two.places
    assert files_of(one.folder) == files_of(two.folder)
    # A second run over the full cache scores nothing, and learns the same.
    again = run(with_cache("one"), tmp_path / "again")
    assert files_of(one.folder) == files_of(two.folder)
    assert torch.equal(final_of(again.run_dir), final_of(tmp_path / "whole"))


def test_the_command_line(world: Path, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(load_recipe(gold(world)).to_yaml())
    given = ["cache-teacher", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "cache"), "--k", "8"]
    done = CliRunner().invoke(app, [*given, "--problems", "5", "--shard-tokens", "20"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "5 responses of" in done.output
    assert "a token" in done.output
    for options, says in (
        (["--kind", "draws"], "--k belongs to kind draws|k belongs to kind topk"),
        (["--split", "tets"], "did you mean 'test'"),
        (["--teacher", "other"], "no teacher called other"),
        (["--kind", "topc"], "--kind"),
    ):
        with pytest.raises(UserError, match=says):
            CliRunner().invoke(app, [*given, *options], catch_exceptions=False)
