"""Every example does what its docstring says, run by the command that its docstring shows."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import kdrl
from kdrl import cli
from kdrl.errors import UserError
from kdrl.objectives.masks import MaskContext, evaluate_mask
from kdrl.run import resume
from kdrl.tasks import build_task
from kdrl.tasks.base import take

ROOT = Path(__file__).parents[1]
OWN = sorted((ROOT / "examples").glob("own_*.py"))


@pytest.fixture(autouse=True)
def in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


def command_of(example: str) -> list[str]:
    text = ast.get_docstring(ast.parse((ROOT / "examples" / example).read_text()))
    assert text is not None
    found = re.search(r"^kdrl (train .*?)$\n\n", text.replace("\\\n", ""), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{example} shows no command"
    return shlex.split(found[1])


def run(monkeypatch: pytest.MonkeyPatch, example: str, *more: str) -> Path:
    """Run the command of an example's docstring with further overrides; returns the run's folder."""
    arguments = command_of(example)
    place = arguments.index("--output")
    monkeypatch.setattr("sys.argv", ["kdrl", *arguments[:place], *more, *arguments[place:]])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    return Path(arguments[place + 1])


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in rows]


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_an_extension_takes_twenty_lines_or_fewer(path: Path):
    tree = ast.parse(path.read_text())
    assert len(ast.unparse(tree.body[1:]).splitlines()) <= 20  # type: ignore[arg-type]


def test_a_term_trains_and_its_settings_are_recipe_keys(monkeypatch):
    rows = rows_of(run(monkeypatch, "own_term.py"))
    assert all(row["loss/far_distill"] >= 0 and row["weight/far_distill"] == 0.1 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows), "the teacher moves the student"
    plugins = "plugins=examples/own_term.py"
    for settings, said in [
        ("{margin: wide}", r"far_distill\.margin: Input should be a valid number"),
        ("{magrin: 1}", r"far_distill\.magrin is no recipe key; did you mean 'margin'"),
    ]:
        with pytest.raises(UserError, match=said):
            kdrl.load_recipe("examples/tiny.yaml", [plugins, f"objective=[{{far_distill: {settings}}}]"])


def test_a_verifier_of_a_plugin_scores_in_worker_processes(monkeypatch):
    folder = run(monkeypatch, "own_verifier.py", "log.rollouts_every=1", "log.rollouts=16", "evaluate.final_problems=4")
    rollouts = rows_of(folder, "rollouts.jsonl")
    assert any(0 < r["reward"] < 1 for r in rollouts), "partial credit"
    assert all(r["correct"] == (r["reward"] == 1) for r in rollouts)
    assert rows_of(folder)[-1]["verifier/crash"] == 0
    again = kdrl.evaluate(folder / "final", folder, problems=4)
    stored = json.loads((folder / "evaluation.json").read_text())["final"]
    assert again.accuracy == stored["metrics"]["accuracy"], "a run's recipe names the plugin"


def test_a_task_is_split_by_text_and_resumes_to_the_byte(monkeypatch):
    folder = run(monkeypatch, "own_task.py", "checkpoint.every=1", "checkpoint.keep=3", "rollout.prompts=60")
    task = build_task(kdrl.load_recipe(folder).task, seed=0)
    splits = {s: {p.prompt for p in take(task.problems(s), 1000)} for s in ("train", "development", "test")}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 13 * 13
    assert all(splits.values())
    torn = Path("torn")
    shutil.copytree(folder, torn)
    for late in ("checkpoints/step-000002", "checkpoints/step-000003", "final"):
        shutil.rmtree(torn / late)
    resume(torn, say=lambda text: None)
    assert without_clock(rows_of(torn)) == without_clock(rows_of(folder)), "past the end of the first epoch"
    weights = "final/model.safetensors"
    assert (torn / weights).read_bytes() == (folder / weights).read_bytes()


def test_a_schedule_moves_a_weight(monkeypatch):
    rows = rows_of(run(monkeypatch, "own_schedule.py"))
    assert [row["weight/distill"] for row in rows] == pytest.approx([0.01, 0.005, 0.01])
    with pytest.raises(UserError, match="sawtooth has no setting 'perod'; did you mean 'period'"):
        kdrl.load_recipe(
            "examples/tiny.yaml",
            ["plugins=examples/own_schedule.py", "optimizer.lr={sawtooth: {top: 1.0, perod: 2}}"],
        )


def test_a_mask_with_a_setting_keeps_hard_groups(monkeypatch):
    rows = rows_of(run(monkeypatch, "own_mask.py"))
    assert all(row["masked_share"] == 0.0 for row in rows if row["groups_without_right"] == 1.0)
    right = torch.tensor([True, False, True, True, False, False])
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    rows_N = torch.arange(6)
    context = MaskContext(right, right.float(), group, ~right, rows_N, rows_N > 0, None)
    kept = {share: evaluate_mask({"hard_group": share}, context).tolist() for share in (0.0, 0.5)}
    assert kept == {0.0: [False] * 4 + [True] * 2, 0.5: [True, True, False, False, True, True]}
    assert evaluate_mask("hard_group", context).tolist() == kept[0.5], "the default"
    with pytest.raises(UserError, match="hard_group has no setting 'shar'; did you mean 'share'"):
        kdrl.load_recipe(
            "examples/tiny.yaml",
            ["method=kdrl", "plugins=examples/own_mask.py", "objective.distill.mask={hard_group: {shar: 1}}"],
        )


def test_the_notebook_runs(capsys):
    left = runpy.run_path("examples/notebook.py", run_name="__main__")
    assert (left["run"].model / "config.json").is_file()
    assert left["sampled"].samples == 4
    assert len(left["greedy"].records) == 8
    assert left["student"].grad.abs().sum() > 0
    assert callable(kdrl.evaluate), "importing its module does not hide the function"
