"""The command line: exit status 0 for success, 2 for a mistake that the user can mend, 1 otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import raw_recipe, rows_of, with_teacher

from kdrl.cli import main
from kdrl.recipe import (
    describe_fields,
    describe_preparations,
    describe_sources,
    describe_terms,
    load_recipe,
    plain,
)
from kdrl.yamls import load_yaml

Kdrl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kdrl(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Kdrl:
    """Run a command in this process; returns status, output and errors. The working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdrl", *map(str, arguments)])
        try:
            main()
            status: Any = 0
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return call


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    raw = raw_recipe(world, "kdrl", evaluate={"final_problems": 3, "baselines": True}, **with_teacher(world))
    path.write_text(json.dumps(raw))
    return path


def test_the_program_is_installed_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kdrl", "methods", "kdlr"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "did you mean 'kdrl'" in done.stderr
    assert done.stdout == ""


def test_a_run_from_the_command_line(kdrl: Kdrl, recipe: Path, tmp_path: Path):
    out = tmp_path / "out"
    status, said, _ = kdrl("train", recipe, "steps=3", "objective.distill.weight=0.5", "--output", out)
    assert status == 0
    for words in (
        "method kdrl: GRPO and a per-token reverse KL",
        "arXiv 2506.02208",
        "objective.distill.weight: 0.002 -> 0.5",
        "start: accuracy",
        "teacher: accuracy",
        "final: accuracy",
        f"report: {out / 'report.html'}",
        f"model:  {out / 'final'}",
    ):
        assert words in said
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3]
    evaluations = json.loads((out / "evaluation.json").read_text())
    assert {name: value is not None for name, value in evaluations.items()} == {
        "start": True,
        "teacher": True,
        "final": True,
    }
    environment = json.loads((out / "environment.json").read_text())
    assert "torch" in str(environment)
    stored = load_recipe(out)
    assert plain(stored) == plain(load_recipe(recipe, ["steps=3", "objective.distill.weight=0.5"]))

    status, _, err = kdrl("train", recipe, "--output", out)
    assert status == 2
    assert "already holds a run" in err
    assert f"kdrl train --resume {out}" in err
    assert kdrl("train", "--resume", out)[0] == 0

    said = tmp_path / "eval.json"  # type: ignore[assignment]
    status, shown, _ = kdrl("eval", out / "final", "--task", recipe, "--json", said, "--problems", "4")
    assert status == 0
    assert "accuracy" in shown
    stored_eval = json.loads(Path(said).read_text())
    assert len(stored_eval["records"]) == 4
    status, shown, _ = kdrl("eval", out / "final", "--task", recipe, "--problems", "4", "--against", said)
    assert (status, "no difference" in shown) == (0, True)
    status, shown, _ = kdrl("report", out)
    assert (status, "report:" in shown) == (0, True)


def test_the_default_folder_is_named_after_the_recipe(kdrl: Kdrl, recipe: Path, tmp_path: Path):
    status, _, _ = kdrl("train", recipe, "steps=1", "evaluate.final_problems=0")
    assert status == 0
    assert (tmp_path / "runs" / "mine" / "final" / "config.json").is_file()


