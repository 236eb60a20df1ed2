"""The verifier works while rows are written and while teachers are asked; nothing else about a run changes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same_run, timeless
from tiny import go, parts_of, raw_recipe, rows_of, run, with_teacher
from torch import Tensor

import kdrl
from kdrl.asking import Asking
from kdrl.batch import Rollouts
from kdrl.build import Builder
from kdrl.engines.decoding import Rows
from kdrl.evaluation import EvaluateConfig, evaluate_loaded, pick_problems
from kdrl.objectives.masks import MaskContext
from kdrl.objectives.scores import Tokens, register_score
from kdrl.recipe import load_recipe
from kdrl.rollouts import Collected, Collector
from kdrl.sources.base import Judge
from kdrl.tasks import VerifierPool
from kdrl.teachers import Evidence, LocalTeacher
from kdrl.trainer import Trainer

# Says that it was asked, and answers when it is allowed to.
JUDGE = """
import os, time


def judge(response, problem, folder):
    open(os.path.join(folder, "asked"), "a").close()
    while not os.path.exists(os.path.join(folder, "allowed")):
        time.sleep(0.005)
    return sum(map(ord, response)) % 2 == 0
"""


@kdrl.register_mask("test_of_mine")
def of_mine(context: MaskContext) -> Tensor:
    return ~context.truncated_B


@kdrl.register_mask("test_said_free", verdicts=False)
def said_free(context: MaskContext) -> Tensor:
    return ~context.truncated_B


@kdrl.register_mask("test_liar", verdicts=False)
def liar(context: MaskContext) -> Tensor:
    return ~context.correct_B


@register_score("test_own_score", reads="data")
def own_score(tokens: Tokens) -> Tensor:
    return tokens.of("index")


def held(world: Path, folder: Path, method: str | None = "kdrl", **change: Any) -> dict[str, Any]:
    """A recipe whose verifier answers nothing before `folder/allowed` is there."""
    (folder / "judge.py").write_text(JUDGE)
    judge = {"name": f"{folder / 'judge.py'}:judge", "settings": {"folder": str(folder)}, "timeout_s": 15.0}
    change = {"steps": 1} | change
    return raw_recipe(world, method, task={"verifier": judge}, **change, **with_teacher(world))


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"nothing made {path.name}: the phases do not overlap"
        time.sleep(0.005)


def before(patch: pytest.MonkeyPatch, kind: type, name: str, first: Callable[..., None]) -> None:
    """Have something done before each call of a method, with what it is called with."""
    plain = getattr(kind, name)

    def method(self: Any, *given: Any, **named: Any) -> Any:
        first(self, *given, **named)
        return plain(self, *given, **named)

    patch.setattr(kind, name, method)


def test_a_response_is_verified_while_others_are_written(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once rows were dropped as finished, writing goes on only when the verifier has been asked."""
    finished: list[int] = []
    raw = held(world, tmp_path, rollout={"max_new_tokens": 24})
    with parts_of(raw, tmp_path / "run") as parts:
        # Not before: the engine's check of a model drops rows too.
        before(monkeypatch, Rows, "keep", lambda rows, keep_B: finished.append(len(keep_B)))
        before(monkeypatch, Rows, "step", lambda rows, token_B: wait_for(tmp_path / "asked") if finished else None)
        before(monkeypatch, LocalTeacher, "score", lambda *given: (tmp_path / "allowed").touch())
        go(parts)
    assert finished
    assert rows_of(tmp_path / "run")[0]["verifier/timeout"] == 0


