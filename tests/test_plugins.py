"""What a user registers is found, checked, and refused where it would silently mean something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kdrl
from kdrl.errors import UserError
from kdrl.objectives.masks import MaskContext, evaluate_mask
from kdrl.objectives.terms import TERMS, TokenView
from kdrl.plugins import load_plugins


def test_a_module_in_the_working_directory_is_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kdrl_test_module.py").write_text(
        "import kdrl\n@kdrl.register_schedule('from_cwd')\ndef f(step, total): return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    load_plugins(["kdrl_test_module"], "a test")
    from kdrl.objectives.schedules import SCHEDULES

    assert "from_cwd" in SCHEDULES


def test_a_plugin_that_fails_is_named(tmp_path: Path):
    bad = tmp_path / "bad.py"
    bad.write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"bad\.py.*ZeroDivisionError"):
        load_plugins([str(bad)], "a test")
    with pytest.raises(UserError, match="does not exist"):
        load_plugins([str(tmp_path / "absent.py")], "a test")


def view_of(tokens: int) -> TokenView:
    zeros, yes = torch.zeros(tokens), torch.ones(tokens, dtype=torch.bool)
    return TokenView(zeros, torch.arange(tokens), tokens, yes, yes, zeros, yes)


@pytest.mark.parametrize("shape", ["mean", "number"])
def test_a_term_that_averages_is_refused(shape: str):
    @kdrl.register_term("averages")
    def averages(view):
        return view.logq_N.mean() if shape == "mean" else 1.0

    kind = TERMS.get("averages")
    with pytest.raises(UserError, match=r"'averages' must return one loss per token, \(3,\)"):
        kind(kind.Config()).loss(view_of(3))


def test_a_term_may_not_take_a_name_that_every_term_has():
    with pytest.raises(UserError, match="'weight', which every term has"):

        @kdrl.register_term("clash")
        def clash(view, weight: float = 1.0):
            return view.logq_N


@pytest.mark.parametrize("made", [torch.ones(2), torch.ones(3, dtype=torch.bool), [True, False]])
def test_a_mask_of_another_shape_or_kind_is_refused(made):
    @kdrl.register_mask("misshapen")
    def misshapen(context):
        return made

    yes_B, row_N = torch.ones(2, dtype=torch.bool), torch.tensor([0, 0, 1])
    context = MaskContext(yes_B, yes_B.float(), torch.arange(2), yes_B, row_N, row_N > 0, None)
    with pytest.raises(UserError, match=r"'misshapen' must return one bool per response"):
        evaluate_mask("misshapen", context)
