"""How long a training step takes: peers, the routed step, and what it could be at best; each in a process of its own.

    python benchmarks/step_time.py --device cuda --output benchmarks/results/step_time-h100.json
    python benchmarks/step_time.py --device cuda --model Qwen2.5-0.5B --arm compile --arm all --arm token@0.5
    python benchmarks/step_time.py --quick        # a tiny model on the CPU

Forward and backward (with `--optimizer`, fused AdamW too), random weights and ids, bf16 on CUDA (with `--autocast`,
fp32 parameters under bf16 autocast). Every round runs each arm once, one after another; before the first, all arms
compile side by side, so that caches on disk are warm: their first steps are `cold`, those of the rounds `first`.
Medians over all steps are quoted, every sample is kept and written as it comes: `--resume` goes on where a machine was
lost. `step_time_report.py` draws them; `step_time_matrix.py` has the runs that this project reports.

Arms: `eager` and `compile` are transformers on all rows, `random_eager` and `random_compile` on random rows. `all` is
this package with ratio=1, `random` with random rows, `routed` with scored rows and the exact head, `sampled` with the
sampled head, `ahead` with the router of the next step beside each. `floor` is `all` on a batch of just the kept rows.
`token`, `loss` and `token_loss` are the other routes, scored by the sampled head; `token_random`, `loss_random` draw.
`liger`, `liger_compile`, `original`, `original_compile` are Liger's kernels and CGGR 0.5.0, which must be installed.
`NAME@R` keeps the fraction R instead of `--ratio`. Switches of this package's arms: `…+outlined`, `…+recompute` and
`…+graphs` are `outline_layers=True`, `recompute_elementwise=True` and `cuda_graphs=True` (which outlines too),
`…+small` the loss in small blocks (`triton_one_pass_small`), `…+fp8` a router whose layers multiply in float8
(`router_body="fp8"`), `…+inductor` `inner="inductor"` on the CPU too, `…+matmul` a step whose layers do
(`matmul="fp8"`), `…+layers=N` a router of N layers. `…+budget=F` runs any arm that compiles under torch's
`activation_memory_budget` F, `…+checkpoint` any arm with transformers' gradient checkpointing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, repeat
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
import transformers
import typer
from harness import WARM_UP, first_line
from step_time_report import Arm, compiled_as, page, table

import cggr_compile as cggr
from cggr_compile.environment import environment
from cggr_compile.run.router_time import mark, seconds_between
from cggr_compile.schedule import kept_of


@dataclass(frozen=True)
class Shape:
    """A Llama-family model and a batch."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    sequence: int
    tied: bool = True


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM-135M", 576, 1536, 30, 9, 3, 49152, 32, 1024),
        Shape("SmolLM-360M", 960, 2560, 32, 15, 5, 49152, 32, 1024),
        Shape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, 16, 1024),
        Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, 16, 1024),
        Shape("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128256, 8, 1024),
        Shape("5M", 256, 688, 6, 4, 2, 4096, 8, 128),
        Shape("tiny", 64, 96, 4, 4, 2, 257, 8, 32),
    )
}


