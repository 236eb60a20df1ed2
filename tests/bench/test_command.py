"""`kdrl bench`: what it reports, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import raw_recipe, with_teacher

from kdrl.bench.recipe import PHASES
from kdrl.cli import main

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Bench:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdrl", "bench", *map(str, arguments)])
        try:
            main()
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
        return (status, *capfd.readouterr())

    return call


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    raw = raw_recipe(world, "kdrl", evaluate={"final_problems": 3, "every": 1}, **with_teacher(world))
    path.write_text(json.dumps(raw))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_recipe_is_measured_and_nothing_is_left_behind(bench: Bench, recipe: Path, world: Path, tmp_path: Path):
    cache = "teacher.cache={path: scores, write: true}"
    before = files(tmp_path), files(world)
    status, out, _ = bench(recipe, cache, "--steps", 2, "--parts", "--json", "found.json")
    assert status == 0, out
    found = json.loads((tmp_path / "found.json").read_text())
    (tmp_path / "found.json").unlink()
    assert (files(tmp_path), files(world)) == before
    assert found["steps"] == 2
    assert len(found["tokens"]) == 2
    assert all(1 <= n <= 12 * 6 for n in found["tokens"])
    assert set(found["phases"]) == {*PHASES, "other", "step"}
    for phase in found["phases"].values():
        assert 0 <= phase["seconds"]["min"] <= phase["seconds"]["median"] <= phase["seconds"]["max"]
    assert sum(found["phases"][name]["seconds"]["max"] for name in PHASES) > 0
    assert found["update"]["flops_per_s"]["median"] > 0
    assert found["memory"]["plan_bytes"] > 0
    assert found["parts"]["engine"]["tokens"] == 12 * 6
    assert found["parts"]["head"]["chunked_over_full"]["median"] > 0
    assert {"machine", "versions", "commit"} <= set(found)
    for word in (*PHASES, "memory:", "engine:", "head:", "found.json"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.yaml"], "none.yaml"),
        (["steps=3"], "the recipe file comes first"),
        (["mine.yaml", "--steps", "0"], "--steps is 0"),
        (["mine.yaml", "step=3"], "did you mean 'steps'"),
        (["mine.yaml", "--json", "nowhere/found.json"], "there is no folder nowhere"),
        (["mine.yaml", "student.model=nothing/here"], "nothing/here"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(bench: Bench, recipe: Path, arguments: list[str], sentence: str):
    status, _, err = bench(*arguments)
    assert status == 2
    assert sentence in err


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_loaded(
    world: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kdrl.memory.available_bytes", lambda device: 10**8)
    monkeypatch.setattr("kdrl.bench.steps.Builder", None)
    (world / "large.json").write_text(json.dumps(raw_recipe(world)))
    status, _, said = bench(world / "large.json")
    assert status == 2
    assert "does not fit" in said
