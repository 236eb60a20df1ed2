"""The worker pool with real processes: verifiers that hang, die or print cost their own response and nothing else."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdrl.errors import UserError
from kdrl.tasks import Problem, ResponseInfo, TaskConfig, VerifierPool, register_verifier

INFO = ResponseInfo(10, False, 100)


@register_verifier("test-hostile")
def hostile(response: str, problem: Problem) -> float:
    """Does what the response says; otherwise compares."""
    match response:
        case "spin":
            while True:
                pass
        case "sleep":
            time.sleep(600)
        case "swallow":
            while True:
                try:
                    time.sleep(600)
                except BaseException:
                    continue
        case "native":
            _ = 9 ** (9**9)  # minutes inside one call that looks at no signal
        case "backtrack":
            re.match(r"(a+)+$", "a" * 60 + "b")
        case "nap":
            time.sleep(0.5)
        case "raise":
            raise RuntimeError("boom")
        case "exit":
            sys.exit(3)
        case "die":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "print":
            print("hello")
        case "write":
            os.write(1, b"hello")
        case "child":
            os.system("echo hello")
        case "close":
            sys.stdout.close()
            sys.stdout = None  # type: ignore[assignment]
        case "text":
            return "right"  # type: ignore[return-value]
        case "two":
            return 2.0
        case "half":
            return 0.5
        case "torch":
            return float("torch" in sys.modules)
    return float(response == problem.answer or response == "nap")


def config(**section: Any) -> TaskConfig:
    return TaskConfig.model_validate({"path": "unread.jsonl", "verifier": "test-hostile", **section})


def items(responses: list[str], answer: str = "good") -> list[tuple[str, Problem, ResponseInfo]]:
    return [(response, Problem(f"id{n}", "?", answer), INFO) for n, response in enumerate(responses)]


STATUS = {
    "spin": "timeout",
    "sleep": "timeout",
    "swallow": "timeout",
    "native": "timeout",
    "backtrack": "timeout",
    "raise": "crash",
    "exit": "crash",
    "die": "crash",
    "kill": "crash",
    "segfault": "crash",
    "text": "crash",
    "two": "crash",
    "print": "printed",
    "write": "printed",
    "child": "printed",
    "good": "ok",
    "bad": "ok",
    "half": "ok",
    "nap": "ok",
}


def test_hostile_responses_cost_only_themselves(caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    responses = ["good", "bad"] * 20
    for bad in STATUS:
        responses += [bad, "good"]
    responses += ["raise", "print", "good"]
    with caplog.at_level(logging.WARNING), VerifierPool(config(), workers=2, timeout_s=1.0) as pool:
        verdicts = pool.score(items(responses))
        after = pool.score(items(["good", "bad", "close", "good", "print", "good"]))
    right = {"good": 1.0, "half": 0.5, "nap": 1.0}
    assert [v.status for v in verdicts] == [STATUS[response] for response in responses]
    assert [v.reward for v in verdicts] == [right.get(response, 0.0) for response in responses]
    assert [v.correct for v in verdicts] == [right.get(response) == 1.0 for response in responses]
    assert [v.correct for v in after] == [True, False, False, True, False, True]
    total = [STATUS[response] for response in responses] + [v.status for v in after]
    assert pool.counts == {status: total.count(status) for status in ("ok", "timeout", "crash", "printed")}
    warned = [record.getMessage() for record in caplog.records if "verifier's status" in record.getMessage()]
    assert len(warned) == 3
    for status in ("timeout", "crash", "printed"):
        assert sum(f"is {status!r}" in message for message in warned) == 1
    assert "hello" not in capfd.readouterr().out, "what a verifier prints must not reach the terminal"


def test_math_says_nothing_beside_its_verdict(capfd: Any) -> None:
    with VerifierPool(TaskConfig.model_validate({"path": "x.jsonl", "verifier": {"name": "math"}})) as pool:
        verdicts = pool.score(items(["so it is $5$", "it is 6", "\\frac{", ""], answer="5"))
    assert [v.correct for v in verdicts] == [True, False, False, False]
    assert capfd.readouterr() == ("", "")


def test_waiting_for_a_worker_does_not_count() -> None:
    with VerifierPool(config(), workers=1, timeout_s=1.5) as pool:
        verdicts = pool.score(items(["nap"] * 6))
    assert [v.status for v in verdicts] == ["ok"] * 6, "six half-second naps in one worker: each far below its time"


def test_results_keep_their_order() -> None:
    responses = [str(n) for n in range(500)]
    with VerifierPool(config(verifier="exact"), workers=2, timeout_s=10) as pool:
        verdicts = pool.score([(r, Problem("x", "?", str(2 * (n // 2))), INFO) for n, r in enumerate(responses)])
    assert [v.correct for v in verdicts] == [n % 2 == 0 for n in range(500)]


def test_shaping_keeps_correct_apart_and_failures_get_no_bonus() -> None:
    made = config(rewards={"format": {"pattern": ".", "bonus": 0.25}, "overlong": {"buffer": 50, "penalty": 0.5}})
    rows = [
        (response, Problem("x", "?", "good"), ResponseInfo(75, False, 100)) for response in ("good", "bad", "raise")
    ]
    with VerifierPool(made, workers=1, timeout_s=10) as pool:
        verdicts = pool.score(rows)
    assert [v.reward for v in verdicts] == [1.0, 0.0, -0.25]
    assert [v.correct for v in verdicts] == [True, False, False]


def test_workers_hold_no_torch() -> None:
    with VerifierPool(config(), workers=1, timeout_s=10) as pool:
        assert pool.score(items(["torch"]))[0].reward == 0.0


def test_importing_tasks_loads_no_torch() -> None:
    code = (
        "import sys, kdrl, kdrl.tasks; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functions_of_a_notebook_travel() -> None:
    wanted = {"good"}
    namespace: dict[str, Any] = {"__name__": "__main__", "wanted": wanted}
    exec("def mine(response, problem):\n    return response in wanted", namespace)
    register_verifier("test-notebook")(namespace["mine"])
    with VerifierPool(config(verifier="test-notebook"), workers=1, timeout_s=10) as pool:
        assert [v.correct for v in pool.score(items(["good", "bad"]))] == [True, False]


def test_module_and_file_functions_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_verifier.py").write_text(
        "HELP = 3\ndef score(response, problem, longer=0):\n    return len(response) == HELP + longer\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("my_verifier:score", "my_verifier.py:score"):
        verifier = {"name": name, "settings": {"longer": 1}}
        with VerifierPool(config(verifier=verifier), workers=1, timeout_s=10) as pool:
            assert [v.correct for v in pool.score(items(["four", "three"]))] == [True, False]


def test_a_verifier_that_cannot_be_loaded_is_told_and_does_not_hang() -> None:
    class Unloadable:
        def __call__(self, response: str, problem: Problem) -> float:
            return 1.0

        def __reduce__(self) -> Any:
            return (_refuse, ())

    register_verifier("test-unloadable")(Unloadable())
    with (
        VerifierPool(config(verifier="test-unloadable"), workers=1, timeout_s=10) as pool,
        pytest.raises(UserError, match=r"cannot be loaded in a worker process: .*not here"),
    ):
        pool.score(items(["x"]))


def _refuse() -> None:
    raise RuntimeError("not here")


SCRIPT = """
import sys
print("script runs", flush=True)
from kdrl.tasks import Problem, ResponseInfo, TaskConfig, VerifierPool, register_verifier

