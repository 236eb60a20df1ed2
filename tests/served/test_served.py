"""A served teacher against a local one on the same tokens, and in whole runs, undisturbed and killed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import server as fork_server
from tiny import made_responses, raw_recipe, rows_of, run, toy

from kdrl.batch import Rollouts
from kdrl.errors import RunError, UserError
from kdrl.models import LoadedModel, ModelConfig, load_model
from kdrl.objectives.objective import token_data
from kdrl.objectives.terms import Distill, DistillConfig
from kdrl.run import resume
from kdrl.teachers import LocalTeacher
from kdrl.teachers.base import Given
from kdrl.teachers.client import Client
from kdrl.teachers.served import ServedTeacher
from kdrl.teachers.served_config import ServedConfig
from served.server import Manners, ToyServer, serve, serving

VOCABULARY = 45


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return toy(2)


@pytest.fixture(scope="module")
def server(model: LoadedModel) -> Iterator[ToyServer]:
    with serving(model, Manners(max_logprobs=64)) as found:
        yield found


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return Rollouts.of(made_responses())


def teacher_at(server: ToyServer, k: int, **change: Any) -> ServedTeacher:
    client = Client(ServedConfig(urls=(server.url,), **change))
    return ServedTeacher(client, server.manners.name, server.loaded.vocab_size, k)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_local_and_served_log_probs_are_equal(server: ToyServer, model: LoadedModel, rollouts: Rollouts, batch: int):
    keep = torch.arange(rollouts.tokens) % 3 != 1
    local = LocalTeacher(model, 4096).score(rollouts, keep, "token", 1.0)
    served = teacher_at(server, 0, batch=batch).score(rollouts, keep, "token", 1.0)
    assert torch.equal(local.scored_N, served.scored_N)
    # The server computes in float32 what the toy computes in float64.
    assert (local.logp_N - served.logp_N).abs().max() < 2e-5
    assert served.calls == local.calls
    assert served.few is None


@pytest.mark.parametrize("k", [3, VOCABULARY])
@pytest.mark.parametrize(
    "spec", [{"divergence": "forward_kl"}, {"divergence": "reverse_kl"}, {"divergence": {"jsd": 0.3}}], ids=str
)
def test_a_top_k_loss_is_the_same_from_both(
    server: ToyServer, model: LoadedModel, rollouts: Rollouts, k: int, spec: dict[str, Any]
):
    """At k = V the served teacher gives its whole distribution."""
    student = toy(1)
    vocabulary = server.loaded.vocab_size
    k = min(k, vocabulary)
    term = Distill(DistillConfig.model_validate(spec | {"support": {"topk": k}}))
    keep = torch.arange(rollouts.tokens) % 3 != 1
    logq = torch.cat([_logq(student, r.prompt_ids, r.token_ids) for r in rollouts.responses])
    given = Given(rollouts.tokens_N, token_data(rollouts))
    index, losses, gradients = torch.arange(rollouts.tokens), [], []
    for teacher, need in ((LocalTeacher(model, 4096), "distribution"), (teacher_at(server, k), "few")):
        evidence = teacher.score(rollouts, keep, need, 1.0)  # type: ignore[arg-type]
        z = logq.clone().requires_grad_(True)
        loss = evidence.comparison(term.compare, index, given)(z.log_softmax(-1), slice(0, rollouts.tokens))[:, 0]
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(z.grad)
    torch.testing.assert_close(losses[0], losses[1], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=5e-5, rtol=1e-4)
    assert losses[0].abs().max() > 0.1


def _logq(student: LoadedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = student.model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits[:, : student.vocab_size], -1)


def test_the_likeliest_tokens_fall_and_leave_out_a_sampled_one_that_is_none(server: ToyServer, rollouts: Rollouts):
    evidence = teacher_at(server, 4).score(rollouts, rollouts.trained_N, "few", 1.0)
    assert evidence.few is not None
    assert evidence.few.ids_NK.shape == (rollouts.tokens, 4)
    assert (evidence.few.logp_NK.diff(dim=-1) <= 0).all()
    inside = (evidence.few.ids_NK == rollouts.tokens_N[:, None]).any(-1)
    assert inside.any()
    assert not inside.all(), "else the test shows nothing"
    lowest = evidence.few.logp_NK[:, -1]
    assert (evidence.logp_N[~inside] <= lowest[~inside]).all()


def padded(rows: int) -> LoadedModel:
    """The served model with more rows than its tokenizer, some of them likely."""
    found = toy(2)
    torch.manual_seed(5)
    found.model.resize_token_embeddings(found.vocab_size + rows)
    with torch.no_grad():
        likely = found.model.get_output_embeddings().weight
        likely[found.vocab_size :] = 1.5 * likely[3 : 3 + rows]
    return found


@pytest.mark.parametrize("rows", [1, 3])
def test_padding_rows_are_left_out_of_the_likeliest_tokens(
    rollouts: Rollouts, rows: int, caplog: pytest.LogCaptureFixture
):
    loaded = padded(rows)
    everything = torch.ones_like(rollouts.trained_N)
    with serving(loaded, Manners(max_logprobs=64)) as server:
        teacher = teacher_at(server, 4)
        found = teacher.score(rollouts, everything, "few", 1.0)
        asked = {body["prompt_logprobs"] for body in server.asked}
        again = teacher.score(rollouts, everything, "few", 1.0)
    assert found.few is not None
    assert again.few is not None
    logits = torch.cat([_logits(loaded, r.prompt_ids, r.token_ids) for r in rollouts.responses])
    logp = logits.log_softmax(-1)
    reached = logp.topk(4).indices >= VOCABULARY
    assert reached.any(), "else the test shows nothing"
    assert min(asked) == 4
    assert 4 < max(asked) <= 4 + rows
    want = logp[:, :VOCABULARY].topk(4)
    assert torch.equal(found.few.ids_NK, want.indices)
    torch.testing.assert_close(found.few.logp_NK, want.values.float(), atol=2e-5, rtol=1e-4)
    assert torch.equal(found.few.logp_NK, again.few.logp_NK)
    assert caplog.text.count("beyond the tokenizer's are left out") == 1


def test_padding_rows_that_a_server_s_limit_hides_are_told(rollouts: Rollouts):
    with serving(padded(3), Manners(max_logprobs=4)) as server:
        teacher = teacher_at(server, 4)
        with pytest.raises(UserError, match=r"padding rows .* among its 4 likeliest .*--max-logprobs \d"):
            teacher.score(rollouts, torch.ones_like(rollouts.trained_N), "few", 1.0)


def _logits(loaded: LoadedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def recipe(world: Path, url: str | None, **change: Any) -> dict[str, Any]:
    teacher: dict[str, Any] = {"model": str(world / "teacher")}
    if url is not None:
        teacher["served"] = {"urls": [url], "backoff_s": 0.02, "batch": 2, "wait_s": 60, "parity": 2}
    return raw_recipe(world, change.pop("method", "kdrl"), teacher=teacher, checkpoint={"every": 0}, **change)


@pytest.fixture(scope="module")
def saved(world: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(world / "teacher")), "cpu", trainable=False, seed=0)


TOPK = {"objective": [{"distill": {"divergence": "forward_kl", "support": {"topk": 5}}}], "method": None}


@pytest.mark.parametrize("change", [{}, TOPK], ids=["sampled", "topk"])
def test_a_run_is_the_same_with_a_served_teacher(
    world: Path, saved: LoadedModel, tmp_path: Path, change: dict[str, Any]
):
    run(recipe(world, None, **change), tmp_path / "local")
    with serving(saved) as server:
        run(recipe(world, server.url, **change), tmp_path / "served")
    for mine, theirs in zip(rows_of(tmp_path / "local"), rows_of(tmp_path / "served"), strict=True):
        for name in ("loss", "grad_norm", "teacher_calls", "tokens"):
            if name in mine:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
    one, other = (
        load_model(ModelConfig(model=str(tmp_path / name / "final")), "cpu", trainable=False, seed=0)
        for name in ("local", "served")
    )
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        # Adam's first steps turn the rounding of a tiny gradient into a part of lr 1e-3.
        assert float((a - b).abs().mean()) < 1e-5


def test_masks_spare_the_server(world: Path, saved: LoadedModel, tmp_path: Path):
    with serving(saved) as server:
        raw = recipe(world, server.url, method="kdrl-mask-response")
        raw["teacher"]["served"] |= {"parity": 0, "batch": 1}
        run(raw, tmp_path / "run")
        rows = rows_of(tmp_path / "run")
        trying = 1  # the request for the top-k limit
        assert len(server.asked) == rows[-1]["teacher_calls"] + trying
        assert rows[-1]["teacher_calls_saved"] > 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Mortal:
    """A server process that is started anew whenever it dies, the next time with the next manners."""

    def __init__(self, context: ForkServerContext, model: Path, lives: list[Manners]) -> None:
        self.context, self.model, self.lives = context, model, lives
        self.port, self.deaths, self.over = free_port(), [], False
        self.process = self._start(lives[0])
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _start(self, manners: Manners) -> Any:
        ready = self.context.Event()
        process = self.context.Process(target=serve, args=(str(self.model), manners, self.port, ready), daemon=True)
        process.start()
        assert ready.wait(60.0)
        return process

    def _watch(self) -> None:
        for manners in self.lives[1:]:
            self.process.join()
            self.deaths.append(self.process.exitcode)
            if self.over:
                return
            self.process = self._start(manners)

    def close(self) -> None:
        self.over = True
        self.process.kill()
        self.thread.join()


def test_a_server_killed_in_the_middle_of_a_step_and_restarted_changes_no_byte(world: Path, tmp_path: Path):
    context = fork_server()
    finals = []
    for name, faults in (("whole", {}), ("killed", {5: "die"})):
        # Of about eight requests a step, the first go to the checks; the second life dies again.
        mortal = Mortal(context, world / "teacher", [Manners(faults=faults), Manners(faults={3: "die"}), Manners()])
        raw = recipe(world, f"http://127.0.0.1:{mortal.port}", steps=3)
        try:
            run(raw, tmp_path / name)
            deaths = list(mortal.deaths)
        finally:
            mortal.close()
        assert deaths == ([-9, -9] if faults else [])
        folder = tmp_path / name / "final"
        finals.append({p.name: p.read_bytes() for p in sorted(folder.iterdir())})
        finals[-1]["rollouts"] = (tmp_path / name / "rollouts.jsonl").read_bytes()
    assert finals[0] == finals[1]


def test_a_run_whose_server_stays_away_ends_and_is_resumed_to_the_same_bytes(world: Path, tmp_path: Path):
    def finals(name: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted((tmp_path / name / "final").iterdir())}

    mortal = Mortal(fork_server(), world / "teacher", [Manners(faults={6: "die"})])
    raw = recipe(world, f"http://127.0.0.1:{mortal.port}", steps=3)
    raw["teacher"]["served"]["wait_s"] = 0.1
    raw["checkpoint"] = {"every": 1}
    with pytest.raises(RunError, match=rf"no teacher server has answered.*:{mortal.port}.*kdrl train --resume"):
        run(raw, tmp_path / "stopped")
    saved = load_model(ModelConfig(model=str(world / "teacher")), "cpu", trainable=False, seed=0)
    with serving(saved, port=mortal.port):
        resume(tmp_path / "stopped", say=lambda text: None)
        run(raw, tmp_path / "whole")
    mortal.close()
    assert len(rows_of(tmp_path / "stopped")) == 3
    assert finals("stopped") == finals("whole")


@pytest.mark.parametrize("api", ["tokens", "completions", "chat"])
def test_a_served_teacher_writes(world: Path, saved: LoadedModel, tmp_path: Path, api: str):
    raw = recipe(world, None, method="sft", source="teacher")
    with serving(saved, Manners(prompt_logprobs=api == "tokens")) as server:
        raw["teacher"]["served"] = {"urls": [server.url], "api": api}
        run(raw, tmp_path / "run")
        assert server.asked
        kinds = {type(body.get("prompt", body.get("messages"))) for body in server.asked if "n" in body}
        assert kinds == {str if api == "completions" else list}
    eos = saved.eos_ids[0]
    for line in (tmp_path / "run" / "teacher_text.jsonl").read_text().splitlines():
        for sample in json.loads(line)["samples"]:
            ids = sample["token_ids"]
            assert 0 < len(ids) <= 6
            assert (ids[-1] == eos) == sample["ended"]
            assert eos not in ids[:-1]
