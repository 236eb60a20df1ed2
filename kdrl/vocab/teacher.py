"""A teacher that reads a response in its own tokens; what it says is carried to the student's tokens in chunks.

A chunk is the shortest run of tokens that starts and ends at the same bytes in both tokenizations. The teacher reads
the problem through its own chat template. Left out: what follows a special token inside a response, what the teacher's
tokenizer cannot write, and what passes its context; such tokens are in no chunk and are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.errors import UserError
from kdrl.models import LoadedModel, encode_prompt
from kdrl.objectives.head import chunks
from kdrl.objectives.objective import Active
from kdrl.objectives.scores import Tokens
from kdrl.teachers.base import Evidence, Given, Gives, Need, Teacher
from kdrl.vocab.align import COLLAPSE, HALF, Group, align, collapsed
from kdrl.vocab.pieces import pieces_of
from kdrl.vocab.terms import VocabTerm, VocabTokens


@dataclass(frozen=True)
class Reading:
    """One response in the teacher's tokens, and its groups; `collapsed` when they were one and were thrown away."""

    ids: list[int]
    groups: list[Group]
    collapsed: bool = False


class Vocabularies:
    """Two models' tokenizers side by side; `shared_2K` are ids of student and teacher that stand for the same text,
    `beginning` those of each that begin a word.
    """

    def __init__(self, student: LoadedModel, teacher: LoadedModel) -> None:
        self.student, self.teacher = student, teacher
        self.mine, self.theirs = pieces_of(student.tokenizer, "student"), pieces_of(teacher.tokenizer, "teacher")
        common = self.mine.by_bytes.keys() & self.theirs.by_bytes.keys()
        pairs = sorted((self.mine.by_bytes[piece], self.theirs.by_bytes[piece]) for piece in common)
        # Rows beyond the tokenizer's are cut off in both heads.
        sizes = (student.vocab_size, teacher.vocab_size)
        each = zip((self.mine, self.theirs), sizes, strict=True)
        self.beginning = [[i for i in pieces.beginning if i < size] for pieces, size in each]
        self.shared_2K = torch.tensor([*pairs, (student.eos_ids[0], teacher.eos_ids[0])]).T.contiguous()

    def read(self, token_ids: Sequence[int], room: float = math.inf) -> Reading:
        """The teacher's tokens of a student's response, `room` of them at most, and what stands for the same text."""
        ended = token_ids[-1] in self.student.eos_ids
        pieces = self.mine.of(token_ids[:-1] if ended else token_ids)
        # The teacher could not read the student's special tokens, nor what was written after one.
        known = next((i for i, piece in enumerate(pieces) if piece is None), len(pieces))
        mine = [piece for piece in pieces[:known] if piece is not None]
        ids, theirs = self.theirs.encode(b"".join(mine))
        if len(ids) > room:
            ids, theirs = ids[: int(room)], theirs[: int(room)]
        groups = align(mine, theirs)
        if collapsed(groups, len(mine), len(theirs)):
            return Reading([], [], collapsed=True)
        whole = known == len(pieces) and sum(map(len, theirs)) == sum(map(len, mine)) and len(ids) < room
        if ended and whole:
            groups.append(Group((len(pieces), len(token_ids)), (len(ids), len(ids) + 1)))
            ids = [*ids, self.teacher.eos_ids[0]]
        # Tokens that no group needs are not read.
        return Reading(ids[: groups[-1].teacher[1] if groups else 0], groups)


