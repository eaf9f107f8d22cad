"""Whatever the architecture: a score is that of the plain row, or one line says why there is none."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from pipeline.errors import UserError
from pipeline.reward.batching import compute_logits
from pipeline.reward.encoding import Encoded
from pipeline.reward.probes import accepts_token_types, supports_padding, supports_prefix_sharing
from tests.models.architectures import make_model

TINY_XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
BOTTLENECK = {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}
SPARSE = {
    "attention_type": "block_sparse",
    "block_size": 4,
    "num_random_blocks": 1,
    "max_position_embeddings": 96,
}
ENCODER_DECODER = {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 64}

# Options of each architecture, and whether rows of different lengths may share a batch.
CLASSIFIERS: dict[str, tuple[dict[str, Any], bool]] = {
    "bert": ({}, True),
    "roberta": ({}, True),
    "distilbert": ({"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}, True),
    "bart": (ENCODER_DECODER, True),
    "gpt2": ({}, True),
    "convbert": ({"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 2}, False),
    "mobilebert": (BOTTLENECK, False),
    "fnet": ({}, False),
    "xlnet": (TINY_XLNET, False),
    "yoso": ({}, False),
    "big_bird": (SPARSE, False),
}
LENGTHS = (4, 40, 9, 9, 40, 5)


def make(architecture: str, **options: Any) -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
    return make_model(AutoModelForSequenceClassification, architecture, **ids | options)


def rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 160, (length - 1,), generator=generator).tolist() for length in LENGTHS]
    return [Encoded([*ids, 2], len(ids) // 2, False) for ids in drawn]


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_score_is_that_of_the_plain_row(architecture: str) -> None:
    options, padding = CLASSIFIERS[architecture]
    model = make(architecture, **options)
    assert supports_padding(model, 64) is padding
    types = {"token_type_ids"} if architecture in ("bert", "big_bird", "xlnet") else set()
    with torch.no_grad():
        expected = []
        for row in rows():
            inputs = {"input_ids": torch.tensor([row.ids])}
            if types:
                inputs["token_type_ids"] = torch.tensor(
                    [[int(i >= row.response_start) for i in range(len(row.ids))]]
                )
            plain = make(architecture, **options)  # a new one, since a BigBird depends on what it has read
            expected.append(plain(**inputs).logits)
        found = compute_logits(
            model,
            [[row] for row in rows()],
            0,
            share_prefixes=False,
            padding=padding,
            use_token_types=bool(types),
        )
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_padding_that_leaves_one_row_as_it_is_is_found_by_others(seed: int) -> None:
    """Of these random weights, some give one short row the same score with padding and without."""
    model = make("mobilebert", **BOTTLENECK)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.4)
    assert not supports_padding(model, 64)


def test_a_base_that_cannot_score_a_row_is_refused() -> None:
    model = make("nystromformer", segment_means_seq_len=64, num_landmarks=8)
    with pytest.raises(UserError, match="base: NystromformerForSequenceClassification cannot score rows of"):
        supports_padding(model, 64, "base")


def test_scores_that_depend_on_chance_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = make("bert"), torch.Generator().manual_seed(0)
    model.classifier.register_forward_hook(
        lambda *arguments: arguments[2] + torch.randn(1, generator=generator)
    )
    with pytest.raises(UserError, match="depend on the rows beside them, or on chance; use another base"):
        supports_padding(model, 64, "base")


def test_short_rows_of_a_bigbird_share_batches() -> None:
    """Up to 28 tokens, its sparse attention is full."""
    model = make("big_bird", **SPARSE)
    assert supports_padding(model, 28)
    assert not supports_padding(model, 29)


def test_token_types_are_for_models_that_have_two() -> None:
    assert accepts_token_types(make("bert"))
    assert not accepts_token_types(make("roberta", type_vocab_size=1))


@torch.no_grad()
def test_rows_that_share_a_prefix_have_their_token_types() -> None:
    """GPT-2 takes token types, as additions of the embeddings of tokens 0 and 1."""
    model = make("gpt2")
    assert supports_prefix_sharing(model, 0, 64)
    prompt = list(range(20, 40))
    ends, starts = ([50, 51, 2], [60, 2], [50, 70, 71, 2]), (20, 18, 23)
    group = [Encoded(prompt + end, start, False) for end, start in zip(ends, starts, strict=True)]
    expected = torch.cat(
        [
            model(
                input_ids=torch.tensor([row.ids]),
                token_type_ids=torch.tensor([[int(i >= row.response_start) for i in range(len(row.ids))]]),
            ).logits
            for row in group
        ]
    )
    for shared in (True, False):
        found = compute_logits(model, [group], 0, share_prefixes=shared, use_token_types=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
