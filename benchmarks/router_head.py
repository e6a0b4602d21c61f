"""How well the router's cheap heads and its fp8 body keep the order of rows, and what the heads cost: real weights,
real text.

    python benchmarks/router_head.py --output benchmarks/results/router_head-cpu
    python benchmarks/router_head.py --quick      # a few short rows

Routers are the first n layers of SmolLM2-135M with its final norm; every head scores the same hidden states of the same
batches of Paradise Lost. Rank correlations (Spearman) are with the exact head of the same router, over the rows of a
batch (mean nll) and over its tokens. A time is one call of the operator's reference, divided by the exact head's call
on the same hidden states. Behind the fp8 body, heads score the hidden states of layers whose linears are
`cggr::fp8_linear`, against those of the exact body.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import cggr_compile.kernels.op.router_heads  # noqa: F401  registers torch.ops.cggr
import torch
import typer
from cggr_compile.kernels.op.fp8_linear import MULTIPLE
from pretrained import load_pretrained, windows_of
from torch import Tensor

from cggr_compile.config import RoutingConfig
from cggr_compile.demo.data import read_text
from cggr_compile.environment import environment
from cggr_compile.ir.router_head import cost_factor

SAMPLES = ((64, 64), (256, 256), (512, 512), (1024, 1024), (2048, 2048))
BODY_SAMPLE = (1024, 1024)
STRIDES = (8,)
WANTED = 0.98
ops = torch.ops.cggr


@dataclass(frozen=True)
class Problem:
    """Hidden states [N, D] of one batch behind one router, by the exact and by the fp8 body, and their targets."""

    hidden: Tensor
    fp8_hidden: Tensor
    target: Tensor
    weight: Tensor
    rows: int


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors (ties, which fp32 means do not have, rank by index)."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def hidden_by_depth(model: torch.nn.Module, ids: Tensor, depths: list[int]) -> dict[int, Tensor]:
    """The head's input [B, S, D] of the router of each depth."""
    found: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        for some in ids.split(8):
            states = model.model(some, output_hidden_states=True, use_cache=False).hidden_states
            for depth in depths:  # the last state has passed the final norm already
                found[depth].append(states[depth] if depth == layers else model.model.norm(states[depth]))
    return {depth: torch.cat(parts) for depth, parts in found.items()}


@contextmanager
def fp8_body(model: torch.nn.Module) -> Iterator[None]:
    """Puts the operator in place of the layers' linears, as `quantize_linears` does."""
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        assert not any(size % MULTIPLE for size in linear.weight.shape)
        linear.forward = lambda x, linear=linear: ops.fp8_linear(x, linear.weight, linear.bias)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def heads(problem: Problem, seed: int) -> Iterator[tuple[str, dict, float | None, Tensor]]:
    """Name, options, seconds (None behind the fp8 body) and token scores [N] of each head; the exact one first."""
    operands = (problem.hidden, problem.weight, None, problem.target)
    noise = torch.rand(1, generator=torch.Generator().manual_seed(seed))

    def sampled(frequent: int, drawn: int, hidden: Tensor = problem.hidden) -> Tensor:
        columns = ops.sample_columns(problem.target, noise, len(problem.weight), frequent, drawn)
        return ops.sampled_score(hidden, *operands[1:], *columns, ["nll"])

    yield "exact", {"router_head": "exact"}, *timed(lambda: ops.score(*operands, ["nll"]))
    for frequent, drawn in SAMPLES:
        options = {"router_head": "sampled", "router_head_frequent": frequent, "router_head_sampled": drawn}
        yield f"sampled, {frequent} + {drawn}", options, *timed(lambda f=frequent, d=drawn: sampled(f, d))
    yield "fp8", {"router_head": "fp8"}, *timed(lambda: ops.fp8_score(*operands, ["nll"]))
    body = {"router_body": "fp8"}
    yield "exact, fp8 body", body, None, ops.score(problem.fp8_hidden, *operands[1:], ["nll"])[0]
    frequent, drawn = BODY_SAMPLE
    options = {**body, "router_head": "sampled", "router_head_frequent": frequent, "router_head_sampled": drawn}
    yield f"sampled, {frequent} + {drawn}, fp8 body", options, None, sampled(*BODY_SAMPLE, problem.fp8_hidden)[0]


