"""vLLM in a process and environment of its own, told to write by a line on its standard input.

Run as a program it is that process: `vllm_side.py FOLDER JOB.json` loads the model, says when it is ready, and for each
line that comes writes once and says how many tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

READY = "kdrl-ready"
DONE = "kdrl-done"


class VllmSide:
    """A context that holds the process; a call writes once and returns how many tokens."""

    def __init__(self, python: Path, loaded: Any, what: Any, threads: int) -> None:
        self._python, self._loaded, self._what, self._threads = python, loaded, what, threads
        self.about: dict[str, Any] = {}

    def __enter__(self) -> VllmSide:
        from kdrl.models import save_final

        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._errors = (folder / "errors.txt").open("w")
        save_final(self._loaded, folder / "model")
        job = {
            "prompts": [list(prompt) for prompt in self._what.prompts],
            "samples": self._what.samples,
            "new_tokens": self._what.new_tokens,
            "seed": self._what.seed,
            "length": max(map(len, self._what.prompts)) + self._what.new_tokens,
        }
        (folder / "job.json").write_text(json.dumps(job))
        more = {
            "OMP_NUM_THREADS": str(self._threads),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        # The child must not import kdrl's environment, nor this folder's modules.
        self._process = subprocess.Popen(
            [str(self._python), "-I", str(Path(__file__).resolve()), str(folder / "model"), str(folder / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | more,
        )
        self.about = {"vllm": self._read(READY)["version"]}
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._errors.close()
        self._folder.cleanup()

    def __call__(self) -> int:
        """Write once."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return int(self._read(DONE)["tokens"])

    def _read(self, word: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return json.loads(line.removeprefix(word))
        errors = (Path(self._folder.name) / "errors.txt").read_text().strip().splitlines()
        raise RuntimeError(f"vLLM ended: {errors[-1] if errors else 'no word why'}")


def _serve(model: str, job: dict[str, Any]) -> None:
    import vllm

    rows = len(job["prompts"]) * job["samples"]
    engine = vllm.LLM(
        model,
        dtype="bfloat16",
        seed=job["seed"],
        max_model_len=job["length"] + 16,
        max_num_seqs=rows,
        max_num_batched_tokens=max(2048, job["length"] + 16),
        enable_prefix_caching=True,
        disable_log_stats=True,
    )
    options = vllm.SamplingParams(
        n=job["samples"],
        temperature=1.0,
        max_tokens=job["new_tokens"],
        ignore_eos=True,
        detokenize=False,
        seed=None,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    print(READY, json.dumps({"version": vllm.__version__}), flush=True)
    for _ in sys.stdin:
        out = engine.generate(prompts, options, use_tqdm=False)
        tokens = sum(len(each.token_ids) for request in out for each in request.outputs)
        print(DONE, json.dumps({"tokens": tokens}), flush=True)
        engine.reset_prefix_cache()


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