@dataclass(frozen=True)
class Aligned:
    """A step's N student tokens and the S tokens `read` that the teacher reads for them, in C chunks.

    `chunk_N` and `chunk_S` are the chunk of each token, -1 where it is in none; `first_C` is a chunk's first token
    among the S, `size_C` its student tokens, `single_C` whether it is one token on both sides.
    """

    read: Rollouts
    chunk_N: Tensor
    chunk_S: Tensor
    first_C: Tensor
    size_C: Tensor
    single_C: Tensor
    columns: Mapping[str, Tensor]
    collapsed: int

    @property
    def reach_N(self) -> Tensor:
        """Tokens that are in a chunk, bool `[N]`."""
        return self.chunk_N >= 0

    def numbers(self, trained_N: Tensor) -> dict[str, float]:
        """Shares of the trained student tokens that are covered and that are one-to-one, and sizes of chunks."""
        total = max(1, int(trained_N.sum()))
        chunks = max(1, len(self.size_C))
        return {
            "covered": float((self.reach_N & trained_N).sum()) / total,
            "one_to_one": float((self.columns["chunk_single"] & trained_N).sum()) / total,
            "student_tokens_per_chunk": float(self.size_C.sum()) / chunks,
            "teacher_tokens_per_chunk": float((self.chunk_S >= 0).sum()) / chunks,
            "collapsed": float(self.collapsed),
        }


@dataclass(frozen=True)
class VocabEvidence(Evidence):
    """Scores in chunks: `logp_N` is a chunk's log-prob in equal parts on its student tokens.

    `where_N` is the chunk's first token among those of `read` that `inner` scored: at both models' first tokens of a
    chunk the text before is the same.
    """

    inner: Evidence | None = None
    chunks: Mapping[str, Tensor] = field(default_factory=dict)
    shared_2K: Tensor | None = None
    spaces_K: Tensor | None = None
    read: Rollouts | None = None

    @property
    def columns(self) -> Mapping[str, Tensor]:
        """What terms must know of the chunks, `[N]` each."""
        return self.chunks

    @property
    def fan(self) -> int:
        """As many as the teacher behind it asks."""
        assert self.inner is not None
        return self.inner.fan

    @torch.no_grad()
    def logp(self, index_C: Tensor, like: Tensor) -> Tensor:
        """The teacher's log-probs `[C, V]` over its own vocabulary at the first token of each token's chunk."""
        assert self.inner is not None
        return self.inner.logp(self.where_N[index_C], like)

    def _of_written(self, logp_CV: Tensor | None, token_C: Tensor, stored_C: Tensor) -> Tensor:
        return stored_C

    def _tokens(self, index_C: Tensor, logq_CV: Tensor, given: Given) -> Tokens:
        given = replace(given, data={**given.data, **self.columns})
        plain = vars(super()._tokens(index_C, logq_CV, given))
        return VocabTokens(**plain, shared_2K=self.shared_2K, spaces_K=self.spaces_K)