def test_dry_run_shows_recipe_method_and_memory_and_makes_nothing(kdrl: Kdrl, recipe: Path, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    status, said, err = kdrl("train", recipe, "steps=7", "--dry-run")
    assert (status, err) == (0, "")
    assert sorted(tmp_path.iterdir()) == before
    resolved, _, rest = said.partition("method kdrl: ")
    assert plain(load_recipe(load_yaml(resolved, "printed"))) == plain(load_recipe(recipe, ["steps=7"]))
    assert "policy_gradient:" in rest
    for part in ("weights", "gradients", "optimizer", "activations", "teacher", "cache"):
        assert part in rest.lower()
    assert rest.count("fits: about") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "absent.yaml"], "there is no recipe at absent.yaml"),
        (["train", "steps=3"], "'steps=3' looks like an override; the recipe file comes first"),
        (["train"], "give a recipe, as in `kdrl train recipes/kdrl.yaml"),
        (["train", "mine.yaml", "stepz=3"], "did you mean 'steps'?"),
        (["train", "mine.yaml", "steps"], "'steps' is no override"),
        (["train", "mine.yaml", "--outptu", "x"], "--output"),
        (["train", "mine.yaml", "--resume", "x"], "--resume takes no recipe"),
        (["train", "--resume", "absent"], "absent is no run to resume"),
        (["train", "mine.yaml", "student.model=./absent"], "absent"),
        (["train", "mine.yaml", "teacher.model=./absent", "--dry-run"], "absent"),
        (["train", "mine.yaml", "task.path=absent.jsonl"], "absent.jsonl"),
        (["train", "mine.yaml", "device=gpu"], "device 'gpu' is not known; use auto, cpu, cuda or cuda:N"),
        (["train", "mine.yaml", "--output", "mine.yaml"], "mine.yaml exists and is not an empty folder"),
        (["train", "mine.yaml", "--output", "mine.yaml/x"], "cannot be made"),
        (["train", "mine.yaml", "task.verifier=nowhere:fn"], "nowhere"),
        (["eval", "./absent", "--task", "mine.yaml"], "absent"),
        (["eval", "m"], "--task"),
        (["eval", "m", "--task", "absent.yaml"], "there is no recipe at absent.yaml"),
        (["eval", "m", "--task", "mine.yaml", "--json", "no/such/x.json"], "there is no folder no/such"),
        (["eval", "m", "--task", "mine.yaml", "--samples", "3"], "temperature 0 writes the same response"),
        (["eval", "m", "--task", "mine.yaml", "--split", "tset"], "Input should be 'train', 'development' or 'test'"),
        (["methods", "kdlr"], "did you mean 'kdrl'?"),
        (["trian"], "trian"),
        (["report", "absent"], "absent"),
    ],
)
def test_a_users_mistake_is_a_sentence_and_status_2(kdrl: Kdrl, recipe: Path, arguments: list[str], words: str):
    status, said, err = kdrl(*arguments)
    assert status == 2
    assert words in err
    assert "Traceback" not in err
    assert "accuracy" not in said


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "train absent.yaml",
        "train broken.yaml",
        "train --wrong",
        "train",
        "eval m --task absent.yaml",
        "bench absent.yaml",
        "bench --help",
        "doctor --help",
    ],
)
def test_help_and_what_can_be_seen_at_once_do_not_wait_for_torch(tmp_path: Path, line: str):
    (tmp_path / "broken.yaml").write_text("method: kdrl\nmethod: opd\n")
    look = (
        "import sys\nfrom kdrl.cli import main\ntry:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", look, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert "[]" in done.stderr.splitlines()


def test_a_recipe_is_read_without_transformers():
    look = "import sys, kdrl.recipe; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "change",
    [
        "teacher.model=./absent",
        "rollout.max_new_tokens=500",
        "student.model=/absent",
        "optimizer.kind=paged_adamw_8bit",
    ],
)
def test_a_train_that_is_refused_leaves_no_folder(kdrl: Kdrl, recipe: Path, tmp_path: Path, change: str):
    (tmp_path / "there").mkdir()
    before = set(tmp_path.rglob("*"))
    for output in ("new/of/three", "there/run"):
        assert kdrl("train", recipe, change, "--output", output)[0] == 2
    (tmp_path / "empty").mkdir()
    assert kdrl("train", recipe, change, "--output", "empty")[0] == 2
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "empty"}, "what was there stays"


def test_a_missing_model_is_named_by_its_option(kdrl: Kdrl, recipe: Path, tmp_path: Path):
    for command in (["train", recipe], ["train", recipe, "--dry-run"], ["bench", recipe], ["doctor", recipe]):
        for key in ("student.model", "teacher.model", "student.tokenizer"):
            status, said, err = kdrl(*command[:2], f"{key}=./absent", *command[2:])
            assert status == 2
            assert f"{key} './absent': there is no such folder" in said + err


def test_a_folder_with_other_things_is_not_written_into(kdrl: Kdrl, recipe: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    status, _, err = kdrl("train", recipe, "--output", "full")
    assert (status, "choose another --output" in err) == (2, True)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_broken_numbers_are_status_1(kdrl: Kdrl, world: Path, tmp_path: Path):
    (tmp_path / "nan.py").write_text(
        "import kdrl\n\n\n@kdrl.register_term('broken')\ndef broken(view):\n    return view.logq_N * float('nan')\n"
    )
    raw = raw_recipe(world, None, objective=["broken"], plugins=["nan.py"], optimizer={"stop_after_bad": 2})
    (tmp_path / "r.yaml").write_text(json.dumps(raw | {"steps": 5, "checkpoint": {"every": 1}}))
    status, _, err = kdrl("train", "r.yaml", "--output", "out")
    assert status == 1
    assert "not finite in 2 updates in a row" in err
    assert "The last good checkpoint is out/checkpoints/step-000001" in err
    assert "Traceback" not in err


def test_without_arguments_it_tells_what_it_can(kdrl: Kdrl):
    status, said, err = kdrl()
    assert status in (0, 2)
    for command in ("train", "eval", "methods", "report"):
        assert command in said + err


def test_methods_are_listed_and_shown(kdrl: Kdrl):
    status, said, _ = kdrl("methods")
    assert status == 0
    assert all(name in said for name in ("kdrl-mask-response", "opd-then-rl", "trrd", "hdpo"))
    status, said, _ = kdrl("methods", "kdrl")
    assert status == 0
    for words in (
        "formula:",
        "(A_i + b R_t) grad log q",
        "citation: Xu et al. 2025",
        "support: {token: k2}",
        "unknown:",
    ):
        assert words in said


def test_help_goes_on_with_every_recipe_key(kdrl: Kdrl):
    status, said, _ = kdrl("train", "--help")
    assert status == 0
    for option in ("--output", "--resume", "--dry-run"):
        assert option in said
    lines = [line.strip() for line in said.splitlines()]
    for name, _, text in describe_fields() + describe_sources() + describe_terms() + describe_preparations():
        place = next(i for i, line in enumerate(lines) if line.split(" ")[0] == name)
        assert lines[place + 1] == text
