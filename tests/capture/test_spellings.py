"""Models that spell the same in other operators, or log while they run: routed as if they did not."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import WIDTH, WORDS, Toy, row_losses, toy_batch

import cggr_compile as cggr
from cggr_compile import CannotOptimize
from cggr_compile.torch_internals.dynamo_traces import tracing_options

LAYERS, LENGTH = 2, 6
LOGGER = logging.getLogger("toys")


class AddedBias(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.bias = nn.Parameter(torch.randn(WORDS))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.bias + self.head(hidden)


class BiasRow(AddedBias):
    """The bias is a row [1, V], as BART's."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, WORDS))


class JoinedTables(AddedBias):
    """The head's weight is joined from two tables, and the bias added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, WORDS, bias=False)
        self.rest = nn.Linear(WORDS, WIDTH - 3, bias=False)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.matmul(torch.cat([self.head.weight.t(), self.rest.weight], 0))
        hidden += self.bias
        return hidden


class LossOfHidden(Toy):
    """Head and loss are one function of torch's (2.13), and a loss of a single example has nothing to do with rows."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> tuple:
        hidden = self.middle(self.embed(input_ids))
        if labels is None:
            return (self.logits(hidden),)
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        weight = self.head.weight
        loss = F.linear_cross_entropy(hidden.reshape(-1, WIDTH), weight, labels, linear_bias=self.head.bias)
        return loss, F.cross_entropy(weight[0].detach(), torch.tensor(1))


class FixedLength(AddedBias):
    """The embedding is the head; the logits of a fixed number of positions are put together from rows."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = torch.matmul(hidden.reshape(-1, WIDTH), self.embed.weight.transpose(0, 1)) + self.bias
        return rows.reshape(hidden.shape[0], LENGTH, WORDS)


class LogProbabilities(Toy):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        log_probabilities = F.log_softmax(logits.reshape(-1, WORDS), -1, dtype=torch.float32)
        return F.nll_loss(log_probabilities, labels.reshape(-1))


class Prompted(Toy):
    """Two learnt positions run through the layers in front of the tokens, and are cut off behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, 2, WIDTH))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([self.prompt.expand(hidden.shape[0], -1, -1), hidden], 1)
        return super().middle(hidden + hidden.cumsum(1))[:, 2:]


class Latent(Toy):
    """The layers run on four latents, which read the tokens and are read by the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, WIDTH))
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        latents = (self.latents @ hidden.transpose(1, 2)).softmax(-1) @ hidden
        latents = super().middle(latents)
        return (self.positions[: hidden.shape[1]] @ latents.transpose(1, 2)).softmax(-1) @ latents


class LabelsLast(Toy):
    """The loss is that of the last positions, as many as there are labels, as BLIP-2's."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss(logits[:, -labels.size(1) :, :], labels)


class Talking(Toy):
    """Logs through the logger's method, and through a method that transformers adds."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        LOGGER.warning(f"{hidden.shape[1]} positions")
        LOGGER.warning_once("this is a toy")
        return super().middle(hidden)


class Reassigned(Toy):
    """Puts its buffer onto the device and dtype of the activations in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.randn(LENGTH, WIDTH), persistent=False)

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        self.table = self.table.to(hidden.device, hidden.dtype)
        return super().middle(hidden + self.table[: hidden.shape[1]])


class Segments(Toy):
    """Adds a trained table, in place, to rows of a constant one that were detached (as Kosmos-2.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.segments = nn.Embedding(2, WIDTH)
        self.register_buffer("table", torch.randn(LENGTH, WIDTH))

    @torch.no_grad()
    def constant(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.table[: hidden.shape[1]].expand(len(hidden), -1, -1).clone()

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = self.constant(hidden).detach()
        positions += self.segments((hidden[..., 0] > 0).long())
        return super().middle(hidden + positions)


class ReadAgain(Segments):
    """Reads what the changed tensor was detached from, which has changed with it."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        constant = self.constant(hidden)
        positions = constant.detach()
        positions += self.segments((hidden[..., 0] > 0).long())
        return Toy.middle(self, hidden + positions * constant)


@pytest.mark.parametrize(
    "kind",
    [
        AddedBias,
        BiasRow,
        JoinedTables,
        pytest.param(
            LossOfHidden, marks=pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="new in torch 2.13")
        ),
        FixedLength,
        LogProbabilities,
        LabelsLast,
        Prompted,
        Latent,
        Talking,
        Reassigned,
        Segments,
    ],
    ids=lambda k: k.__name__,
)
def test_rows_loss_and_gradients_are_eagers(kind: type[Toy]) -> None:
    torch.manual_seed(0)
    eager = kind().train()
    truncated = copy.deepcopy(eager)
    truncated.layers = truncated.layers[:LAYERS]
    routed = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=LAYERS, inner="eager")
    batch = toy_batch(length=LENGTH)
    loss = routed(**batch)[0]
    loss.backward()
    rows = routed.cggr.selected
    assert torch.equal(rows, row_losses(truncated, batch).topk(2).indices.sort().values)
    expected = eager(batch["input_ids"][rows], batch["labels"][rows])[0]
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, actual), wanted in zip(routed.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(actual.grad, wanted.grad), name
    for (name, actual), wanted in zip(routed.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(actual, wanted), name
    assert list(routed.state_dict()) == list(eager.state_dict())
    assert routed.cggr.report().stack.layers == len(eager.layers)
    assert "→ cggr.masked_loss" in str(routed.cggr.diff())


def test_what_a_changed_tensor_was_detached_from_is_not_read_afterwards() -> None:
    model = cggr.optimize(ReadAgain().train(), inner="eager")
    with pytest.raises(CannotOptimize, match=r"detached from is read afterwards .*positions \* constant"):
        model(**toy_batch(length=LENGTH))


@pytest.mark.parametrize("kind", [Prompted, Latent])
def test_positions_that_are_not_the_calls_route_no_tokens(kind: type[Toy]) -> None:
    model = cggr.optimize(kind().train(), route="token", inner="eager", selection="random")
    with pytest.raises(CannotOptimize, match="the layers run on other positions than the call's tokens"):
        model(**toy_batch(length=LENGTH))


def test_loggers_are_passed_over_only_while_a_step_is_traced() -> None:
    config = torch._dynamo.config
    mine = {logging.Logger.debug}
    with config.patch(ignore_logger_methods=mine):
        cggr.optimize(Talking().train(), inner="eager")(**toy_batch())
        assert config.ignore_logger_methods == mine
        with tracing_options():
            assert {logging.Logger.debug, logging.Logger.warning} <= set(config.ignore_logger_methods)
            json.dumps(config.ignore_logger_methods)  # as Dynamo does where it logs its options
        assert config.ignore_logger_methods == mine
