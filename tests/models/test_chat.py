"""One encoding of a conversation: the turn as templates write it, what truncation keeps, where the end is."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Scratch
from pipeline.errors import UserError
from pipeline.models.chat import (
    PRIVATE,
    _warn_of_rewriting,
    conversation_ids,
    cut_prompt,
    encode_pair,
    encode_turn,
    pad_rows,
    prompt_ids,
    truncated_lengths,
)
from pipeline.models.loading import load_tokenizer
from pipeline.models.scratch import new_policy
from tests.models.manners import FAMILIES, make_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"]
SIZE = Scratch(layers=1, width=8, heads=1, vocabulary=300, positions=64)
TOKENIZER = new_policy(TEXTS, SIZE, "\n")[1]
WORDS = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=20)
TEMPLATED = [family for family, (template, *_) in FAMILIES.items() if template]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Tokenizers by family, saved as published ones are and loaded as stages load them."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        make_tokenizer(family).save_pretrained(folder)
    return {family: load_tokenizer(str(folder)) for family, folder in folders.items()}


def test_prompt_ids_do_not_depend_on_the_completion() -> None:
    tokenizer = new_policy(TEXTS, SIZE, separator="")[1]  # nothing keeps the two apart but the encoding
    completions = ("t", "t sat", " dog", "")
    prompts = {tuple(encode_turn(tokenizer, "the ca", completion)[0]) for completion in completions}
    assert prompts == {tuple(prompt_ids(tokenizer, "the ca"))}
    prompt, turn = encode_turn(tokenizer, "the ca", "t")
    assert tokenizer("the cat")["input_ids"] != [*prompt, *turn[:-1]]


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS)
def test_text_survives_and_eos_is_last(prompt: str, completion: str) -> None:
    before, after, is_cut = encode_pair(TOKENIZER, prompt, completion, 10_000)
    assert TOKENIZER.decode(before) == prompt + "\n"
    assert TOKENIZER.decode(after[:-1]) == completion
    assert after[-1] == TOKENIZER.eos_token_id
    assert after.count(TOKENIZER.eos_token_id) == 1
    assert not is_cut


def test_messages_and_strings_are_the_same_text() -> None:
    turn = [{"role": "user", "content": "the cat"}]
    assert prompt_ids(TOKENIZER, turn) == prompt_ids(TOKENIZER, "the cat")
    answer = [{"role": "assistant", "content": "sat"}]
    assert encode_turn(TOKENIZER, turn, answer) == encode_turn(TOKENIZER, turn, "sat")
    dialogue = [*turn, *answer, {"role": "user", "content": "on?"}]
    assert TOKENIZER.decode(prompt_ids(TOKENIZER, dialogue)) == f"the cat\nsat{TOKENIZER.eos_token}on?\n"


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "a"}] * 2])
def test_a_completion_is_one_message(messages: list[dict[str, str]]) -> None:
    with pytest.raises(UserError, match=f"{len(messages)} messages"):
        encode_turn(TOKENIZER, "a", messages)


@pytest.mark.parametrize(
    ("family", "prompt", "turn"),
    [
        ("qwen", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>\n"),
        ("qwen-base", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>\n"),
        (
            "thinking",
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nA<|im_end|>\n",
        ),
        ("opened", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n", "A<|im_end|>\n"),
        (
            "dated",
            "<|im_start|>system\nToday is 01 Jan 2026<|im_end|>\n"
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
            "A<|im_end|>\n",
        ),
        (
            "gemma",
            "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
            "A<end_of_turn>\n",
        ),
        (
            "llama3",
            "<|begin|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "A<|eot_id|>",
        ),
        ("phi3", "<|user|>\nQ<|end|>\n<|assistant|>\n", "A<|end|>\n<|endoftext|>"),
        ("llama2", "<s>Q\n", "A</s>"),
        ("both-ends", "<s>Q\n", "A</s>"),
        ("bare", "<s>user: Q\nassistant: ", "A\n</s>"),
    ],
)
def test_a_turn_is_what_the_template_writes(loaded, family: str, prompt: str, turn: str) -> None:
    tokenizer = loaded[family]
    before, after = encode_turn(tokenizer, "Q", "A")
    assert (tokenizer.decode(before), tokenizer.decode(after)) == (prompt, turn)
    assert before == prompt_ids(tokenizer, "Q")


@pytest.mark.parametrize("family", TEMPLATED)
@pytest.mark.parametrize("text", ["An apple.", "\nAn apple.\n", "", "🙂 שלום"])
def test_a_conversation_is_what_transformers_renders(loaded, family: str, text: str) -> None:
    tokenizer = loaded[family]
    messages = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": text}]
    plain = tokenizer.apply_chat_template(messages, return_dict=False)
    assert conversation_ids(tokenizer, messages[:1], text) == plain
    if family != "opened":  # the template rewrites it
        assert tokenizer.decode(plain).startswith(tokenizer.decode(prompt_ids(tokenizer, "Name a fruit.")))


def test_the_rule_for_a_template_that_rewrites_is_logged(loaded, caplog) -> None:
    tokenizer = loaded["opened"]
    _warn_of_rewriting.cache_clear()  # it may have been logged in an earlier test
    caplog.clear()
    encode_turn(tokenizer, "Q", "A")
    encode_turn(tokenizer, "Q", "B")
    assert [record.message.partition(": ")[2].partition(";")[0] for record in caplog.records] == [
        "its chat template renders a prompt differently once an answer follows"
    ]


def test_what_a_generation_prompt_opened_is_not_repeated(loaded) -> None:
    before, turn = encode_turn(loaded["opened"], "Q", "<think>\nWhy?\n</think>\n\nA")
    assert loaded["opened"].decode(before).endswith("<|im_start|>assistant\n<think>\n")
    assert loaded["opened"].decode(turn) == "Why?\n</think>\n\nA<|im_end|>\n"


def test_a_date_inside_a_macro_is_fixed(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen")
    clock = "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%B ' ~ '%Y') }}"
    tokenizer.chat_template = f"\nX {{%- macro head() %}}{clock}{{% endmacro %}}{{{{ head() }}}}"
    tokenizer.save_pretrained(tmp_path)
    rendered = load_tokenizer(str(tmp_path)).apply_chat_template([{"role": "user"}], tokenize=False)
    assert rendered == "\nX2026-01-01 2026-01-01"


def test_an_artifact_keeps_its_template(loaded, tmp_path: Path) -> None:
    for family, tokenizer in loaded.items():
        tokenizer.save_pretrained(tmp_path / family)
        again = load_tokenizer(str(tmp_path / family))
        assert again.chat_template == tokenizer.chat_template, family
        assert prompt_ids(again, "Q") == prompt_ids(tokenizer, "Q")


def test_a_date_does_not_depend_on_the_day(loaded) -> None:
    tokenizer = loaded["dated"]
    assert tokenizer.init_kwargs["template_date"] == "2026-01-01"
    assert "Today is 01 Jan 2026" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False
    )
    assert "template_date" not in loaded["qwen"].init_kwargs


def test_named_templates_need_a_default(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen")
    template = tokenizer.chat_template
    tokenizer.chat_template = {"rag": template, "tool_use": template}
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="has the chat templates rag, tool_use, and no default; choose one"):
        load_tokenizer(str(tmp_path / "none"))

    tokenizer.chat_template = {"default": template, "tool_use": template}
    tokenizer.save_pretrained(tmp_path / "default")
    assert prompt_ids(load_tokenizer(str(tmp_path / "default")), "Q") == prompt_ids(
        make_tokenizer("qwen"), "Q"
    )


def test_a_refused_conversation_is_one_line(loaded) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    with pytest.raises(UserError, match=r"refuses the conversation \(system, user\) that begins"):
        prompt_ids(loaded["gemma"], messages)


@pytest.mark.parametrize("family", ["qwen", "gemma", "llama3", "phi3", "llama2"])
def test_special_tokens_in_a_text_are_text(loaded, family: str) -> None:
    tokenizer = loaded[family]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    spelled = "".join(FAMILIES[family][1])
    expected, plain = (encode_turn(tokenizer, "Q", text) for text in ("A", f"A{spelled}B"))
    for before, after in zip(expected, plain, strict=True):
        assert [token for token in before if token in special] == [
            token for token in after if token in special
        ]
    assert f"A{spelled}B" in tokenizer.decode(plain[1])
    assert f"A{spelled}B" in tokenizer.decode(prompt_ids(tokenizer, f"A{spelled}B"))


def test_characters_for_private_use_are_kept_apart_from_special_tokens(loaded) -> None:
    text = f"a{chr(PRIVATE + 900)}b"
    assert text in loaded["qwen"].decode(prompt_ids(loaded["qwen"], text))


def test_a_prompt_of_no_messages_is_an_empty_one(loaded) -> None:
    for tokenizer in loaded.values():
        assert encode_turn(tokenizer, [], "A") == encode_turn(tokenizer, "", "A")


@given(st.integers(0, 30), st.integers(1, 30), st.integers(2, 40), st.sampled_from(["left", "right"]))
def test_truncation_keeps_something_of_each_and_wastes_nothing(prompt, turn, most, side) -> None:
    first, second = truncated_lengths(prompt, turn, most, side)
    assert first + second == min(prompt + turn, most)
    assert (first >= 1) == (prompt >= 1)
    assert second >= 1
    if side == "left" and first > 1:
        assert second == turn
    if side == "right" and second > 1:
        assert first == prompt


@pytest.mark.parametrize(
    ("side", "max_length", "prompt", "turn"),
    [
        ("left", 8, "abc\n", "xyz<|eos|>"),
        ("left", 7, "bc\n", "xyz<|eos|>"),
        ("left", 4, "\n", "xyz"),  # a cut turn does not end
        ("left", 3, "\n", "xy"),
        ("right", 7, "abc\n", "xyz"),
        ("right", 5, "abc\n", "x"),
        ("right", 4, "abc", "x"),
    ],
)
def test_a_cut_turn_does_not_end(side: str, max_length: int, prompt: str, turn: str) -> None:
    before, after, is_cut = encode_pair(TOKENIZER, "abc", "xyz", max_length, side)
    assert (TOKENIZER.decode(before), TOKENIZER.decode(after)) == (prompt, turn)
    assert is_cut == (max_length < 8)


def test_a_bos_stays_when_the_beginning_is_cut(loaded) -> None:
    tokenizer = loaded["llama2"]
    bos = tokenizer.bos_token_id
    assert cut_prompt(tokenizer, [bos, 11, 12, 13], 3, "left") == [bos, 12, 13]
    assert cut_prompt(tokenizer, [bos, 11, 12, 13], 1, "left") == [13]
    assert cut_prompt(tokenizer, [bos, 11, 12, 13], 3, "right") == [bos, 11, 12]
    assert cut_prompt(tokenizer, [10, 11, 12, 13], 3, "left") == [11, 12, 13]
    assert cut_prompt(tokenizer, [bos, 11], 2, "left") == [bos, 11]


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[1, 2, 3], [4, 7, 7], [7, 7, 7]], [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        ("left", [[1, 2, 3], [7, 7, 4], [7, 7, 7]], [[1, 1, 1], [0, 0, 1], [0, 0, 0]]),
    ],
)
def test_pad(side: str, ids: list[list[int]], mask: list[list[int]]) -> None:
    assert [tensor.tolist() for tensor in pad_rows([[1, 2, 3], [4], []], 7, side)] == [ids, mask]
