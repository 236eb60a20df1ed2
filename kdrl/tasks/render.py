"""From a task's item to the text a model is asked, by format strings over the item's fields."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdrl.errors import UserError, nearest
from kdrl.tasks.base import Prompt, user_text
from kdrl.tasks.config import TaskConfig
from kdrl.tasks.splits import text_key

Fields = Mapping[str, Any]
_COMPACT = "_compact"


class _Known(dict[str, Any]):
    """Fields of an item, each also as NAME_compact (no white space); a missing one is a UserError."""

    def __init__(self, fields: Fields, option: str, where: str) -> None:
        super().__init__(fields)
        self.option, self.where = option, where

    def __missing__(self, name: str) -> Any:
        base = name.removesuffix(_COMPACT)
        if base != name and base in self:
            return "".join(str(self[base]).split())
        raise UserError(f"{self.option} names a field {name!r} that {self.where} does not have{nearest(name, self)}")


def fill(template: str, fields: Fields, option: str, where: str) -> str:
    """The template with fields filled in; raises UserError for an unknown field or a broken template."""
    try:
        return string.Formatter().vformat(template, (), _Known(fields, option, where))
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{option} {template!r} is not a format string that fits {where}: {error}.") from error


@dataclass(frozen=True)
class Rendered:
    """A prompt and the digest that decides its split and whether it is a repetition."""

    prompt: Prompt
    key: bytes
    split_key: bytes


def render(config: TaskConfig, text: str, fields: Fields, where: str) -> Rendered:
    """The prompt of an item whose plain text is `text`, after template and system prompt."""
    if config.template is not None:
        text = fill(config.template, fields, "task.template", where)
    prompt: Prompt = text
    if config.system_prompt is not None:
        prompt = [{"role": "system", "content": config.system_prompt}, {"role": "user", "content": text}]
    return keyed(config, prompt, fields, where)


def keyed(config: TaskConfig, prompt: Prompt, fields: Fields, where: str) -> Rendered:
    """A finished prompt with its digests."""
    key = text_key(user_text(prompt))
    if config.split_by is None:
        return Rendered(prompt, key, key)
    return Rendered(prompt, key, text_key(fill(config.split_by, fields, "task.split_by", where)))
