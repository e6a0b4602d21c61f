"""Refusals name what the user has chosen, not a library's line."""

from __future__ import annotations

import re

import pytest
import torch
from architectures import build, token_batch
from routed_toys import toy
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile import CannotOptimize
from cggr_compile.capture.causes import CAUSES, in_words, recognised


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.where)
def test_known_causes_are_named_with_a_remedy(cause) -> None:
    line = f"/env/site-packages{cause.where}{'' if cause.where.endswith('.py') else 'layer.py'}:12: x.item()"
    error = recognised(CannotOptimize("what was found", source=line, hint="rewrite that line, or else"))
    assert error.reason == f"{cause.name} (what was found)"
    assert cause.remedy in error.hint
    assert "rewrite" not in str(error)


def test_no_advice_to_rewrite_a_librarys_line() -> None:
    line = "/env/lib/site-packages/somelib/models.py:3: return x.tolist()"
    error = recognised(CannotOptimize("a break", source=line, hint="rewrite that line, or else"))
    assert "the line belongs to somelib" in error.hint
    own = CannotOptimize("a break", source="/home/me/model.py:3: x", hint="rewrite that line")
    assert recognised(own) is own


def test_symbols_are_put_in_words() -> None:
    text = "Could not guard on data-dependent expression Eq(zuf0, 1) of [s12, u3]"
    assert not re.search(r"\b(zuf|u|s)\d", in_words(text))


def test_neftune_is_named() -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = toy()
    model.embed.neftune_noise_alpha = 5.0
    model.embed.register_forward_hook(neftune_post_forward_hook)
    with pytest.raises(CannotOptimize, match=r"^cannot optimize: NEFTune .*; train without neftune_noise_alpha"):
        model(**toy_batch(8))


def test_hooks_that_move_tensors_between_devices_are_named() -> None:
    from accelerate import dispatch_model

    model = dispatch_model(toy(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.raises(CannotOptimize, match=r"^cannot optimize: Accelerate's hooks .*; load the model onto one"):
        model(**toy_batch(8))


class Raises(Toy):
    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] > 2:
            raise ValueError("too long a sequence")
        return super().middle(hidden)


class Views(Toy):
    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().middle(hidden.transpose(0, 1).view(-1, hidden.shape[2]).view_as(hidden))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Raises,
            r"the model raises ValueError\('too long a sequence'\) where Dynamo traces it .*raise ValueError.*; check",
        ),
        (
            Views,
            r"fails while Dynamo traces it \(\w*Error: Cannot view a tensor .*\) \(at .*hidden\.transpose.*\); check",
        ),
    ],
)
def test_what_a_model_raises_is_said(kind: type[Toy], message: str) -> None:
    with pytest.raises(CannotOptimize, match=message):
        cggr.optimize(kind().train(), inner="eager")(**toy_batch())


class Branches(Toy):
    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().middle(hidden if hidden.sum().item() > 0 else -hidden)


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.long)])
def test_flex_attention_is_named(padded: bool) -> None:
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    batch = token_batch()
    mask = {"attention_mask": batch["attention_mask"]} if padded else {}
    cggr.optimize(model, inner="eager")
    with pytest.raises(CannotOptimize, match=r"no graph holds.*load the model with attn_implementation='sdpa'"):
        model(input_ids=batch["input_ids"], labels=batch["labels"], **mask)


def test_experts_in_a_loop_are_told_the_other_implementation() -> None:
    model = build("mixtral")
    model.set_experts_implementation("eager")
    with pytest.raises(CannotOptimize, match=r"experts run one by one.*set_experts_implementation\('grouped_mm'\)"):
        cggr.optimize(model, ratio=0.5, inner="eager")(**token_batch())


def test_a_branch_on_data_is_refused_without_symbols() -> None:
    model = cggr.optimize(Branches().train(), inner="eager")
    with pytest.raises(CannotOptimize, match=r"test_causes\.py:\d+") as error:
        model(**toy_batch(8))
    assert not re.search(r"\b(zuf|zf|u|s)\d+\b", str(error.value))


class Lists(Toy):
    """Makes a list of numbers, as many as the data say."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        for place in hidden[0, :, 0].gt(0).nonzero().flatten().tolist():
            hidden = hidden + place
        return super().middle(hidden)


def test_a_list_as_long_as_the_data_say_is_refused_by_its_line() -> None:
    """Vision towers attend to each image by itself, in as many chunks as the grids say."""
    model = cggr.optimize(Lists().train(), inner="eager")
    with pytest.raises(CannotOptimize, match=r"numbers that it reads from data .*test_causes\.py:\d+") as error:
        model(**toy_batch(8))
    assert not re.search(r"\b(zuf|zf|u|s)\d+\b", str(error.value))