class VocabTeacher:
    """`inner` asked about responses in its own tokens; only terms that know of chunks can read its answers.

    With `spaces` it is also asked how likely a new word begins at each chunk, where it gives its distribution.
    """

    def __init__(self, inner: Teacher, vocabularies: Vocabularies, *, spaces: bool = False) -> None:
        self.inner, self.vocabularies, self.spaces = inner, vocabularies, spaces
        self._last: tuple[Rollouts, Aligned] | None = None
        self._warned = False

    @property
    def gives(self) -> Gives:
        """Log-probs of what was written, and distributions where the teacher behind it gives them."""
        return Gives(self.inner.gives.distribution)

    def aligned(self, rollouts: Rollouts) -> Aligned:
        """The chunks of a step's responses; raises UserError when every long response came out as one chunk.

        A lone one may, beside others that are covered.
        """
        if self._last is None or self._last[0] is not rollouts:
            self._last = (rollouts, self._align(rollouts))
        return self._last[1]

    def as_read(self, response: Response) -> Response | None:
        """A response in the teacher's tokens, as it is scored; None where it can read nothing of it."""
        prompt = encode_prompt(self.vocabularies.teacher, response.problem.prompt)
        return self._read(response, prompt)[0]

    def _read(self, response: Response, prompt: list[int]) -> tuple[Response | None, Reading]:
        longest = getattr(self.inner, "longest", math.inf)
        reading = self.vocabularies.read(response.token_ids, max(0, longest - len(prompt)))
        if not reading.ids:
            return None, reading
        # Nothing of the student's own tokens may be left on it.
        own: dict[str, Any] = {"logp": None, "importance": None, "trained": None, "privileged_ids": None}
        return replace(response, prompt_ids=prompt, token_ids=reading.ids, **own), reading

    def _align(self, rollouts: Rollouts) -> Aligned:
        prompts: dict[int, list[int]] = {}
        rows: list[tuple[int, Response, Reading]] = []
        lost = 0
        for row, response in enumerate(rollouts.responses):
            problem = response.problem
            if id(problem) not in prompts:
                prompts[id(problem)] = encode_prompt(self.vocabularies.teacher, problem.prompt)
            found, reading = self._read(response, prompts[id(problem)])
            lost += reading.collapsed
            if found is not None:
                rows.append((row, found, reading))
        long = sum(len(r.token_ids) >= COLLAPSE for r in rollouts.responses)
        if lost and (not rows or 1 < lost == long):
            raise UserError(
                f"the alignment with the teacher's tokens collapsed: {lost} of {len(rollouts.responses)} responses "
                f"have {COLLAPSE} tokens and more and are one chunk each, and no other of them is as long and covered, "
                "so nothing is compared token by token. The two tokenizers share no boundaries on such text; choose a "
                "teacher of another tokenizer, or use its text: kdrl generate."
            )
        return _lay_chunks(rollouts, rows, lost)

    def narrowed(self, active: Active, rollouts: Rollouts) -> Active:
        """A term that asks this teacher, with the tokens that it can use."""
        assert isinstance(active.term, VocabTerm)
        found = self.aligned(rollouts)
        reach_N = found.reach_N & active.term.usable_N(found.columns)
        return replace(active, eligible_N=active.eligible_N & found.reach_N, keep_N=active.keep_N & reach_N)

    def numbers(self) -> dict[str, float]:
        """How well the last step's responses were covered."""
        return {} if self._last is None else self._last[1].numbers(self._last[0].trained_N)

    def warning(self) -> str | None:
        """What is said, once, when the last step's responses were covered by less than half."""
        if self._warned or self._last is None or not bool(self._last[0].trained_N.any()):
            return None
        covered = self.numbers()["covered"]
        self._warned = covered < HALF
        if not self._warned:
            return None
        return (
            f"only {covered:.0%} of this step's trained tokens stand for text that it reads (vocabulary/covered), and "
            "the terms that ask it train on those alone: its tokenizer lacks characters of the responses, or its "
            "context is short. Choose another teacher, or its own text (kdrl generate); said once."
        )

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Score the chunks that hold a kept token."""
        found = self.aligned(rollouts)
        count = len(found.size_C)
        # One place more, for the tokens of chunk -1.
        wanted_C = torch.zeros(count + 1, dtype=torch.bool, device=keep_N.device)
        wanted_C[found.chunk_N[keep_N & found.reach_N]] = True
        keep_S = wanted_C[found.chunk_S]
        inner = self.inner.score(found.read, keep_S, need, temperature)
        sum_C = inner.logp_N.new_zeros(count).index_add(0, found.chunk_S[keep_S], inner.logp_N[keep_S])
        rest_C = sum_C - inner.logp_N[found.first_C]
        scored_N = wanted_C[found.chunk_N]
        chunk_N = torch.where(scored_N, found.chunk_N, -1)
        columns = {**found.columns, "chunk_rest": _at(rest_C, chunk_N)}
        if self.spaces and inner.head is not None:
            columns["chunk_space"] = _at(self._begins(inner, found.first_C, wanted_C[:-1]), chunk_N)
        return VocabEvidence(
            logp_N=_at(sum_C / found.size_C.clamp(min=1), chunk_N),
            where_N=torch.where(scored_N, _at(found.first_C, chunk_N), -1),
            calls=inner.calls,
            temperature=temperature,
            inner=inner,
            chunks=columns,
            shared_2K=self.vocabularies.shared_2K.to(keep_N.device),
            spaces_K=torch.tensor(self.vocabularies.beginning[0], device=keep_N.device),
            read=found.read,
        )

    def _begins(self, inner: Evidence, first_C: Tensor, wanted_C: Tensor) -> Tensor:
        """The teacher's log-prob that a new word begins, at the first token of each wanted chunk `[C]`."""
        mine = torch.tensor(self.vocabularies.beginning[1], device=first_C.device)
        index = wanted_C.nonzero().squeeze(1)
        out_C = inner.logp_N.new_zeros(len(first_C))
        assert inner.head is not None
        for part in chunks(len(index), inner.head.vocab_size):
            logp_KV = inner.logp(first_C[index[part]], out_C)
            out_C[index[part]] = logp_KV[:, mine].logsumexp(-1).clamp(max=0.0)
        return out_C


