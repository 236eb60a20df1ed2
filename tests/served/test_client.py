"""Requests that fail: what is repeated, what is routed around, what is told, and that the answers stay the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import made_responses, toy

from kdrl.batch import Rollouts
from kdrl.errors import RunError, UserError
from kdrl.teachers import LocalTeacher
from kdrl.teachers.client import Client
from kdrl.teachers.served import ServedTeacher
from kdrl.teachers.served_config import ServedConfig
from served.server import RefusalError, ToyServer, serving

QUICK = {"backoff_s": 0.01, "batch": 1, "concurrency": 3, "timeout_s": 10.0, "wait_s": 5.0}


@pytest.fixture(scope="module")
def model() -> Any:
    return toy(2)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return Rollouts.of(made_responses())


@pytest.fixture
def server(model: Any) -> Iterator[ToyServer]:
    with serving(model) as found:
        yield found


def teacher_at(*urls: str, **change: Any) -> ServedTeacher:
    return ServedTeacher(Client(ServedConfig(urls=urls, **(QUICK | change))), "toy", 45, 4)


def logp(teacher: ServedTeacher, rollouts: Rollouts) -> torch.Tensor:
    return teacher.score(rollouts, rollouts.trained_N, "token", 1.0).logp_N


@pytest.mark.parametrize("fault", [500, 503, "garbage", "short", "nan", "half"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_fault_is_repeated_and_changes_no_number(server: ToyServer, rollouts: Rollouts, fault: Any, batch: int):
    want = logp(teacher_at(server.url), rollouts)
    server.asked.clear()
    server.manners.faults = {0: fault, 2: fault}
    teacher = teacher_at(server.url, batch=batch)
    assert torch.equal(logp(teacher, rollouts), want)
    requests = -(-rollouts.rows // batch)
    assert teacher.client.traffic.repeated >= 2
    assert len(server.asked) == requests + 2


def test_a_slow_answer_is_asked_for_again(server: ToyServer, rollouts: Rollouts):
    want = logp(teacher_at(server.url), rollouts)
    server.asked.clear()
    server.manners.faults = {1: 3.0}
    teacher = teacher_at(server.url, timeout_s=1.0)
    assert torch.equal(logp(teacher, rollouts), want)
    assert teacher.client.traffic.repeated >= 1


def test_answers_that_stay_useless_end_the_run_with_a_sentence(server: ToyServer, rollouts: Rollouts):
    server.manners.faults = dict.fromkeys(range(100), 500)
    with pytest.raises(
        RunError, match=r"http://127.0.0.1:\d+ gave no usable answer in 3 tries .*the engine is gone.*resume"
    ):
        logp(teacher_at(server.url, retries=2), rollouts)


def test_what_a_server_refuses_is_told_and_not_repeated(server: ToyServer, rollouts: Rollouts):
    server.manners.context = 10
    with pytest.raises(UserError, match=r"status 400.*maximum context length is 10"):
        logp(teacher_at(server.url, concurrency=1), rollouts)
    assert len(server.asked) <= 4


def test_replicas_share_the_work_and_a_dead_one_is_routed_around(
    model: Any, rollouts: Rollouts, caplog: pytest.LogCaptureFixture
):
    with serving(model) as one, serving(model) as two:
        want = logp(teacher_at(one.url), rollouts)
        one.asked.clear()
        teacher = teacher_at(one.url, two.url)
        assert torch.equal(logp(teacher, rollouts), want)
        assert one.asked
        assert two.asked
        one.shutdown()
        one.server_close()
        assert torch.equal(logp(teacher, rollouts), want)
        assert not caplog.records, "a run that goes on needs no warning"
        # It comes back at the same address and is used again after its pause.
        with serving(model, port=one.server_address[1]) as again:
            time.sleep(0.1)
            assert torch.equal(logp(teacher, rollouts), want)
            assert again.asked


def test_a_step_waits_for_a_server_that_comes_back(model: Any, rollouts: Rollouts, caplog: pytest.LogCaptureFixture):
    with serving(model) as server:
        want = logp(teacher_at(server.url), rollouts)
        port = server.server_address[1]
    teacher, found = teacher_at(server.url), []
    thread = threading.Thread(target=lambda: found.append(logp(teacher, rollouts)))
    thread.start()
    while thread.is_alive() and not caplog.records:
        time.sleep(0.01)
    assert f"no teacher server answers ({server.url}" in caplog.text
    with serving(model, port=port):
        thread.join(20.0)
    assert torch.equal(found[0], want)
    assert f"{server.url} answers again" in caplog.text


def test_waiting_has_an_end_that_names_the_server_and_how_to_go_on(model: Any, rollouts: Rollouts):
    with serving(model) as server:
        url = server.url
    with pytest.raises(RunError, match=rf"no teacher server has answered.*{url}.*kdrl train --resume"):
        logp(teacher_at(url, wait_s=0.05), rollouts)


def test_no_thread_goes_on_after_an_error(model: Any, rollouts: Rollouts):
    with serving(model) as server:
        url = server.url
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(RunError):
            logp(teacher_at(url, wait_s=0.02), rollouts)
    assert threading.active_count() <= before


def test_an_examination_ends_with_the_step_that_asked_for_it(model: Any, rollouts: Rollouts):
    begun, outcome = threading.Event(), []
    with serving(model) as one, serving(model) as two:
        teacher = teacher_at(one.url, two.url)
        client = teacher.client
        client.lost(two.url, "away")
        client.replicas[1].not_before = 0.0

        def refuse(path: str, body: dict[str, Any]) -> Any:
            assert begun.wait(20.0)
            raise RefusalError(400, "no")

        def hang(path: str, body: dict[str, Any]) -> Any:
            begun.set()
            time.sleep(10.0)

        def examine(alone: Client) -> None:
            try:
                alone.ask("/v1/completions", {"model": "toy"}, lambda answer: answer)
            except RunError as error:
                outcome.append(error)
                raise

        one.answer, two.answer, client.examine = refuse, hang, examine  # type: ignore[method-assign]
        with pytest.raises(UserError, match=f"{one.url} refuses"):
            logp(teacher, rollouts)
    assert len(outcome) == 1, "else the thread waited for the answer"


def test_a_key_comes_from_the_environment(server: ToyServer, monkeypatch: pytest.MonkeyPatch):
    server.manners.key = "s3cret"
    with pytest.raises(UserError, match=r"wants a key: set teacher\.served\.key_env"):
        teacher_at(server.url).client.ask_each("/v1/models")
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="environment variable MY_KEY, which is not set"):
        teacher_at(server.url, key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "wrong")
    with pytest.raises(UserError, match="the key in MY_KEY is not accepted") as caught:
        teacher_at(server.url, key_env="MY_KEY").client.ask_each("/v1/models")
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", "s3cret")
    assert teacher_at(server.url, key_env="MY_KEY").client.ask_each("/v1/models")


def test_only_kept_responses_and_tokens_are_sent(server: ToyServer, model: Any, rollouts: Rollouts):
    keep = torch.zeros_like(rollouts.trained_N)
    keep[[0, 2, 9, 40]] = True
    teacher = teacher_at(server.url)
    found = teacher.score(rollouts, keep, "token", 1.0)
    touched = rollouts.row_N[keep].unique()
    assert found.calls == len(server.asked) == len(touched) < rollouts.rows
    last = {int(rollouts.row_N[i]): i - rollouts.span(int(rollouts.row_N[i]))[0] for i in (0, 2, 9, 40)}
    lengths = sorted(len(rollouts.responses[row].prompt_ids) + place + 1 for row, place in last.items())
    assert sorted(len(body["prompt"][0]) for body in server.asked) == lengths
    want = LocalTeacher(model, 4096).score(rollouts, keep, "token", 1.0)
    assert torch.equal(found.scored_N, keep)
    torch.testing.assert_close(found.logp_N, want.logp_N, atol=2e-5, rtol=1e-5)
    assert (found.logp_N[~keep] == 0).all()
    assert teacher.score(rollouts, keep & False, "few", 1.0).calls == 0
