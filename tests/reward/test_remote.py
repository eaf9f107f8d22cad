"""Reward models by URL: what a server is sent, and which of its replies are scores."""

import shutil
import socket

import pytest

from pipeline import RewardModel, config
from pipeline.config import Reward
from pipeline.errors import UserError
from pipeline.reward.encoding import Encoding
from pipeline.reward.functions import require_reward, reward_from_model
from tests.reward.stand_in import ANSWERS, PROMPTS, by_hand, opened, reward_folder


def test_vllm_is_given_the_ids_and_no_score_differs(serve, decoder):
    server = serve("vllm", decoder)
    rm = opened(server, reads=str(decoder))
    assert server.asked == [
        {"model": "rm", "input": [rm.encode("Hello.", "Hello.").ids], "use_activation": False}
    ]
    assert rm.score(PROMPTS, ANSWERS) == by_hand(decoder)
    assert server.asked[1]["input"][3][-1] == rm.tokenizer.eos_token_id
    assert len(server.asked[1]["input"][3]) == 60
    assert rm.rank("Name a fruit.", ANSWERS) == RewardModel.load(decoder).rank("Name a fruit.", ANSWERS)
    plain = reward_from_model(RewardModel.load(decoder), length_penalty=1.0)
    ours = reward_from_model(rm, length_penalty=1.0)
    assert ours[1:3] == plain[1:3] == (0.5, 1.0)
    given = {"prompts": PROMPTS, "completions": ANSWERS}
    assert ours.score(**given) == pytest.approx(plain.score(**given), abs=1e-5)
    assert rm.score(PROMPTS, ANSWERS, normalize=True) == pytest.approx(
        [value / 2 - 0.25 for value in rm.score(PROMPTS, ANSWERS)]
    )
    assert rm.score([], []) == []


@pytest.mark.parametrize("output", ["logit", "log_odds", "probability"])
def test_of_several_labels_raw_logits_come_back(serve, tiny_gpt2, tmp_path, output):
    folder = reward_folder(
        tiny_gpt2,
        tmp_path / "rm",
        ("no", "yes", "maybe"),
        output=output,
        logit=1,
        encoding=Encoding(max_length=60),
    )
    assert opened(serve("vllm", folder)).score(PROMPTS, ANSWERS) == by_hand(folder)
    texts = Encoding(form="concatenation", max_length=60)
    folder = reward_folder(
        tiny_gpt2, tmp_path / "texts", ("no", "yes", "maybe"), output=output, logit=1, encoding=texts
    )
    assert opened(serve("tei", folder)).score(PROMPTS, ANSWERS) == by_hand(folder)


def test_tei_is_given_texts_in_batches_that_it_takes(serve, tiny_encoders, tmp_path, caplog):
    folder = reward_folder(
        tiny_encoders["bert"], tmp_path / "rm", encoding=Encoding(form="pair", eos=False, max_length=100)
    )
    server = serve("tei", folder)
    rm = opened(server)
    assert rm.score(PROMPTS[:3], ANSWERS[:3]) == pytest.approx(
        RewardModel.load(folder).score(PROMPTS[:3], ANSWERS[:3]), abs=1e-5
    )
    assert [len(body["inputs"]) for body in server.asked] == [1, 2, 1]
    assert server.asked[1]["inputs"] == [[PROMPTS[0], ANSWERS[0]], ["user: Hi.\nuser: Who?", ANSWERS[1]]]
    assert "differently" not in caplog.text
    assert rm.score(PROMPTS, ANSWERS) == by_hand(folder)  # a cut between letters gives a text of the same ids
    assert "differently" not in caplog.text
    rm.score(["é" * 80], ["é"])  # 95 bytes of the prompt stay, half a letter among them
    assert (
        f"{server.url}: TEI encodes rows that were cut at max_length=100, or that spell a special token, diff"
        in caplog.text
    )
    server.faults = [lambda found: [[{"score": 1.0, "label": "LABEL_0"}]]]
    with pytest.raises(
        UserError,
        match=rf"^{server.url}/predict: returned 200, .*LABEL_0.*; expected 1 × 1 finite logits \(reward\)",
    ):
        rm.score(["Hi."], ["Yes."])


