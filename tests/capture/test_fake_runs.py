"""Dynamo's graph and its fake values are the same where calls that are alike are run once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, token_batch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from cggr_compile.capture.fake_runs import FakeRuns
from cggr_compile.ir.program import describe
from cggr_compile.torch_internals import transformers
from cggr_compile.torch_internals.dynamo_traces import (
    fake_runs_by,
    places_written_once,
    tracing_options,
)


def _graph(function: Callable[..., Any], batch: dict[str, Any], run: Callable[..., Any]) -> list[dict[str, Any]]:
    """Dynamo's nodes: calls, descriptions of the values, which of these share memory, and which are views."""
    rows: list[dict[str, Any]] = []

    def record(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        storages: dict[StorageWeakRef, int] = {}
        for node in gm.graph.nodes:
            row = {"op": node.op, "target": str(node.target), "arguments": str((node.args, node.kwargs))}
            found = node.meta.get("example_value")
            for x in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(x, FakeTensor):
                    reference = StorageWeakRef(x.untyped_storage())
                    # Some operators compute views of tensors that nobody has.
                    is_view = reference in storages and x._is_view()
                    storage = storages.setdefault(reference, len(storages))
                    row["value"] = (describe(x), describe(x.storage_offset()), x.is_leaf, storage, is_view)
            rows.append(row)
        return gm.forward

    torch._dynamo.reset()
    with fake_runs_by(run), tracing_options():
        torch.compile(function, backend=record, dynamic=True, fullgraph=True)(**batch)
    return rows


def assert_same_graph(function: Callable[..., Any], batch: dict[str, Any]) -> int:
    """The number of calls that were not run."""
    runs = FakeRuns()
    expected = _graph(function, batch, lambda node, args, kwargs, call: call())
    actual = _graph(function, batch, runs.run)
    assert len(actual) == len(expected) > 1
    for got, wanted in zip(actual, expected, strict=True):
        assert got == wanted
    return runs.saved


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.long) for n in ARCHITECTURES if n != "gpt2")]
)
def test_the_graph_of_a_model(name: str) -> None:
    model = ARCHITECTURES[name].build().train()
    transformers.install_output_hooks(model, {})
    batch = token_batch(6, 16)
    assert assert_same_graph(model, {**batch, "use_cache": False}) > 10


class _Block(nn.Module):
    def __init__(self, body: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.body(x, self.weight)
        return x


def _in_place(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y, z = x @ weight, x @ weight
    y += 1
    return y * z.mul_(2)


def _views(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = (x @ weight).view(-1, 2, 4).transpose(1, 2)
    return (y + y.contiguous()).reshape(x.shape).to(x.dtype)


def _views_of_views(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = (x @ weight)[:, 2:].unsqueeze(1).expand(-1, 3, -1)
    with torch.no_grad():
        z = x.detach()[1:].T.T
    last = y[..., -1:].detach()
    y = y.contiguous()
    y[0].mul_(2)
    return (x[1:] * z).sum() + last.sum() + x + y.sum(1)[:, :1]


def _without_gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x @ weight
    return (x @ weight) + y.detach()


def _casts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = nn.functional.linear(x, weight)
    return nn.functional.linear(y.float(), weight) + nn.functional.dropout(x, 0.5)


def _mapped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: row * 2 + weight[0])(x) * 2 + weight[0]


def _numbers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x @ weight) * x.shape[0] + x.shape[0] * 1.5 + torch.arange(x.shape[0], device=x.device)[:, None]


def _known_numbers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    two, three = torch.tensor(1) * 2, torch.tensor(1.5) * 2
    return x * two.item() + (x @ weight) * three.item()


@pytest.mark.parametrize(
    "body", [_known_numbers, _in_place, _views, _views_of_views, _without_gradient, _casts, _mapped, _numbers]
)
def test_calls_of_all_kinds(body: Callable[..., Any]) -> None:
    assert assert_same_graph(_Block(body), {"x": torch.randn(6, 8)}) > 0


def test_a_result_does_not_share_memory_with_the_one_it_is_like() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        y, z = torch.sin(x), torch.sin(x)
        y.add_(1)
        return y - z

    storages: list[StorageWeakRef] = []

    def keep(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        alike = gm.graph.find_nodes(op="call_function", target=torch.sin)
        storages.extend(StorageWeakRef(node.meta["example_value"].untyped_storage()) for node in alike)
        return gm.forward

    torch._dynamo.reset()
    runs = FakeRuns()
    with fake_runs_by(runs.run):
        got = torch.compile(body, backend=keep)(torch.randn(5))
    assert runs.saved == 1
    assert len(storages) == len(set(storages)) == 2
    torch.testing.assert_close(got, torch.ones(5))


def test_dynamo_is_itself_again_afterwards() -> None:
    from torch._dynamo import utils

    before = utils.run_node
    with pytest.raises(RuntimeError, match="stop"), fake_runs_by(FakeRuns().run):
        raise RuntimeError("stop")
    assert utils.run_node is before


def test_places_in_the_source_are_those_that_dynamo_writes() -> None:
    model = ARCHITECTURES["gpt2"].build().train()
    transformers.install_output_hooks(model, {})

    def deep(depth: int, x: torch.Tensor) -> torch.Tensor:
        return deep(depth - 1, x) if depth else x * 2

    def forward(**batch: Any) -> Any:
        return model(**batch), deep(6, batch["input_ids"])  # lines that are repeated are counted

    found: list[list[str | None]] = []

    def read(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        found.append([node.stack_trace for node in gm.graph.nodes])
        return gm.forward

    for written in (nullcontext, places_written_once):
        torch._dynamo.reset()
        with written(), tracing_options():
            torch.compile(forward, backend=read, dynamic=True, fullgraph=True)(**token_batch(6, 16), use_cache=False)
    plain, once = found
    assert plain == once
    for part in ("modeling_gpt2.py", "Previous line repeated"):
        assert any(place and part in place for place in once)
