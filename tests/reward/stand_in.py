"""A stand-in for servers of reward models: it speaks vLLM's and TEI's formats, runs the very model on what it
is sent, and fails as asked.
"""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pipeline import RewardModel
from pipeline.config import Reward
from pipeline.reward.functions import load_reward, require_reward
from pipeline.reward.settings import RewardSettings

PROMPTS = [
    "What is the capital of France?",
    [{"role": "user", "content": "Hi."}, {"role": "user", "content": "Who?"}],
    "",
    "Name a fruit.",
]
ANSWERS = [
    "Paris.",
    "You fool.",
    "The answer is no.",
    " An apple, I think; but a pear will do. " * 9,
]  # the last is over max_length


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        says = self.server.says
        self.send(*((200, says[self.path]) if self.path in says else (404, {"detail": "Not Found"})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.key = self.headers["Authorization"]
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "hang":
            self.server.over.wait()
        elif isinstance(fault, tuple):
            self.send(*fault)
        else:
            servers = {"/classify": self.server.classify, "/pooling": self.server.pool}
            answer = servers.get(self.path, self.server.predict)(body)
            answer = fault(answer) if fault else answer
            self.send(*answer if isinstance(answer, tuple) else (200, answer))

    def send(self, status, content, wait=None):
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        data = data.encode() if isinstance(data, str) else data
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if wait is not None:
            self.send_header("Retry-After", str(wait))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class StandIn(ThreadingHTTPServer):
    """`faults` befall the next requests, in order: a status with its content, a lost connection, silence, or
    another answer.
    """

    def __init__(self, engine, folder, rows=2, name=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = (
            (RewardSettings.load(Path(folder)) or RewardSettings()).auto_class.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(folder),
        )
        self.rows, self.faults, self.asked, self.over = rows, [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        labels = {str(i): label for i, label in self.model.config.id2label.items()}
        kind = {"classifier" if len(labels) > 1 else "reranker": {"id2label": labels, "label2id": {}}}
        info = {
            "model_id": name or str(folder),
            "model_sha": "f00",
            "model_type": kind,
            "max_input_length": 126,
            "max_client_batch_size": rows,
        }
        card = {
            "id": "rm",
            "object": "model",
            "owned_by": "vllm",
            "root": name or str(folder),
            "max_model_len": 128,
        }
        self.says = {"/info": info} if engine == "tei" else {"/v1/models": {"object": "list", "data": [card]}}

    @torch.inference_mode()
    def classify(self, body):
        """vLLM: ids alone; squashed unless told not to, or a regression."""
        assert body["model"] == "rm"
        assert all(isinstance(i, int) for row in body["input"] for i in row)
        logits = [self.model(input_ids=torch.tensor([ids])).logits[0] for ids in body["input"]]
        if body.get("use_activation") is not False and self.model.config.problem_type != "regression":
            logits = [each.softmax(0) if len(each) > 1 else each.sigmoid() for each in logits]
        data = [
            {"index": i, "label": None, "probs": each.tolist(), "num_classes": len(each)}
            for i, each in enumerate(logits)
        ]
        return {"object": "list", "model": "rm", "data": data[::-1]}

    @torch.inference_mode()
    def pool(self, body):
        """vLLM: the outputs of every token, squashed unless told not to."""
        assert (body["model"], body["task"]) == ("rm", "token_classify")
        logits = [self.model(input_ids=torch.tensor([ids])).logits[0] for ids in body["input"]]
        if body.get("use_activation") is not False:
            logits = [each.softmax(-1) for each in logits]
        data = [{"index": i, "object": "pooling", "data": each.tolist()} for i, each in enumerate(logits)]
        return {"object": "list", "model": "rm", "data": data[::-1]}

    @torch.inference_mode()
    def predict(self, body):
        """TEI: a list of lists of one text or two; the labels of each row, the highest score first."""
        if len(body["inputs"]) > self.rows:
            return 413, {
                "error": f"batch size {len(body['inputs'])} > maximum allowed batch size {self.rows}",
                "error_type": "Validation",
            }
        found = []
        for texts in body["inputs"]:
            assert len(texts) in (1, 2)
            inputs = self.tokenizer(*texts, return_tensors="pt", truncation=body["truncate"], max_length=126)
            logits = self.model(**inputs).logits[0]
            scores = (
                logits if body["raw_scores"] else logits.softmax(0) if len(logits) > 1 else logits.sigmoid()
            )
            row = [
                {"score": value, "label": self.model.config.id2label[i]}
                for i, value in enumerate(scores.tolist())
            ]
            found.append(sorted(row, key=lambda each: -each["score"]))
        return found


def reward_folder(base, folder, labels=("reward",), **known):
    torch.manual_seed(0)
    known = {"objective": "classification" if len(labels) > 1 else "pairwise"} | known
    settings = RewardSettings(outputs=list(labels), **known)
    model = settings.auto_class.from_pretrained(base, **settings.head)
    for (
        name,
        weight,
    ) in model.named_parameters():  # scores of several sizes, so that a squashed one is another
        if name.startswith(("score", "classifier")):
            torch.nn.init.normal_(weight, std=1.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told["model_input_names"] = [
        "input_ids",
        "attention_mask",
        *(["token_type_ids"] if model.config.model_type == "bert" else []),
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    settings.save(folder)
    return folder


def opened(server, **given):
    reward = Reward(source=server.url, **given)
    return load_reward(reward, require_reward(reward, "rlhf reward"))


def by_hand(folder):
    return pytest.approx(RewardModel.load(folder).score(PROMPTS, ANSWERS), abs=1e-5)
