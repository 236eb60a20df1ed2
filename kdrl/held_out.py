"""The likelihood loss of held-out worked solutions, for scalars that follow it."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl.batch import Response, Rollouts
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.sources.text import encoded_text
from kdrl.tasks import Problem
from kdrl.update import Updater


def solution_loss(student: LoadedModel, updater: Updater, problems: Sequence[Problem], max_tokens: int) -> float:
    """Mean -log q per token of the problems' worked solutions in nats; raises UserError where one has none."""
    responses = []
    for number, problem in enumerate(problems):
        if not problem.solution:
            raise UserError(
                "a schedule follows eval/loss, the likelihood of worked solutions, and development problem "
                f"{problem.id} has none; name them with task.columns.solution or task.solution, or follow another."
            )
        ids = encoded_text(student, problem.solution)[0][:max_tokens]
        prompt = encode_prompt(student, problem.prompt)
        responses.append(Response(problem, number, prompt, ids, "gold", True, problem.solution))
    rollouts = Rollouts.of(responses, student.device)
    logq_N = updater.score_policy(rollouts, 1.0)[0]
    return -float(logq_N.double().mean())
