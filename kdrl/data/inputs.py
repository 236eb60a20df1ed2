"""What both data commands start from: a recipe, a file with its task section, or a data file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from kdrl.config import Config
from kdrl.errors import UserError
from kdrl.models.config import TeacherModelConfig
from kdrl.overrides import assign, parse_override
from kdrl.plugins import load_plugins
from kdrl.problems import explain_validation
from kdrl.recipe import RolloutConfig, load_recipe
from kdrl.tasks.config import TaskConfig
from kdrl.tasks.readers import ENDINGS
from kdrl.teachers.config import TeacherConfig
from kdrl.yamls import load_yaml

C = TypeVar("C", bound=Config)


class Inputs(Config):
    """The sections of a recipe that the data commands use."""

    seed: int = 0
    """Order of the problems, and the default seed of what is drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    plugins: tuple[str, ...] = ()
    """Python files or modules to import first: one's own verifiers and tasks."""
    student: TeacherModelConfig | None = None
    """The small model: the reference of `select`."""
    teacher: TeacherConfig | None = None
    """The large model; `generate` may ask one on a server."""
    task: TaskConfig
    """Prompts and their verifier."""
    rollout: RolloutConfig = RolloutConfig()
    """How responses are written."""

    def model_section(self, named: str) -> TeacherModelConfig:
        """How to load a model by name: as the section that names it does, else in the student's format and template."""
        sections = [s for s in (self.student, self.teacher) if s is not None]
        for section in sections:
            if section.model == named:
                return _here(section)
        if not sections:
            return TeacherModelConfig(model=named)
        kept = ("chat_template", "chat_template_kwargs", "eos", "dtype", "autocast", "attention")
        return TeacherModelConfig(model=named, **{name: getattr(sections[0], name) for name in kept})


def _here(section: TeacherModelConfig) -> TeacherModelConfig:
    """The section of a model that was named, to be loaded wherever the recipe's teacher is."""
    away = isinstance(section, TeacherConfig)
    return section.model_copy(update={"served": None, "cache": None}) if away else section


def loaded_here(section: TeacherModelConfig, option: str) -> TeacherModelConfig:
    """The section of a model that is loaded in this process; raises UserError for a teacher that is elsewhere."""
    if isinstance(section, TeacherConfig) and (section.served is not None or section.reads_cache):
        where = "on a server" if section.served is not None else "a cache"
        raise UserError(
            f"the recipe's teacher is {where}, which this command does not ask; name a model to load by {option}, or "
            "set teacher.served=null or teacher.cache=null to load teacher.model."
        )
    return section


def open_inputs(source: str | Path, overrides: Sequence[str] = ()) -> Inputs:
    """Read a recipe (YAML file or folder of a run), a YAML file with `task`, or a data file or folder.

    A data file stands for `task: {path: FILE}`. Raises UserError for anything amiss.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in ENDINGS:
        return _validated({"task": {"path": str(source)}}, overrides, str(source))
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            return _validated({"task": {"dataset": str(source)}}, overrides, str(source))
        path = path / "recipe.yaml"
    if not path.is_file():
        raise UserError(
            f"there is no file or folder {source}; give a recipe or task file (.yaml), the folder of a run, a data "
            f"file ({', '.join(ENDINGS)}) or a `datasets` folder."
        )
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is neither a recipe nor a task file: it must be a mapping with a `task` section.")
    if set(raw) <= set(Inputs.model_fields):
        return _validated(raw, overrides, str(path))
    recipe = load_recipe(path, overrides)
    return Inputs(**{name: getattr(recipe, name) for name in Inputs.model_fields})


def _validated(raw: dict[str, Any], overrides: Sequence[str], where: str) -> Inputs:
    for key, value in map(parse_override, overrides):
        assign(raw, key, value, "the command line")
    plugins = raw.get("plugins") or ()
    raw["plugins"] = [plugins] if isinstance(plugins, str) else plugins
    load_plugins(raw["plugins"], where)
    try:
        return Inputs.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(explain_validation(error, Inputs, ""))) from None


def checked_options(kind: type[C], given: dict[str, Any]) -> C:
    """Options of a command as a section; raises UserError naming the option."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        lines = (re.sub(r"^--\w+", lambda m: m[0].replace("_", "-"), x) for x in explain_validation(error, kind, "--"))
        raise UserError("; ".join(line.removeprefix("--: ") for line in lines)) from None
