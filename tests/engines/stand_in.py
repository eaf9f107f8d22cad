"""A stand-in for a vLLM server that samples from a policy: the wire format, the very model, and faults."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

POSTED = {
    *("/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc"),
    *("/pause", "/resume", "/reset_prefix_cache", "/update_weight_version"),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "StandIn"

    def do_GET(self):
        if self.server.over.is_set():
            return self.connection.shutdown(socket.SHUT_RDWR)
        if self.path in self.server.posted:
            return self.send(405, {"detail": "Method Not Allowed"})
        pages = {
            "/v1/models": self.server.models,
            "/metrics": lambda: self.server.metrics,
            "/get_world_size": lambda: {"world_size": 2},
            "/weight_info": lambda: {"weight_version": self.server.version},
        }
        return self.send(200, pages[self.path]()) if self.path in pages else self.send(404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.server.asked.append((self.path, body))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "drop" or self.server.over.is_set():
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "hang":
            self.server.over.wait()
        elif isinstance(fault, tuple):
            self.send(*fault)
        else:
            status, reply = self.server.answer(self.path, body)
            self.send(status, fault(reply) if fault else reply)

    def send(self, status, content):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class StandIn(ThreadingHTTPServer):
    """`faults` befall the next posts, in order: a lost connection, silence, a status, or another reply."""

    daemon_threads = True

    def __init__(self, folder, posted=frozenset(POSTED), processed=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folder, self.posted, self.processed = str(folder), posted, processed
        self.tokens, self.takes_weights = 128, True
        self.faults: list[Any] = []
        self.asked: list[tuple[str, Any]] = []
        self.sampled: list[list[int]] = []
        self.over, self.lock = threading.Event(), threading.Lock()
        self.metrics = 'vllm:lora_requests_info{max_lora="1"} 1.0\n'
        self.generator = torch.Generator().manual_seed(0)
        self.restart()

    def restart(self):
        """Serve what the server was started with: its base, and no adapter."""
        self.policy = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.adapters: dict[str, Any] = {}
        self.version = "default"

    def stop(self):
        """Answer no more."""
        if not self.over.is_set():
            self.over.set()
            self.shutdown()
            self.server_close()

    def models(self):
        base = {"id": "base", "root": self.folder, "parent": None, "max_model_len": self.tokens}
        return {"data": [base, *({"id": name, "root": "x", "parent": "base"} for name in self.adapters)]}

    @torch.no_grad()
    def answer(self, path, body):
        if path not in self.posted:
            return 404, {"detail": "Not Found"}
        if path == "/v1/load_lora_adapter":
            base = AutoModelForCausalLM.from_pretrained(self.folder)
            self.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        elif path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        elif path == "/collective_rpc" and self.takes_weights:
            self.policy = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/v1/completions":
            model = {"base": self.policy} | self.adapters
            if body["model"] not in model:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            with self.lock:
                rows = [self.sample(model[body["model"]], prompt, body) for prompt in body["prompt"]]
            return 200, {
                "model": body["model"],
                "choices": [{"index": i} | row for i, row in enumerate(rows)],
            }
        return 200, {}

    def sample(self, model, prompt, body):
        ids, logprobs, tops = [], [], []
        warpers = [TemperatureLogitsWarper(body["temperature"])]
        if body["top_k"]:
            warpers.append(TopKLogitsWarper(body["top_k"]))
        if body["top_p"] < 1:
            warpers.append(TopPLogitsWarper(body["top_p"]))
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in body["stop_token_ids"]):
            logits = raw = model(torch.tensor([prompt + ids])).logits[:, -1]
            logits[:, list(map(int, body["logit_bias"]))] += -100.0
            if len(ids) < body["min_tokens"]:
                logits[:, body["stop_token_ids"]] = -torch.inf
            for warper in warpers:
                logits = warper(None, logits)
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=self.generator))
            scores = logits if self.processed else raw
            scores = scores.log_softmax(-1)[0]
            ids, logprobs = [*ids, token], [*logprobs, float(scores[token])]
            tops.append({f"token_id:{i}": float(scores[i]) for i in scores.topk(body["logprobs"]).indices})
        self.sampled.append(ids)
        reason = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        return {
            "token_ids": ids,
            "prompt_token_ids": prompt,
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": tops},
            "finish_reason": reason,
        }


@contextmanager
def stand_in(folder, **options):
    """Serve until the end of the block, and yield the server."""
    server = StandIn(folder, **options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.stop()
