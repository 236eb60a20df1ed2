"""The documentation says what the code does: generated pages are fresh, recipes load, files and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdrl.recipe import load_recipe
from kdrl.yamls import load_yaml

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
FIXED = [path for path in DOCS if path.name not in ("methods.md", "recipe-keys.md", "traps.md")]
BLOCKS = [
    (p.name, n, b) for p in FIXED for n, b in enumerate(re.findall(r"```yaml\n(.*?)```", p.read_text(), re.DOTALL))
]


def test_generated_pages_are_up_to_date():
    # A process of its own: other tests register terms and masks that are not the project's.
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_reference.py", "--check"],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("page", "number", "text"), BLOCKS, ids=[f"{p}-{n}" for p, n, _ in BLOCKS])
def test_a_recipe_in_the_documentation_is_valid(page: str, number: int, text: str):
    base = load_yaml((ROOT / "examples" / "tiny.yaml").read_text(), "tiny.yaml")
    load_recipe({**base, **load_yaml(text, page)})


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_and_files_that_are_named_exist(path: Path):
    if not path.exists():
        pytest.skip(f"{path.name} is not written yet")
    text = path.read_text()
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        target = (path.parent / link) if link else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            heads = [
                h.strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            ]
            assert anchor in heads, f"{path.name} links to {link}#{anchor}"
    for name in re.findall(r"\b(?:examples|recipes|docs)/[\w-]+\.\w+", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"
