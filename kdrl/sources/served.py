"""A served model that writes: token ids in and out where the server gives them, else text, tokenised here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrl.engines.base import Sample
from kdrl.errors import UserError
from kdrl.models import LoadedModel
from kdrl.sources.text import TeacherSource, encoded_text
from kdrl.tasks import Problem
from kdrl.teachers.client import UnusableError
from kdrl.teachers.served import ServedTeacher

_LARGEST_SEED = 2**31


class ServedSource(TeacherSource):
    """What a served teacher writes to each prompt, stored like a local teacher's.

    A prompt's seed follows from the run's, so that vLLM writes the same again; other servers may not.
    """

    def __init__(
        self, teacher: ServedTeacher, student: LoadedModel, store: Path, samples: int, sampling: Mapping[str, Any]
    ) -> None:
        self.teacher = teacher
        super().__init__(None, student, store, samples, sampling)

    def fresh(self, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], seed: int) -> list[list[Sample]]:
        """Samples [problem][sample] from the server."""
        api = self.teacher.config.api
        path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
        bodies = [
            self._body(problem, list(prompt), (seed + i) % _LARGEST_SEED)
            for i, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
        ]
        return self.teacher.client.map(path, bodies, lambda answer, index: self._read(answer))

    def _body(self, problem: Problem, prompt: list[int], seed: int) -> dict[str, Any]:
        s = self.sampling
        body = {
            "model": self.teacher.name,
            "n": self.samples,
            "max_tokens": s["max_new_tokens"],
            "temperature": s["temperature"],
            "top_p": s["top_p"],
            "seed": seed,
        }
        if s["stop"]:
            body["stop"] = list(s["stop"])
        if self.teacher.config.api == "tokens":
            # Said even where they change nothing: vLLM would take the model's own defaults.
            body |= {"top_k": s["top_k"] or -1, "min_p": 0.0, "repetition_penalty": 1.0}
            return body | {"prompt": prompt, "return_token_ids": True, "include_stop_str_in_output": True}
        if self.teacher.config.api == "completions":
            return body | {"prompt": self.student.tokenizer.decode(prompt)}
        said = problem.prompt
        return body | {"messages": [{"role": "user", "content": said}] if isinstance(said, str) else list(said)}

    def _read(self, answer: Any) -> list[Sample]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != self.samples:
            raise UnusableError(f"{len(choices)} responses instead of {self.samples}")
        return [self._sample(choice) for choice in choices]

    def _sample(self, choice: Any) -> Sample:
        api, ended = self.teacher.config.api, choice["finish_reason"] == "stop"
        if api == "tokens":
            ids = choice.get("token_ids")
            if ids is None:
                raise UserError(
                    "the teacher server gives no token ids of what it writes (vLLM does from 0.10.2 on); set "
                    "teacher.served.api=completions to take its text."
                )
            if not ids:
                raise UnusableError("an empty response")
            return Sample([int(token) for token in ids], [], ended)
        text = str(choice["message"]["content"] if api == "chat" else choice["text"])
        ids = encoded_text(self.student, text)[0]
        limit = self.sampling["max_new_tokens"]
        # The server counted its own tokens; these are the student's.
        if ended and len(ids) <= limit:
            return Sample(ids, [], True)
        return Sample(ids[:-1][:limit] or ids, [], len(ids) == 1)