def test_a_teacher_scores_while_the_verifier_works(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The verifier waits for the teacher: asked after the verdicts, every response would have run out of time."""
    before(monkeypatch, LocalTeacher, "score", lambda *given: (tmp_path / "allowed").touch())
    with parts_of(held(world, tmp_path), tmp_path / "run") as parts:
        go(parts)
    (row,) = rows_of(tmp_path / "run")
    assert row["verifier/timeout"] == 0
    assert 0 < row["accuracy"] < 1


def distill(mask: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"policy_gradient": {}}, {"distill": {"mask": mask, **more}}]


OWN = [{"distill": {"teacher": "self"}}]
FREE: dict[str, Any] = {
    "all": distill("all"),
    "truncated": distill({"not": "truncated"}),
    "entropy": distill({"top_entropy": 0.5}),
    "score": distill({"score": {"above": {"of": "position", "value": 0.3}}}),
    "ranked": distill({"score": {"top_share": {"of": "entropy_q", "share": 0.5}}}),
    "said": distill(["test_said_free", {"not": "truncated"}]),
    "whole": distill("all", support="full"),
    "scale": distill("all", scale={"times": {"of": "reward", "by": 2.0}}),
    "reference": [{"policy_gradient": {}}, {"reference_kl": {}}],
    "off": [*distill("all"), {"distill": {"mask": "wrong_response", "weight": 0.0}}],
    "own": OWN,
}
LATE: dict[str, Any] = {
    "wrong": distill("wrong_response"),
    "group": distill({"not": "wrong_group"}),
    "any": distill({"any": ["truncated", "right_response"]}),
    "list": distill([{"top_entropy": 0.9}, "wrong_response"]),
    "score": distill({"score": {"one_minus": {"of": "correct"}}}),
    "rate": distill({"score": {"above": {"of": {"one_minus": {"of": "group_rate"}}, "value": 0.3}}}),
    "mine": distill("test_of_mine"),
    "own-score": distill({"score": {"above": {"of": "test_own_score", "value": 2}}}),
    "two": [*distill("all"), {"distill": {"mask": "wrong_response"}}],
    "advantage": [{"policy_gradient": {"modulate": {}}}],
    "reference": [{"policy_gradient": {}}, {"reference_kl": {"mask": "wrong_response"}}],
}
SIBLING = {"self_teacher": {"context": "{prompt}{sibling}"}}


def asked_before(raw: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that a teacher or the reference was asked, whether verdicts were still to come."""
    seen: list[bool] = []

    def look(teacher: LocalTeacher, rollouts: Rollouts, *given: Any) -> None:
        seen.append(not any(r.judged for r in rollouts.responses))

    before(patch, LocalTeacher, "score", look)
    with parts_of(raw, folder) as parts:
        go(parts)
    return seen


@pytest.mark.parametrize("name", FREE)
def test_who_needs_no_verdict_does_not_wait(name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    more: dict[str, Any] = {"self_teacher": {"context": "{prompt}{answer}"}} if name == "own" else {}
    raw = raw_recipe(world, None, objective=FREE[name], **with_teacher(world), **more)
    assert asked_before(raw, tmp_path, monkeypatch) == [True] * 2, "once a step, before the verdicts"


@pytest.mark.parametrize("name", LATE)
def test_who_needs_verdicts_waits(name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw = raw_recipe(world, None, objective=LATE[name], **with_teacher(world))
    assert asked_before(raw, tmp_path, monkeypatch) == [False] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"rollout": {"dynamic_sampling": 1}},
        {"teacher": {"prepare": {"soft_prompt": {"tokens": 2, "lr": 1e-3}}}},
        {"objective": OWN, **SIBLING},
        {"objective": [{"distill": {}}], "source": {"filtered": {"keep": {"score": "length", "above": 0}}}},
    ],
    ids=["dynamic", "fitted", "sibling", "filtered"],
)
def test_what_resamples_fits_or_reads_a_sibling_waits(
    change: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raw = raw_recipe(world, None, **({"objective": distill("all", support="full")} | change))
    raw["teacher"] = with_teacher(world)["teacher"] | raw.get("teacher", {})
    seen = asked_before(raw, tmp_path, monkeypatch)
    assert seen
    assert not any(seen)


def test_a_teacher_waits_though_the_reference_does_not(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    objective = [*distill("wrong_response"), {"reference_kl": {}}]
    raw = raw_recipe(world, None, objective=objective, **with_teacher(world))
    assert asked_before(raw, tmp_path, monkeypatch) == [True, False] * 2


def one_after_another(patch: pytest.MonkeyPatch) -> None:
    """The same loop with each phase after the one before: nothing sent early, nobody asked early."""
    begin = Collector.begin

    def settled(self: Collector, *given: Any) -> Collected:
        out = begin(self, *given)
        self.settle(out)
        return out

    patch.setattr(Judge, "listener", lambda self, problems, read: None)
    patch.setattr(Judge, "send", lambda self, responses: None)
    patch.setattr(Collector, "begin", settled)
    patch.setattr(Asking, "early", lambda *given: {})


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("kdrl", {}),
        ("kdrl-mask-response", {}),
        (None, {"source": {"mixed": 0.3}, "objective": [{"distill": {"support": "full", "on": ["mixed"]}}]}),
        ("dapo", {"rollout": {"dynamic_sampling": 2}}),
        ("hdpo", {"source": {"privileged": {"template": "{prompt}{answer} ", "samples": 2}}}),
        (None, {"objective": [*distill(["test_liar", {"top_entropy": 0.7}]), {"reference_kl": {}}]}),
    ],
    ids=["kdrl", "masked", "mixed", "dapo", "hdpo", "liar"],
)
def test_the_run_is_the_one_without_overlap(method: str | None, change: dict[str, Any], world: Path, tmp_path: Path):
    """To the byte: samples, rewards, losses, calls and weights."""
    broken = {"verifier": {"name": f"{world / 'judge.py'}:breaks"}}
    raw = raw_recipe(world, method, **({"steps": 3, "task": broken} | change), **with_teacher(world))
    run(raw, tmp_path / "together")
    with pytest.MonkeyPatch.context() as patch:
        one_after_another(patch)
        run(raw, tmp_path / "apart")
    assert_same_run(tmp_path / "together", tmp_path / "apart")
    assert (tmp_path / "together" / "rollouts.jsonl").read_text() == (tmp_path / "apart" / "rollouts.jsonl").read_text()
    assert timeless(tmp_path / "together")[-1]["verifier/crash"] > 0


