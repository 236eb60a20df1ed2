"""A small HTTP server that speaks as vLLM's does, over a tiny model; it can be told to misbehave at given requests.

It scores each prompt alone, so its numbers depend on nothing else: a test may ask for equal bytes.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from kdrl.engines import TorchEngine
from kdrl.models import LoadedModel, TeacherModelConfig, load_model


@dataclass
class Manners:
    """How a server behaves; `faults` maps the number of a scoring or writing request to 500, 503, garbage, short,
    nan, half, die (SIGKILL) or a number of seconds to be slow."""

    name: str = "toy"
    max_logprobs: int = 20
    context: int = 128
    key: str | None = None
    follows_temperature: bool = False
    prompt_logprobs: bool = True
    raw_logits: bool = False
    detokenize: bool = True
    spelling: dict[int, str] = field(default_factory=dict)
    shift: float = 0.0
    faults: dict[int, Any] = field(default_factory=dict)


class RefusalError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ToyServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, loaded: LoadedModel, manners: Manners, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.loaded, self.manners = loaded, manners
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no error here."""

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/detokenize":
            return self.spell(body["tokens"])
        if body["model"] != self.manners.name:
            raise RefusalError(404, f"The model `{body['model']}` does not exist.")
        if path == "/v1/chat/completions":
            prompts = [self.loaded.tokenizer(body["messages"][-1]["content"])["input_ids"]]
        else:
            prompts = body["prompt"]
        if isinstance(prompts, str):
            prompts = [self.loaded.tokenizer(prompts)["input_ids"]]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        for prompt in prompts:
            if len(prompt) + 1 > self.manners.context:
                raise RefusalError(400, f"maximum context length is {self.manners.context} tokens")
        with self.lock:
            if body.get("prompt_logprobs") is not None and self.manners.prompt_logprobs:
                return {"choices": [self.score(prompt, i, body) for i, prompt in enumerate(prompts)]}
            return {"choices": self.write(prompts[0], body, chat=path.endswith("chat/completions"))}

    def spell(self, tokens: list[int]) -> dict[str, str]:
        if not self.manners.detokenize:
            raise RefusalError(404, "Not Found")
        spelling = self.manners.spelling
        return {"prompt": "".join(spelling.get(t) or str(self.loaded.tokenizer.decode([t])) for t in tokens)}

    def score(self, prompt: list[int], index: int, body: dict[str, Any]) -> dict[str, Any]:
        k, manners = body["prompt_logprobs"], self.manners
        if k > manners.max_logprobs:
            raise RefusalError(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {manners.max_logprobs}"
            )
        temperature = body["temperature"] if manners.follows_temperature else 1.0
        with torch.no_grad():
            logits = self.loaded.model(torch.tensor([prompt]), use_cache=False).logits[0].float()
        logp = logits + 20.0 if manners.raw_logits else torch.log_softmax(logits / temperature, -1) + manners.shift
        rows: list[Any] = [None]
        for place, token in enumerate(prompt[1:]):
            entries = {str(token): float(logp[place, token])}
            top = logp[place].topk(k)
            entries |= {str(int(t)): float(x) for t, x in zip(top.indices, top.values, strict=True)}
            rows.append({t: {"logprob": x, "rank": 1, "decoded_token": "?"} for t, x in entries.items()})
        return {"index": index, "text": "", "prompt_logprobs": rows, "finish_reason": "length"}

    def write(self, prompt: list[int], body: dict[str, Any], chat: bool) -> list[dict[str, Any]]:
        engine = TorchEngine(self.loaded, 64, filtered_ok=True)
        how = {"temperature": body.get("temperature", 1.0), "top_p": body.get("top_p", 1.0)}
        n, new = body.get("n", 1), body["max_tokens"]
        found = engine.generate([prompt], samples=n, max_new_tokens=new, seed=body.get("seed", 0), **how)[0]
        choices = []
        for i, sample in enumerate(found):
            text = self.loaded.tokenizer.decode(sample.token_ids[:-1] if sample.ended else sample.token_ids)
            choice = {"index": i, "finish_reason": "stop" if sample.ended else "length", "prompt_logprobs": None}
            choice |= {"message": {"content": text}} if chat else {"text": text}
            choices.append(choice | ({"token_ids": sample.token_ids} if body.get("return_token_ids") else {}))
        return choices


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ToyServer  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        manners = self.server.manners
        if manners.key is not None and self.headers.get("Authorization") != f"Bearer {manners.key}":
            self._send(401, {"error": {"message": "no"}})
            return
        self._send(200, {"data": [{"id": manners.name, "max_model_len": manners.context}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = None
        if self.path != "/detokenize":
            with self.server.lock:
                fault = self.server.manners.faults.get(len(self.server.asked))
                self.server.asked.append(body)
        if self._misbehaves(fault):
            return
        try:
            answer = self.server.answer(self.path, body)
        except RefusalError as refusal:
            self._send(refusal.status, {"error": {"message": str(refusal), "code": refusal.status}})
            return
        if fault == "short":
            answer["choices"].pop()
        if fault == "nan":
            answer["choices"][0]["prompt_logprobs"][-1] = {t: {"logprob": float("nan")} for t in range(40)}
        if fault == "half":
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self._send(200, answer)

    def _misbehaves(self, fault: Any) -> bool:
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(fault, float):
            time.sleep(fault)
        if fault in (500, 503):
            self._send(fault, {"error": {"message": "the engine is gone"}})
        if fault == "garbage":
            self._send(200, None, data=b"<html>it works!")
        return fault in (500, 503, "garbage")

    def _send(self, status: int, answer: Any, data: bytes | None = None) -> None:
        data = json.dumps(answer).encode() if data is None else data
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(loaded: LoadedModel, manners: Manners | None = None, port: int = 0) -> Iterator[ToyServer]:
    """A server in a thread of this process."""
    server = ToyServer(loaded, manners or Manners(), port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def serve(model: str, manners: Manners, port: int, ready: Any) -> None:
    """A server that is a process of its own, until it is killed."""
    torch.set_num_threads(1)
    loaded = load_model(TeacherModelConfig(model=str(Path(model))), "cpu", trainable=False, seed=0)
    server = ToyServer(loaded, manners, port)
    ready.set()
    server.serve_forever()