def test_what_an_engine_cannot_be_given_is_told(serve, decoder, tiny_encoders, tmp_path):
    with pytest.raises(
        UserError,
        match=(
            "reads a chat as token ids, but text-embeddings-inference accepts only text; serve it with vLLM"
        ),
    ):
        opened(serve("tei", decoder))
    pair = Encoding(form="pair", eos=False, max_length=100)
    typed = reward_folder(tiny_encoders["bert"], tmp_path / "typed", encoding=pair)
    with pytest.raises(
        UserError,
        match="reads token types, which vLLM does not accept; serve it with text-embeddings-inference",
    ):
        opened(serve("vllm", typed))
    plain = reward_folder(tiny_encoders["distilbert"], tmp_path / "plain", encoding=pair)
    assert opened(serve("vllm", plain)).score(PROMPTS, ANSWERS) == by_hand(plain)
    untyped = reward_folder(tiny_encoders["roberta"], tmp_path / "untyped", encoding=pair)
    with pytest.raises(
        UserError,
        match="reads pairs without token types, but text-embeddings-inference adds them; serve it with vLLM",
    ):
        opened(serve("tei", untyped))


def test_it_is_asked_again_and_waits_longer_each_time_or_as_told(serve, decoder):
    server = serve("vllm", decoder)
    rm = opened(server)
    expected = RewardModel.load(decoder).score(PROMPTS, ANSWERS)
    server.faults = [
        "drop",
        (503, "busy"),
        (429, {"error": "Model is overloaded"}, 7),
        (500, "oops"),
        (502, "<html>"),
    ]
    assert rm.score(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert server.slept == [2, 7, 8, 16]  # after the first loss at once
    server.faults, server.asked = [(503, "down")] * 9, []
    with pytest.raises(
        UserError,
        match=(
            r"/classify: returned 503, 'down'; expected 4 × 1 finite logits \(reward\); start one "
            r"with: vllm"
        ),
    ):
        rm.score(PROMPTS, ANSWERS)
    assert len(server.asked) == 8
    assert server.slept[4:] == [2, 4, 8, 16, 32, 60]  # another 60 would be over the 180 of `timeout`
    server.faults, server.asked = [(503, "down", 10**6)], []
    with pytest.raises(UserError, match="returned 503, 'down'"):
        rm.score(PROMPTS, ANSWERS)
    assert len(server.asked) == 1
    assert len(server.slept) == 10


def test_what_does_not_answer_is_told_at_once(serve, decoder):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(
        UserError,
        match=(
            rf"^{url}/info: no response: .*refused.*; start one with: vllm serve MODEL --runner "
            rf"pooling; or text-emb"
        ),
    ):
        require_reward(Reward(source=url), "rlhf reward")
    server = serve("vllm", decoder)
    server.faults = ["hang"]
    with pytest.raises(
        UserError, match=r"/classify: no response: timed out; .*raise 'timeout' \(now 0.5 s\)"
    ):
        opened(server, timeout=0.5)


@pytest.mark.parametrize(
    "url", ["http://", "http://me:word@gpu7:8000", "https://gpu7/x?key=abc", "http://gpu7:8000/#a"]
)
def test_a_url_tells_where_alone_and_keeps_no_secret(url):
    with pytest.raises(ValueError, match="a key goes into the environment as REWARD_API_KEY"):
        Reward(source=url)


def test_a_slash_at_its_end_makes_no_other_url():
    assert Reward(source="http://gpu7:8000/").source == "http://gpu7:8000"


WRONG = {  # what comes back for four rows of one logit
    "no JSON": (200, "<html>hello</html>"),
    "no route": (404, {"detail": "Not Found"}),
    "a text": lambda found: "fine",
    "nothing": lambda found: {},
    "another shape": lambda found: {"data": [1, 2, 3, 4]},
    "too few": lambda found: found | {"data": found["data"][1:]},
    "two numbers": lambda found: found | {"data": [each | {"probs": [0.1, 0.9]} for each in found["data"]]},
    "NaN": lambda found: found | {"data": [each | {"probs": [float("nan")]} for each in found["data"]]},
    "an infinite one": lambda found: (
        found | {"data": [each | {"probs": [float("inf")]} for each in found["data"]]}
    ),
    "over fp32": lambda found: found | {"data": [each | {"probs": [1e39]} for each in found["data"]]},
    "a number as text": lambda found: found | {"data": [each | {"probs": ["1"]} for each in found["data"]]},
    "a truth value": lambda found: found | {"data": [each | {"probs": [True]} for each in found["data"]]},
    "an index twice": lambda found: found | {"data": [found["data"][0], *found["data"][:3]]},
    "an index too high": lambda found: (
        found | {"data": [each | {"index": each["index"] + 1} for each in found["data"]]}
    ),
    "an index below 0": lambda found: (
        found | {"data": [each | {"index": each["index"] - 4} for each in found["data"]]}
    ),
    "an index as text": lambda found: (
        found | {"data": [each | {"index": str(each["index"])} for each in found["data"]]}
    ),
    "one row too many": lambda found: found | {"data": [*found["data"], {"index": 4, "probs": [0.0]}]},
    "too deep": (200, b"[" * 10**5),
    "a number of 5,000 digits": (200, b'{"data": ' + b"9" * 5000 + b"}"),
    "no number": lambda found: found | {"data": [each | {"probs": [None]} for each in found["data"]]},
    "not UTF-8": (200, b'{"data": "\xff"}'),
}


def test_a_wrong_answer_is_told_in_one_line(serve, decoder):
    server = serve("vllm", decoder)
    rm = opened(server)
    for name, fault in WRONG.items():
        server.faults = [fault]
        with pytest.raises(
            UserError,
            match=rf"^{server.url}/classify: returned (200|404), '.*'; expected 4 × 1 finite logits",
        ) as told:
            rm.score(PROMPTS, ANSWERS)
        assert "\n" not in str(told.value), name
    assert server.slept == []
    server.faults = [(401, {"error": "Unauthorized"})]
    with pytest.raises(
        UserError, match=r"returned 401, .*; put its key into the environment as REWARD_API_KEY"
    ):
        rm.score(PROMPTS, ANSWERS)
    assert server.key is None


def test_a_label_twice_or_of_another_name_is_no_answer(serve, tiny_gpt2, tmp_path):
    texts = Encoding(form="concatenation", max_length=60)
    folder = reward_folder(tiny_gpt2, tmp_path / "rm", ("no", "yes"), logit=1, encoding=texts)
    server = serve("tei", folder)
    rm = opened(server)
    for labels in (("yes", "yes"), ("no", "yes", "yes"), ("no", "Yes"), ("no", "yes", "maybe")):
        server.faults = [lambda _, labels=labels: [[{"score": 0.5, "label": name} for name in labels]]]
        with pytest.raises(UserError, match=r"/predict: returned 200, .*; expected 1 × 2 finite logits"):
            rm.score(["Hi."], ["Yes."])


def test_what_a_server_tells_of_itself_is_checked(serve, decoder):
    server = serve("tei", decoder)
    info = server.says["/info"]
    for change in (
        {"model_id": 5},
        {"model_id": ""},
        {"model_id": "m" * 2000},
        {"model_sha": ["f00"]},
        {"max_input_length": "126"},
        {"max_input_length": True},
        {"max_client_batch_size": -1},
        {"model_type": [1]},
    ):
        server.says = {"/info": info | change}
        with pytest.raises(UserError, match="neither text-embeddings-inference nor vLLM: /info returned 200"):
            opened(server)


def test_what_is_too_large_is_halved(serve, decoder):
    server = serve("vllm", decoder)
    rm = opened(server)
    server.faults = [
        (413, "length limit exceeded"),
        (422, {"error": "batch size 2", "error_type": "Validation"}),
    ]
    assert rm.score(PROMPTS, ANSWERS) == by_hand(decoder)
    assert [len(body["input"]) for body in server.asked] == [1, 4, 2, 1, 1, 2]
    assert len(rm.score(PROMPTS, ANSWERS, batch_size=3)) == 4
    assert [len(body["input"]) for body in server.asked[6:]] == [3, 1]
    server.faults = [(413, "length limit exceeded")]
    with pytest.raises(UserError, match="returned 413, 'length limit exceeded'"):
        rm.score_response("Hi.", "Yes.")


def test_who_answers_is_told_apart(serve, decoder, tiny_gpt2, tmp_path):
    server = serve("vllm", decoder)
    server.says = {"/info": "<html>", "/v1/models": {"data": []}}
    with pytest.raises(
        UserError,
        match=(
            r"neither text-embeddings-inference nor vLLM: /info returned 200, .*html.*, /v1/models "
            r"returned 200"
        ),
    ):
        opened(server)
    server.says = {"/info": {"model_id": "e5", "model_type": {"embedding": {"pooling": "cls"}}}}
    with pytest.raises(UserError, match="e5 is of type embedding; expected a sequence classifier"):
        opened(server)
    with pytest.raises(
        UserError,
        match=(
            "serves /data/rm, which is not a folder here; name the folder or hub id of the served "
            "model: reads="
        ),
    ):
        opened(serve("vllm", decoder, name="/data/rm"))
    server = serve("vllm", decoder)
    server.says["/v1/models"]["data"][0]["max_model_len"] = 32
    with pytest.raises(
        UserError, match=r"accepts 32 tokens, but .*decoder reads up to 60; serve it with as many"
    ):
        opened(server)
    other = reward_folder(
        tiny_gpt2, tmp_path / "other", ("no", "yes"), logit=1, encoding=Encoding(max_length=60)
    )
    with pytest.raises(UserError, match=r"expected 1 × 2 finite logits \(no, yes\); start"):
        opened(serve("vllm", decoder), reads=str(other))
    adapter = tmp_path / "adapter"
    shutil.copytree(decoder, adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="is an adapter alone, which vllm does not serve"):
        opened(serve("vllm", decoder), reads=str(adapter))


def test_its_identity_is_what_is_read_and_what_the_server_tells(serve, decoder):
    """Not where it runs: the same model behind another port is the same input."""
    one, same = serve("vllm", decoder), serve("vllm", decoder)
    found = [
        require_reward(Reward(source=each.url, reads=str(decoder)), "rlhf reward") for each in (one, same)
    ]
    assert found[0].identity == found[1].identity
    assert found[0].manifest["served"]["url"] == one.url
    same.says["/v1/models"]["data"][0]["id"] = "rm-2"
    same.classify = lambda body: one.classify(body | {"model": "rm"})
    assert require_reward(Reward(source=same.url), "rlhf reward").identity != found[0].identity
    assert found[0].manifest["reads"] == require_reward(Reward(source=str(decoder)), "rlhf reward").identity


@pytest.mark.parametrize("key", [{"reads": "runs/demo/reward"}, {"timeout": 5}])
def test_keys_of_a_server_need_a_url(key):
    with pytest.raises(
        UserError,
        match=(
            "is only read with the URL of a server as the source, but that is 'runs/demo/reward'; remove it"
        ),
    ):
        config.validate(Reward, {"source": "runs/demo/reward"} | key, "ppo.yaml")
    assert config.validate(Reward, {"source": "runs/demo/reward", "reads": None}, "ppo.yaml").is_loaded
    assert not config.validate(Reward, {"source": "https://h:8000"} | key, "ppo.yaml").is_loaded


def test_steps_from_vllm_are_those_of_the_model(serve, tiny_gpt2, tmp_path):
    known = {"objective": "stepwise", "logit": 1, "output": "probability", "aggregate": "mean"}
    how = Encoding(max_length=60, step_separator=" ")
    folder = reward_folder(tiny_gpt2, tmp_path / "steps", ("wrong", "right"), encoding=how, **known)
    server = serve("vllm", folder)
    remote, local = opened(server), RewardModel.load(folder)
    expected = local.score_steps(PROMPTS, ANSWERS)
    found = remote.score_steps(PROMPTS, ANSWERS)
    assert [len(row) for row in found] == [1, 2, 4, 81]
    assert found[3][-1] == 0.5  # it was cut
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert len({round(p, 3) for row in expected for p in row}) > 10
    assert remote.score(PROMPTS, ANSWERS) == pytest.approx(local.score(PROMPTS, ANSWERS), abs=1e-5)
    assert reward_from_model(remote).score(PROMPTS, ANSWERS)[0].ends == [6]

    def drop_token(answer):
        answer["data"][0]["data"].pop()
        return answer

    server.faults = [drop_token]
    with pytest.raises(UserError, match=r"/pooling: .*; expected \d+ × 2 finite logits \(wrong, right\)"):
        remote.score_steps(["Hello."], ["Hello."])


def test_steps_are_refused_by_tei(serve, tiny_encoders, tmp_path):
    known = {"objective": "stepwise", "logit": 1, "output": "probability"}
    how = Encoding(form="concatenation", eos=False, max_length=60)
    folder = reward_folder(
        tiny_encoders["bert"], tmp_path / "steps", ("wrong", "right"), encoding=how, **known
    )
    with pytest.raises(
        UserError, match="reads steps, but text-embeddings-inference serves no token classifier"
    ):
        opened(serve("tei", folder))
