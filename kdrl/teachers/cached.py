"""A teacher that reads stored scores, with no model in memory; and one that stores what it scores.

Left out: hub ids among the fingerprints that are compared when a cache is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrl.batch import Response, Rollouts
from kdrl.errors import UserError
from kdrl.models import LoadedModel, head_of
from kdrl.models.loading import load_tokenizer
from kdrl.objectives.head import Head
from kdrl.objectives.support import Few
from kdrl.teachers.base import Evidence, Gives, Need, Teacher
from kdrl.teachers.cache_codec import Found, Scored, codec_of, head_from, head_tensors, together
from kdrl.teachers.cache_config import Stored
from kdrl.teachers.cache_identity import files_digest, identity, options_of, tokenizer_digest
from kdrl.teachers.cache_store import CacheStore, key_of
from kdrl.teachers.config import TeacherConfig


class CachedTeacher:
    """Reads the scores of responses that a cache holds; raises UserError for any other."""

    def __init__(self, store: CacheStore) -> None:
        self.store = store
        manifest = store.manifest
        self.codec = codec_of(manifest, manifest["vocab"], manifest.get("seed", 0))
        self._head: Head | None = None

    @property
    def gives(self) -> Gives:
        """What is stored."""
        return self.codec.gives

    @property
    def longest(self) -> float:
        """Tokens that the teacher read at most, where it read responses in tokens of its own."""
        return self.store.manifest.get("context", math.inf)

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """The stored scores of the kept tokens; raises UserError for a response that is not there."""
        check_temperature(self.store, temperature)
        keys = keys_of(rollouts, keep_N)
        if not all(key in self.store.places for key in keys.values()):
            check_there(self.store, [rollouts.responses[row] for row in keys], "this step")
        return self._read(rollouts, keep_N, need, keys)

    def _read(self, rollouts: Rollouts, keep_N: Tensor, need: Need, keys: Mapping[int, bytes]) -> Evidence:
        """What is stored of the kept tokens, whose responses are all there."""
        device = rollouts.tokens_N.device
        index_M = keep_N.nonzero().squeeze(1)
        shards, at_M, order_M = self._places(rollouts, index_M.cpu(), keys)
        where_N = torch.full_like(rollouts.tokens_N, -1)
        logp_N = torch.zeros(rollouts.tokens, device=device)
        where_N[index_M[order_M.to(device)]] = torch.arange(len(index_M), device=device)
        found = []
        for (name, _), part_M in zip(shards, at_M.split([count for _, count in shards]), strict=True):
            tensors = self.store.tensors(name)
            found.append((tensors["logp"][part_M], None if need == "token" else self.codec.decode(tensors, part_M)))
        if found:
            logp_N[index_M[order_M.to(device)]] = torch.cat([logp for logp, _ in found]).to(device)
        plain = Evidence(logp_N, where_N, len(keys), temperature=self.store.manifest["temperature"])
        parts = [part for _, part in found if part is not None]
        if need == "token":
            return plain
        return self._with(plain, together(parts) if parts else self.codec.nothing(), device)

    def _places(
        self, rollouts: Rollouts, index_M: Tensor, keys: Mapping[int, bytes]
    ) -> tuple[list[tuple[str, int]], Tensor, Tensor]:
        """Shards with their numbers of tokens, the tokens' places in them, and the order that these are in."""
        places = {row: self.store.places[key] for row, key in keys.items()}
        names = sorted({place.shard for place in places.values()})
        numbers = {name: number for number, name in enumerate(names)}
        shift_B, shard_B = torch.zeros(rollouts.rows, dtype=torch.long), torch.zeros(rollouts.rows, dtype=torch.long)
        for row, place in places.items():
            shift_B[row] = place.first - rollouts.offsets[row]
            shard_B[row] = numbers[place.shard]
        row_M = rollouts.row_N.cpu()[index_M]
        order_M = shard_B[row_M].sort(stable=True).indices
        counts = shard_B[row_M].bincount(minlength=len(names)).tolist()
        return list(zip(names, counts, strict=True)), (index_M + shift_B[row_M])[order_M], order_M

    def _with(self, plain: Evidence, found: Found, device: torch.device) -> Evidence:
        if found.few is not None:
            few = found.few
            columns = (few.ids_NK, few.logp_NK, few.weight_NK, few.tail_N)
            return replace(plain, few=Few(*(None if x is None else x.to(device) for x in columns)))  # type: ignore[arg-type]
        if self._head is None:
            self._head = head_from(self.store.head(), self.store.manifest["head"], device)
        hidden_MD = self._head.weight_VD.new_empty(0, self._head.weight_VD.shape[1])
        if found.hidden_MD is not None and len(found.hidden_MD):
            hidden_MD = found.hidden_MD.to(device)
        return replace(plain, hidden_MD=hidden_MD, head=self._head)


