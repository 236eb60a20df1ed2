"""A checkpoint is whole or it is not there: kills, full disks, flipped bits, and an optimizer that goes on exactly."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdrl.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    TornError,
    flatten_optimizer,
    load,
    restore_optimizer,
)
from kdrl.errors import UserError

REPO = Path(__file__).parents[1]


def content(step: int) -> dict[str, dict[str, Tensor]]:
    """Tensors that only this step has, so that a mixture of two saves cannot pass."""
    made = torch.Generator().manual_seed(step)
    return {
        "student": {"w": torch.randn(64, 32, generator=made), "step": torch.tensor(step)},
        "optimizer": {"w|exp_avg": torch.randn(64, 32, generator=made).bfloat16()},
    }


def assert_is(loaded, step: int) -> None:
    assert loaded.step == step
    assert loaded.state == {"step": step}
    for group, tensors in content(step).items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[group][name], tensor)


def saved(run: Path, *steps: int, scores: dict[int, float] | None = None, **config) -> Checkpoints:
    checkpoints = Checkpoints(run, CheckpointConfig(**config))
    for step in steps:
        checkpoints.save(step, content(step), {"step": step}, score=(scores or {}).get(step))
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(p.name for p in checkpoints.folder.iterdir() if p.name != ".lock")


def test_nothing_saved_is_none_and_writes_nothing(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "run", CheckpointConfig()).latest() is None
    assert list(tmp_path.iterdir()) == []


def test_save_and_load_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {
        "student": {
            "nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
            "half": torch.arange(7, dtype=torch.bfloat16),
            "count": torch.tensor(2**62),
            "empty": torch.zeros(0, 3),
            "flags": torch.tensor([True, False]),
            "transposed": torch.arange(6.0).reshape(2, 3).T,
        },
        "nothing": {},
    }
    state = {"z": 1, "a": [0.1 + 0.2, 5e-324, None, True, "ä\n"], "deep": {"n": {"list": []}}, "big": 2**80}
    Checkpoints(tmp_path, CheckpointConfig()).save(3, tensors, state, score=0.25)
    loaded = Checkpoints(tmp_path, CheckpointConfig()).latest()
    assert loaded is not None
    assert (loaded.state, loaded.score) == (state, 0.25)
    assert list(loaded.state) == list(state)
    for name, tensor in tensors["student"].items():
        found = loaded.tensors["student"][name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert found.contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )
    assert loaded.tensors["nothing"] == {}


def test_tied_tensors_are_stored_once_and_views_are_cut_loose(tmp_path: Path) -> None:
    table = torch.randn(1000, 16)
    group = {
        "embed": table,
        "head": table,
        "row": table[3],
        "half": table[:500],
        "same_place_other_shape": table.view(-1),
    }
    path = Checkpoints(tmp_path, CheckpointConfig()).save(1, {"student": group}, {})
    found = load(path).tensors["student"]
    assert all(torch.equal(found[name], tensor) for name, tensor in group.items())
    assert found["head"].data_ptr() == found["embed"].data_ptr()
    assert (path / "student.safetensors").stat().st_size < 2.6 * table.numel() * 4


@pytest.mark.parametrize("state", [{1: 2}, {"a": (1, 2)}, {"a": [torch.tensor(1)]}, {"a": {"b": Path("x")}}])
def test_state_that_json_would_change_is_refused_by_place(tmp_path: Path, state: dict) -> None:
    with pytest.raises(TypeError, match=r"^state(\.a)?"):
        Checkpoints(tmp_path, CheckpointConfig()).save(1, {}, state)
    assert not (tmp_path / "checkpoints").exists()


def test_keeps_newest_n_and_best(tmp_path: Path) -> None:
    scores = {1: 0.2, 2: 0.9, 3: 0.9, 4: 0.1, 5: 0.3, 6: 0.3}
    checkpoints = saved(tmp_path, *scores, scores=scores, keep=2)
    assert names(checkpoints) == ["step-000003", "step-000005", "step-000006"]
    assert checkpoints.best() == checkpoints.folder / "step-000003"
    # A second process finds the best of the first: scores live in the manifests.
    again = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    again.save(7, content(7), {"step": 7})
    assert names(again) == ["step-000003", "step-000007"]
    assert names(saved(tmp_path / "other", *scores, scores=scores, keep=1, keep_best=False)) == ["step-000006"]


def test_the_old_one_goes_only_after_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    monkeypatch.setattr("kdrl.checkpoint.save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, content(2), {"step": 2})
    assert names(checkpoints) == ["step-000001"]
    assert_is(checkpoints.latest(), 1)


def test_saving_a_step_twice_replaces_it(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    checkpoints.save(2, content(5), {"step": 5})
    loaded = checkpoints.latest()
    assert loaded is not None
    assert loaded.state == {"step": 5}
    assert names(checkpoints) == ["step-000001", "step-000002"]


def test_kill_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    (checkpoints.folder / "step-000002").rename(checkpoints.folder / ".old-step-000002")
    assert_is(Checkpoints(tmp_path, CheckpointConfig()).latest(), 2)


def damage(file: Path, how: str, place: float) -> None:
    data = bytearray(file.read_bytes())
    at = min(int(place * len(data)), len(data) - 1)
    if how == "flip":
        data[at] ^= 1 << random.Random(at).randrange(8)
    elif how == "truncate":
        del data[at:]
    elif how == "append":
        data += b"\n"
    else:
        file.unlink()
        return
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_every_damage_is_found_named_and_skipped(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    file = checkpoints.folder / "step-000002" / name
    whole = file.read_bytes()
    places = [i / 97 for i in range(98)]
    cases = [("flip", p) for p in places] + [("truncate", p) for p in places] + [("append", 0), ("missing", 0)]
    for how, place in cases:
        damage(file, how, place)
        caplog.clear()
        assert_is(checkpoints.latest(), 1)
        assert "step-000002" in caplog.text
        assert name in checkpoints.skipped[0]
        file.write_bytes(whole)
    assert_is(checkpoints.latest(), 2)
    assert checkpoints.skipped == []


def test_every_single_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, CheckpointConfig()).save(1, {}, {}, score=0.5)
    file = path / "manifest.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(TornError):
            load(path)


def test_a_renamed_folder_is_not_taken_for_another_step(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    (checkpoints.folder / "step-000002").rename(checkpoints.folder / "step-000009")
    assert_is(checkpoints.latest(), 1)
    assert "step 2" in checkpoints.skipped[0]


def test_none_whole_is_an_error_that_names_all(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for step in (1, 2):
        damage(checkpoints.folder / f"step-00000{step}" / "state.json", "missing", 0)
    with pytest.raises(UserError, match=r"(?s)step-000002.*state.json.*step-000001.*new --output"):
        checkpoints.latest()


def test_a_torn_one_never_pushes_out_a_whole_one(tmp_path: Path) -> None:
    saved(tmp_path, 2, 3)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    damage(checkpoints.folder / "step-000003" / "state.json", "flip", 0.5)
    assert_is(checkpoints.latest(), 2)
    checkpoints.save(1, content(1), {"step": 1})  # by count alone 3 and 2 are the newest
    assert names(checkpoints) == ["step-000001", "step-000002"]


WRITER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.test_checkpoint import content
from kdrl.checkpoint import Checkpoints, CheckpointConfig
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=2))
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    checkpoints.save(step, content(step), {"step": step}, score=1 / step)
    print(step, flush=True)
"""
FORKING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from tests.test_checkpoint import content
from kdrl.checkpoint import Checkpoints, CheckpointConfig
for line in sys.stdin:
    run, step = line.split()
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(run, CheckpointConfig(keep=2))
        step = int(step)
        while True:
            step += 1
            checkpoints.save(step, content(step), {"step": step}, score=1 / step)
            os.write(1, b"saved %d\\n" % step)
    os.write(1, b"child %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


class Writer:
    """A process that forks children which save in a loop; the test kills a child with -9 and gets the next one."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING, str(REPO)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def kill_after(self, run: Path, step: int, seconds: float) -> int:
        """Let a child save from `step` on and kill it `seconds` after a save; the last step it said is saved."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{run} {step}\n")
        self.process.stdin.flush()
        child, last, killed = 0, step, False
        while (line := self.process.stdout.readline()) != "dead\n":
            assert line, "the writer ended by itself"
            word, number = line.split()
            if word == "child":
                child = int(number)
            else:
                last = int(number)
            if child and last > step and not killed:
                time.sleep(seconds)
                os.kill(child, signal.SIGKILL)
                killed = True
        return last


