from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdrl.errors import UserError
from kdrl.jsonlines import JsonLines, cut_back, plain, read_lines


def test_every_line_is_on_disk_when_the_process_is_killed(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    code = (
        "import os, signal, sys; from kdrl.jsonlines import JsonLines; f = JsonLines(sys.argv[1])\n"
        "for i in range(5): f.write({'step': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_lines(path) == ([{"step": i} for i in range(5)], [])


def test_resumed_file_equals_the_uninterrupted_one(tmp_path: Path):
    rows = [{"step": i, "loss": i / 3, "text": "ünï\n"} for i in range(6)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = JsonLines(whole)
    for row in rows:
        first.write(row)
    second = JsonLines(cut)
    for row in rows[:3]:
        second.write(row)
    offset = second.offset()
    for row in rows[3:5]:
        second.write(row)
    second.close()
    with open(cut, "ab") as file:
        file.write(b'{"step": 5, "lo')
    resumed = JsonLines(cut, offset)
    for row in rows[3:]:
        resumed.write(row)
    assert cut.read_bytes() == whole.read_bytes()


def test_cut_back_never_leaves_half_a_line(tmp_path: Path):
    path = tmp_path / "m"
    path.write_bytes(b"{}\n{}\n{")
    cut_back(path, 6)
    assert path.read_bytes() == b"{}\n{}\n"
    with pytest.warns(UserWarning, match="had 50 bytes"):
        cut_back(path, 50)
    with pytest.warns(UserWarning, match="lines between are lost"):
        cut_back(path, 4)
    assert path.read_bytes() == b"{}\n"
    with pytest.warns(UserWarning, match="end at byte 0"):
        cut_back(tmp_path / "absent", 3)


def test_two_runs_never_share_a_file(tmp_path: Path):
    JsonLines(tmp_path / "m").write({"step": 1})
    with pytest.raises(UserError, match="another run"):
        JsonLines(tmp_path / "m")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_a_sentence_that_names_the_file(tmp_path: Path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written: No space left"):
        lines.write({"step": 1})
    lines.close()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        JsonLines(tmp_path / "file" / "metrics.jsonl")


def test_reading_names_what_is_wrong_and_keeps_the_rest(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnot json\n[1]\n\xff\xfe\n\n{"step": 2}\n{"st')
    rows, notes = read_lines(path)
    assert rows == [{"step": 1}, {"step": 2}]
    assert "unfinished" in notes[0]
    assert "3 of 6 lines" in notes[1]
    assert notes[1].endswith("2, 3, 4")
    assert read_lines(tmp_path / "none.jsonl") == ([], ["none.jsonl does not exist"])


def test_values_become_plain_json():
    values = {
        "a": np.float32(0.5),
        "b": float("nan"),
        "c": (1, np.int64(2)),
        3: np.array([1.0, np.inf]),
        "p": Path("x"),
    }
    assert plain(values) == {"a": 0.5, "b": None, "c": [1, 2], "3": [1.0, None], "p": "x"}
    assert json.dumps(plain(values), allow_nan=False)
