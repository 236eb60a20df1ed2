"""The loop on real parts: who is asked, which gradient is applied, and what happens when the numbers break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    SpyUpdater,
    assert_near,
    go,
    parts_of,
    plain_gradient,
    plain_logp,
    raw_recipe,
    rows_of,
    run,
    with_teacher,
)

import kdrl
import kdrl.errors
from kdrl.batch import Rollouts
from kdrl.models.packing import packs
from kdrl.objectives.terms import TokenView
from kdrl.teachers import Evidence, LocalTeacher
from kdrl.trainer import Parts, RunError


@kdrl.register_term("nan_gradient")
def nan_gradient(view: TokenView) -> torch.Tensor:
    return view.logq_N * torch.nan


@kdrl.register_term("nan_value")
def nan_value(view: TokenView) -> torch.Tensor:
    """A loss that is no number although its gradient is one."""
    return view.logq_N + torch.nan


@kdrl.register_schedule("blip")
def blip(step: int, total: int, at: int) -> float:
    return float(step == at)


class SpyTeacher:
    """A teacher that remembers which responses it was asked about, and how many tokens its model really read."""

    def __init__(self, inner: LocalTeacher) -> None:
        self.inner = inner
        self.asked: list[set[int]] = []
        self.tokens_read = 0
        assert packs(inner.loaded)
        inner.loaded.model.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens_read += kwargs["input_ids"].numel()

    def score(self, rollouts: Rollouts, keep_N: torch.Tensor, need: Any, temperature: float) -> Evidence:
        self.asked.append(set(rollouts.row_N[keep_N].tolist()))
        return self.inner.score(rollouts, keep_N, need, temperature)


def spied(parts: Parts) -> tuple[SpyUpdater, SpyTeacher]:
    teacher = parts.teachers["teacher"]
    assert isinstance(teacher, LocalTeacher)
    updater, spy = SpyUpdater(parts.student), SpyTeacher(teacher)
    parts.updater, parts.teachers = updater, {"teacher": spy}
    return updater, spy


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_kdrls_gradient_on_real_rollouts_is_advantage_plus_beta_r(world: Path, tmp_path: Path, temperature: float):
    """Contract 1, end to end: (A + beta R) grad log pi over all tokens of the batch, from the models' own logits."""
    beta = 0.3
    raw = raw_recipe(world, "kdrl", steps=1, rollout={"temperature": temperature}, **with_teacher(world))
    with parts_of(raw, tmp_path, f"objective.distill.weight={beta}", "optimizer.lr=0", "optimizer.clip=") as parts:
        updater, spy = spied(parts)
        go(parts)
        (seen,) = updater.seen
        responses = seen.scored.rollouts.responses
        rewards = torch.tensor([r.reward for r in responses]).view(3, 4)
        assert rewards.std(dim=1).max() > 0, "without a mixed group the policy gradient would be zero"
        spread = rewards.std(dim=1, keepdim=True)
        advantage_B = ((rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-6)).flatten().tolist()

        def loss() -> torch.Tensor:
            total = torch.zeros(())
            for response, advantage in zip(responses, advantage_B, strict=True):
                chosen = torch.tensor(response.token_ids)[:, None]
                both = [
                    plain_logp(m, response.prompt_ids, response.token_ids, temperature).gather(-1, chosen)[:, 0]
                    for m in (parts.student, spy.inner.loaded)
                ]
                gap = (both[1] - both[0]).detach()
                assert gap.abs().max() < 10, "beyond the clamp the formula would be another one"
                total = total - ((advantage + beta * gap) * both[0]).sum()
            return total / sum(len(r.token_ids) for r in responses)

        assert_near(seen.gradient, plain_gradient(parts.student, loss))


