"""Where a model lies (folder, GGUF file, hub id), and what went wrong there, as sentences."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kdrl.errors import UserError
from kdrl.models.config import TeacherModelConfig


@dataclass(frozen=True)
class Origin:
    """A stored model as transformers wants to be asked for it; `label` names it in sentences."""

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    gguf: bool = False


def find_origin(config: TeacherModelConfig) -> Origin:
    """Resolve `model`, `gguf_file` and `revision`; raises UserError for a missing or broken local folder or file."""
    named = str(config.model)
    path = Path(named).expanduser()
    options: dict[str, Any] = {} if config.revision is None else {"revision": config.revision}
    if named.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"model {named!r}: there is no such GGUF file.")
        if config.gguf_file is not None or config.revision is not None:
            raise UserError(f"model {named!r} is a GGUF file; remove `gguf_file` and `revision`.")
        return Origin(str(path.parent), named, {"gguf_file": path.name}, gguf=True)
    if config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    if path.is_dir():
        _check_folder(path, named, config.gguf_file)
        if config.revision is not None:
            raise UserError(f"model {named!r} is a local folder; `revision` belongs to hub ids, remove it.")
        return Origin(str(path), named, options, gguf=config.gguf_file is not None)
    if path.exists():
        raise UserError(f"model {named!r} is a file; give the folder that holds config.json, or a .gguf file.")
    check_named(named)
    return Origin(named, named, options | hub_options(), gguf=config.gguf_file is not None)


def check_named(named: str, what: str = "model") -> None:
    """Raise UserError for what can only be a path and is not there; a hub id is not looked up."""
    path = Path(named).expanduser()
    plainly = named.startswith((".", "/", "~")) or named.count("/") > 1
    if path.exists() or not (plainly or ("/" in named and path.parent.is_dir())):
        return
    where = ""
    if path.parent.is_dir():
        close = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
        near = f"; did you mean {str(path.parent / close[0])!r}?" if close else "."
        where = f" The folder {str(path.parent)!r} holds no {path.name!r}{near}"
    hub = "" if plainly else " If it is a hub id, start the command from a folder that holds no such name."
    raise UserError(f"{what} {named!r}: there is no such folder.{where}{hub}")


@cache
def hub_answers() -> bool:
    """Whether the hub says anything at all, within five seconds; asked once."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # requests' or httpx' own, or of a hub that is switched off
        return False
    return True


def hub_options() -> dict[str, Any]:
    """What transformers is told of hub ids: to look into its cache alone where the hub does not answer.

    Left to itself it asks for half a minute. One request a process.
    """
    return {} if hub_answers() else {"local_files_only": True}


def _check_folder(path: Path, named: str, gguf_file: str | None) -> None:
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise UserError(f"model {named!r}: the folder holds no {gguf_file!r} (option gguf_file).")
        return
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(f"model {named!r} holds a LoRA adapter, not a model; give the folder with the merged weights.")
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; to read its GGUF file set gguf_file: {ggufs[0]}" if ggufs else "; give a Hugging Face model folder"
        raise UserError(f"model {named!r}: the folder has no config.json{hint}.")
    _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            pointer = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")
            what = "is a git-lfs pointer, not the weights; run `git lfs pull`" if pointer else f"is corrupt ({error})"
            raise UserError(f"{file} {what}.") from error


def gguf_options(origin: Origin) -> dict[str, Any]:
    """Ask for dense weights where transformers would keep GGUF blocks packed (it always unpacked before 5.2x)."""
    if not origin.gguf:
        return {}
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def explain(error: Exception, label: str, what: str) -> str:
    """A sentence for what transformers raised while loading the model or tokenizer called `label`."""
    text = str(error)
    first = text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
    local = Path(label).expanduser().exists()
    if "Unrecognized configuration class" in text:
        return f"{what} {label!r} is not a causal language model that transformers knows."
    if "trust_remote_code" in text:
        return (
            f"{what} {label!r} needs code from its own repository, which is not run here; use a built-in architecture."
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"{what} {label!r}: this transformers version does not know the architecture ({first})."
    if "gated" in text or "401" in text:
        return f"{what} {label!r} is gated or private on the hub; log in with `hf auth login`, or give a local folder."
    if not local and ("connect" in text or "not a local folder" in text or "offline" in text or "cached" in text):
        if not hub_answers():
            return (
                f"{what} {label!r}: there is no local folder of that name, the hub's cache holds no such id, and the "
                "hub cannot be reached. Correct the path, or give a folder."
            )
        return f"{what} {label!r} is no local folder, and no hub id that is cached or can be reached ({first})."
    if what == "tokenizer" and local:
        return (
            f"{label!r} has no tokenizer that transformers can load; set `tokenizer` to a folder or hub id ({first})."
        )
    return f"{what} {label!r} cannot be loaded: {first}"
