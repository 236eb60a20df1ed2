"""A cache on the disk: damage of any kind is found, foreign parts are refused, a kill or a full disk loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import made_responses, toy

from cache.making import KINDS, all_of, fill, keyed, writing
from kdrl.batch import Response, Rollouts
from kdrl.errors import UserError
from kdrl.teachers import cache_disk
from kdrl.teachers.base import Evidence
from kdrl.teachers.cache_store import CacheStore
from kdrl.teachers.cached import CachedTeacher

RESPONSES = made_responses(groups=4)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return toy(2)


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / request.param
    fill(loaded, path, KINDS[request.param], RESPONSES)
    return path


def read_all(folder: Path, responses: list[Response] | None = None) -> Evidence:
    teacher = CachedTeacher(CacheStore.read(folder))
    rollouts = Rollouts.of(responses or RESPONSES)
    return teacher.score(rollouts, all_of(rollouts), "distribution" if teacher.gives.distribution else "few", 1.0)


def numbers(evidence: Evidence) -> list[torch.Tensor]:
    found = [evidence.logp_N]
    for part in (evidence.hidden_MD, evidence.few):
        if isinstance(part, torch.Tensor):
            found.append(part[evidence.where_N])
        elif part is not None:
            few = part.at(evidence.where_N)
            found += [x for x in (few.ids_NK, few.logp_NK, few.weight_NK, few.tail_N) if x is not None]
    return found


def same(one: Evidence, other: Evidence) -> bool:
    return all(torch.equal(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.stat().st_size)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.stat().st_size}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(data: st.DataObject, folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = data.draw(st.sampled_from(files(copy)))
    raw = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[place >> 3] ^= 1 << (place & 7)
    file.write_bytes(raw)
    with pytest.raises(UserError) as told:
        read_all(copy)
    assert str(copy) in str(told.value)
    assert any(word in str(told.value) for word in ("again", "put a copy", "is kept", "are kept"))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncation_is_found(data: st.DataObject, folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = data.draw(st.sampled_from(files(copy)))
    size = file.stat().st_size
    # All but the newline after the manifest's last brace, without which nothing is lost.
    most = size - (2 if file.name == "manifest.json" else 1)
    os.truncate(file, data.draw(st.integers(0, most)))
    with pytest.raises(UserError, match=str(copy)):
        read_all(copy)


@pytest.mark.parametrize("name", ["shard-000001.safetensors", "index.jsonl", "manifest.json"])
def test_a_missing_file_is_found(name: str, folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(UserError, match=str(tmp_path / "copy")):
        read_all(tmp_path / "copy")


def test_parts_of_another_cache_are_found(loaded: Any, folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    fill(toy(5), other, KINDS[folder.name], RESPONSES)
    for name in ("shard-000001.safetensors", "index.jsonl", "manifest.json"):
        copy = tmp_path / f"copy-{name}"
        shutil.copytree(folder, copy)
        shutil.copy(other / name, copy / name)
        with pytest.raises(UserError, match=str(copy)):
            read_all(copy)
    # All of it, shards and index alike, under this cache's manifest.
    copy = tmp_path / "all"
    shutil.copytree(other, copy)
    shutil.copy(folder / "manifest.json", copy / "manifest.json")
    with pytest.raises(UserError, match="of another cache"):
        read_all(copy)
    (copy / "index.jsonl").unlink()
    with pytest.raises(UserError, match="of another cache"):
        writing(loaded, copy, KINDS[folder.name])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loaded": toy(6)}, "another teacher"),
        ({"temperature": 0.7}, "another temperature"),
        ({"stored": KINDS["topk"].model_copy(update={"k": 5})}, "other settings.*k"),
        ({"stored": KINDS["draws"]}, "other settings.*kind"),
    ],
)
def test_a_cache_is_not_added_to_by_another_teacher_or_setting(
    change: dict[str, Any], says: str, loaded: Any, tmp_path: Path
):
    fill(loaded, tmp_path / "cache", KINDS["topk"], RESPONSES[:2])
    before = files_of(tmp_path / "cache")
    given_ = {"loaded": loaded, "stored": KINDS["topk"], "temperature": 1.0} | change
    with pytest.raises(UserError, match=says):
        writing(given_["loaded"], tmp_path / "cache", given_["stored"], temperature=given_["temperature"])
    assert files_of(tmp_path / "cache") == before


def test_adding_keeps_what_is_there(loaded: Any, folder: Path, tmp_path: Path):
    grown = tmp_path / "grown"
    stored = KINDS[folder.name]
    fill(loaded, grown, stored, RESPONSES[:6])
    first = files_of(grown)
    fill(loaded, grown, stored, RESPONSES[6:])
    assert same(read_all(grown), read_all(folder))
    for name, raw in first.items():
        assert files_of(grown)[name][: len(raw)] == raw
    assert files_of(grown) == files_of(folder), "in two sittings or in one: the same bytes"


def test_what_a_kill_leaves_is_healed_without_loss(loaded: Any, folder: Path, tmp_path: Path):
    stored, want = KINDS[folder.name], files_of(folder)
    index = (folder / "index.jsonl").read_bytes().split(b"\n")
    last = b"\n".join(index[:-2]) + b"\n"
    # Before the line of the last shard; in the middle of it; with a shard half written beside.
    for number, kept in enumerate((last, last + index[-2][:40])):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        (copy / "index.jsonl").write_bytes(kept)
        (copy / ".part-shard-000009.safetensors").write_bytes(b"half")
        with pytest.raises(UserError, match=r"cut off; give the same `kdrl cache-teacher` command again"):
            read_all(copy)
        with writing(loaded, copy, stored).store as store:
            assert "whole but not in the index" in store.notes[0]
        assert files_of(copy) == want


def test_a_removed_shard_is_scored_again(loaded: Any, folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "shard-000001.safetensors").unlink()
    teacher = writing(loaded, copy, KINDS[folder.name])
    with teacher.store as store:
        assert "scored again" in store.notes[0]
        missing = {key: r for key, r in keyed(RESPONSES).items() if key not in store.places}
        assert len(missing) == 3
        teacher.put(missing, "cpu")
    assert same(read_all(copy), read_all(folder))


@pytest.mark.parametrize("call", range(1, 6))
def test_a_full_disk_is_a_sentence_and_loses_nothing(
    call: int, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache, stored = tmp_path / "cache", KINDS["topk"]
    fill(loaded, cache, stored, RESPONSES[:4])
    before = read_all(cache, RESPONSES[:4])
    real, seen = os.fsync, [0]

    def full(fd: int) -> None:
        seen[0] += 1
        if seen[0] == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    teacher = writing(loaded, cache, stored)
    with teacher.store:
        monkeypatch.setattr(cache_disk.os, "fsync", full)
        told = None
        for start in (4, 7):
            try:
                teacher.put(keyed(RESPONSES[start : start + 3]), "cpu")
            except UserError as error:
                told = str(error)
                break
        monkeypatch.undo()
    assert told is not None
    assert "No space left on device" in told
    assert "written before is whole; make room, then go on with the same command" in told
    assert not list(cache.glob(".part-*"))
    fill(loaded, cache, stored, [r for r in RESPONSES if r not in RESPONSES[:4]])
    assert same(read_all(cache, RESPONSES[:4]), before)


def test_two_teachers_of_a_run_do_not_write_one_folder(loaded: Any, tmp_path: Path):
    store = writing(loaded, tmp_path / "cache", KINDS["topk"]).store
    with store, pytest.raises(UserError, match="two teachers of this run would write"):
        writing(loaded, tmp_path / "cache", KINDS["topk"])
    writing(loaded, tmp_path / "cache", KINDS["topk"]).store.close()


def test_only_one_process_writes(loaded: Any, tmp_path: Path):
    import subprocess
    import sys

    hold = (
        "import fcntl, os, sys, time; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.lockf(fd, fcntl.LOCK_EX)"
        "; print('held', flush=True); time.sleep(60)"
    )
    fill(loaded, tmp_path / "cache", KINDS["topk"], RESPONSES[:2])
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "cache" / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing"):
            writing(loaded, tmp_path / "cache", KINDS["topk"])
    finally:
        holder.kill()
        holder.wait()
    writing(loaded, tmp_path / "cache", KINDS["topk"]).store.close()