def test_kill_9_at_any_moment_of_a_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sixty kills at random moments: what was said to be saved is there and whole; the next process goes on from it."""
    random.seed(5)
    writer, step = Writer(), 0
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    try:
        for _ in range(60):
            said = writer.kill_after(tmp_path, step, random.uniform(0, 0.02))
            loaded = checkpoints.latest()
            checkpoints.close()
            assert loaded is not None
            assert loaded.step in (said, said + 1)  # killed after the rename, before it could say so
            assert_is(loaded, loaded.step)
            assert checkpoints.skipped == []
            assert all(name.startswith("step-") for name in names(checkpoints))
            step = loaded.step
    finally:
        writer.process.kill()
        writer.process.communicate()
    # If no kill had met a save half done, this test would have shown nothing.
    assert "cut off before it was whole" in caplog.text


def test_every_system_call_of_a_save_can_be_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before its 1st, 2nd, ... change of the disk and cleans nothing up; then resume and save."""

    class DeadError(BaseException):
        pass

    def save_dying_at(run: Path, moment: int) -> bool:
        left = moment

        def mortal(function):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    raise DeadError
                left -= 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("mkdir", "rename", "write_bytes"):
                patch.setattr(Path, name, mortal(getattr(Path, name)))
            patch.setattr("kdrl.checkpoint.save_file", mortal(save_file))
            patch.setattr(os, "fsync", mortal(os.fsync))
            for name in ("unlink", "rmdir"):  # so that a removal stops in the middle
                patch.setattr(os, name, mortal(getattr(os, name)))
            try:
                Checkpoints(run, CheckpointConfig(keep=1)).save(3, content(3), {"step": 3})
            except DeadError:
                return False
        return True

    moment = 0
    while True:
        run = tmp_path / str(moment)
        saved(run, 1, 2, keep=2)
        done = save_dying_at(run, moment)
        for path in (run / "checkpoints").glob("step-*"):
            load(path)  # whatever has a name is whole, also what was being removed
        checkpoints = Checkpoints(run, CheckpointConfig(keep=1))
        loaded = checkpoints.latest()
        assert loaded is not None
        assert_is(loaded, loaded.step)
        assert loaded.step == 3 or not done
        assert checkpoints.skipped == []
        checkpoints.save(4, content(4), {"step": 4})
        assert names(checkpoints) == ["step-000004"]
        if done:
            break
        moment += 1
    assert moment > 12


