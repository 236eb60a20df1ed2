"""Responses sent before their verdicts are asked for: a verdict is of the text and the problem that were sent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kdrl.errors import UserError
from kdrl.tasks import Problem, ResponseInfo, TaskConfig, VerifierPool

INFO = ResponseInfo(10, False, 100)
# Writes down what it is asked; `wait` goes on when the marker is there, so that what follows in one worker must wait.
JUDGE = """
import os, time


def judge(response, problem, folder):
    with open(os.path.join(folder, "log"), "a") as log:
        log.write(response + "/" + str(problem.answer) + "\\n")
    while response == "wait" and not os.path.exists(os.path.join(folder, "marker")):
        time.sleep(0.01)
    if response == "raise":
        raise RuntimeError("boom")
    while response == "spin":
        pass
    return response == problem.answer
"""


@pytest.fixture
def config(tmp_path: Path) -> TaskConfig:
    (tmp_path / "judge.py").write_text(JUDGE)
    verifier = {"name": f"{tmp_path / 'judge.py'}:judge", "settings": {"folder": str(tmp_path)}}
    return TaskConfig.model_validate({"path": "unread.jsonl", "verifier": verifier})


def asked(folder: Path) -> Counter[str]:
    log = folder / "log"
    return Counter(log.read_text().split() if log.exists() else [])


def items(problem: Problem, *responses: str) -> list[tuple[str, Problem, ResponseInfo]]:
    return [(response, problem, INFO) for response in responses]


def test_a_verdict_is_of_the_text_and_the_problem_that_were_sent(config: TaskConfig, tmp_path: Path) -> None:
    # Two objects of one id, as problems of equal prompts are.
    one, other = Problem("id", "?", "good"), Problem("id", "?", "bad")
    with VerifierPool(config, workers=2, timeout_s=20) as pool:
        for response in ("good", "bad", "bad", "unclaimed"):
            pool.send(response, one)
        pool.send("good", other)
        rows = [*items(one, "bad", "good", "changed", "bad"), *items(other, "good", "bad")]
        assert [v.correct for v in pool.score(rows)] == [False, True, False, False, False, True]
        assert pool.counts["ok"] == 6
        sent = asked(tmp_path)
        assert sent["good/good"] == 1, "what was sent is not sent again"
        assert (sent["bad/good"], sent["changed/good"], sent["bad/bad"]) == (2, 1, 1)
        assert [v.correct for v in pool.score(items(one, "good"))] == [True]
        assert asked(tmp_path)["good/good"] == 2, "one sending is one verdict"


def test_shaping_is_of_the_response_that_is_scored(config: TaskConfig) -> None:
    shaped = config.model_copy(update={"rewards": TaskConfig.model_validate(
        {"path": "x.jsonl", "verifier": "exact", "rewards": {"overlong": {"buffer": 50, "penalty": 0.5}}}
    ).rewards})  # fmt: skip
    problem = Problem("id", "?", "good")
    with VerifierPool(shaped, workers=1, timeout_s=20) as pool:
        pool.send("good", problem)
        (verdict,) = pool.score([("good", problem, ResponseInfo(75, False, 100))])
    assert verdict.reward == 0.75


def test_what_is_dropped_is_cancelled_and_leaves_no_verdict(config: TaskConfig, tmp_path: Path) -> None:
    problem = Problem("id", "?", "good")
    with VerifierPool(config, workers=1, timeout_s=60) as pool:
        for response in ("wait", "dropped", "good", "good", "dropped"):
            pool.send(response, problem)
        futures = {key[1]: [future for _, future in sent] for key, sent in pool._sent.items()}
        pool.send_only([("wait", problem), ("good", problem), ("new", problem)])
        assert all(future.cancelled() for future in futures["dropped"])
        assert [future.cancelled() for future in futures["good"]] == [False, True]
        (tmp_path / "marker").touch()
        verdicts = pool.score(items(problem, "wait", "good", "new"))
        assert [(v.correct, v.status) for v in verdicts] == [(False, "ok"), (True, "ok"), (False, "ok")]
        assert sum(pool.counts.values()) == 3
        assert pool._sent == {}
        again = pool.score(items(problem, "good", "other"))
        assert [v.correct for v in again] == [True, False], "the workers go on"


def test_failures_of_what_was_sent_are_told_as_ever(config: TaskConfig) -> None:
    problem = Problem("id", "?", "good")
    with VerifierPool(config, workers=2, timeout_s=1.0) as pool:
        for response in ("spin", "raise", "good"):
            pool.send(response, problem)
        verdicts = pool.score(items(problem, "spin", "raise", "good"))
    assert [v.status for v in verdicts] == ["timeout", "crash", "ok"]


def test_a_broken_verifier_is_told_when_verdicts_are_asked_for(tmp_path: Path) -> None:
    from kdrl.tasks import register_verifier

    class Unloadable:
        def __call__(self, response: str, problem: Problem) -> float:
            return 1.0

        def __reduce__(self) -> Any:
            return (_refuse, ())

    register_verifier("test-unloadable-sent")(Unloadable())
    made = TaskConfig.model_validate({"path": "x.jsonl", "verifier": "test-unloadable-sent"})
    problem = Problem("id", "?", "good")
    with VerifierPool(made, workers=1, timeout_s=10) as pool:
        pool.send("x", problem)
        with pytest.raises(UserError, match=r"cannot be loaded in a worker process: .*not here"):
            pool.score(items(problem, "x"))


def _refuse() -> None:
    raise RuntimeError("not here")
