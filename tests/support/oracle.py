"""The independent eager oracle: no graph, no operator and no helper of the compiler is used here.

Given the untouched model, it scores rows with a copy whose layer list is cut to the first n layers, selects, and runs
the model on the selected rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from architectures import Architecture
from torch import nn

Batch = Mapping[str, torch.Tensor]


def truncated(model: nn.Module, architecture: Architecture, layers: int) -> nn.Module:
    """A copy of the model with only its first layers, dropout switched off."""
    router = copy.deepcopy(model)
    parent, _, name = architecture.layers.rpartition(".")
    owner = router.get_submodule(parent)
    setattr(owner, name, nn.ModuleList(list(getattr(owner, name))[:layers]))
    for attribute in ("num_hidden_layers", "n_layer", "num_layers"):
        if attribute in vars(router.config):
            setattr(router.config, attribute, layers)
    for module in router.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return router


def token_scores(logits: torch.Tensor, labels: torch.Tensor, scoring: str, causal: bool) -> torch.Tensor:
    """Scores [B, S] of each position in fp32 (0 where the label is ignored)."""
    if causal:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    logs = F.log_softmax(logits.float(), dim=-1)
    top = logs.exp().topk(2, dim=-1).values
    parts = {
        "loss": -logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1),
        "entropy": -(logs.exp() * logs).sum(-1),
        "margin": 1 - (top[..., 0] - top[..., 1]),
    }
    scores = sum(parts.values()) if scoring == "combined" else parts[scoring]
    return torch.where(labels == -100, torch.zeros(()), scores)


def counted(labels: torch.Tensor, causal: bool) -> torch.Tensor:
    """How many labels of each row enter the loss."""
    return (labels[:, 1:] if causal else labels).ne(-100).sum(1)


def row_scores(
    model: nn.Module, architecture: Architecture, batch: Batch, layers: int, scoring: str = "loss"
) -> torch.Tensor:
    """An eager router's scores [B]: means over counted labels, -inf without any."""
    with torch.no_grad():
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        logits = truncated(model, architecture, layers)(**inputs).logits
    scores = token_scores(logits, batch["labels"], scoring, architecture.causal).sum(1)
    counts = counted(batch["labels"], architecture.causal)
    return torch.where(counts > 0, scores / counts.clamp(min=1), torch.tensor(-math.inf))


def expected_rows(
    model: nn.Module, architecture: Architecture, batch: Batch, ratio: float, layers: int, scoring: str = "loss"
) -> torch.Tensor:
    """The rows an eager router selects: the k hardest that have a counted label, sorted."""
    mean = row_scores(model, architecture, batch, layers, scoring)
    rows = max(1, math.ceil(ratio * len(mean) - 1e-9))
    rows = min(rows, int(mean.isfinite().sum()))
    order = sorted(range(len(mean)), key=lambda row: (-mean[row].item(), row))
    return torch.tensor(sorted(order[:rows]))


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Gradients by parameter name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def step(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss, which is the first of the outputs, and gradients of one step of a model as it is."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch)[0]
    loss.backward()
    return loss.detach(), gradients(model)


def saved_bytes(model: torch.nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps between forward and backward, parameters left out."""
    model(**batch)  # what captures does so before the hooks watch
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(kept.values())


@contextmanager
def without_sync() -> Iterator[None]:
    """Raises where the host waits for a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rounding(*lengths: int, dtype: torch.dtype = torch.float32) -> float:
    """How far, relative to their size, results of sums of these lengths are apart where their order differs: each
    addition rounds by half a unit of `dtype`, to first order (Higham, Accuracy and Stability, 4.2)."""
    return sum(lengths) * torch.finfo(dtype).eps / 2


def rows_of(batch: Batch, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch restricted to some rows."""
    return {name: tensor[rows] for name, tensor in batch.items()}


def assert_same_step(
    loss: torch.Tensor,
    actual: Mapping[str, torch.Tensor | None],
    expected_loss: torch.Tensor,
    expected: Mapping[str, torch.Tensor | None],
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Equality of loss and gradients; bitwise unless a tolerance is given."""
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=atol)
    assert_same_gradients(actual, expected, rtol, atol)


def assert_step_within(
    share: float,
    loss: torch.Tensor,
    actual: Mapping[str, torch.Tensor | None],
    expected_loss: torch.Tensor,
    expected: Mapping[str, torch.Tensor | None],
) -> None:
    """The loss within `share` of itself, every gradient within `share` of the step's largest entry: a gradient that is
    zero but for rounding has no size of its own."""
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    torch.testing.assert_close(loss, expected_loss, rtol=share, atol=0.0)
    assert_same_gradients(actual, expected, rtol=0.0, atol=share * largest)


Step = tuple[torch.Tensor, Mapping[str, torch.Tensor | None]]


FEW = 64


def assert_no_further(found: Step, same_dtype: Step, truth: Step, times: float = 1.0) -> None:
    """The loss, and each gradient by its norm, are no further from a step in fp32 than `times` the distance of eager's
    step in the same dtype, but for one rounding to bfloat16.

    With `times=2` the errors of two independent computations of one precision pass: an error of no more variance than
    another's exceeds twice its norm with a probability that falls exponentially in the number of entries. So gradients
    of fewer than `FEW` entries are taken together.
    """
    unit = rounding(1, dtype=torch.bfloat16)
    assert (found[0] - truth[0]).abs() <= times * (same_dtype[0] - truth[0]).abs() + unit * truth[0]
    few: list[tuple[torch.Tensor, ...]] = []
    for name, exact in truth[1].items():
        actual, expected = found[1][name], same_dtype[1][name]
        assert (actual is None) == (expected is None) == (exact is None), name
        if actual is None or expected is None or exact is None:
            continue
        assert actual.dtype == expected.dtype, name
        compared = tuple(x.float().flatten() for x in (actual, expected, exact))
        if exact.numel() < FEW:
            few.append(compared)
        else:
            _assert_near(name, *compared, times)
    if few:
        _assert_near("the small ones", *(torch.cat(each) for each in zip(*few, strict=True)), times)


def assert_autocast_steps_no_further(model: nn.Module, truth: nn.Module, batches: Iterable[Batch]) -> None:
    """Steps on a GPU under bfloat16 autocast are no further from `truth`'s in fp32 than twice an eager copy's."""
    eager = copy.deepcopy(truth)
    for cpu in batches:
        batch = {key: tensor.cuda() for key, tensor in cpu.items()}
        with torch.autocast("cuda", torch.bfloat16):
            found, same = step(model, batch), step(eager, batch)
        assert_no_further(found, same, step(truth, batch), times=2.0)


def _assert_near(name: str, actual: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor, times: float) -> None:
    error, allowed = ((x - exact).norm() for x in (actual, expected))
    unit = rounding(1, dtype=torch.bfloat16)
    assert error <= times * allowed + unit * exact.norm(), f"{name}: {error / exact.norm()}"


def assert_same_gradients(
    actual: Mapping[str, torch.Tensor | None],
    expected: Mapping[str, torch.Tensor | None],
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Equality of every gradient; bitwise unless a tolerance is given."""
    assert actual.keys() == expected.keys()
    missing = [name for name in expected if (actual[name] is None) != (expected[name] is None)]
    assert not missing, f"gradient present on one side only: {missing}"
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(
                actual[name], gradient, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )
