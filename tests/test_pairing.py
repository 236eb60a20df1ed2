from __future__ import annotations

import pytest

from kdrl.errors import UserError
from kdrl.methods import get_method
from kdrl.objectives.objective import Objective
from kdrl.objectives.terms import TERMS
from kdrl.pairing import check_gives
from kdrl.recipe import read_entry
from kdrl.teachers.base import Gives


def objective_of(entries: list) -> Objective:
    read = [read_entry(entry) for entry in entries]
    return Objective([TERMS.get(entry.name)(entry.config) for entry in read])


def test_a_transform_that_stored_scores_cannot_serve_is_named_with_the_way_to_clear_it():
    distill = get_method("kd").recipe["objective"][1]["distill"] | {"support": {"topk": 8}}
    stored = Gives(distribution=False, topk=64)
    with pytest.raises(
        UserError, match=r"objective.distill.target=\{\} \(it sets rescale, student_temperature, teacher"
    ):
        check_gives("teacher", stored, objective_of([{"distill": distill}]), stored=True)
    check_gives("teacher", stored, objective_of([{"distill": distill | {"target": {}}}]), stored=True)
