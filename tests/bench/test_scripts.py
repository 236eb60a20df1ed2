"""The benchmark scripts run, on their smallest cases, and write what they found."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["engine.py", "--only", "0.3M"],
        ["teacher.py", "--only", "token, float32, vocabulary 55"],
        ["group.py", "--only", "grpo"],
        ["scaling.py", "--only", "vocabulary 1,000"],
        ["gpu.py", "--tiny"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_script_runs_and_writes_its_cases(arguments: list[str], tmp_path: Path):
    found = tmp_path / "found.json"
    command = [sys.executable, FOLDER / arguments[0], *arguments[1:], "--quick", "--threads", "1", "--json", found]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    content = json.loads(found.read_text())
    assert content["cases"]
    assert {"machine", "versions", "seed"} <= set(content)
    for case in content["cases"]:
        assert {"case", "commit", "date", "command"} <= set(case)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("trainer", ["GRPOTrainer", "DistillationTrainer", "GKDTrainer"])
def test_both_sides_have_time_phases_and_memory(trainer: str, tmp_path: Path):
    found = tmp_path / "found.json"
    command = [sys.executable, FOLDER / "trl_compare.py", "--quick", "--threads", "1", "--json", found]
    done = subprocess.run([*command, "--trainers", trainer], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for case in json.loads(found.read_text())["cases"]:
        assert {"rollout", "update"} < set(case["kdrl_phases"])
        assert {"generation", "rest"} == set(case["trl_phases"])
        if sys.platform.startswith("linux"):
            assert case["kdrl_peak_mib"]["min"] > 0 < case["trl_peak_mib"]["min"]


@pytest.mark.slow
def test_cases_of_other_names_stay_and_unknown_ones_are_named(tmp_path: Path):
    found = tmp_path / "found.json"
    for case in ("mask keeps 50%", "mask keeps 10%"):
        command = [sys.executable, FOLDER / "scaling.py", "--quick", "--threads", "1", "--json", found, "--only", case]
        subprocess.run(command, capture_output=True, check=True, timeout=600)
    assert [case["case"] for case in json.loads(found.read_text())["cases"]] == ["mask keeps 50%", "mask keeps 10%"]
    command[-1] = "none such"
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "no case's name holds 'none such'" in done.stderr