@register_verifier("mine")
def mine(response, problem):
    while response == "spin":
        pass
    return response == problem.answer

pool = VerifierPool(TaskConfig(path="unread.jsonl", verifier={"name": "mine"}), workers=1, timeout_s=300)
rows = [(r, Problem("x", "?", "a"), ResponseInfo(1, False, 9)) for r in "ab"]
print([v.correct for v in pool.score(rows)], flush=True)
print("pids", *[child.pid for child in __import__("multiprocessing").active_children()], flush=True)
if "wait" in sys.argv:
    pool.score([("spin", *rows[0][1:])])
pool.close()
"""


def script(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return [sys.executable, str(tmp_path / "script.py")], environment


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    command, environment = script(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[:2] == ["script runs", "[True, False]"]
    assert done.stdout.count("script runs") == 1


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    command, environment = script(tmp_path)
    with subprocess.Popen([*command, "wait"], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = iter(parent.stdout.readline, "")
        pids = next([int(pid) for pid in line.split()[1:]] for line in lines if line.startswith("pids"))
        time.sleep(0.5)  # the worker is then busy and reads no pipe whose end would tell it
        parent.kill()
    assert pids
    for _ in range(100):
        if not any(_alive(pid) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail(f"orphans: {[pid for pid in pids if _alive(pid)]}")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
