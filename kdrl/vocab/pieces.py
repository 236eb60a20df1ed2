"""The bytes that each token of a tokenizer stands for, and text as its tokens, byte for byte.

Left out: tokenizers that lose bytes by design (WordPiece), and sentencepiece files that no fast tokenizer reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from kdrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
# What may stand before a text; the second is a byte of its own in every tokenizer that falls back to bytes.
_BEFORE = ("\n", "\x01")
# Decoders whose tokens stand for bytes by themselves, wherever they stand.
_KNOWN = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "Sequence"}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, read backwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_of_character()


def _decoders(spec: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if spec is not None:
        yield spec
        for inner in spec.get("decoders", ()):
            yield from _decoders(inner)


class Pieces:
    """A tokenizer as a table from ids to bytes; raises UserError for one whose tokens are no fixed bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, who: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"the {who}'s tokenizer ({type(tokenizer).__name__}) has no fast form, so its tokens cannot be aligned "
                "with another tokenizer's; save it as tokenizer.json."
            )
        text = backend.to_str()
        spec = json.loads(text)
        kinds = {d["type"] for d in _decoders(spec["decoder"])}
        if not kinds or kinds - _KNOWN:
            strange = ", ".join(sorted(kinds - _KNOWN)) or "none"
            raise UserError(
                f"the {who}'s tokenizer does not keep the bytes of a text (decoder: {strange}), so its tokens cannot "
                "be aligned with another tokenizer's; byte-level BPE, sentencepiece and character tokenizers can."
            )
        self._level = "ByteLevel" in kinds
        self._spaced = bool(kinds & {"Replace", "Metaspace"})
        self._special = set(tokenizer.all_special_ids)
        self._special |= {t["id"] for t in spec["added_tokens"] if t["special"]}
        unknown = getattr(tokenizer, "unk_token_id", None)
        self._special |= set() if unknown is None else {unknown}
        self._plain = {t["id"] for t in spec["added_tokens"] if not t["special"]}
        self._encoder = _own_encoder(text)
        self.of_id: dict[int, bytes | None] = {i: self._bytes(t, i) for t, i in tokenizer.get_vocab().items()}

    def _bytes(self, token: str, index: int) -> bytes | None:
        """What a token stands for; None for a special one."""
        if index in self._special:
            return None
        if index in self._plain:
            return token.encode()
        if self._level:
            return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in token)
        if self._spaced:
            found = _BYTE.fullmatch(token)
            return bytes([int(found[1], 16)]) if found else token.replace(_SPACE, " ").encode()
        return token.encode()

    @cached_property
    def single(self) -> dict[int, int]:
        """The token of each single byte that has one of its own."""
        found: dict[int, int] = {}
        for index, piece in self.of_id.items():
            if piece is not None and len(piece) == 1:
                found.setdefault(piece[0], index)
        return found

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The token of each piece of text; the first where several stand for it."""
        found: dict[bytes, int] = {}
        for index, piece in sorted(self.of_id.items()):
            if piece:
                found.setdefault(piece, index)
        return found

    @cached_property
    def beginning(self) -> list[int]:
        """Tokens that begin a new word: those with a space, tab or newline in front, and special ones."""
        return sorted(i for i, piece in self.of_id.items() if piece is None or piece[:1] in (b" ", b"\t", b"\n"))

    def of(self, ids: Sequence[int]) -> list[bytes | None]:
        """The bytes of each token, None for a special one or one beyond the vocabulary."""
        return [self.of_id.get(index) for index in ids]

    def encode(self, data: bytes) -> tuple[list[int], list[bytes]]:
        """Tokens of `data` and the bytes of each; of the longest start of it that this tokenizer can write.

        Bytes that are no UTF-8 become single-byte tokens where there are any. A text that spells a special token stays
        text.
        """
        ids: list[int] = []
        pieces: list[bytes] = []
        for part, valid in _parts(data):
            more = self._text(part) if valid else self._raw(part)
            ids += more[0]
            pieces += more[1]
            if sum(map(len, more[1])) < len(part):
                break
        return ids, pieces

    def _raw(self, part: bytes) -> tuple[list[int], list[bytes]]:
        known = 0
        while known < len(part) and part[known] in self.single:
            known += 1
        return [self.single[b] for b in part[:known]], [bytes([b]) for b in part[:known]]

    def _text(self, part: bytes) -> tuple[list[int], list[bytes]]:
        text = part.decode()
        text = text[: self._writable(text)]
        ids = self._ids(text)
        best = _matching(ids, self.of(ids), part)
        # A tokenizer that puts a space before every text puts none where something stands before it.
        for before in _BEFORE if self._spaced else ():
            if b"".join(best[1]) == part:
                break
            start, after = self._ids(before), self._ids(before + text)
            if after[: len(start)] == start:
                ids = after[len(start) :]
                best = max(best, _matching(ids, self.of(ids), part), key=lambda found: sum(map(len, found[1])))
        return best

    def _ids(self, text: str) -> list[int]:
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def _writable(self, text: str) -> int:
        """Characters that the tokenizer can write, from the start: a character tokenizer refuses the unknown."""

        def fits(count: int) -> bool:
            try:
                self._ids(text[:count])
            except Exception:  # the Rust encoder raises a bare Exception
                return False
            return True

        if fits(len(text)):
            return len(text)
        low, high = 0, len(text)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


_KNOWN_PIECES: WeakKeyDictionary[Any, Pieces] = WeakKeyDictionary()


def pieces_of(tokenizer: PreTrainedTokenizerBase, who: str) -> Pieces:
    """The table of a tokenizer, made once: a large vocabulary takes a second."""
    if tokenizer not in _KNOWN_PIECES:
        _KNOWN_PIECES[tokenizer] = Pieces(tokenizer, who)
    return _KNOWN_PIECES[tokenizer]


def _own_encoder(text: str) -> Any:
    """A copy of the tokenizer that cuts nothing off, pads nothing and reads no special tokens out of a text."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(text)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def _parts(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Cut into runs of valid UTF-8 (True) and bytes that are none (False)."""
    while data:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start], True
            yield data[error.start : error.end], False
            data = data[error.end :]
        else:
            yield data, True
            return


def _matching(ids: Sequence[int], pieces: Sequence[bytes | None], data: bytes) -> tuple[list[int], list[bytes]]:
    """The tokens from the start on that spell `data`: a normaliser may have changed the text."""
    kept: list[bytes] = []
    at = 0
    for piece in pieces:
        if piece is None or data[at : at + len(piece)] != piece:
            break
        kept.append(piece)
        at += len(piece)
    return list(ids[: len(kept)]), kept
