"""The two commands: what `make` does with an old Python, a GPU, an index or a second call; what the wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" >> "{log}"
case "$*" in
  -V) echo "Python 3.10.1" ;;
  *version_info*) exit {too_old} ;;
  *"pip --version"*) exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


class Workshop:
    """A copy of what `make install` reads, and interpreters that only write down how they were called."""

    def __init__(self, folder: Path, *, too_old: int = 0, gpu: bool = False) -> None:
        self.folder, self.log = folder / "clone", folder / "log"
        self.folder.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints"):
            source = REPO / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self.folder / name)
        tools = folder / "tools"
        tools.mkdir()
        fakes = {"pythonX": FAKE_PYTHON.format(log=self.log, too_old=too_old)}
        fakes["nvidia-smi"] = "#!/bin/sh\necho 'GPU 0: something'\n" if gpu else "#!/bin/sh\nexit 9\n"
        for name, text in fakes.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.path = f"{tools}:{os.environ['PATH']}"

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | {"PATH": self.path}
        command = ["make", "PYTHON=pythonX", *arguments]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)

    def installs(self) -> list[str]:
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [call.split(" install ")[1] for call in calls if " install " in call]


@needs_make
def test_install_is_pinned_on_a_cpu_and_the_second_call_does_nothing(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    assert shop.make("install").returncode == 0
    assert shop.installs() == ["-c constraints/cpu.txt -e .[test]"]
    assert shop.make("install").returncode == 0
    assert shop.installs() == []
    later = (shop.folder / "Makefile").stat().st_mtime + 5
    os.utime(shop.folder / "constraints" / "cpu.txt", (later, later))
    assert shop.make("install").returncode == 0
    assert shop.installs() == ["-c constraints/cpu.txt -e .[test]"]


@needs_make
def test_a_failed_install_is_tried_again(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    assert shop.make("install").returncode == 0
    python = shop.folder / ".venv" / "bin" / "python"
    working = python.read_text()
    os.utime(shop.folder / "pyproject.toml", (2**32, 2**32))
    python.write_text('#!/bin/sh\ncase "$*" in *--version*|*version_info*) exit 0 ;; esac\nexit 3\n')
    assert shop.make("install").returncode != 0
    python.write_text(working)
    shop.installs()
    assert shop.make("install").returncode == 0
    assert shop.installs() != []


@needs_make
def test_a_machine_with_a_gpu_is_not_pinned_to_cpu_builds(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, gpu=True)
    assert shop.make("install").returncode == 0
    assert shop.installs() == ["-e .[test]"]


@needs_make
def test_torch_index_serves_torch_alone(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    assert shop.make("install", "TORCH_INDEX=file:///wheels").returncode == 0
    torch, rest = shop.installs()
    assert torch == "--no-deps --index-url file:///wheels -c constraints/cpu.txt torch>=2.11"
    assert "index" not in rest


@needs_make
def test_an_old_or_missing_python_is_a_sentence(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, too_old=1)
    done = shop.make("install")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer and pythonX is Python 3.10.1" in done.stderr
    assert not (shop.folder / ".venv").exists()
    done = shop.make("install", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "no command is called 'no-such-python'" in done.stderr


@needs_make
@pytest.mark.parametrize("target", ["help", "install", "test", "demo", "lint", "format", "types", "smollm", "clean"])
def test_every_target_is_there(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pins() -> dict[str, Requirement]:
    lines = (REPO / "constraints" / "cpu.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found)
    return {canonicalize_name(pin.name): pin for pin in found}


def test_every_direct_dependency_has_a_pin_within_its_bounds() -> None:
    pinned = pins()
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["test"], *extras["dev"], *extras["bench"], *extras["tensorboard"]]
    for need in map(Requirement, asked):
        if need.name != "kdrl":
            pin = pinned[canonicalize_name(need.name)]
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert need.specifier.contains(exact.version), f"{pin} is outside {need}"


def test_floors_are_as_promised() -> None:
    floors = {need.name: str(need.specifier) for need in map(Requirement, PROJECT["dependencies"])}
    assert PROJECT["requires-python"] == ">=3.11"
    assert (floors["torch"], floors["transformers"]) == (">=2.11", ">=5.17")


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", "pyproject.toml", "constraints/cpu.txt"])
def test_no_registry_host_and_no_path_of_one_machine(name: str) -> None:
    text = (REPO / name).read_text()
    assert not re.findall(
        r"https?://\S+|pypi\.org|pythonhosted|download\.pytorch|(?<![\w.])/(?:root|work|opt|home)/", text
    )


@pytest.mark.parametrize("module", ["kdrl", "kdrl.tasks"])
def test_import_does_not_pay_for_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Built from a copy, without a network: data files beside the code are easily forgotten."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPO / "kdrl", copy / "kdrl", ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPO / name, copy / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("kdrl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (entry,) = (name for name in held if name.endswith("entry_points.txt"))
        script = re.search(r"^kdrl = ([\w.]+):", archive.read(entry).decode(), re.MULTILINE)
    files = {
        str(p.relative_to(REPO)) for p in (REPO / "kdrl").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert files - held == set()
    assert script is not None
    assert script[1].replace(".", "/") + ".py" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
