"""`check`: whether routed training of one model equals eager training on the rows it selects.

The eager side shares nothing with the compiler. It finds the layer stack by watching which modules run and exchanging
their outputs, makes the router by putting the output of layer n in the place of the last layer's, selects rows by their
mean loss, and trains the untouched model on those rows.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cggr_compile.api import optimize

Batch = Mapping[str, torch.Tensor]
Step = tuple[torch.Tensor, dict[str, torch.Tensor | None]]

IGNORED = -100
# Difference, relative to the largest entry of the gradient, that reordered fp32 sums explain.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Check:
    """Outcome of `check`.

    Attributes:
        difference: largest difference of the loss or a gradient entry to eager's, relative to the largest entry of that
            tensor where this is above 1; 0.0 is bitwise equality, infinity a gradient that only one side has.
        where: the tensor of that difference ("loss" or a parameter's name), empty without one.
        selected: for each batch, the rows that the compiled router selected, sorted.
        expected: for each batch, the rows that the eager router selects.
        layers: how many layers the compiler found, `path` where and `proof` how.
    """

    difference: float
    where: str
    selected: tuple[tuple[int, ...], ...]
    expected: tuple[tuple[int, ...], ...]
    layers: int
    path: str
    proof: str

    @property
    def exact(self) -> bool:
        """Same rows, and loss and every gradient bitwise equal."""
        return self.selected == self.expected and self.difference == 0

    @property
    def within_rounding(self) -> bool:
        """Same rows, and differences no larger than reordered sums explain."""
        return self.selected == self.expected and self.difference <= ROUNDING

    def __str__(self) -> str:
        if self.selected != self.expected:
            return f"rows {self.selected} selected, {self.expected} by the eager router"
        if self.exact:
            return f"exact: {self.layers} layers ({self.path or 'unnamed'}, {self.proof})"
        return f"differs by {self.difference:.1e} ({self.where})"


def check(model: nn.Module, *batches: Batch, ratio: float = 0.5, router_layers: int = 1) -> Check:
    """Compares routed training steps of `model` with eager training on the rows that an eager router selects.

    For each batch two steps are compared: one while every row is kept, and one with rows selected. The model is copied,
    not changed. Both sides run without a key-value cache and without an inner compiler. A bitwise comparison needs
    dropout probabilities of 0, and attention whose kernel does not depend on the mask's data
    (`attn_implementation="eager"`).

    Args:
        model: a language model on the CPU in fp32.
        batches: `input_ids` [B, S] int64, `labels` [B, S] int64, and whatever else its forward takes, one row each.
        ratio: fraction of rows kept, in (0, 1).
        router_layers: layers of the router.

    Raises:
        ValueError: no batch was given.
        CannotOptimize: the model cannot be routed.
        LayerStackNotFound: the eager side finds no layers to make a router of.
    """
    if not batches:
        raise ValueError("check: no batch was given; pass at least one, check(model, {'input_ids': …, 'labels': …})")
    eager, routed = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    for each in (eager, routed):
        if hasattr(each, "config"):
            each.config.use_cache = False
    optimize(routed, ratio=ratio, router_layers=router_layers, inner="eager", warmup_steps=1)
    differences = [_difference(eager_step(routed, batch), eager_step(eager, batch)) for batch in batches]
    routed.cggr.step()
    selected, expected = [], []
    for batch in batches:
        actual = eager_step(routed, batch)
        rows = routed.cggr.selected
        selected.append(tuple(rows.tolist()))
        expected.append(tuple(_expected_rows(eager, batch, len(rows), router_layers)))
        differences.append(
            _difference(actual, eager_step(eager, {name: tensor[rows] for name, tensor in batch.items()}))
        )
    stack = routed.cggr.runtime.plans[-1].program.layers
    return Check(*max(differences), tuple(selected), tuple(expected), len(stack), stack.path, stack.proof)


class LayerStackNotFound(ValueError):
    """No list of modules runs more than once in the eager model."""


def eager_step(model: nn.Module, batch: Batch) -> Step:
    """Loss and gradients by parameter name, from the same generator state every time."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _difference(actual: Step, expected: Step) -> tuple[float, str]:
    """The largest difference and the tensor it is in; infinite where only one side has a gradient."""
    pairs = [("loss", actual[0], expected[0])]
    pairs += [(name, actual[1].get(name), gradient) for name, gradient in expected[1].items()]
    distances = ((_distance(left, right), name) for name, left, right in pairs)
    return max((distance, name if distance else "") for distance, name in distances)


def _distance(left: torch.Tensor | None, right: torch.Tensor | None) -> float:
    if left is None or right is None:
        return 0.0 if left is right else math.inf
    if torch.equal(left, right) or (left.isnan().equal(right.isnan()) and left.nan_to_num().equal(right.nan_to_num())):
        return 0.0
    apart = ((left - right).abs().max() / right.abs().max().clamp(min=1)).item()
    return math.inf if math.isnan(apart) else apart


def _expected_rows(model: nn.Module, batch: Batch, kept: int, layers: int) -> list[int]:
    """The `kept` rows with a counted label whose mean token loss under the eager router is largest, sorted."""
    shift = _label_shift(model, batch)
    with _router(model, batch, layers) as router, torch.no_grad():
        logits = router(**_inputs(model, batch)).logits
    losses, counted = _token_losses(logits, batch["labels"], shift)
    counts = counted.sum(1)
    means = torch.where(counts > 0, losses.sum(1) / counts.clamp(min=1), -math.inf)
    order = sorted(range(len(means)), key=lambda row: (-means[row].item(), row))
    return sorted(order[: min(kept, int((counts > 0).sum()))])


def _inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """What the logits are computed from: all but the labels, unless a decoder reads them."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {name: tensor for name, tensor in batch.items() if decodes or name != "labels"}


def _token_losses(logits: torch.Tensor, labels: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [B, S] in fp32, 0 where nothing is counted, and which are counted."""
    ignored = torch.full_like(labels[:, :shift], IGNORED)
    targets = torch.cat([labels[:, shift:], ignored], dim=1)
    counted = targets != IGNORED
    own = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, -own, 0.0), counted


