"""From a problem's prompt to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl.models.loading import LoadedModel


def encode_prompt(loaded: LoadedModel, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of a prompt, ready for a response to follow: chat template when there is one, else plain text.

    Plain text gets the BOS that its tokenizer adds, and never an EOS. Raises UserError for messages without a chat
    template and for text that the tokenizer cannot write.
    """
    template = loaded.config.chat_template != "none" and loaded.tokenizer.chat_template is not None
    if template:
        ids = _templated(loaded, prompt)
    elif isinstance(prompt, str):
        ids = _plain(loaded.tokenizer, prompt)
        while ids and ids[-1] in loaded.eos_ids:
            ids.pop()
    else:
        reason = (
            "chat_template is `none`" if loaded.config.chat_template == "none" else "the tokenizer has no chat template"
        )
        raise UserError(f"the prompt is a list of messages, but {reason}; set `chat_template`, or give plain text.")
    if not ids:
        raise UserError(f"the prompt {str(prompt)[:80]!r} has no tokens, so there is nothing to continue.")
    return ids


def _templated(loaded: LoadedModel, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        text = loaded.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **loaded.config.chat_template_kwargs
        )
    except Exception as error:  # Jinja raises its own and the template's errors of any kind
        raise UserError(f"the chat template refuses the prompt {str(prompt)[:80]!r}: {error}") from error
    return _plain(loaded.tokenizer, str(text), special=False)  # the template writes its own special tokens


def _plain(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])  # type: ignore[arg-type]
    except Exception as error:  # the Rust encoder raises a bare Exception
        known = tokenizer.get_vocab()
        strange = sorted({c for c in text if c not in known})
        shown = f"; it does not know {' '.join(map(repr, strange[:10]))}" if strange and len(known) < 1000 else ""
        raise UserError(f"the tokenizer cannot write {text[:80]!r}{shown} ({error}).") from error


def apply_template_option(tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """Give the tokenizer the chat template that the recipe names (a file or its text), if any."""
    if option in ("auto", "none"):
        return
    if "{{" in option or "{%" in option:
        tokenizer.chat_template = option
        return
    path = Path(option).expanduser()
    if not path.is_file():
        raise UserError(
            f"chat_template names the file {option!r}, which does not exist; give auto, none or a Jinja file."
        )
    tokenizer.chat_template = path.read_text(encoding="utf-8")