def timed(call) -> tuple[float, Tensor]:
    """Seconds of a call and its first row."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result[0]


def compare(problem: Problem, seed: int) -> Iterator[dict]:
    """One record a head: correlations with the exact one, seconds, and multiply-adds relative to it."""
    exact_seconds, exact = 0.0, torch.empty(0)
    for name, options, seconds, tokens in heads(problem, seed):
        if name == "exact":
            assert seconds is not None
            exact_seconds, exact = seconds, tokens
            for stride in STRIDES:
                strided = exact.view(problem.rows, -1)[:, ::stride].mean(1)
                rows = spearman(strided, exact.view(problem.rows, -1).mean(1))
                yield {"head": f"exact, every {stride}th position", "row": rows, "flops": 1 / stride}
        yield {
            "head": name,
            "row": spearman(tokens.view(problem.rows, -1).mean(1), exact.view(problem.rows, -1).mean(1)),
            "token": spearman(tokens, exact),
            "bias": (tokens - exact).mean().item(),
            **({} if seconds is None else {"seconds": seconds, "time": seconds / exact_seconds}),
            "flops": cost_factor(RoutingConfig(ratio=0.5, **options), len(problem.weight)),
        }


def problems(
    model: torch.nn.Module, windows: torch.Tensor, rows: int, batches: int, depths: list[int]
) -> Iterator[tuple[int, int, Problem]]:
    """(batch, depth, problem)."""
    weight = model.lm_head.weight.detach()
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    for index, ids in enumerate(windows[order[: batches * rows]].split(rows)):
        states = hidden_by_depth(model, ids, depths)
        with fp8_body(model):
            fp8_states = hidden_by_depth(model, ids, depths)
        for depth in depths:
            hidden, fp8_hidden = (x[depth][:, :-1].flatten(0, 1) for x in (states, fp8_states))
            yield index, depth, Problem(hidden, fp8_hidden, ids[:, 1:].flatten(), weight, rows)


def render(report: dict) -> str:
    """The table: a line for each head, a pair of columns for each depth, worst over batches."""
    depths = list(dict.fromkeys(record["depth"] for record in report["samples"]))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['model']}, {report['text']}, {report['shape']}; {report['device']}, commit {report['commit']}, "
        f"{versions}. `{report['command']}`\n",
        "Cells: lowest rank correlation with the exact head and body over the batches, of rows / of tokens; **bold** "
        f"where the rows' is at least {WANTED}.\n",
        f"| head | FLOPs | time | {' | '.join(f'{depth} layers' for depth in depths)} |",
        "| --- " * (3 + len(depths)) + "|",
    ]
    by_head = sorted(report["samples"], key=lambda record: record["order"])
    for head, group in groupby(by_head, key=lambda record: record["head"]):
        records = list(group)
        times = [record["time"] for record in records if "time" in record]
        cells = [f"×{records[0]['flops']:.3f}", f"×{statistics.median(times):.2f}" if times else ""]
        cells += [_cell([record for record in records if record["depth"] == depth]) for depth in depths]
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(records: list[dict]) -> str:
    row = min(record["row"] for record in records)
    text = f"**{row:.3f}**" if row >= WANTED else f"{row:.3f}"
    tokens = [record["token"] for record in records if "token" in record]
    return f"{text} / {min(tokens):.3f}" if tokens else text


def main(
    rows: int = 64, sequence_length: int = 256, batches: int = 3, quick: bool = False, output: Path | None = None
) -> None:
    """Measures every head and the fp8 body, and prints the table; `--output NAME` writes NAME.json and NAME.md."""
    if quick:
        rows, sequence_length, batches = 8, 64, 1
    pretrained = load_pretrained()
    model = pretrained.model.eval()
    layers = model.config.num_hidden_layers
    text, source = read_text(None)
    windows = windows_of(text, pretrained, sequence_length)
    report = {
        **environment(torch.device("cpu"), None),
        "model": pretrained.source,
        "text": source,
        "shape": f"{batches} batches of {rows} × {sequence_length} tokens",
        "samples": [],
    }
    depths = sorted({2, max(2, layers // 8), layers})
    for batch, depth, problem in problems(model, windows, rows, batches, depths):
        for order, record in enumerate(compare(problem, seed=batch)):
            report["samples"].append({"batch": batch, "depth": depth, "order": order, **record})
            print(json.dumps(report["samples"][-1]), file=sys.stderr, flush=True)
    table = render(report)
    print(table)
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(table)


if __name__ == "__main__":
    typer.run(main)