class WritingTeacher(CachedTeacher):
    """Has another teacher score what the cache lacks, stores it, and gives only what it reads back.

    So a response has the same numbers when it is scored and whenever it is read again, after a kill too: a step's
    missing responses are stored together or not at all.
    """

    def __init__(self, inner: Teacher, store: CacheStore) -> None:
        super().__init__(store)
        self.inner = inner

    def score(self, rollouts: Rollouts, keep_N: Tensor, need: Need, temperature: float) -> Evidence:
        """Stored scores of the kept tokens, as stored; what was missing is scored now, whole responses at a time."""
        check_temperature(self.store, temperature)
        keys = keys_of(rollouts, keep_N)
        missing = {key: rollouts.responses[row] for row, key in keys.items() if key not in self.store.places}
        self.put(missing, rollouts.tokens_N.device)
        return self._read(rollouts, keep_N, need, keys)

    def put(self, responses: Mapping[bytes, Response], device: torch.device | str) -> None:
        """Score responses and store them as one shard."""
        if not responses:
            return
        rollouts = Rollouts.of(list(responses.values()), device)
        everything = torch.ones_like(rollouts.trained_N)
        need: Need = "distribution" if self.inner.gives.distribution else "few"
        evidence = self.inner.score(rollouts, everything, need, self.store.manifest["temperature"])
        lengths = [len(response.token_ids) for response in responses.values()]
        keys = list(responses)
        self.store.add(keys, lengths, self.codec.encode(Scored(evidence, tuple(lengths), tuple(keys))))


def keys_of(rollouts: Rollouts, keep_N: Tensor) -> dict[int, bytes]:
    """The keys of the responses that have a kept token, by row."""
    rows = rollouts.row_N[keep_N].unique().tolist()
    return {row: key_of(rollouts.responses[row].prompt_ids, rollouts.responses[row].token_ids) for row in rows}


def check_temperature(store: CacheStore, temperature: float) -> None:
    """Raise UserError unless the scores are at the policy's temperature."""
    stored = store.manifest["temperature"]
    if stored != temperature:
        raise UserError(
            f"{store.folder} holds scores at temperature {stored:g}, and the policy has {temperature:g}; set "
            f"rollout.temperature={stored:g}, or write another cache."
        )


def open_cached(
    section: TeacherConfig,
    reader: LoadedModel,
    temperature: float,
    who: str = "the student",
    where: str = "teacher",
) -> CachedTeacher:
    """The teacher that reads a section's cache; raises UserError for one of another tokenizer, teacher or temperature.

    `reader`, the tokenizer of `who`, gave the tokens that it is asked about; the section is at `where` in the recipe.
    The weights are compared where `model` is a local folder that holds them.
    """
    assert section.cache is not None
    store = CacheStore.read(Path(section.cache.path).expanduser())
    manifest = store.manifest
    check_temperature(store, temperature)
    for whose, tokenizer in ((who, reader.tokenizer), (f"{where}.model", _tokenizer_of(section))):
        if tokenizer_digest(tokenizer) != manifest["tokenizer"]:
            raise UserError(
                f"{store.folder} holds scores of a teacher with another tokenizer than {whose} has; choose a teacher "
                "of the student's family, and cache its scores; or let it read its own tokens (chunk_distill)."
            )
    if set(reader.eos_ids).isdisjoint(manifest["eos"]):
        raise UserError(
            f"{who} and the teacher of {store.folder} end a response differently; set eos to a common token."
        )
    _check_teacher(store, section, where)
    return CachedTeacher(store)