def build(shape: Shape, device: str, autocast: bool = False) -> torch.nn.Module:
    """The model with random weights, fp32 on the CPU and for autocast, else bf16, in training mode."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.sequence,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" and not autocast else torch.float32
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).train()


def _ours(**options: Any) -> Callable[..., Any]:
    def make(model: torch.nn.Module, arm: Arm) -> Callable[..., Any]:
        switches = {"cuda_graphs": arm.graphs, "outline_layers": arm.outlined or "auto"}
        switches |= {"recompute_elementwise": arm.recompute, "router_layers": arm.layers or "auto"}
        switches |= {"inner": "inductor" if arm.inductor else "auto"}
        switches |= {"router_body": "fp8" if arm.fp8 else "exact", "matmul": "fp8" if arm.matmul else "exact"}
        switches["kernels"] = {"masked_loss": "triton_one_pass_small"} if arm.small else "auto"
        return cggr.optimize(model, **{"ratio": arm.ratio, **options}, **switches)

    return make


def _ahead(model: torch.nn.Module, arm: Arm) -> Callable[..., Any]:
    routed = _ours(router_head="sampled")(model, arm)
    following: Iterator[Any] | None = None

    def step(**batch: torch.Tensor) -> Any:
        nonlocal following
        following = following or iter(model.cggr.score_ahead(repeat(batch)))
        return routed(**next(following))

    return step


def _liger(model: torch.nn.Module, *_: Any) -> torch.nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    return model


def _original(model: torch.nn.Module, arm: Arm) -> torch.nn.Module:
    from cggr import CGGRModel, create_truncated_router

    router = create_truncated_router(model, num_layers=2)
    return CGGRModel(model, router=router, min_tokens_ratio=arm.ratio, warmup_steps=0, dynamic_threshold=False)


def _original_compiled(model: torch.nn.Module, arm: Arm) -> torch.nn.Module:
    routed = _original(model, arm)
    routed.model, routed.scorer.router = torch.compile(routed.model), torch.compile(routed.scorer.router)
    return routed


def _on_random_rows(model: Callable[..., Any], arm: Arm) -> Callable[..., Any]:
    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        order = torch.randperm(len(input_ids), device=input_ids.device)
        rows = order[: kept_of(arm.ratio, len(input_ids))].sort().values
        return model(input_ids=input_ids[rows], labels=labels[rows])

    return step


Make = Callable[..., Callable[..., Any]]
PEERS: dict[str, Make] = {
    "eager": lambda model, *_: model,
    "compile": lambda model, *_: torch.compile(model),
    "random_eager": _on_random_rows,
    "random_compile": lambda model, arm: _on_random_rows(torch.compile(model), arm),
    "liger": _liger,
    "liger_compile": lambda model, *_: torch.compile(_liger(model)),
    "original": _original,
    "original_compile": _original_compiled,
}
OURS: dict[str, Make] = {
    "all": _ours(ratio=1.0),
    "floor": _ours(ratio=1.0),
    "random": _ours(selection="random"),
    "routed": _ours(),
    "sampled": _ours(router_head="sampled"),
    "ahead": _ahead,
    "token": _ours(route="token", selection="topk", router_head="sampled"),
    "token_random": _ours(route="token", selection="random"),
    "loss": _ours(route="loss", selection="topk", router_head="sampled"),
    "loss_random": _ours(route="loss", selection="random"),
    "token_loss": _ours(route=("token", "loss"), selection="topk", router_head="sampled"),
}
ARMS = PEERS | OURS
UNCOMPILED = ("eager", "random_eager", "liger", "original")
DEFAULT_ARMS = ("eager", "compile", "all", "floor", "random", "routed", "sampled")


def measure(
    arm: str, shape: Shape, device: str, ratio: float, steps: int, optimizer: bool, autocast: bool
) -> dict[str, Any]:
    """Seconds of each step after the warm-up, one right after the other as in training: nothing waits for the device
    between them. Seconds from the call that optimises or compiles the model to the end of the first step, peak memory
    in bytes, and of one step on CUDA the milliseconds in kernels and their number, in all and by kernel (name, number,
    microseconds). Of this package's arms also what the cost model predicts, as a share of a step on everything."""
    parsed = Arm.parse(arm, ratio)
    torch._functorch.config.activation_memory_budget = parsed.budget
    model = build(shape, device, autocast)
    if parsed.checkpoint:
        model.gradient_checkpointing_enable()
    marks = [mark(torch.device(device))]
    step = ARMS[parsed.name](model, parsed)
    rows = kept_of(parsed.ratio, shape.batch) if parsed.name == "floor" else shape.batch
    ids = torch.randint(0, shape.vocabulary, (rows, shape.sequence), device=device)
    update = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda") if optimizer else None
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    def one_step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            outputs = step(input_ids=ids, labels=ids)
        (outputs if isinstance(outputs, torch.Tensor) else outputs.loss).backward()
        if update is not None:
            update.step()

    for index in range(steps + WARM_UP):
        if index == WARM_UP and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one_step()
        marks.append(mark(torch.device(device)))
    sync()
    seconds = [seconds_between(*pair) for pair in pairwise(marks)]
    record: dict[str, Any] = {"first": seconds[0], "steps": seconds[WARM_UP:]}
    if hasattr(model, "cggr") and model.cggr.config.ratio < 1:
        record["predicted_share"] = model.cggr.report().cost.step_ratio
    if device == "cuda":
        # What a CUDA graph holds is reserved, not allocated.
        record["peak_bytes"] = torch.cuda.max_memory_reserved() if parsed.graphs else torch.cuda.max_memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            one_step()
            sync()
        events = [event for event in profile.key_averages() if event.self_device_time_total]
        record["kernel_milliseconds"] = sum(event.self_device_time_total for event in events) / 1000
        record["kernels"] = sum(event.count for event in events)
        record["profile"] = [[event.key[:100], event.count, event.self_device_time_total] for event in events]
    return record


