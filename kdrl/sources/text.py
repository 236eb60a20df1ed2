"""Responses that are text already: worked solutions of the data, and a teacher's answers written once and stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kdrl.batch import Response
from kdrl.engines.base import Engine, Sample
from kdrl.errors import UserError
from kdrl.jsonlines import JsonLines
from kdrl.models import LoadedModel, encode_prompt
from kdrl.sources.base import Request, Source
from kdrl.sources.student import decoded
from kdrl.tasks import Problem


def encoded_text(
    student: LoadedModel, text: str, untrained_spans: Sequence[tuple[int, int]] = ()
) -> tuple[list[int], list[bool] | None]:
    """Token ids of a text and its end token, and which are trained where spans of characters are not."""
    try:
        encoded = student.tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(untrained_spans))
    except Exception as error:  # the Rust encoder raises a bare Exception
        raise UserError(f"the student's tokenizer cannot write the solution {text[:80]!r}: {error}") from error
    ids: list[int] = [*encoded["input_ids"], student.eos_ids[0]]  # type: ignore[list-item]
    if not untrained_spans:
        return ids, None
    offsets = encoded["offset_mapping"]
    trained = [not any(a < end and start < b for a, b in untrained_spans) for start, end in offsets]  # type: ignore[union-attr]
    return ids, [*trained, True]


class GoldSource(Source):
    """The problem's worked solution as the response, one a problem, cut at `max_tokens`."""

    def __init__(self, student: LoadedModel, max_tokens: int) -> None:
        self.student = student
        self.max_tokens = max_tokens

    def write(self, request: Request) -> list[Response]:
        """One response a problem; raises UserError for a problem without a solution."""
        request.out.generated += len(request.problems)
        return [self._response(p, group) for p, group in zip(request.problems, request.groups, strict=True)]

    def _response(self, problem: Problem, group: int) -> Response:
        if not problem.solution:
            raise UserError(
                f"problem {problem.id} has no worked solution, which source `gold` needs; name the column with "
                "task.columns.solution, or a writer with task.solution"
            )
        ids, trained = encoded_text(self.student, problem.solution, problem.untrained_spans)
        return Response(
            problem,
            group,
            encode_prompt(self.student, problem.prompt),
            ids[: self.max_tokens],
            "gold",
            len(ids) <= self.max_tokens,
            problem.solution,
            trained=None if trained is None else trained[: self.max_tokens],
            reward=1.0,
            correct=True,
            judged=True,
        )


class TeacherSource(Source):
    """What the teacher writes to each prompt, sampled once and kept in `store` for later epochs and resumed runs."""

    def __init__(
        self,
        engine: Engine | None,
        student: LoadedModel,
        store: Path,
        samples: int,
        sampling: Mapping[str, Any],
    ) -> None:
        self.engine, self.student, self.store = engine, student, store
        self.samples, self.sampling = samples, sampling
        self._written: dict[str, list[Sample]] = {}
        self._lines: JsonLines | None = None

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """How many bytes of the store are safe on disk."""
        return {"offset": 0 if self._lines is None else self._lines.offset()}, {}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Cut the store back, so that a resumed step asks for the same texts again."""
        self._open(values["offset"])

    def _open(self, offset: int) -> None:
        if self._lines is not None:
            self._lines.close()
        self._lines = JsonLines(self.store, offset if self.store.exists() else None)
        self._written = _read_store(self.store)

    def write(self, request: Request) -> list[Response]:
        """`samples` responses a problem; what the store lacks is written now."""
        missing = list({p.id: p for p in request.problems if p.id not in self._written}.values())
        # One seed a batch that is missing: a resumed run finds what was stored and writes only the rest.
        prompts = [encode_prompt(self.student, problem.prompt) for problem in missing]
        if missing:
            fresh = self.fresh(missing, prompts, request.seed)
            for problem, samples in zip(missing, fresh, strict=True):
                self._keep(problem.id, samples)
        out = []
        for problem, group in zip(request.problems, request.groups, strict=True):
            prompt = encode_prompt(self.student, problem.prompt)
            for sample in self._written[problem.id]:
                text = decoded(self.student, sample.token_ids)
                out.append(Response(problem, group, prompt, sample.token_ids, "teacher", sample.ended, text))
        request.out.generated += len(out)
        return out

    def fresh(self, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], seed: int) -> list[list[Sample]]:
        """Samples [problem][sample] that are written now."""
        assert self.engine is not None
        return self.engine.generate(prompts, samples=self.samples, seed=seed, **self.sampling)

    def _keep(self, problem: str, samples: list[Sample]) -> None:
        if self._lines is None:
            self._open(0)
        assert self._lines is not None
        self._written[problem] = samples
        entry = [{"token_ids": s.token_ids, "ended": s.ended} for s in samples]
        self._lines.write({"problem": problem, "samples": entry})


def _read_store(path: Path) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            found[entry["problem"]] = [Sample(s["token_ids"], [], s["ended"]) for s in entry["samples"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is no stored teacher text ({error}); delete the file") from None
    return found