FULL = """
import json, sys, resource
sys.path.insert(0, sys.argv[1])
from tests.test_checkpoint import content
from kdrl.checkpoint import Checkpoints, CheckpointConfig
from kdrl.errors import UserError
import torch
checkpoints = Checkpoints(sys.argv[2], CheckpointConfig())
checkpoints.save(1, content(1), {"step": 1})
if sys.argv[3] != "none":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
big = {"student": {"w": torch.zeros(3_000_000)}} if sys.argv[4] == "tensors" else {"student": {}}
state = {"text": "x" * 12_000_000} if sys.argv[4] == "state" else {}
try:
    checkpoints.save(2, big, state)
    print("saved")
except UserError as error:
    print(error)
"""


def check_full(run: Path, limit: str, part: str) -> None:
    command = [sys.executable, "-c", FULL, str(REPO), str(run), limit, part]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "step-000002" in out, out
    assert "12,0" in out  # bytes needed
    assert "--resume" in out
    checkpoints = Checkpoints(run, CheckpointConfig())
    assert names(checkpoints) == ["step-000001"]
    assert_is(checkpoints.latest(), 1)


def test_file_size_limit(tmp_path: Path) -> None:
    check_full(tmp_path / "run", "1000000", "tensors")


@pytest.mark.parametrize("part", ["tensors", "state"])
def test_full_disk(tmp_path: Path, part: str) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system to fill can be mounted by root only")
    try:
        check_full(tmp_path / "run", "none", part)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), "0", str(REPO)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout
        while writer.stdout.readline() != "2\n":
            pass
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        with pytest.raises(UserError, match="another process is training"):
            checkpoints.latest()
        with pytest.raises(UserError, match="another process is training"):
            checkpoints.save(9, {}, {})
    finally:
        writer.kill()
        writer.communicate()
    assert checkpoints.latest() is not None


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if kind == "bfloat16":
        model = model.bfloat16()
    decay = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}
    rest = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    if kind == "sgd":
        return model, torch.optim.SGD([decay, rest], lr=0.01, momentum=0.9)
    options = {"amsgrad": kind == "amsgrad", "fused": kind == "fused" or None}
    lr = torch.tensor(1e-2) if kind == "tensor lr" else 1e-2
    optimizer = torch.optim.AdamW([decay, rest], lr=lr, betas=(0.9, 0.95), **options)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = 1e-2 / (step + 1)
        optimizer.step()