def start(command: list[str], variables: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[str]:
    """The command, with these environment variables beside this process's own."""
    own = {**os.environ, **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)


GRACE = 60
"""Seconds in which a process that is told to end has to."""


def outcome(process: subprocess.Popen[str], timeout: float) -> dict[str, Any]:
    """What the process printed last, or why it failed."""
    try:
        out, err = process.communicate(timeout=max(timeout, 0))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks; killed, it would leave them on their GPUs
        try:
            process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
        return {"failed": f"not done in {timeout:.0f} s"}
    if process.returncode != 0:
        lines = err.splitlines()[::-1]
        return {
            "failed": first_line(
                "\n".join([line for line in lines if "Error" in line and "ChildFailed" not in line] or lines)
            )
        }
    return json.loads(out.splitlines()[-1])


MUST_AGREE = ("commit", "device", "versions", "shape", "strong", "ratio", "optimizer", "autocast")


def earlier(report: dict[str, Any], output: Path) -> dict[str, Any]:
    """The report of an interrupted run of the same commit, machine and options, without what failed;
    `typer.BadParameter` where the output is of another one."""
    before = json.loads(output.read_text())
    for key in MUST_AGREE:
        if before.get(key) != report.get(key):
            raise typer.BadParameter(
                f"resume: {output} has {key} {before.get(key)}, not {report.get(key)}; name another output"
            )
    good = {name: [run for run in runs if "steps" in run] for name, runs in before["samples"].items()}
    return {**before, "samples": good}


def resume(report: dict[str, Any], output: Path) -> None:
    """Takes over what an interrupted run has measured."""
    before = earlier(report, output)
    report["cold"] |= {name: found for name, found in before["cold"].items() if isinstance(found, float)}
    for name, runs in report["samples"].items():
        runs += before["samples"].get(name, [])


def save(report: dict[str, Any], output: Path | None) -> None:
    """Writes what there is so far: a machine may be lost in the middle."""
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(page(report))


@contextmanager
def cores_kept_busy(number: int) -> Iterator[None]:
    """So many other processes compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    model: Annotated[str, typer.Option(help=" or ".join(SHAPES))] = "SmolLM-135M",
    batch: Annotated[int | None, typer.Option(help="rows, the model's default if not given")] = None,
    sequence: Annotated[int | None, typer.Option(help="tokens a row")] = None,
    ratio: float = 0.25,
    steps: int = 10,
    rounds: int = 2,
    arm: Annotated[
        list[str] | None, typer.Option(help="repeatable, NAME[@RATIO][+SWITCH…]: " + ", ".join(ARMS))
    ] = None,
    optimizer: Annotated[bool, typer.Option(help="with a step of fused AdamW")] = False,
    autocast: Annotated[bool, typer.Option(help="fp32 parameters under bf16 autocast")] = False,
    side_by_side: Annotated[int, typer.Option(help="processes that compile at once before round 1")] = 4,
    timeout: Annotated[float, typer.Option(help="seconds after which a process is stopped")] = 300,
    budget: Annotated[float, typer.Option(help="seconds after which all of them are, and no other starts")] = math.inf,
    again: Annotated[bool, typer.Option("--resume", help="go on where the run that wrote the output ended")] = False,
    busy: Annotated[int, typer.Option(help="processes that keep as many cores busy meanwhile")] = 0,
    quick: Annotated[bool, typer.Option(help="the tiny model, one round")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON; the table goes beside it")] = None,
    commit: Annotated[str | None, typer.Option(help="the commit measured, where there is no checkout")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every arm and writes JSON and a markdown table."""
    if quick:
        model, rounds, steps, side_by_side = "tiny", 1, 3, 0
    given = {"batch": batch, "sequence": sequence}
    shape = replace(SHAPES[model], **{name: size for name, size in given.items() if size is not None})
    if only is not None:
        print(json.dumps(measure(only, shape, device, ratio, steps, optimizer, autocast)))
        return
    arms = list(arm or DEFAULT_ARMS)
    for name in arms:
        parsed = Arm.parse(name, ratio)
        if parsed.name not in ARMS:
            raise typer.BadParameter(f"arm: got {name!r}, expected one of {', '.join(ARMS)} in front of its switches")
        if parsed.name in PEERS and parsed != Arm(
            parsed.name, parsed.ratio, checkpoint=parsed.checkpoint, budget=parsed.budget
        ):
            raise typer.BadParameter(
                f"arm: got {name!r}, but the switches except +budget=F and +checkpoint are for this package's arms"
            )
    command = [sys.executable, __file__, "--device", device, "--model", model, "--ratio", str(ratio)]
    command += ["--batch", str(shape.batch), "--sequence", str(shape.sequence)]
    command += ["--optimizer"] * optimizer + ["--autocast"] * autocast
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    cold: dict[str, Any] = {}
    report = {
        **environment(torch.device(device), commit),
        "shape": asdict(shape), "ratio": ratio, "optimizer": optimizer, "autocast": autocast,
        "side_by_side": side_by_side, "busy": busy, "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "cold": cold, "samples": samples,
    }  # fmt: skip
    if again and output is not None and output.exists():
        resume(report, output)
    end = time.monotonic() + budget

    def left() -> float:
        return min(timeout, end - time.monotonic())

    compiled = dict.fromkeys(compiled_as(name) for name in arms if Arm.parse(name, ratio).name not in UNCOMPILED)
    waiting = [name for name in compiled if name not in cold] if side_by_side else []
    while waiting and left() > 0:
        now, waiting = waiting[:side_by_side], waiting[side_by_side:]
        compiling = [start([*command, "--steps", "0", "--only", name]) for name in now]
        for name, process in zip(now, compiling, strict=True):
            found = outcome(process, left())
            cold[name] = found.get("first", found.get("failed"))
            print(f"compiled {name}: {cold[name]}", file=sys.stderr, flush=True)
        save(report, output)
    for turn in range(rounds):
        for name in arms:
            if len(samples[name]) > turn or left() <= 0:
                continue
            with cores_kept_busy(busy):
                samples[name].append(outcome(start([*command, "--steps", str(steps), "--only", name]), left()))
            print(f"{name}: {samples[name][-1]}", file=sys.stderr, flush=True)
            save(report, output)
    print(table(report))


if __name__ == "__main__":
    typer.run(main)
