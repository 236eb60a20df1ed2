"""A verifier of one's own: partial credit for a number that is close.

kdrl train examples/tiny.yaml plugins=examples/own_verifier.py task.verifier.name=close_number \
  task.verifier.settings.scale=5 task.extract=last_number --output runs/own-verifier

`response` is what `task.extract` found. A score of 1 counts as correct; the verifier runs in worker processes.
Without a plugin the function can be named where it stands: task.verifier.name=examples/own_verifier.py:close_number
"""

import kdrl


@kdrl.register_verifier("close_number")
def close_number(response: str, problem: kdrl.Problem, *, scale: float = 10.0) -> float:
    """1 for the reference number, falling to 0 at a distance of `scale`."""
    distance = abs(float(response) - float(problem.answer))
    return max(0.0, 1.0 - distance / scale)
