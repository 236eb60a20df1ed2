"""A method's place on the seven axes is read off its recipe."""

from __future__ import annotations

import pytest

from kdrl.errors import UserError
from kdrl.methods import all_methods
from kdrl.methods.axes import DOT, NAMES, axes_of, table, words

# Rows of the catalogue's table, as they come out here; a dot is the default.
ROWS = {
    "seqkd": ("teacher", "text", DOT, DOT, "-log q", DOT, DOT),
    "reverse-kl": ("gold", DOT, DOT, DOT, "q||p", DOT, DOT),
    "gkd": ("mixture(0.5, batch)", DOT, DOT, DOT, "J(0.5)", DOT, DOT),
    "distillm-2": ("pair(teacher, student)", DOT, DOT, "T 1", "p||M(-1, 0.1) + q||M(-1, 0.9)†", DOT, DOT),
    "amid": ("gold", DOT, DOT, DOT, "q||r (0.2, 0.7), r = M(0.5, 0.1)", DOT, DOT),
    "eopd": ("student", DOT, f"{DOT} + topk(16, renormalise)", DOT, "q||p + p||q", "above(entropy_p, 0.8)", DOT),
    "veto": ("student", DOT, DOT, DOT, "q||r, r = p q^linear(0.8 to 0)†", DOT, "tilt linear(0.8 to 0)"),
    "dkd": ("gold", DOT, DOT, "T 4, T^2, decouple(1, 8)", "-log q + p||q", DOT, DOT),
    "opd": ("student", DOT, "token(k1, advantage)", DOT, "q||p", DOT, DOT),
    "promptkd": ("student", DOT, DOT, "adapt(soft_prompt)", "q||p", DOT, DOT),
    "rs-kd": ("gold", DOT, "draws(12)", DOT, "p||q", DOT, DOT),
    "sdft": ("student; teacher: self, ema with context", DOT, "topk(100, student)", DOT, "J(0.5)", DOT, DOT),
    "ded": ("filtered(teacher: right, student_rate)", "text", DOT, DOT, "-log q", DOT, DOT),
    "dpkd": ("gold", DOT, DOT, DOT, "0.5 -log q + 0.5 BT(0.1)", DOT, DOT),
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_of_the_catalogue(name: str):
    assert axes_of(name).cells() == ROWS[name]


def test_every_method_has_seven_cells_and_moves_what_it_says():
    head, *rows = table()
    assert head == ("method", *NAMES)
    assert [row[0] for row in rows] == list(all_methods())
    for row in rows:
        assert len(row) == 8
        assert all(row)
    moving = {row[0] for row in rows if row[-1] != DOT}
    assert {"taid", "veto", "distillm", "cakld", "adakd", "ps-kd", "ptkd", "kdrl-annealed"} <= moving
    assert not moving & {"kd", "gkd", "opd", "grpo", "sdft"}


def test_expressions_in_words():
    assert words({"top_share": {"of": {"one_minus": {"of": "label_p"}}, "share": 0.5}}) == (
        "top_share(one_minus(label_p), 0.5)"
    )
    assert words({"linear": {"from": 1.0, "to": 0.2}}) == "linear(1 to 0.2)"
    assert words({"calibrated": {"of": "max_p", "complement": True}}) == "calibrated(max_p, complement)"
    with pytest.raises(UserError, match="did you mean 'taid'"):
        axes_of("tiad")
