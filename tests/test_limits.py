"""A device out of memory: the work that failed is done anew in halves, and the run is the one with the smaller number.

There is no such error on a CPU, so it is raised by hand, where a pass is larger than it may be and after it was made:
whatever that left behind is there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optimizers import stop_at
from test_resume import assert_same_run, files_of, timeless
from tiny import (
    assert_near,
    flat,
    gradient,
    made_responses,
    parts_of,
    problem,
    raw_recipe,
    rows_of,
    run,
    score,
    section,
    toy,
    with_teacher,
)

from kdrl import update
from kdrl.batch import Response, Rollouts, lay_out, pack_rows
from kdrl.checkpoint import Checkpoints
from kdrl.engines import TorchEngine
from kdrl.engines.decoding import Rows
from kdrl.engines.joint import JointEngine
from kdrl.errors import RunError
from kdrl.limits import Limit, Limits, SparingEngine, SparingUpdater, told
from kdrl.models import LoadedModel, ModelConfig, load_model
from kdrl.models.packing import wanted_states
from kdrl.recipe import load_recipe
from kdrl.run import resume
from kdrl.teachers import Evidence, LocalTeacher, ReferenceTeacher, SelfTeacher, local
from kdrl.update import Tally, Updater

TOKENS, ROWS = "optimizer.micro_batch_tokens", "rollout.rows"
ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"


def out_of_memory(
    patch: pytest.MonkeyPatch, kind: type, name: str, most: int | Mapping[int, int] = 22
) -> list[tuple[int, int]]:
    """Have passes of more than `most` tokens, or so many rows written at once, fail inside calls of a method.

    `most` may change from the call of a number on, counted from 1. Returns the list that call and size are put in.
    """
    plain, calls, inside = getattr(kind, name), [0], [False]
    steps, passes = {1: most} if isinstance(most, int) else most, []

    def method(self: Any, *given: Any, **named: Any) -> Any:
        calls[0] += 1
        inside[0] = True
        try:
            return plain(self, *given, **named)
        finally:
            inside[0] = False

    def sized(plain: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            done = plain(*given, **named)
            if inside[0]:
                passes.append((calls[0], size(*given)))
                bounds = [most for call, most in steps.items() if call <= calls[0]]
                if bounds and passes[-1][1] > bounds[-1]:
                    raise torch.OutOfMemoryError(ERROR)
            return done

        return run

    patch.setattr(kind, name, method)
    if name == "generate":
        patch.setattr(Rows, "step", sized(Rows.step, lambda rows, token_B: len(token_B)))
    else:
        states = sized(wanted_states, lambda loaded, micro: micro.input_ids_BL.numel())
        for module in (update, local):
            patch.setattr(module, "wanted_states", states)
    return passes


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
        passes = out_of_memory(patch, kind, method, 6 if option == ROWS else 22)
        run(raw, tmp_path / "disturbed")
    rows = rows_of(tmp_path / "disturbed")
    half = rows[0][f"halved/{option}"]
    assert [row[f"halved/{option}"] for row in rows] == [half] * 3
    assert half == 6 if option == ROWS else 12 <= half <= 24
    assert f"{option} is {half} from now on, which changes no result" in caplog.text
    assert sum(size > (6 if option == ROWS else 22) for _, size in passes) == 1
    section, key = option.split(".")
    run(raw | {section: raw[section] | {key: half}}, tmp_path / "calm")
    assert without_halving(tmp_path / "disturbed") == without_halving(tmp_path / "calm")
    assert files_of(tmp_path / "disturbed" / "final") == files_of(tmp_path / "calm" / "final")


def test_the_balance_of_two_gradients_is_halved_too(world: Path, tmp_path: Path) -> None:
    """To rounding: the teacher had scored in whole micro-batches before."""
    raw = recipes(world)["balance"]
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, Updater, "accumulate", {2: 22})
        run(raw, tmp_path / "disturbed")
    run(raw, tmp_path / "calm")
    for one, other in zip(rows_of(tmp_path / "disturbed"), rows_of(tmp_path / "calm"), strict=True):
        for key in ("loss", "kd_norm", "rl_norm", "grad_norm", "entropy", "kd_rl_cosine"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)


def test_two_writers_together_write_the_same_in_halves(world: Path, tmp_path: Path) -> None:
    raw = raw_recipe(world, "gkd", source={"speculative": 4}, **with_teacher(world))
    run(raw, tmp_path / "calm")
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, JointEngine, "generate", 6)
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
            out_of_memory(patch, Updater, "accumulate")
            out_of_memory(patch, TorchEngine, "generate", {2: 6})
            run(raw, tmp_path / name)
    assert [ROWS in str(row.keys()) for row in rows_of(tmp_path / "whole")] == [False, True, True, True]
    stop_at(tmp_path / "stopped", 2)
    resume(tmp_path / "stopped", say=lambda text: None)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(("most", "saved_step"), [({3: 2}, 2), ({2: 22, 7: 2}, 5)])
def test_a_second_time_ends_the_run_and_keeps_what_is_saved(
    most: dict[int, int], saved_step: int, world: Path, tmp_path: Path
) -> None:
    """At once, or steps later."""
    raw = recipes(world)["grpo"] | {"steps": 8, "checkpoint": {"every": 1, "keep": 9}}
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, Updater, "accumulate", most)
        with pytest.raises(RunError, match=r"micro_batch_tokens was halved to \d+ before.*kdrl train --resume") as told:
            run(raw, tmp_path / "run")
    assert "more lines" not in str(told.value)
    checkpoints = Checkpoints(tmp_path / "run", load_recipe(raw).checkpoint)
    saved = checkpoints.latest()
    checkpoints.close()
    assert saved is not None
    assert saved.step == saved_step
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


def shared_prompt(prompt: int = 64, responses: int = 16, own: int = 8) -> list[Response]:
    """Responses to one long prompt, most of which is read once."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 30, (prompt + responses * own,), generator=draw).tolist()
    texts = [ids[prompt + own * n :][:own] for n in range(responses)]
    return [
        Response(problem(), 0, ids[:prompt], text, "student", True, "", reward=float(n % 2))
        for n, text in enumerate(texts)
    ]


