"""One forward: whatever shares a row or a batch, each answer has the logits it has alone."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from pipeline.models.loading import head_config
from pipeline.reward import batching, probes
from pipeline.reward.encoding import Encoded

DECODERS = {
    "gpt2": {},
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}


def make(architecture, labels=1, **more):
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 100,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": labels}
    return AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(architecture, **size | ids | more)
    ).eval()


def groups(rng=None):
    """Of answers that share a prompt, that share its beginning, that are one another's beginning, or that are
    alone.
    """
    rng = rng or random.Random(0)

    def ids(count):
        return [rng.randrange(3, 100) for _ in range(count)]

    prompt, other = ids(20), ids(7)
    rows = [
        [prompt + ids(n) for n in (3, 9, 1)],
        [other + ids(5), other[:3] + ids(5)],
        [other, other + ids(4)],
        [ids(12)],
        [ids(1), ids(1)],
    ]
    return [[Encoded(row, 2, False) for row in group] for group in rows]


@torch.no_grad()
def alone(model, found):
    """An independent oracle: one row at a time through the model itself, which then needs no pad token."""
    return torch.cat([model(input_ids=torch.tensor([each.ids])).logits for group in found for each in group])


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
@torch.no_grad()
def test_a_shared_prompt_changes_no_score(architecture, batch_size):
    model = make(architecture, labels=2, **DECODERS[architecture])
    assert probes.supports_prefix_sharing(model, 0, 64)
    expected = alone(model, groups())
    for shared in (True, False):
        torch.testing.assert_close(
            batching.compute_logits(model, groups(), 0, share_prefixes=shared, batch_size=batch_size),
            expected,
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_those_of_rows_apart(shared):
    model = make("gpt2")
    model.zero_grad()
    torch.cat(
        [model(input_ids=torch.tensor([each.ids])).logits for group in groups() for each in group]
    ).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    batching.compute_logits(model, groups(), 0, share_prefixes=shared).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_pad_token_is_not_what_says_where_an_answer_ends():
    model = make("gpt2")
    model.config.pad_token_id = 2  # EOS, which ends every answer
    ending = [[Encoded([*each.ids, 2], 2, False) for each in group] for group in groups()]
    expected = torch.cat(
        [
            model.score(model.transformer(torch.tensor([each.ids])).last_hidden_state[:, -1])
            for g in ending
            for each in g
        ]
    )
    torch.testing.assert_close(
        batching.compute_logits(model, ending, 2, share_prefixes=False), expected, atol=1e-5, rtol=0
    )


def test_models_that_cannot_share_are_found_out():
    window = {"num_key_value_heads": 2, "sliding_window": 16}
    assert not probes.supports_prefix_sharing(make("mistral", **window), 0, 64)
    assert probes.supports_prefix_sharing(make("mistral", **window), 0, 16)
    assert not probes.supports_prefix_sharing(
        make("gpt_neo", attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4), 0, 64
    )
    assert not probes.supports_prefix_sharing(make("bert"), 0, 64)


def test_an_attention_that_takes_no_mask_of_its_own_is_said(caplog):
    size = {
        "n_layer": 1,
        "n_head": 2,
        "hidden_size": 32,
        "vocab_size": 100,
        "pad_token_id": 0,
        "num_labels": 1,
    }
    bloom = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bloom", **size)).eval()
    assert not probes.supports_prefix_sharing(bloom, 0, 64)
    assert (
        "BloomForSequenceClassification does not support a 4-D attention mask, so prefixes are not shared"
        in caplog.text
    )


@torch.no_grad()
def test_an_encoder_reads_its_segments():
    model = make("bert", labels=3, initializer_range=0.2)
    pairs = [[Encoded([5, 6, 7, 8], 2, False)], [Encoded([5, 6, 9], 1, False), Encoded([4], 1, False)]]
    types = [[0, 0, 1, 1], [0, 1, 1], [0]]
    rows = [each.ids for group in pairs for each in group]
    expected = torch.cat(
        [
            model(torch.tensor([i]), token_type_ids=torch.tensor([t])).logits
            for i, t in zip(rows, types, strict=True)
        ]
    )
    torch.testing.assert_close(
        batching.compute_logits(model, pairs, 0, share_prefixes=False, use_token_types=True),
        expected,
        atol=1e-5,
        rtol=0,
    )
    plain = torch.cat([model(torch.tensor([ids])).logits for ids in rows])
    torch.testing.assert_close(
        batching.compute_logits(model, pairs, 0, share_prefixes=False), plain, atol=1e-5, rtol=0
    )
    assert (expected - plain).abs().max() > 1e-3


def test_a_shared_row_is_no_wider_than_it_pays():
    beginning = list(range(3, 13))
    unrelated = [[Encoded(beginning + [13 + n] * 220, 10, False) for n in range(64)]]
    assert max(row.width for row in batching._prefix_rows(unrelated, 64, hidden_size=64)) == 230
    related = [[Encoded([5] * 500 + [13 + n] * 100, 500, False) for n in range(64)]]
    rows = list(batching._prefix_rows(related, 64, hidden_size=768))
    assert [row.width for row in rows] == [4000, 500 + 29 * 100]  # no more than MAX_WIDTH
    assert [response for row in rows for response in row.responses] == list(range(64))
    assert [row.width for row in batching._prefix_rows(related, 4, hidden_size=64)] == [900] * 16


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_eager_attention_adds_its_mask(precision):
    model = make("gpt2", attn_implementation="eager", initializer_range=0.2).to(precision)
    assert probes.supports_prefix_sharing(model, 0, 64)
    if precision == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(
                batching.compute_logits(model, groups(), 0, share_prefixes=True),
                alone(model, groups()),
                atol=1e-4,
                rtol=0,
            )


def test_batches_keep_to_their_limits():
    rows = [
        batching.SharedPrefixRow([], [[7] * width], [number])
        for number, width in enumerate([3000, 40, 50, 60, 900])
    ]
    batches = list(batching._batches(rows, 3, 4096, max_padding=100))
    assert sorted(response for batch in batches for row in batch for response in row.responses) == list(
        range(5)
    )
    assert [[row.width for row in batch] for batch in batches] == [[40, 50, 60], [900], [3000]]
    assert [[row.width for row in batch] for batch in batching._batches(rows, 2, 4096, 100)] == [
        [40, 50],
        [60],
        [900],
        [3000],
    ]
    assert [[row.width for row in batch] for batch in batching._batches(rows, 9, 4096, 20)] == [
        [40, 50],
        [60],
        [900],
        [3000],
    ]
    assert [[row.width for row in batch] for batch in batching._batches(rows, 9, 4096, 10**6)] == [
        [40, 50, 60, 900],
        [3000],
    ]
    assert [[row.width for row in batch] for batch in batching._batches(rows, 9, 15000, 10**6)] == [
        [40, 50, 60, 900, 3000],
    ]


def test_the_head_is_found_under_an_adapter():
    from peft import LoraConfig, TaskType, get_peft_model

    model = make("gpt2")
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=2))
    with torch.no_grad():
        torch.testing.assert_close(
            batching.compute_logits(adapted, groups(), 0, share_prefixes=True),
            alone(adapted, groups()),
            atol=1e-5,
            rtol=0,
        )
    assert head_config(["a", "b"], "regression")["id2label"] == {0: "a", 1: "b"}


TOKEN_DECODERS = {"gpt2": {}, "llama": {"num_key_value_heads": 2}, "gpt_neox": {}}


def make_token_classifier(architecture, **more):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 2}
    config = AutoConfig.for_model(architecture, **size | ids | more)
    return AutoModelForTokenClassification.from_config(config).eval()


@pytest.mark.parametrize("architecture", [*TOKEN_DECODERS, "bert"])
def test_several_outputs_of_a_response_are_those_of_it_alone(architecture):
    model = make_token_classifier(architecture, **TOKEN_DECODERS.get(architecture, {}))
    assert probes.is_decoder(model) == (architecture in TOKEN_DECODERS)
    rng = random.Random(0)
    # Some steps end in the prefix that two responses share, some responses have none.
    found = [
        [
            row._replace(
                steps=sorted(rng.sample(range(-1, len(row.ids)), rng.randrange(min(4, len(row.ids)))))
            )
            for row in group
        ]
        for group in groups()
    ]
    with torch.no_grad():
        expected = torch.cat(
            [
                model(input_ids=torch.tensor([row.ids])).logits[0][row.positions]
                for group in found
                for row in group
            ]
        )
        for shares in {False, architecture in TOKEN_DECODERS}:
            for size in (1, 2, 64):
                computed = batching.compute_logits(model, found, 0, share_prefixes=shares, batch_size=size)
                torch.testing.assert_close(computed, expected, atol=1e-5, rtol=0)
    assert len(expected) == sum(len(row.positions) for group in found for row in group) > 10
    assert probes.supports_prefix_sharing(model, 0, 64) == (architecture in TOKEN_DECODERS)
