"""The SFT stage's keys."""

from typing import ClassVar

from pydantic import model_validator

from pipeline.config.base import ModelStage, Overlong, PolicyStage, StageInput


class SFTStage(ModelStage, PolicyStage):
    """Fine-tunes the policy on demonstrations, with the loss on the response alone."""

    stage: ClassVar[str] = "sft"
    inputs: ClassVar = {"records": StageInput("records", "prepare"), "model": StageInput("model")}

    separator: str = "\n"
    """Text that ends a user turn if the tokenizer has no chat template."""

    overlong: Overlong = "truncate_left"
    """Treatment of rows over `max_length`: cut the prompt's start, cut the response's end, or drop them."""

    @model_validator(mode="after")
    def check_architecture(self) -> "SFTStage":
        if self.scratch is not None and self.scratch.architecture != "gpt2":
            raise ValueError(
                f"scratch.architecture={self.scratch.architecture!r}: a policy from scratch is a GPT-2; "
                "expected 'gpt2'"
            )
        if self.scratch is not None and self.lora is not None:
            raise ValueError(
                "model: scratch is trained in full, because an adapter's base would exist nowhere else; "
                "remove the 'lora:' section"
            )
        return self
