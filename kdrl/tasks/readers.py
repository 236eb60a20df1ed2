"""Rows of files and data sets, each with the place it stands at for error messages."""

from __future__ import annotations

import csv
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdrl.errors import UserError, nearest

Row = tuple[str, Mapping[str, Any]]
"""(file and line or row, column -> value)"""

_HUB_SPLITS = {"train": ("train",), "development": ("validation", "development", "dev", "valid"), "test": ("test",)}


def read_files(paths: Sequence[str]) -> Iterator[Row]:
    """Rows of all files in order; the ending says the format. Raises UserError naming file and line."""
    for name in paths:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"the data file {name} does not exist{_beside(path)}")
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"the data file {name} ends in {path.suffix!r}; known endings: {', '.join(_READERS)}.")
        yield from reader(path)


def _beside(path: Path) -> str:
    names = [other.name for other in path.parent.iterdir() if other.is_file()] if path.parent.is_dir() else []
    return f" in {path.parent}{nearest(path.name, names)}" if names else "."


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _text_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            cut = " The line has no end: the file may be cut off." if not line.endswith("\n") else ""
            raise UserError(f"{where}: not a JSON object ({error.msg} at column {error.colno}).{cut}") from error
        yield where, _object(row, where)


def _json(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _text_lines(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json data file must hold a list of objects; use .jsonl for one object a line.")
    for number, row in enumerate(rows, 1):
        yield f"{path} item {number}", _object(row, f"{path} item {number}")


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with columns, found a {type(row).__name__}.")
    return row


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(line for _, line in _text_lines(path))
    try:
        header = next(reader, None)
        if not header:
            raise UserError(f"{path}:1: a CSV file needs a first line with the column names.")
        while (values := next(reader, None)) is not None:
            where = f"{path}:{reader.line_num}"
            if not values:
                continue
            if len(values) != len(header):
                raise UserError(f"{where}: {len(values)} values, but the header names {len(header)} columns.")
            yield where, {name: value or None for name, value in zip(header, values, strict=True)}
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error}).") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}).") from error


_READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
ENDINGS = tuple(_READERS)
"""How the name of a data file may end."""


def read_hub(name: str, settings: Mapping[str, Any], split: str) -> Iterator[Row]:
    """Rows of one split of a `datasets` folder or hub id; none when it has no such split. Raises UserError."""
    splits = _load(name, json.dumps(dict(settings), sort_keys=True, default=str))
    for key in _HUB_SPLITS[split]:
        if key in splits:
            for number, row in enumerate(splits[key], 1):
                yield f"{name} ({key}) row {number}", row
            return


@lru_cache(maxsize=2)
def _load(name: str, settings_json: str) -> Mapping[str, Any]:
    import datasets

    settings = json.loads(settings_json)
    _check_hub_settings(settings, datasets.load_dataset)
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            if settings:
                raise UserError(f"task.settings {sorted(settings)} have no meaning for the saved data set {name}.")
            loaded: Any = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else name, **settings)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_why(name, folder, error)) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _check_hub_settings(settings: Mapping[str, Any], function: Any) -> None:
    known = set(inspect.signature(function).parameters) - {"path", "split", "streaming", "config_kwargs"}
    for key in settings:
        if key not in known:
            raise UserError(f"task.settings: a data set has no setting {key!r}{nearest(key, known)}")


def _why(name: str, folder: Path, error: Exception) -> str:
    from reasoning_gym.factory import DATASETS

    first = str(error).strip().partition("\n")[0]
    if folder.is_dir():
        return f"the folder {name} cannot be read as a data set ({type(error).__name__}: {first})."
    hint = ""
    if name in DATASETS:
        hint = f" {name!r} is a reasoning-gym task: for that set task.name: reasoning_gym."
    return (
        f"the data set {name!r} is no folder here and cannot be loaded from the Hugging Face hub "
        f"({type(error).__name__}: {first}). Check the id and the network, or give a file as task.path.{hint}"
    )