def _label_shift(model: nn.Module, batch: Batch) -> int:
    """0 or 1: which makes the cross-entropy of the model's logits its loss."""
    with torch.no_grad():
        output = model(**batch)
    labels = batch["labels"]

    def gap(shift: int) -> float:
        rows = output.logits[:, : labels.shape[1] - shift].flatten(0, 1).float()
        return abs(F.cross_entropy(rows, labels[:, shift:].flatten(), ignore_index=IGNORED).item() - output.loss.item())

    return min((1, 0), key=gap)


@contextmanager
def _router(model: nn.Module, batch: Batch, layers: int) -> Iterator[nn.Module]:
    """The model without dropout, the output of layer `layers` in the place of the last layer's."""
    training = model.training
    model.eval()
    stack = layer_calls(model, batch)
    taken: list[torch.Tensor] = []

    def place(call: int, output: torch.Tensor) -> torch.Tensor:
        if call == layers - 1:
            taken.append(output)
        return taken[0] if call == len(stack) - 1 else output

    try:
        with _outputs_replaced(stack, place):
            yield model
    finally:
        model.train(training)


@contextmanager
def _outputs_replaced(stack: list[nn.Module], place: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While it holds, the first tensor that the i-th call of the stack returns becomes `place(i, tensor)`."""
    calls = itertools.count()

    def replaced(_: nn.Module, output: Any) -> Any:
        own = _residual(output)
        return output if own is None else _with_residual(output, place(next(calls), own))

    with _forwards_followed(stack, replaced):
        yield


@contextmanager
def _forwards_followed(modules: Iterable[nn.Module], follow: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    """While it holds, `follow(module, output)` is what each of the modules returns, also where a model calls a layer's
    `forward` itself, which passes forward hooks by."""
    own = {module: vars(module).get("forward") for module in modules}
    for module in own:
        vars(module)["forward"] = _followed(module, module.forward, follow)
    try:
        yield
    finally:
        for module, forward in own.items():
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _followed(
    module: nn.Module, forward: Callable[..., Any], follow: Callable[[nn.Module, Any], Any]
) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return follow(module, forward(*args, **kwargs))

    return run


def layer_calls(model: nn.Module, batch: Batch) -> list[nn.Module]:
    """The layers in the order in which they run; a layer that runs again is listed again.

    Candidates are the indexed containers (`layers.0`, `layers.1`, …) whose members run at least twice between them. A
    stack of layers is one where the output of the first decides everything behind it: put in its place in a run on
    other rows, it gives its own logits. Of several, the one with the most parameters, or else the last, is taken; where
    there is none, the container with the most parameters.

    Raises:
        LayerStackNotFound: there is no candidate.
    """
    inputs = _inputs(model, batch)
    containers = {
        child: path.rpartition(".")[0] for path, child in model.named_modules() if path.rpartition(".")[2].isdigit()
    }
    calls: dict[str, list[nn.Module]] = {}

    def record(module: nn.Module, output: Any) -> Any:
        if _residual(output) is not None:
            run = calls.pop(containers[module], [])
            calls[containers[module]] = [*run, module]  # containers in the order of their last calls
        return output

    with _forwards_followed(containers, record), torch.no_grad():
        model(**inputs)
    stacks = [run for run in calls.values() if len(run) > 1]
    if not stacks:
        raise LayerStackNotFound(f"{type(model).__name__} runs no list of modules more than once")

    def merit(position: int) -> tuple[bool, int, int]:
        size = sum(parameter.numel() for module in set(stacks[position]) for parameter in module.parameters())
        return _decides(model, inputs, stacks[position]), size, position

    return stacks[max(range(len(stacks)), key=merit)]


def _decides(model: nn.Module, inputs: Batch, stack: list[nn.Module]) -> bool:
    """Whether the output of the stack's first call, put into a run on other ids, gives the logits it came from.

    The other ids are those that the logits are made for: a decoder's come from the labels, and its encoder's stay.
    """
    taken: list[torch.Tensor] = []
    ids = "labels" if "labels" in inputs else "input_ids"
    others = {**inputs, ids: inputs[ids].roll(1, 0)}

    def take(call: int, output: torch.Tensor) -> torch.Tensor:
        taken.append(output.clone())
        return output

    with torch.no_grad():
        with _outputs_replaced(stack, take):
            wanted = model(**inputs).logits
        with _outputs_replaced(stack, lambda call, output: taken[0].clone() if call == 0 else output):
            return torch.equal(model(**others).logits, wanted)


def _residual(output: Any) -> Any:
    """The first tensor that a layer returns, None where it returns none."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((part for part in output if isinstance(part, torch.Tensor)), None)
    return output if isinstance(output, torch.Tensor) else None


def _with_residual(output: Any, residual: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return residual
    items = list(output.items() if isinstance(output, Mapping) else enumerate(output))
    place = next(key for key, part in items if isinstance(part, torch.Tensor))
    changed = [(key, residual if key == place else part) for key, part in items]
    return type(output)(changed if isinstance(output, Mapping) else (part for _, part in changed))
