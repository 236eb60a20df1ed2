"""What the benchmark scripts share: the result file, the peak of memory, and the table of phases."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl.bench.machine import peak_bytes

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


def test_a_rerun_replaces_its_own_cases_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    common, options = script(monkeypatch, "common"), Namespace(json=tmp_path / "found.json")
    monkeypatch.setattr(sys, "argv", ["engine.py", "--only", "one, two", "--json", str(options.json)])
    common.save(options, [{"case": "one", "value": 1}, {"case": "two", "value": 2}])
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    common.save(options, [{"case": "two", "value": 3}])
    found = json.loads(options.json.read_text())
    assert [(c["case"], c["value"], c["threads"]) for c in found["cases"]] == [
        ("one", 1, threads),
        ("two", 3, threads + 1),
    ]
    assert found["cases"][0]["command"] == "python benchmarks/engine.py --only 'one, two' --json found.json"


def test_cases_of_another_machine_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    common, options = script(monkeypatch, "common"), Namespace(json=tmp_path / "found.json")
    common.save(options, [{"case": "one"}])
    content = json.loads(options.json.read_text())
    content["machine"]["cpu"] = "another"
    options.json.write_text(json.dumps(content))
    common.save(options, [{"case": "two"}])
    assert [case["case"] for case in json.loads(options.json.read_text())["cases"]] == ["two"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells")
def test_a_peak_is_of_what_came_after_it_was_settled(monkeypatch: pytest.MonkeyPatch):
    common = script(monkeypatch, "common")
    torch.ones(64 << 18).sum()
    for size in (32, 8):
        before = common.settle()
        torch.ones(size << 18).sum()
        after = peak_bytes("cpu")
        assert after is not None
        assert size - 1 <= common.mib(after - before) <= size + 6


def test_phases_have_what_is_left_of_a_step_and_rates(monkeypatch: pytest.MonkeyPatch):
    job = script(monkeypatch, "beside_trl.job")
    blocks = [job.Block([2.0, 4.0], {100}, {1}, {"rollout": [0.5, 1.0], "verify": [0.0, 0.0]}) for _ in range(2)]
    found = job.by_phase(blocks, 100, "other")
    assert list(found) == ["rollout", "verify", "other"]
    assert found["rollout"] == {"seconds": {"median": 0.75, "min": 0.5, "max": 1.0}, "tokens_per_s": 133.3}
    assert "tokens_per_s" not in found["verify"]
    assert found["other"]["seconds"] == {"median": 2.25, "min": 1.5, "max": 3.0}
