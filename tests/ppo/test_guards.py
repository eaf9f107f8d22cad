"""What skips a step or stops a run: gradients and a KL that are not finite, a policy too far away."""

import json
import math

import pytest
import torch

from pipeline.errors import UserError
from pipeline.ppo.callbacks import check_kl
from tests.ppo.making import weights


def test_a_gradient_that_is_not_finite_skips_its_step(make, capsys, tmp_path):
    trainer = make(num_rollouts=3, num_ppo_epochs=1)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (
        compute(*a, **k) * (math.nan if trainer.state.global_step == 1 else 1.0)
    )
    at = []
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: (at.append(weights(trainer)["value_head.weight"]), step(*a, **k))[
        1
    ]
    trainer.train()
    assert not torch.equal(at[0], at[1])
    assert torch.equal(at[1], at[2])
    assert not torch.equal(at[2], weights(trainer)["value_head.weight"])
    assert "step 1: the gradient is not finite" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "work" / "skipped-1.jsonl").open(encoding="utf-8")]
    for name in ("logprobs", "token_scores"):
        assert [len(row[name]) for row in rows] == [len(row["response_ids"]) for row in rows]
    assert [row["score"] for row in rows] == pytest.approx([sum(row["token_scores"]) for row in rows])
    assert len(rows) == 4


def test_three_in_a_row_stop_the_run(make):
    trainer = make(num_rollouts=9)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (
        compute(*a, **k) * (math.nan if trainer.state.global_step in (0, 2, 3, 4) else 1.0)
    )
    with pytest.raises(UserError, match="not finite in 3 steps in a row"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_a_policy_too_far_from_its_reference_stops_the_run(make):
    trainer = make(num_rollouts=9, learning_rate=0.3, max_kl=0.5)
    with pytest.raises(
        UserError,
        match=(
            r"KL to the reference is [\d.e+]+ nats per response, above training.max_kl=0.5; the "
            r"last checkpoints are kept"
        ),
    ):
        trainer.train()
    assert 0 < trainer.state.global_step < 9


@pytest.mark.parametrize("limit", [0.5, None])
@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_stops_the_run_without_a_limit_too(kl, limit):
    message = rf"ppo: rollout 3: KL to the reference is {kl}, not finite; .* in w;"
    with pytest.raises(UserError, match=message):
        check_kl(kl, limit, 3, "w")