def test_a_masked_response_costs_no_teacher_call(world: Path, tmp_path: Path):
    with parts_of(raw_recipe(world, "kdrl-mask-response", **with_teacher(world)), tmp_path) as parts:
        updater, spy = spied(parts)
        trainer = go(parts)
        batches = [s.scored.rollouts for s in updater.seen]
        wrong = [{i for i, r in enumerate(b.responses) if not r.correct} for b in batches]
        assert spy.asked == wrong
        count = sum(map(len, wrong))
        assert 0 < count < sum(b.rows for b in batches), "the mask must have had something to do"
        assert count == trainer.progress.teacher_calls
        texts = [(b, b.responses[i]) for b, rows in zip(batches, wrong, strict=True) for i in rows]
        prompts = {(id(b), tuple(r.prompt_ids)) for b, r in texts}
        own = sum(len(r.token_ids) - 1 for _, r in texts)
        assert spy.tokens_read == own + sum(len(ids) for _, ids in prompts), "a prompt once for its responses"
        assert trainer.progress.teacher_calls_saved == sum(b.rows for b in batches) - count
        last = rows_of(tmp_path)[-1]
        assert (last["teacher_calls"], last["teacher_calls_saved"]) == (count, sum(b.rows for b in batches) - count)
        tokens = [len(r.token_ids) for r in batches[-1].responses]
        kept = sum(tokens[i] for i in wrong[-1])
        assert last["masked_share"] == pytest.approx(1 - kept / sum(tokens))


def test_a_group_mask_asks_only_about_groups_without_a_right_answer(world: Path, tmp_path: Path):
    raw = raw_recipe(world, "kdrl-mask-group", rollout={"prompts": 12, "group": 2}, **with_teacher(world))
    with parts_of(raw, tmp_path) as parts:
        updater, spy = spied(parts)
        go(parts)
        for asked, seen in zip(spy.asked, updater.seen, strict=True):
            solved = {r.group for r in seen.scored.rollouts.responses if r.correct}
            assert asked == {i for i, r in enumerate(seen.scored.rollouts.responses) if r.group not in solved}
            assert asked


def test_a_term_of_weight_zero_asks_nobody(world: Path, tmp_path: Path):
    raw = raw_recipe(world, "opd-then-rl", steps=3, **with_teacher(world))
    switches = [f"objective.{term}.weight.switch.at=1" for term in ("distill", "policy_gradient")]
    with parts_of(raw, tmp_path, *switches) as parts:
        updater, spy = spied(parts)
        go(parts)
        # The term leaves the final end token out, so a response that is nothing else needs no teacher.
        first = updater.seen[0].scored.rollouts.responses
        assert spy.asked == [{i for i, r in enumerate(first) if len(r.token_ids) > 1 or not r.ended}]
        assert [[a.name for a in s.scored.active] for s in updater.seen] == [["distill"]] + [["policy_gradient"]] * 2
    rows = rows_of(tmp_path)
    assert [r["weight/distill"] for r in rows] == [1, 0, 0]
    assert rows[2]["teacher_calls"] == rows[0]["teacher_calls"] > 0
    assert rows[1]["log_ratio_mean"] is rows[1]["masked_share"] is None


def test_several_updates_use_the_log_probs_from_before_the_first(world: Path, tmp_path: Path):
    raw = raw_recipe(
        world,
        "kdrl",
        steps=1,
        optimizer={"minibatches": 3, "epochs": 2, "lr": 0.05, "clip": None},
        **with_teacher(world),
    )
    with parts_of(raw, tmp_path, "objective.distill.weight=0.5") as parts:
        updater, _ = spied(parts)
        go(parts)
        seen = updater.seen
        assert len(seen) == 6
        for epoch in (seen[:3], seen[3:]):
            assert sorted(row for s in epoch for row in s.rows) == list(range(12))
        assert [s.rows for s in seen[:3]] != [s.rows for s in seen[3:]], "each epoch is shuffled anew"
        start = seen[0].logp_N
        for s in seen:
            assert s.scored.old_N is not None
            assert torch.equal(s.scored.old_N, start)
        moved = [(s.logp_N - start).abs().max().item() for s in seen]
        assert moved[0] == 0
        assert all(m > 1e-3 for m in moved[1:])


def test_one_update_a_batch_takes_the_policy_as_its_own_old_one(world: Path, tmp_path: Path):
    with parts_of(raw_recipe(world, steps=1), tmp_path) as parts:
        parts.updater = updater = SpyUpdater(parts.student)
        go(parts)
        assert updater.seen[0].scored.old_N is None
        sampled = updater.seen[0].scored.sampled_N
        assert sampled is not None
        # The engine's log-probs and the training forward's are the same policy.
        torch.testing.assert_close(rows_of(tmp_path)[0]["sampling_mismatch"], 0.0, atol=1e-4, rtol=0)


