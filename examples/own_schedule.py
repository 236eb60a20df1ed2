"""A schedule of one's own, for any weight or the learning rate.

kdrl train examples/tiny.yaml method=kdrl plugins=examples/own_schedule.py \
  'objective.distill.weight={sawtooth: {top: 0.01, period: 2}}' --output runs/own-schedule

Keyword arguments are settings of the schedule; all are numbers.
"""

import kdrl


@kdrl.register_schedule("sawtooth")
def sawtooth(step: int, total: int, top: float, period: int = 10) -> float:
    """Falls from `top` towards 0 over `period` steps, again and again (`step` counts from 0, `total` is `steps`)."""
    return top * (1.0 - (step % period) / period)
