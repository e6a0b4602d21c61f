"""What the token route refuses, with the reason, and what convolutions mean once they are allowed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import oracle
import plans
import pytest
import token_oracle
import torch
import transformers as T
from architectures import GROUPED, Architecture, token_batch
from torch import nn

import cggr_compile as cggr

CONVOLUTIONS = Architecture(
    "lfm2",
    lambda: T.Lfm2ForCausalLM(T.Lfm2Config(**GROUPED, layer_types=["full_attention", "conv", "full_attention"])),
    "model.layers",
)


class Layers(nn.Module):
    """A minimal model whose layers add `mix(hidden)` to the residual; `extra` is one more input."""

    def __init__(self, mix: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.embed = nn.Embedding(31, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 31)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, extra: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + self.mix(layer(hidden), extra)
        logits = self.head(hidden)
        return (nn.functional.cross_entropy(logits.view(-1, 31), labels.view(-1)),)


def places(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1], device=x.device)


MIXES = {
    "cumulative sum": (lambda x, _: x.cumsum(1), "layer 1 mix tokens by their places: aten.cumsum runs along"),
    "shift": (lambda x, _: x.roll(1, 1), "aten.roll runs along the sequence"),
    "padding": (lambda x, _: nn.functional.pad(x, (0, 0, 1, 0))[:, :-1], "shifts or lengthens the sequence"),
    "padding and cutting": (lambda x, _: nn.functional.pad(x, (0, 0, 1, -1)), "shifts or lengthens the sequence"),
    "Fourier": (lambda x, _: torch.fft.fft2(x).real, "_fft_c2c runs along the sequence"),
    "Fourier of reals": (
        lambda x, _: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=8, dim=1).sum(1, True),
        "_fft_r2c runs",
    ),
    "blocks": (
        lambda x, _: nn.functional.unfold(x.mT[:, :, None], (1, 3), padding=(0, 1)).unflatten(1, (8, 3)).sum(2).mT,
        "what aten.im2col does along the sequence is not known",
    ),
    "mirrored": (lambda x, _: torch.fliplr(x), "in aten.fliplr.default: aten.flip runs along the sequence"),
    "turned": (lambda x, _: torch.rot90(x, 2, (1, 2)), "aten.flip runs along the sequence"),
    "filled place": (lambda x, _: x.index_fill(1, torch.tensor([0]), 0.0), "what aten.index_fill does along"),
    "written place": (lambda x, _: x.select_scatter(x[:, 0] * 0, 1, 0), "the sequence"),
    "written slice": (
        lambda x, _: x.slice_scatter(x.new_zeros(x.shape[0], 1, 8), 1, 0, 1),
        "aten.slice_scatter writes to fixed places of the sequence",
    ),
    "stretched": (
        lambda x, _: nn.functional.interpolate(x.mT, scale_factor=1.0, mode="linear").mT,
        "upsample_linear1d.*does along the sequence is not known",
    ),
    "joined in front": (
        lambda x, _: torch.cat([torch.zeros_like(x[:, :1]), x], 1)[:, :-1],
        "aten.slice takes fixed places of the sequence",
    ),
    "first token": (lambda x, _: x + x[:, :1], "aten.slice takes fixed places of the sequence"),
    "one token": (lambda x, _: x + x[:, 0].unsqueeze(1), "aten.select runs along the sequence"),
    "window": (
        lambda x, _: nn.functional.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
        "reads neighbours along the sequence",
    ),
    "transposed window": (
        lambda x, _: nn.functional.conv_transpose1d(
            x.transpose(1, 2), torch.ones(8, 1, 3), padding=1, groups=8
        ).transpose(1, 2),
        "reads neighbours along the sequence",
    ),
    "index": (lambda x, _: x[:, places(x)], r"cannot tell which tokens a value of shape \[S\] is about"),
    "fixed index": (
        lambda x, _: x + x[:, torch.tensor([0])],
        "aten.index takes places of the sequence by their number",
    ),
    "gather": (lambda x, _: x.gather(1, places(x).view(1, -1, 1).expand(x.shape)), "aten.gather takes places"),
    "beside the chosen": (
        lambda x, _: x + x.gather(1, (x.topk(2, 1).indices + 1).clamp(max=1)).sum(1, keepdim=True),
        "aten.gather takes places of the sequence by their number",
    ),
    "chosen among features": (
        lambda x, _: x + x.gather(1, x.topk(2, 2).indices).sum(2, keepdim=True),
        "aten.gather takes places of the sequence by their number",
    ),
    "distance": (
        lambda x, _: (x @ x.transpose(1, 2)).tril(-2) @ x,
        "aten.tril measures distances along the sequence",
    ),
    "no batch": (
        lambda x, _: (x.transpose(0, 1) + places(x).float().view(-1, 1, 1)).transpose(0, 1),
        r"cannot tell which tokens a value of shape .S.* is about, and layer 1 depend on it",
    ),
    "other size": (
        lambda x, extra: x + (x @ extra.T.sin()) @ extra,
        "has a dynamic size that is neither the batch's nor the sequence's",
    ),
}


# Refused by the rule that refuses another of them.
ALIKE = ("joined in front", "transposed window", "beside the chosen", "chosen among features")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] if n in ALIKE else []) for n in MIXES])
def test_ambiguous_layers_are_refused_with_the_reason(name: str) -> None:
    mix, reason = MIXES[name]
    torch.manual_seed(0)
    model = Layers(mix).train()
    batch = {"input_ids": torch.randint(0, 31, (4, 7))}
    if name == "other size":
        batch["extra"] = torch.randn(5, 8)
        torch._dynamo.mark_dynamic(batch["extra"], 0)
    with pytest.raises(cggr.CannotOptimize, match=reason) as caught:
        cggr.explain(model, batch, route="token", selection="random")
    assert caught.value.hint
    assert caught.value.node


def test_places_in_the_whole_sequence_are_no_index_into_the_kept_tokens() -> None:
    """Not even where places may mean those among the kept tokens."""
    model = Layers(MIXES["gather"][0]).train()
    options = {"route": "token", "selection": "random", "allow_compressed_recurrence": True}
    with pytest.raises(cggr.CannotOptimize, match=r"at places given by a value of shape \[B, S, 8\], which count in"):
        cggr.explain(model, {"input_ids": torch.randint(0, 31, (4, 7))}, **options)


@pytest.mark.parametrize("allowed", [False, True])
def test_unrolled_scans_are_refused_whatever_is_allowed(allowed: bool) -> None:
    """Their number of levels belongs to the whole length."""
    model = Layers(lambda x, _: x + x[:, ::2].sum(1, keepdim=True)).train()
    options = {"route": "token", "selection": "random", "allow_compressed_recurrence": allowed}
    with pytest.raises(cggr.CannotOptimize, match="layer 1 read every n-th token, as a scan does"):
        cggr.explain(model, {"input_ids": torch.randint(0, 31, (4, 7))}, **options)


def ordered(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    """Triangles, sums over tokens, nothing in front and a sink beside the keys."""
    scores = torch.cat([x.new_empty(0), (x @ x.transpose(1, 2)).tril()], -2)  # as a cache that is empty yet
    sink = scores.amax(-1, keepdim=True)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return weights @ x + x.mean(1, keepdim=True)


def chosen(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    """Attention to the best keys, as many as there are up to three, and the sequence's largest entries."""
    scores = x @ x.transpose(1, 2)
    best = scores.topk(min(3, x.shape[1]), -1).indices.to(torch.int32)
    hidden = scores.new_ones(scores.shape, dtype=torch.bool).scatter(-1, best.long(), False)
    largest = x.gather(1, x.sort(dim=1, descending=True).indices)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ x + largest.sum(1, keepdim=True)


