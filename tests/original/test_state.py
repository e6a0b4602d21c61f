"""State, modes and autocast of the original's modules."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import build
from original_models import SCORINGS, SELECTIONS, Fixed, Plain, batch_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cggr_compile import CGGRLoss, CGGRModel, CGGRScorer, create_truncated_router


def test_step_count_survives_a_round_trip() -> None:
    for make in (CGGRLoss, lambda: CGGRScorer(Plain()), lambda: CGGRModel(Plain())):
        first, second = make(), make()
        for _ in range(3):
            first.step()
        assert second.load_state_dict(first.state_dict()).missing_keys == []
        counter = getattr(second, "scorer", second).step_count
        assert (counter.item(), counter.dtype) == (3, torch.long)
    assert list(CGGRLoss().state_dict()) == ["step_count"]
    assert "scorer.step_count" in CGGRModel(Plain()).state_dict()


def test_scoring_ignores_dropout_and_restores_the_mode() -> None:
    model = Plain(dropout=0.5).train()
    model.stack[1].eval()
    ids, labels = batch_of()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    scorer = CGGRScorer(model)
    difficulty = scorer(ids, targets=labels)[0]
    assert torch.get_rng_state().equal(state), "scoring must not advance the generator of the main pass"
    assert [module.training for module in model.modules()] == modes
    assert difficulty.equal(CGGRScorer(copy.deepcopy(model).eval())(ids, targets=labels)[0])
    assert not difficulty.requires_grad
    with pytest.raises(RuntimeError):
        scorer(ids.float(), targets=labels)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("cut", [True, False])
def test_every_parameter_gets_a_gradient_under_autocast(cut: bool) -> None:
    model, (ids, labels) = build("llama"), batch_of()
    routed = CGGRModel(model, create_truncated_router(model, 1) if cut else None, warmup_steps=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = routed(ids, labels=labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_router_runs_outside_the_weight_cache() -> None:
    """Asserted on the switch itself: in torch 2.13 a cache filled without gradients does no harm."""
    seen = []

    class Probe(Plain):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            seen.append((torch.is_autocast_cache_enabled(), torch.is_grad_enabled(), self.training))
            return super().forward(input_ids)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        CGGRModel(Probe())(batch_of()[0], labels=batch_of()[1])
    assert seen == [(False, False, False), (True, True, True)]


def test_nothing_is_read_back_before_the_metrics() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        for scoring in SCORINGS:
            for selection in SELECTIONS:
                loss = CGGRLoss(scoring, selection)(torch.empty(2, 8, 20), torch.zeros(2, 8, dtype=torch.long))
                assert loss.shape == ()
                scorer = CGGRScorer(Fixed(torch.empty(2, 8, 20)), scoring=scoring, selection=selection)
                ids = torch.zeros(2, 8, dtype=torch.long)
                assert scorer(ids, targets=ids)[1].shape == (2, 8)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_criterion_need_not_follow_the_data_to_its_device(selection: str, dynamic: bool) -> None:
    ids, logits = torch.empty(2, 8, dtype=torch.long, device="meta"), torch.empty(2, 8, 20, device="meta")
    assert CGGRLoss(selection=selection, dynamic_threshold=dynamic)(logits, ids).is_meta
    assert CGGRScorer(Fixed(logits), selection=selection, dynamic_threshold=dynamic)(ids, targets=ids)[1].is_meta