def test_logging_gradients_does_not_change_the_run(world: Path, tmp_path: Path):
    outputs = []
    for every in (0, 1):
        raw = raw_recipe(world, "kdrl", log={"gradients_every": every}, **with_teacher(world))
        run(raw, tmp_path / str(every))
        outputs.append((tmp_path / str(every) / "final" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    assert "kd_norm" not in rows_of(tmp_path / "0")[0]
    row = rows_of(tmp_path / "1")[0]
    assert row["kd_rl_norm_ratio"] == pytest.approx(row["kd_norm"] / row["rl_norm"])
    assert -1 <= row["kd_rl_cosine"] <= 1


def test_rate_and_weights_follow_their_schedules(world: Path, tmp_path: Path):
    raw = raw_recipe(
        world,
        "kdrl-annealed",
        steps=4,
        optimizer={"lr": {"linear": {"from": 4e-3, "to": 0.0}}, "warmup": 2},
        **with_teacher(world),
    )
    run(raw, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [r["lr"] for r in rows] == pytest.approx([2e-3, 3e-3, 2e-3, 1e-3])
    assert [r["weight/distill"] for r in rows] == pytest.approx([5e-3 - 5e-5 * k for k in range(4)])
    for row in rows:
        parts = row["weight/distill"] * row["loss/distill"] + row["loss/policy_gradient"]
        assert row["loss"] == pytest.approx(parts)


def test_every_step_tells_what_was_promised(world: Path, tmp_path: Path):
    raw = raw_recipe(world, "kdrl", log={"gradients_every": 1}, **with_teacher(world))
    run(raw, tmp_path / "run")
    promised = {
        *("step", "reward", "accuracy", "zero_advantage_share", "log_ratio_mean", "log_ratio_beyond_clamp"),
        *("entropy", "tokens", "truncated", "kd_rl_norm_ratio", "kd_rl_cosine", "masked_share", "teacher_calls"),
        *("time/rollout", "time/verify", "time/teacher", "time/update", "tokens_per_second", "kl_teacher", "grad_norm"),
        *("verifier/timeout", "verifier/crash", "verifier/printed", "skipped_updates", "loss/distill"),
    }
    for row in rows_of(tmp_path / "run"):
        assert promised <= row.keys()


@pytest.mark.parametrize("term", ["nan_gradient", "nan_value"])
def test_numbers_that_break_are_skipped_counted_and_stop_the_run(world: Path, tmp_path: Path, term: str):
    broken = {term: {"weight": {"switch": {"at": 2, "before": 0.0, "after": 1.0}}}}
    raw = raw_recipe(
        world,
        None,
        steps=9,
        objective=[{"policy_gradient": {}}, broken],
        optimizer={"stop_after_bad": 3},
        checkpoint={"every": 1, "keep": 20},
    )
    with pytest.raises(RunError, match="not finite in 3 updates in a row, up to step 5") as caught:
        run(raw, tmp_path / "run")
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved[-1].name == "step-000004"
    assert str(saved[-1]) in str(caught.value)
    good, last = (
        load_file(tmp_path / "run/checkpoints" / s / "student.safetensors") for s in ("step-000002", saved[-1])
    )
    assert all(torch.equal(good[name], last[name]) and bool(last[name].isfinite().all()) for name in good)
    rows = rows_of(tmp_path / "run")
    assert [r["skipped_updates"] for r in rows] == [0, 0, 1, 2, 3]
    assert rows[-1]["loss"] is None
    assert not (tmp_path / "run" / "final").exists()


def test_one_bad_update_among_good_ones_stops_nothing(world: Path, tmp_path: Path):
    raw = raw_recipe(
        world,
        None,
        steps=4,
        objective=[{"entropy": {}}, {"nan_gradient": {"weight": {"blip": {"at": 1}}}}],
        optimizer={"stop_after_bad": 2},
    )
    run(raw, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [r["skipped_updates"] for r in rows] == [0, 1, 1, 1]
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"every": 1, "final_problems": 0}, "no development problems"),
        ({"final_problems": 4, "baselines": False}, "no test problems"),
    ],
)
def test_an_evaluation_without_problems_is_refused_before_the_first_step(
    world: Path, tmp_path: Path, evaluate: dict[str, Any], words: str
):
    raw = raw_recipe(world, task={"holdout": None}, evaluate=evaluate)
    with pytest.raises(kdrl.errors.UserError, match=words):
        run(raw, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "the mended recipe may use the same folder"