def _lay_chunks(rollouts: Rollouts, rows: Sequence[tuple[int, Response, Reading]], lost: int) -> Aligned:
    """Chunks of all rows, but for those that hold a token that is not trained."""
    read = Rollouts.of([response for _, response, _ in rows], rollouts.tokens_N.device)
    trained = rollouts.trained_N.tolist()
    chunk_N, chunk_S = [-1] * rollouts.tokens, [-1] * read.tokens
    first, size, single = list[int](), list[int](), list[bool]()
    for place, (row, _, reading) in enumerate(rows):
        begin, start = rollouts.offsets[row], read.offsets[place]
        for group in reading.groups:
            mine = range(begin + group.student[0], begin + group.student[1])
            if not all(trained[i] for i in mine):
                continue
            for i in mine:
                chunk_N[i] = len(size)
            for i in range(start + group.teacher[0], start + group.teacher[1]):
                chunk_S[i] = len(size)
            first.append(start + group.teacher[0])
            size.append(len(mine))
            single.append(group.single)
    device = rollouts.tokens_N.device
    at_N = torch.tensor(chunk_N, dtype=torch.long, device=device)
    single_C = torch.tensor(single, dtype=torch.bool, device=device)
    size_C = torch.tensor(size, dtype=torch.long, device=device)
    inside_N = at_N >= 0
    before_N = torch.cat([at_N.new_full((1,), -1), at_N[:-1]])
    # Every token outside is a chunk of its own, so that a number names one chunk and neighbours can be told apart.
    outside_N = torch.arange(len(at_N), device=device) + len(size)
    columns = {
        "chunk": torch.where(inside_N, at_N, outside_N),
        "chunk_first": inside_N & (at_N != before_N),
        "chunk_size": _at(size_C, at_N),
        "chunk_single": _at(single_C, at_N),
    }
    return Aligned(
        read,
        at_N,
        torch.tensor(chunk_S, dtype=torch.long, device=device),
        torch.tensor(first, dtype=torch.long, device=device),
        size_C,
        single_C,
        columns,
        lost,
    )


def _at(values_C: Tensor, chunk_N: Tensor) -> Tensor:
    """A chunk's value at each of its tokens, zero at tokens in none."""
    out_N = torch.zeros_like(chunk_N, dtype=values_C.dtype)
    inside_N = chunk_N >= 0
    out_N[inside_N] = values_C[chunk_N[inside_N]]
    return out_N


def chunk_blocks(active: Sequence[Active], evidence: Mapping[str, Evidence]) -> dict[str, Tensor]:
    """For terms whose chunks must stay together in the head, the chunk of each token `[N]` by term."""
    return {
        a.name: evidence[a.teacher].columns["chunk"]
        for a in active
        if isinstance(a.term, VocabTerm) and a.term.joined and a.teacher
    }
