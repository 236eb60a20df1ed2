"""A served model that writes: token ids in and out where the server gives them, else text, tokenised here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdrl.engines.base import Sample
from kdrl.engines.sampling import prompt_keys
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.models.loading import load_without_weights
from kdrl.seeds import derive
from kdrl.sources.text import TeacherSource, encoded_text
from kdrl.tasks import Problem
from kdrl.teachers.client import UnusableError
from kdrl.teachers.config import TeacherConfig
from kdrl.teachers.served import ServedTeacher

_LARGEST_SEED = 2**31


def reader_of(section: TeacherConfig, student: LoadedModel | None) -> LoadedModel:
    """Tokenizer, end tokens and template for a served model: its own where they are at hand, else the student's.

    Raises UserError where there is neither.
    """
    try:
        return load_without_weights(section)
    except UserError:
        if student is None:
            raise
        return replace(student, config=student.config.model_copy(update={"model": section.model}))


class ServedEngine:
    """An engine whose model is a served teacher; `reader` is how its text is read and written.

    `problems` are those whose prompts it may be given: the chat API takes messages and not tokens. A prompt's seed
    follows from the call's and its tokens, so that vLLM writes the same again; other servers may not.
    """

    def __init__(self, teacher: ServedTeacher, reader: LoadedModel, problems: Sequence[Problem] = ()) -> None:
        self.teacher, self.reader, self.api = teacher, reader, teacher.config.api
        self._said = {tuple(encode_prompt(reader, p.prompt)): p.prompt for p in problems} if self.api == "chat" else {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        seed: int,
        done: Callable[[int, int, Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """Samples [prompt][sample] without log-probs; raises UserError or RunError as the client does.

        `done` is called when all are there: answers are read in threads of their own.
        """
        body = {
            "model": self.teacher.name,
            "n": samples,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        if stop:
            body["stop"] = list(stop)
        if self.api == "tokens":
            # Said even where they change nothing: vLLM would take the model's own defaults.
            body |= {"top_k": top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
            body |= {"return_token_ids": True, "include_stop_str_in_output": True}
        elif top_k:
            raise UserError(f"top_k is no option of api {self.api}; set it to 0, or serve the teacher for api tokens.")
        bodies = [
            body | {"seed": derive(seed, "served", *key) % _LARGEST_SEED} | self._asked(list(prompt))
            for key, prompt in zip(prompt_keys(prompts), prompts, strict=True)
        ]
        path = "/v1/chat/completions" if self.api == "chat" else "/v1/completions"
        found = self.teacher.client.map(path, bodies, lambda answer, i: self._read(answer, samples, max_new_tokens))
        if done is not None:
            for i, row in enumerate(found):
                for j, sample in enumerate(row):
                    done(i, j, sample)
        return found

    def _asked(self, prompt: list[int]) -> dict[str, Any]:
        if self.api == "tokens":
            return {"prompt": prompt}
        if self.api == "completions":
            return {"prompt": self.reader.tokenizer.decode(prompt)}
        said = self._said[tuple(prompt)]
        return {"messages": [{"role": "user", "content": said}] if isinstance(said, str) else list(said)}

    def _read(self, answer: Any, samples: int, limit: int) -> list[Sample]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != samples:
            raise UnusableError(f"{len(choices)} responses instead of {samples}")
        return [self._sample(choice, limit) for choice in choices]

    def _sample(self, choice: Any, limit: int) -> Sample:
        ended = choice["finish_reason"] == "stop"
        if self.api == "tokens":
            return Sample(self._checked(choice.get("token_ids")), [], ended)
        text = str(choice["message"]["content"] if self.api == "chat" else choice["text"])
        ids = encoded_text(self.reader, text)[0]
        # The server counted its own tokens; these are the reader's.
        if ended and len(ids) <= limit:
            return Sample(ids, [], True)
        return Sample(ids[:-1][:limit] or ids, [], len(ids) == 1)

    def _checked(self, ids: Sequence[int] | None) -> list[int]:
        if ids is None:
            raise UserError(
                "the teacher server gives no token ids of what it writes (vLLM does from 0.10.2 on); set "
                "teacher.served.api=completions to take its text; or evaluate.baselines=false where it only scores."
            )
        if not ids:
            raise UnusableError("an empty response")
        if max(ids) >= self.reader.vocab_size:
            raise UserError(
                f"the served teacher wrote token {max(ids)}, a padding row of its vocabulary: the tokenizer has "
                f"{self.reader.vocab_size}. Set rollout.top_p below 1, or teacher.served.api=completions for its text."
            )
        return [int(token) for token in ids]


class ServedSource(TeacherSource):
    """What a served teacher writes to each prompt, stored like a local teacher's."""

    def __init__(
        self, teacher: ServedTeacher, student: LoadedModel, store: Path, samples: int, sampling: Mapping[str, Any]
    ) -> None:
        self.teacher = teacher
        super().__init__(None, student, store, samples, sampling)

    def fresh(self, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], seed: int) -> list[list[Sample]]:
        """Samples [problem][sample] from the server."""
        engine = ServedEngine(self.teacher, self.student, problems)
        return engine.generate(prompts, samples=self.samples, seed=seed, **self.sampling)