SOURCES: dict[str, Any] = {
    "student": "student",
    "mixture": {"mixture": {"share": 0.5, "per": "sample"}},
    "buffer": {"buffer": {"share": 0.9, "size": 8}},
    "speculative": {"speculative": 3},
    "guided": {"guided": 1},
    "filtered": {"filtered": {"keep": "right", "tries": 2}},
    "privileged": {"privileged": {"template": "{prompt}{answer} ", "samples": 2}},
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_response_is_verified_once_whoever_writes(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sent: list[str] = []
    before(monkeypatch, VerifierPool, "_schedule", lambda pool, response, problem: sent.append(response))
    origins = ["student", "gold", "teacher", "privileged", "buffer", "speculative"]
    raw = raw_recipe(
        world,
        None,
        steps=3,
        source=SOURCES[name],
        objective=[{"cross_entropy": {"on": origins}}],
        **with_teacher(world),
    )
    with parts_of(raw, tmp_path) as parts:
        go(parts)
        pool = parts.collector.judge.pool
        assert pool is not None
        assert len(sent) == sum(pool.counts.values()) > 0
        assert pool._sent == {}


def test_time_by_phase_adds_up(world: Path, tmp_path: Path):
    run(raw_recipe(world, "kdrl", **with_teacher(world)), tmp_path)
    for row in rows_of(tmp_path):
        seconds = [row[f"time/{phase}"] for phase in ("rollout", "verify", "teacher", "update")]
        assert min(seconds) >= 0
        assert sum(seconds) <= row["time/step"]


def children() -> int:
    return len(multiprocessing.active_children())


def test_a_teacher_that_fails_leaves_no_worker_behind(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The verifier is never allowed to answer."""
    alive: list[int] = []

    def fail(*given: Any) -> None:
        wait_for(tmp_path / "asked")
        alive.append(children())
        raise RuntimeError("no teacher")

    there = children()
    before(monkeypatch, LocalTeacher, "score", fail)
    with pytest.raises(RuntimeError, match="no teacher"), parts_of(held(world, tmp_path), tmp_path / "run") as parts:
        go(parts)
    assert alive[0] > there
    assert children() == there


def test_a_trial_scores_with_verdicts(world: Path, tmp_path: Path):
    with parts_of(raw_recipe(world, "kdrl", **with_teacher(world)), tmp_path) as parts:
        scored = Trainer(parts).trial(0)
        assert all(r.judged for r in scored.rollouts.responses)
        assert torch.equal(scored.rollouts.reward_B, torch.tensor([r.reward for r in scored.rollouts.responses]))
        assert 0 < float(scored.rollouts.reward_B.mean()) < 1


def test_an_evaluation_verifies_while_it_writes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent: list[int] = []
    before(monkeypatch, VerifierPool, "_schedule", lambda *given: sent.append(1))
    counted: list[int] = []
    before(monkeypatch, VerifierPool, "score", lambda *given: counted.append(len(sent)))
    config = EvaluateConfig(problems=5, samples=3, temperature=1.0, max_new_tokens=8)
    with ExitStack() as stack:
        builder = Builder(load_recipe(raw_recipe(world)), tmp_path, stack)
        problems = pick_problems(builder.task, config)
        found = evaluate_loaded(builder.engine, builder.student, problems, builder.pool, config, 0)
    assert counted == [15], "all were sent before the first verdict was asked for"
    assert len(sent) == 15
    right = [sum(map(ord, r.text)) % 2 == 0 for record in found.records for r in record.responses]
    assert [r.correct for record in found.records for r in record.responses] == right


def test_evidence_is_what_the_teacher_gives_after_the_verdicts(world: Path, tmp_path: Path):
    found: list[tuple[Evidence, Evidence]] = []
    with parts_of(raw_recipe(world, "kdrl", **with_teacher(world)), tmp_path) as parts:
        trainer = Trainer(parts)
        collected = parts.collector.begin(trainer.moment, lambda rollouts: set())
        rollouts = Rollouts.of(collected.responses)
        known = trainer.asking.early(rollouts, trainer.moment, None, None)
        assert list(known) == ["teacher"]
        parts.collector.settle(collected)
        rollouts.take_verdicts()
        active = parts.objective.activate(rollouts, trainer.moment)
        early, late = (trainer.asking.ask(rollouts, active, had)[0]["teacher"] for had in (known, {}))
        assert early is known["teacher"][1]
        found.append((early, late))
    for early, late in found:
        assert torch.equal(early.logp_N, late.logp_N)
        assert torch.equal(early.where_N, late.where_N)