def widen(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() * 1.001
        state["note"] = 7


@pytest.mark.parametrize("kind", ["plain", "bfloat16", "amsgrad", "fused", "tensor lr", "sgd"])
def test_three_more_steps_are_the_same_with_a_pause(tmp_path: Path, kind: str) -> None:
    model, optimizer = build(kind)
    train(model, optimizer, range(4))
    tensors, state = flatten_optimizer(optimizer, dict(model.named_parameters()))
    Checkpoints(tmp_path, CheckpointConfig()).save(
        4, {"student": model.state_dict(), "optimizer": tensors}, {"optimizer": state}
    )
    train(model, optimizer, range(4, 7))

    again, resumed = build(kind)
    loaded = Checkpoints(tmp_path, CheckpointConfig()).latest()
    assert loaded is not None
    again.load_state_dict(loaded.tensors["student"])
    restore_optimizer(resumed, dict(again.named_parameters()), loaded.tensors["optimizer"], loaded.state["optimizer"])
    train(again, resumed, range(4, 7))
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name
    assert str(optimizer.state_dict()["param_groups"]) == str(resumed.state_dict()["param_groups"])


def test_moments_keep_their_dtype_and_other_state_its_place(tmp_path: Path) -> None:
    model, optimizer = build("bfloat16")
    train(model, optimizer, range(2))
    widen(optimizer)
    named = dict(model.named_parameters())
    tensors, state = flatten_optimizer(optimizer, named)
    assert json.loads(json.dumps(state)) == state
    again, resumed = build("bfloat16")
    restore_optimizer(resumed, dict(again.named_parameters()), tensors, state)
    for name, parameter in again.named_parameters():
        was, now = optimizer.state[named[name]], resumed.state[parameter]
        assert was.keys() == now.keys()
        assert now["exp_avg"].dtype == torch.float32
        assert torch.equal(was["exp_avg"], now["exp_avg"])
        assert was["exp_avg"].data_ptr() != now["exp_avg"].data_ptr()
        assert now["note"] == 7


def test_another_optimizer_or_model_is_refused() -> None:
    model, optimizer = build("plain")
    train(model, optimizer, range(1))
    tensors, state = flatten_optimizer(optimizer, dict(model.named_parameters()))
    other, sgd = build("sgd")
    with pytest.raises(UserError, match=r"another optimizer.*AdamW.*SGD"):
        restore_optimizer(sgd, dict(other.named_parameters()), tensors, state)
    bigger = nn.Sequential(*model, nn.Linear(3, 3))
    wide = torch.optim.AdamW(bigger.parameters())
    with pytest.raises(UserError, match=r"trained parameters"):
        restore_optimizer(wide, dict(bigger.named_parameters()), tensors, state)