def grouped(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    """Tokens in two groups whose sizes are read from the data, as experts run on theirs."""
    flat = x.flatten(0, 1)
    second = flat[:, 0] > 0
    sizes = [int((~second).sum().item()), int(second.sum().item())]
    order = second.int().argsort(stable=True)
    first, rest = flat[order].split(sizes)
    return torch.cat([first.sin(), rest.cos()])[order.argsort()].view(x.shape)


def of_features(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    """Operators that are refused along the sequence, along features; and some that torch composes of others."""
    x = nn.functional.pad(x, (1, -1)) + torch.fft.fft(x).real + x.select_scatter(x[..., 0] * 2, 2, 1)
    x = nn.functional.relu6(x) + nn.functional.selu(x) + x.detach().floor_divide(2)
    return x + nn.functional.log_softmax(x, -1)


@pytest.mark.parametrize("mix", [ordered, chosen, grouped, of_features])
def test_mixing_as_a_set_means_the_same_on_the_kept_tokens(mix: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    eager = Layers(mix).train()
    model = cggr.optimize(copy.deepcopy(eager), route="token", ratio=0.5, selection="random", inner="eager")
    batch = {"input_ids": torch.randint(0, 31, (4, 7)), "labels": torch.randint(0, 31, (4, 7))}
    loss = model(**batch)[0]
    loss.backward()
    positions = model.cggr.selected
    hidden = eager.embed(batch["input_ids"])
    hidden = hidden + mix(eager.layers[0](hidden), None)
    part = token_oracle.take(hidden, positions, 1)
    hidden = token_oracle.put(hidden, part + mix(eager.layers[1](part), None), positions)
    hidden = hidden + mix(eager.layers[2](hidden), None)
    expected = nn.functional.cross_entropy(eager.head(hidden).view(-1, 31), batch["labels"].view(-1))
    expected.backward()
    oracle.assert_same_step(loss.detach(), oracle.gradients(model), expected.detach(), oracle.gradients(eager))


@pytest.mark.long
def test_convolutions_are_opt_in_and_see_the_kept_tokens_as_neighbours() -> None:
    torch.manual_seed(0)
    eager = CONVOLUTIONS.build().train()
    eager.config.use_cache = False
    eager.set_attn_implementation("eager")
    batch = token_batch(masked=False)
    program = plans.captured(eager, batch)
    with pytest.raises(cggr.CannotOptimize, match=r"layer 1 mix tokens by their places: .*allow_compressed_recurrence"):
        plans.Routed(eager, program, route="token")
    copied = copy.deepcopy(eager)
    options = {"ratio": 0.5, "selection": "random", "allow_compressed_recurrence": True}
    routed = plans.Routed(eager, program, route="token", **options)
    actual = routed.step(batch)
    expected = token_oracle.step(copied, CONVOLUTIONS, batch, range(1, 2), routed.selected)
    oracle.assert_same_step(*actual, *expected)


def test_layers_must_be_left() -> None:
    model = Layers(lambda x, _: x).train()
    with pytest.raises(cggr.CannotOptimize, match="leave none of the 3 layers"):
        cggr.explain(
            model, {"input_ids": torch.randint(0, 31, (4, 7))}, route="token", first_layers=2, selection="random"
        )


class Biased(Layers):
    """Adds its attention mask to what its layers mix."""

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        return super().forward(input_ids, labels, attention_mask)


@pytest.mark.parametrize("mask", ["added", "counted"])
def test_a_mask_that_is_added_does_not_tell_padding(mask: str) -> None:
    def mix(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + mask.unsqueeze(-1).to(x.dtype) if mask_added else x * (mask.unsqueeze(-1) != 0)

    mask_added = mask == "added"
    ids = torch.randint(31, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(4, 6)}
    model = cggr.optimize(Biased(mix).train(), route="token", ratio=0.5, selection="random", inner="eager")
    if mask_added:
        with pytest.raises(cggr.CannotOptimize, match=r"attention_mask of torch.float32 is added to something"):
            model(**batch)
    else:
        model(**batch)[0].backward()
