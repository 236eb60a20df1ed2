"""Every source in a real run: recipe to metrics, the stored recipe read back, and a kill that changes no byte."""

from __future__ import annotations

import json
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from killing import attempt, kill_until_done, server
from test_resume import assert_same_run
from tiny import raw_recipe, rows_of, run, with_teacher

from kdrl.errors import UserError
from kdrl.recipe import load_recipe
from kdrl.run import resume
from kdrl.tasks.base import problem_id

CE: list[dict[str, Any]] = [{"cross_entropy": {"on": ["gold", "teacher", "student", "buffer", "corrupt"]}}]
KL: list[dict[str, Any]] = [{"distill": {"support": "full"}}]


def reward(*on: str, **more: Any) -> list[dict[str, Any]]:
    return [{"policy_gradient": {"on": list(on), "advantage": "reinforce", **more}}]


@pytest.fixture(scope="module")
def traces(world: Path) -> str:
    """Right and wrong traces of some of the world's problems, as `kdrl generate` writes them."""
    path = world / "traces.jsonl"
    data = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    rows = [
        {"id": problem_id(d["prompt"]), "prompt": d["prompt"], "answer": d["answer"], "response": text}
        | {"reward": float(right), "correct": right, "tokens": len(text), "ended": True}
        for d in data[:30]
        for text, right in ((d["answer"], True), (d["answer"] + "1", False), ("0", False))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipes(world: Path, traces: str) -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """Sources and an objective that reads them."""
    return {
        "mixture": ({"mixture": {"share": {"linear": {"from": 0.2, "to": 0.9}}, "per": "sample"}}, KL),
        "buffer": ({"buffer": {"share": 0.8, "size": 20}}, KL),
        "buffer-teacher": ({"buffer": {"share": 0.7, "size": 20, "other": "teacher"}}, KL),
        "speculative": ({"speculative": 3}, KL),
        "mixed": ({"mixed": 0.3}, reward("mixed")),
        "mixed-k2": ({"mixed": {"share": 0.3, "weights": "prefix"}}, [{"distill": {"support": {"token": "k2"}}}]),
        "corrupt": ({"corrupt": {"share": 0.4, "pick": "hard"}}, [*CE, *KL]),
        "pair": ("pair", [{"preference": {"by": "origin", "on": ["teacher", "student"]}}]),
        "guided": ({"guided": 1}, reward("student", "teacher", advantage="dr_grpo", off_policy={"shape": 0.1})),
        "guided-traces": (
            {"guided": {"teacher": 1, "traces": traces}},
            reward("student", "teacher", advantage="dr_grpo", off_policy={"shape": 0.1}),
        ),
        "traces": ({"traces": {"path": traces, "take": "pair"}}, CE),
        "filtered": ({"filtered": {"keep": "right", "tries": 3}}, CE),
        "filtered-teacher": (
            {"filtered": {"source": "teacher", "keep": [{"score": "student_rate", "below": 0.9}, "right"]}},
            CE,
        ),
        "filtered-mixed": (
            {"filtered": {"source": {"mixed": 0.2}, "keep": {"score": "teacher_logp", "best": 2}}},
            KL,
        ),
        "filtered-traces": ({"filtered": {"source": {"traces": traces}, "keep": {"score": "length", "best": 1}}}, CE),
    }


NAMES = list(recipes(Path(), ""))
LOSSES = {"mixed", "guided", "guided-traces"}


def raw_of(name: str, world: Path, traces: str, **change: Any) -> dict[str, Any]:
    source, objective = recipes(world, traces)[name]
    return raw_recipe(world, None, source=source, objective=objective, **{"steps": 8} | change, **with_teacher(world))


@pytest.mark.parametrize("name", NAMES)
def test_each_source_trains(name: str, world: Path, traces: str, tmp_path: Path):
    raw = raw_of(name, world, traces)
    run(raw, tmp_path / "run")
    recipe = load_recipe(raw)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 8
    for row in rows:
        shares = [row[f"origin/{origin}"] for origin in recipe.source.origins]
        assert sum(shares) == pytest.approx(1.0) or (name.startswith("filtered") and sum(shares) == 0.0)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert all(row["skipped_updates"] == 0 for row in rows)
    for origin in recipe.source.origins:
        assert any(row[f"origin/{origin}"] > 0 for row in rows), origin
    stored = load_recipe(tmp_path / "run")
    assert stored.source == recipe.source
    assert stored.to_yaml() == (tmp_path / "run" / "recipe.yaml").read_text()


def test_numbers_of_a_run(world: Path, traces: str, tmp_path: Path):
    """What a source tells stands in every row that it concerns."""
    wanted = {
        "speculative": {"source/replaced"},
        "mixed": {"source/importance"},
        "buffer": {"source/buffer_share", "source/buffer_size"},
        "filtered": {"source/kept", "source/skipped_problems"},
        "guided-traces": {"source/without_trace"},
        "corrupt": {"source/changed_tokens"},
    }
    for name, keys in wanted.items():
        run(raw_of(name, world, traces, steps=2), tmp_path / name)
        for row in rows_of(tmp_path / name):
            assert {key for key in row if key.startswith("source/")} == keys
            assert all(row[key] >= 0 for key in keys)


def test_a_step_with_nothing_left_changes_nothing(world: Path, tmp_path: Path):
    """All responses filtered away: no gradient, a row that says so, and the run goes on."""
    judge = {"verifier": {"name": f"{world / 'judge.py'}:never"}}
    raw = raw_recipe(world, None, source={"filtered": "right"}, objective=CE, task=judge, optimizer={"minibatches": 2})
    run(raw, tmp_path / "run")
    for row in rows_of(tmp_path / "run"):
        assert (row["batch_responses"], row["grad_norm"], row["loss"]) == (0, 0.0, 0.0)
        assert (row["source/skipped_problems"], row["responses"]) == (3.0, 12 * row["step"])


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return server()


OFTEN: dict[str, Any] = {"steps": 8, "checkpoint": {"every": 1, "keep": 8}, "log": {"rollouts_every": 1}}


def test_a_killed_buffer_comes_back_to_the_byte(world: Path, traces: str, tmp_path: Path, context: ForkServerContext):
    raw = raw_of("buffer-teacher", world, traces, **OFTEN)
    assert attempt(context, raw, tmp_path / "whole", None, 60.0) == 0
    died, _ = kill_until_done(context, raw, tmp_path / "killed", seed=3, kills=3)
    assert died >= 2
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert any(row["origin/buffer"] for row in rows_of(tmp_path / "whole")), "there must be a buffer to lose"
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step-000008" / "state.json").read_text())
    assert state["source"]["source.other"]["offset"] > 0
    assert len(state["source"]["source"]["verdicts"]) == 20


@pytest.mark.parametrize(
    "name", ["mixture", "speculative", "mixed-k2", "corrupt", "guided", "traces", "filtered-teacher"]
)
def test_a_resumed_run_is_the_undisturbed_one(name: str, world: Path, traces: str, tmp_path: Path):
    """From its checkpoint after step 3, as if it had been stopped there."""
    run(raw_of(name, world, traces, **OFTEN), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in range(4, 9):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step:06d}")
    resume(tmp_path / "again", say=lambda text: None)
    assert_same_run(tmp_path / "whole", tmp_path / "again")


K2 = [{"distill": {"support": {"token": "k2"}}}]


@pytest.mark.parametrize(
    ("source", "objective", "change", "words"),
    [
        ({"speculative": 3}, KL, {"teacher": None}, "there is no teacher"),
        ({"mixed": 0.2}, reward("mixed"), {"teacher": None}, "there is no teacher, but the source has it write"),
        ("pair", CE, {"teacher": None}, "there is no teacher, but the source has it write"),
        ({"guided": 1}, reward("student"), {"teacher": None}, "there is no teacher, but the source has it write"),
        ({"speculative": 3}, KL, {"rollout": {"top_k": 5, "filtered": True}}, "draws every token from two models"),
        (
            {"filtered": {"source": {"mixed": 0.2}, "keep": "right"}},
            KL,
            {"rollout": {"top_p": 0.5, "filtered": True}},
            "source filtered draws every token from two models",
        ),
        ({"guided": 4}, reward("student"), {}, "leaves the student none"),
        ({"mixture": {"linear": {"from": 0.0, "to": 3.0}}}, KL, {}, "share goes from 0 to 1.5; a share is from 0"),
        ({"speculative": 3}, K2, {}, "on speculative text that is not its gradient"),
        ({"buffer": 0.5}, K2, {}, "on buffer, gold text that is not its gradient"),
        ({"corrupt": 0.5}, K2, {}, "on corrupt, gold text that is not its gradient"),
        ({"mixed": {"share": 0.2, "weights": "none"}}, K2, {}, r"set source\.mixed\.weights to token, prefix"),
        ({"mixed": {"share": 0.2, "weights": "none"}}, reward("mixed"), {}, r"set source\.mixed\.weights to token"),
        ({"buffer": 0.5}, reward("student", "buffer"), {}, "a gradient of the student's own samples"),
        ({"filtered": "right"}, reward("student"), {}, "takes advantages over all of a problem's responses"),
        ({"buffer": 0.5}, reward("student"), {"rollout": {"dynamic_sampling": 2}}, "cannot replace by the same kind"),
        (
            {"mixture": {"share": 0.5, "per": "sample"}},
            reward("student"),
            {"rollout": {"dynamic_sampling": 2}},
            "cannot replace by the same kind",
        ),
        (
            "teacher",
            reward("student"),
            {"rollout": {"dynamic_sampling": 2}},
            "resamples the student, who writes nothing",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    source: Any, objective: list[dict[str, Any]], change: dict[str, Any], words: str, world: Path
):
    raw = raw_recipe(world, None, source=source, objective=objective, **{**with_teacher(world), **change})
    with pytest.raises(UserError, match=words):
        load_recipe(raw)


@pytest.mark.parametrize(
    ("source", "objective"),
    [
        ({"filtered": {"score": "group_rate", "above": 0.0, "below": 1.0}}, reward("student")),
        ({"mixed": {"share": 0.2, "weights": "sequence"}}, [*reward("mixed"), *K2]),
        ({"mixed": 0.2}, [{"reference_kl": {"on": ["mixed"]}}]),
    ],
)
def test_what_can_work_is_taken(source: Any, objective: list[dict[str, Any]], world: Path):
    load_recipe(raw_recipe(world, None, source=source, objective=objective, **with_teacher(world)))


def test_dynamic_sampling_takes_mixed_and_guided_groups(world: Path, tmp_path: Path):
    for name, source, term in (
        ("mixed", {"mixed": 0.3}, reward("mixed", advantage="dr_grpo")),
        ("guided", {"guided": 1}, reward("student", "teacher", advantage="dr_grpo", off_policy={"shape": 0.1})),
    ):
        raw = raw_recipe(
            world,
            None,
            source=source,
            objective=term,
            rollout={"dynamic_sampling": 3, "group": 3},
            **with_teacher(world),
        )
        run(raw, tmp_path / name)
        assert any(row["grad_norm"] > 0 for row in rows_of(tmp_path / name))


def test_a_broken_trace_file_stops_the_run_with_file_and_line(world: Path, traces: str, tmp_path: Path):
    path = tmp_path / "cut.jsonl"
    path.write_text(Path(traces).read_text()[:-20])
    raw = raw_recipe(world, None, source={"traces": str(path)}, objective=CE)
    with pytest.raises(UserError, match=r"cut\.jsonl:90: .*cut off"):
        run(raw, tmp_path / "run")


def test_traces_without_prompts_are_those_of_the_task(world: Path, traces: str, tmp_path: Path):
    lines = [json.loads(line) for line in Path(traces).read_text().splitlines()]
    train = {p["prompt"] for p in lines}
    raw = raw_recipe(world, None, source={"traces": str(tmp_path / "t.jsonl")}, objective=CE)
    del raw["task"]["holdout"]  # then every problem of the file is a training problem
    slim = [{k: row[k] for k in ("id", "response", "correct")} for row in lines]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slim))
    run(raw, tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert samples
    assert {s["prompt"] for s in samples} <= train
