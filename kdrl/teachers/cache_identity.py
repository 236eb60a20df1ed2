"""Whose scores a cache holds: teacher, tokenizer, temperature and kind, each by content and not by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kdrl.models import LoadedModel, NewModel
from kdrl.models.config import TeacherModelConfig
from kdrl.models.heads import causal_lm
from kdrl.models.sources import find_origin

# Where a model comes from and how text is written for it; the rest of a section changes what it answers.
_NAMES = {"model", "gguf_file", "revision", "tokenizer", "eos", "chat_template", "chat_template_kwargs", "attention"}
_ELSEWHERE = {"cache", "served", "prepare", "offload"}
_VOLATILE = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of every token and its id."""
    return _hash(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def options_of(section: TeacherModelConfig) -> dict[str, Any]:
    """What a section says, other than by default, that changes a teacher's numbers."""
    return section.model_dump(mode="json", exclude_defaults=True, exclude=_NAMES | _ELSEWHERE)


def teacher_identity(section: TeacherModelConfig, loaded: LoadedModel | None) -> dict[str, Any]:
    """Name, options and a hash of configuration and weights: of the files of a local model, else of its tensors."""
    named = section.model if isinstance(section.model, str) else "new model"
    found = files_digest(section)
    how = "files"
    if found is None:
        # Of a server that names no weights the name has to do.
        how, found = ("tensors", _tensors_digest(loaded)) if loaded is not None else ("name", _hash([named]))
    return {"model": named, "options": options_of(section), "of": how, "weights": found}


def files_digest(section: TeacherModelConfig) -> str | None:
    """A hash of a local model's configuration and weight files; None where there are none."""
    if isinstance(section.model, NewModel):
        return None
    folder = Path(str(section.model)).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file() and section.gguf_file is None:
        return None
    origin = find_origin(section)
    folder = Path(origin.name)
    if not folder.is_dir():
        return None
    named = origin.options.get("gguf_file")
    files = [folder / named] if named else sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        return None
    config = folder / "config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() and not named else {}
    return _hash([_without_volatile(said), sorted(_file_hash(file) for file in files)])


def identity(
    section: TeacherModelConfig,
    loaded: LoadedModel | None,
    student: LoadedModel,
    settings: Mapping[str, Any],
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """The content of a cache's manifest, but for the head of hidden states."""
    reader = loaded or student
    return {
        **settings,
        "temperature": temperature,
        "vocab": student.vocab_size,
        "teacher": teacher_identity(section, loaded),
        "tokenizer": tokenizer_digest(reader.tokenizer),
        "eos": sorted(reader.eos_ids),
        **({"seed": seed} if settings["kind"] == "draws" else {}),
    }


def _without_volatile(said: Any) -> Any:
    return {key: value for key, value in said.items() if key not in _VOLATILE}


def _tensors_digest(loaded: LoadedModel) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(causal_lm(loaded).state_dict().items()):
        if "lora_" in name:
            continue
        found.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    said = _without_volatile(causal_lm(loaded).config.to_dict())  # type: ignore[operator, union-attr]
    return _hash([said, found.hexdigest()])


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(content: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(content), sort_keys=True, default=str).encode()).hexdigest()