def sparing(student: LoadedModel, budget: int = 16_384) -> SparingUpdater:
    return SparingUpdater(student, Limit(TOKENS, budget, "budget"))


TERMS: list[dict[str, Any]] = [{"policy_gradient": {}}, {"distill": {"teacher": "teacher"}}]


@pytest.mark.parametrize("most", [170, 128, 112])
def test_a_shared_prompt_far_below_the_budget_is_halved_for_good_and_changes_nothing(most: int) -> None:
    """The whole is one pass of 176 tokens, the prompt once and no last token, under a budget of 16,384."""
    student, teacher = toy(1, trainable=True), toy(2)
    scored = score(student, shared_prompt(), TERMS, teacher=teacher)
    whole, tallies = gradient(student, scored), [Tally(), Tally()]
    Updater(student, 4096).accumulate(scored, range(16), tallies[0])
    with pytest.MonkeyPatch.context() as patch:
        passes = out_of_memory(patch, Updater, "accumulate", most)
        updater = sparing(student)
        updater.clear()
        updater.accumulate(scored, range(16), tallies[1])
    assert [size for _, size in passes if size > most] == [176]
    assert len(passes) > 2
    assert_near(flat(updater), whole)
    assert tallies[0].tokens == tallies[1].tokens
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, Updater, "score_policy", most)
        again = sparing(student)
        found = again.score_policy(scored.rollouts, 1.0)
    assert again.budget == updater.budget < 176
    for one, other in zip(found, Updater(student, 4096).score_policy(scored.rollouts, 1.0), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)


def test_a_teacher_that_reads_longer_texts_than_the_student_is_halved_by_its_own() -> None:
    responses = [replace(r, privileged_ids=[*r.prompt_ids[:40], n + 2]) for n, r in enumerate(shared_prompt())]
    rollouts, limit = Rollouts.of(responses), Limit(TOKENS, 16_384, "budget")
    teacher = limit.follow(SelfTeacher(toy(1), 1))

    def ask(asked: LocalTeacher) -> Evidence:
        return asked.score(rollouts, rollouts.trained_N, "distribution", 1.0)

    with pytest.MonkeyPatch.context() as patch:
        passes = out_of_memory(patch, LocalTeacher, "score", 400)
        found = limit.run(lambda: ask(teacher))
    assert [size for _, size in passes if size > limit.value] == [16 * 48]
    assert limit.value == 16 * 48 // 2
    assert torch.allclose(found.logp_N, ask(SelfTeacher(toy(1), 4096)).logp_N, rtol=0, atol=1e-5)


def test_one_response_cannot_be_halved() -> None:
    """Not even once: the pass would be the same."""
    student = toy(1, trainable=True)
    scored = score(student, shared_prompt(responses=1), [{"distill": {"teacher": "teacher"}}], teacher=toy(2))
    with pytest.MonkeyPatch.context() as patch:
        passes = out_of_memory(patch, Updater, "accumulate", 20)
        with pytest.raises(RunError, match=r"micro_batch_tokens is 16,384 and cannot be halved.*kdrl train --resume"):
            sparing(student).accumulate(scored, [0])
    assert len(passes) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_half_of_what_a_pass_costs_splits_it(packed: bool) -> None:
    """Whatever is shared and however long; twice of it does not."""
    for responses in (shared_prompt(), made_responses(), made_responses(1, groups=5, size=4), shared_prompt(3, 2, 1)):
        rollouts = Rollouts.of(responses)
        for count in range(2, rollouts.rows + 1):
            given = (rollouts, range(count), rollouts.trained_N)
            cost = lay_out(*given, 0, packed=packed).cost
            assert len(pack_rows(*given, 2 * cost, packed=packed)) == 1
            assert len(pack_rows(*given, cost // 2, packed=packed)) > 1


def test_greedy_samples_of_a_prompt_are_one_row() -> None:
    """Halving prompts times samples would leave the same rows."""
    loaded = load_model(ModelConfig.model_validate(section()), "cpu", trainable=False, seed=1)
    engine, prompts = SparingEngine(loaded, Limit(ROWS, 64, "max_rows")), [[3 + n, 5] for n in range(6)]
    asked: dict[str, Any] = {"samples": 4, "max_new_tokens": 5, "temperature": 0.0, "seed": 0}
    whole = engine.generate(prompts, **asked)
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory(patch, TorchEngine, "generate", 3)
        assert [[s.token_ids for s in row] for row in engine.generate(prompts, **asked)] == [
            [s.token_ids for s in row] for row in whole
        ]
    assert engine.max_rows == 3


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
