"""Tokenizers of every kind that can be aligned: byte-level BPE, sentencepiece-like, characters, a real one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdrl.models.config import NewTokenizer
from kdrl.models.loading import quiet
from kdrl.models.scratch import character_tokenizer

SMOLLM = Path(__file__).parents[2] / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCES = [
    "the sum of twelve and thirty-one is forty-three; the difference is nineteen.",
    "12 + 31 - 4 = 39, so the answer is 39.",
    "Zwölf und einunddreißig sind 43. Ça va bien, merci!",
    "def add(a, b):\n    return a + b\n",
    "the the the answer answer is is 100 1000 10000",
]


def _wrapped(tokenizer: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **more)


def byte_level(size: int = 400, sentences: list[str] | None = None, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True) for t in (eos, "<|pad|>")],  # type: ignore[list-item]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences or SENTENCES, trainer)
    return _wrapped(tokenizer, eos_token=eos, pad_token="<|pad|>")


def sentencepiece_like(size: int = 500) -> PreTrainedTokenizerFast:
    """BPE over spaces written as U+2581, with byte fallback and a space put before every text, as Llama-2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)  # type: ignore[arg-type]
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Bytes are no special tokens; the trainer only knows how to reserve them so.
    tokenizer = _without_added_bytes(tokenizer)
    return _wrapped(tokenizer, eos_token="</s>", unk_token="<unk>")


def _without_added_bytes(tokenizer: Tokenizer) -> Tokenizer:
    import json

    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


def characters() -> PreTrainedTokenizerBase:
    """One token a character."""
    known = "".join(dict.fromkeys("".join(SENTENCES) + "abcdefghijklmnopqrstuvwxyz0123456789+-=;# "))
    return character_tokenizer(NewTokenizer(characters=known))


def smollm() -> PreTrainedTokenizerBase:
    """SmolLM2's 49k byte-level BPE; skips the test when `make smollm` has not fetched it."""
    if not SMOLLM.exists():
        pytest.skip("make smollm fetches SmolLM2")
    with quiet():
        return AutoTokenizer.from_pretrained(str(SMOLLM.parent), gguf_file=SMOLLM.name)


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece_like,
    "characters": characters,
    "smollm": smollm,
}


@lru_cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer by its kind, made once."""
    return KINDS[kind]()