def _tokenizer_of(section: TeacherConfig) -> Any:
    """The tokenizer that a section names; a folder that holds nothing else will do."""
    named = section.model
    if isinstance(named, str) and section.tokenizer is None and Path(named).expanduser().is_dir():
        section = section.model_copy(update={"tokenizer": named})
    return load_tokenizer(section)


def _check_teacher(store: CacheStore, section: TeacherConfig, where: str) -> None:
    teacher = store.manifest["teacher"]
    for name, value in options_of(section).items():
        if teacher["options"].get(name) != value:
            raise UserError(
                f"{where}.{name} is {value}, and {store.folder} holds scores of a teacher with "
                f"{teacher['options'].get(name, 'the default')}; leave it out, or write another cache."
            )
    found = files_digest(section) if teacher["of"] == "files" else None
    if found is not None and found != teacher["weights"]:
        raise UserError(
            f"{store.folder} holds scores of another teacher ({teacher['model']}, weights {teacher['weights'][:12]}) "
            f"than {where}.model={section.model} (weights {found[:12]}); name the cache of this teacher, or write one."
        )


def open_writing(
    inner: Teacher,
    section: TeacherConfig,
    loaded: LoadedModel | None,
    reader: LoadedModel,
    folder: Path,
    stored: Stored,
    *,
    temperature: float,
    seed: int,
    own: bool = False,
    kind: type[CacheStore] = CacheStore,
) -> WritingTeacher:
    """A teacher that stores what `inner` scores; `loaded` is its model, where it is in memory and not the student's.

    `reader` gives the tokens that it is asked about: the student, or with `own` tokens the teacher; `kind` opens the
    folder. Raises UserError for a folder that holds another teacher's scores or other settings.
    """
    chosen = stored.settings()
    check_inner(inner.gives, chosen)
    content = identity(section, loaded, reader, chosen, temperature, seed)
    longest = getattr(inner, "longest", math.inf)
    if own and longest < math.inf:
        # How much of a response it read decides what a response is stored as.
        content["context"] = int(longest)
    head: dict[str, Tensor] | None = None
    if chosen["kind"] == "hidden":
        head, content["head"] = head_tensors(head_of(loaded or reader))
    return WritingTeacher(inner, kind.write(folder, content, head))


def check_inner(gives: Gives, chosen: Mapping[str, Any]) -> None:
    """Raise UserError when a teacher cannot give what is to be stored."""
    enough = gives.distribution or (chosen["kind"] == "topk" and gives.topk >= chosen["k"])
    if not enough:
        raise UserError(
            f"kind {chosen['kind']} cannot be stored of a teacher that gives {gives}"
            + (f"; store topk with k up to {gives.topk}." if gives.topk else "; use a local teacher.")
        )


def check_there(store: CacheStore, responses: Sequence[Response], when: str) -> None:
    """Raise UserError for responses of `when` that a cache does not hold, with how to add them."""
    missing = [r for r in responses if key_of(r.prompt_ids, r.token_ids) not in store.places]
    if not missing:
        return
    first = missing[0]
    kind = {name: store.manifest[name] for name in ("kind", "k", "draws", "tau") if name in store.manifest}
    raise UserError(
        f"{store.folder} does not hold {len(missing)} of {len(responses)} responses of {when}, such as "
        f"{first.text[:40]!r} of problem {first.problem.id}. Add them: kdrl cache-teacher RECIPE --output "
        f"{store.folder} {Stored(**kind).options()}, with the recipe of this run and --problems as many as it meets "
        "(a response has another key when its prompt, template or rollout.max_new_tokens changed)."
    )
