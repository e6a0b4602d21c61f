"""How long a training step takes on several GPUs of one host, each with a batch of its own (weak scaling), or with its
part of one batch (`--strong`).

    python benchmarks/distributed.py --ranks 1 --ranks 2 --output benchmarks/results/distributed-h200.json
    python benchmarks/distributed.py --ranks 1 --ranks 2 --strong
    python benchmarks/distributed.py --ranks 2 --arm fsdp2:compile --arm fsdp2:all --model Llama-3.2-1B
    python benchmarks/distributed.py --ranks 1 --ranks 2 --ranks 4 --beside --rounds 1
    python benchmarks/distributed.py --quick        # a tiny model, two processes on the CPU with gloo

Each measurement is a torchrun of its own (`--only` is what its ranks run). Forward, backward and AdamW; parameters are
fp32, and on CUDA a step runs in bf16: by autocast, or under FSDP2 by its MixedPrecisionPolicy, which reduces gradients
in fp32. Every round runs each arm once, one after another; its first step compiles. With `--beside` arms run at once
where there are GPUs for each; they share the host's cores, so first steps are then not to be compared. With `--resume`
the output keeps what it has, of other arms and ranks too, and only what is missing is measured.

Arms are WRAP:ARM[@RATIO]. WRAP is `none` (on one rank, where no other runs), `ddp` (`ddp_views` with
gradient_as_bucket_view=True, `ddp_bf16` with it and PyTorch's bf16_compress_hook) or `fsdp2` (layers and root;
`fsdp2_kept` with reshard_after_forward=False). ARM is `eager`, `compile` (torch.compile of the wrapped model, under
FSDP2 of each layer), `all` (this package, ratio=1) or `sampled` (scored rows, the sampled head). `…+graphs` is
`cuda_graphs=True`, `…+outlined` is `outline_layers=True`.

Per arm and number of ranks: seconds of each step on rank 0, the largest peak of memory of any rank, and of one step on
CUDA the milliseconds in kernels, in NCCL's among them, and in which NCCL's alone ran (exposed communication).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Condition
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from harness import gpus
from step_time import SHAPES, Shape, build, earlier, outcome, start
from torch.autograd import DeviceType
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import cggr_compile as cggr
from cggr_compile.environment import environment
from cggr_compile.run.router_time import mark, seconds_between

OURS: dict[str, dict[str, Any]] = {"all": {"ratio": 1.0}, "sampled": {"router_head": "sampled"}}
WRAPS = ("none", "ddp", "ddp_views", "ddp_bf16", "fsdp2", "fsdp2_kept")
ARMS = ("eager", "compile", *OURS)
WARM_UP = 12
"""DistributedDataParallel times its own steps at first: the first eleven were 10 % longer than those behind them."""
DEFAULT_ARMS = [f"{wrap}:{arm}" for wrap in ("none", "ddp", "fsdp2") for arm in ("compile", "all", "sampled")]


def parse(name: str, ratio: float) -> tuple[str, str, dict[str, Any]]:
    """Wrapper, arm and this package's options of a name; `typer.BadParameter` for any other."""
    wrap, _, rest = name.partition(":")
    arm, *switches = rest.split("+")
    arm, _, own = arm.partition("@")
    known = {"graphs": {"cuda_graphs": True}, "outlined": {"outline_layers": True}}
    if wrap not in WRAPS or arm not in ARMS or not set(switches) <= known.keys() or (switches and arm not in OURS):
        raise typer.BadParameter(f"arm: got {name!r}, expected WRAP:ARM of {', '.join(WRAPS)} and {', '.join(ARMS)}")
    options = {"ratio": float(own or ratio), **OURS.get(arm, {})}
    for switch in switches:
        options |= known[switch]
    return wrap, arm, options


def wrapped(model: torch.nn.Module, wrap: str, arm: str, options: dict[str, Any], device: torch.device) -> Any:
    """What is called in a step."""
    if arm in OURS:
        cggr.optimize(model, **options)
    if wrap.startswith("fsdp2"):
        dtype = torch.bfloat16 if device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            if arm == "compile":
                layer.compile()
            fully_shard(layer, mp_policy=policy, reshard_after_forward=wrap == "fsdp2")
        return fully_shard(model, mp_policy=policy, reshard_after_forward=wrap == "fsdp2")
    called: Any = model
    if wrap.startswith("ddp"):
        devices = None if device.type == "cpu" else [device.index]
        called = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=wrap != "ddp")
        if wrap == "ddp_bf16":
            called.register_comm_hook(None, bf16_compress_hook)
    return torch.compile(called) if arm == "compile" else called


def measure(name: str, shape: Shape, device: torch.device, ratio: float, steps: int) -> dict[str, Any]:
    """One rank's part of a measurement; the figures are rank 0's, the peak of memory the largest of all ranks'."""
    wrap, arm, options = parse(name, ratio)
    model = build(shape, device.type).float()
    random = torch.Generator(device).manual_seed(dist.get_rank())
    ids = torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), device=device, generator=random)
    cuda = device.type == "cuda"
    marks = [mark(device)]
    step = wrapped(model, wrap, arm, options, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=cuda)

    def one_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        casts = cuda and not wrap.startswith("fsdp2")
        with torch.autocast("cuda", dtype=torch.bfloat16) if casts else nullcontext():
            loss = step(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()

    for index in range(steps + WARM_UP):
        if index == WARM_UP and cuda:
            torch.cuda.reset_peak_memory_stats()
        one_step()
        marks.append(mark(device))
    if cuda:
        torch.cuda.synchronize()
    seconds = [seconds_between(*pair) for pair in pairwise(marks)]
    record: dict[str, Any] = {"first": seconds[0], "steps": seconds[WARM_UP:]}
    if cuda:
        peak = torch.tensor(float(torch.cuda.max_memory_reserved()), device=device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        record["peak_bytes"] = int(peak)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            one_step()
            torch.cuda.synchronize()
        record |= kernel_times(
            [
                (event.name, event.time_range.start, event.time_range.end)
                for event in profile.events()
                if event.device_type == DeviceType.CUDA
            ]
        )
    return record


def kernel_times(kernels: list[tuple[str, float, float]]) -> dict[str, float]:
    """Milliseconds in kernels (name, start, end in microseconds), in NCCL's, and in which nothing but NCCL's ran."""
    nccl = [kernel for kernel in kernels if "nccl" in kernel[0].lower()]
    rest = [kernel for kernel in kernels if "nccl" not in kernel[0].lower()]
    return {
        "kernel_milliseconds": sum(end - begin for _, begin, end in kernels) / 1000,
        "nccl_milliseconds": sum(end - begin for _, begin, end in nccl) / 1000,
        "exposed_milliseconds": (_covered(kernels) - _covered(rest)) / 1000,
    }


def _covered(kernels: list[tuple[str, float, float]]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    covered, until = 0.0, -math.inf
    for _, begin, end in sorted(kernels, key=lambda kernel: kernel[1]):
        covered += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return covered


def run_rank(name: str, shape: Shape, device: str, ratio: float, steps: int) -> None:
    """What torchrun starts: rank 0 prints the record."""
    rank = int(os.environ["LOCAL_RANK"])
    own = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        record = measure(name, shape, own, ratio, steps)
        if rank == 0:
            print(json.dumps(record), flush=True)
    finally:
        dist.destroy_process_group()


def medians(report: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of what was measured, by arm and ranks."""
    steps = {key: [step for run in runs for step in run.get("steps", [])] for key, runs in report["samples"].items()}
    return {key: median(found) * 1e3 for key, found in steps.items() if found}


def _line(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _figure(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def table(report: dict[str, Any]) -> str:
    """Medians by arm and ranks; scaling is the one-rank step of the same arm over the step, of ranks that share a batch
    over as many of them (100 % is ideal)."""
    scales = "strong scaling" if report.get("strong") else "weak scaling"
    columns = ("arm", "ranks", "ms", scales, "GiB a rank", "exposed ms")
    lines = [_line(*columns), _line(*("---" for _ in columns))]
    found = medians(report)
    for key, runs in report["samples"].items():
        name, _, ranks = key.rpartition(" ×")
        if key not in found:
            lines.append(_line(name, ranks, (runs or [{}])[-1].get("failed", "not run"), "", "", ""))
            continue
        alone = found.get(f"none:{name.partition(':')[2]} ×1")
        share = int(ranks) if report.get("strong") else 1
        scaling = f"{alone / found[key] / share:.0%}" if alone else ""
        peak = max((run["peak_bytes"] / 2**30 for run in runs if "peak_bytes" in run), default=None)
        exposed = [run["exposed_milliseconds"] for run in runs if "exposed_milliseconds" in run]
        figures = _figure(found[key]), scaling, _figure(peak), _figure(median(exposed) if exposed else None)
        lines.append(_line(name, ranks, *figures))
    return "\n".join(lines)


class Devices:
    """Which GPUs (CUDA's names) no measurement uses. On the CPU, which has none, there is one place for all ranks."""

    def __init__(self, device: str) -> None:
        self.names = gpus() if device == "cuda" else []
        self._free, self._changed = sorted(self.names), Condition()

    @contextmanager
    def taken(self, number: int) -> Iterator[list[str]]:
        """As many GPUs, once they are free."""
        number = min(number, len(self.names))
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= number)
            own, self._free = self._free[:number], self._free[number:]
        try:
            yield own
        finally:
            with self._changed:
                self._free = sorted(self._free + own)
                self._changed.notify_all()


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    model: Annotated[str, typer.Option(help=" or ".join(SHAPES))] = "SmolLM-135M",
    batch: Annotated[int | None, typer.Option(help="rows of a rank, the model's default if not given")] = None,
    sequence: Annotated[int | None, typer.Option(help="tokens a row")] = None,
    ratio: float = 0.25,
    ranks: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    strong: Annotated[bool, typer.Option(help="--batch is that of all ranks together")] = False,
    arm: Annotated[list[str] | None, typer.Option(help="repeatable, WRAP:ARM[@RATIO][+SWITCH…]")] = None,
    steps: int = 20,
    rounds: int = 2,
    timeout: Annotated[float, typer.Option(help="seconds after which a measurement is stopped")] = 300,
    beside: Annotated[bool, typer.Option(help="arms at once, each on GPUs of its own")] = False,
    limit: Annotated[float, typer.Option(help="seconds for everything; what is over then is not measured")] = 1e9,
    again: Annotated[bool, typer.Option("--resume", help="measure only what the output does not have")] = False,
    quick: Annotated[bool, typer.Option(help="the tiny model, one round of three steps, two ranks")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON; the table goes beside it")] = None,
    commit: Annotated[str | None, typer.Option(help="the commit measured, where there is no checkout")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every arm on every number of ranks, and writes JSON and a markdown table."""
    if quick:
        model, rounds, steps, ranks = "tiny", 1, 3, [2]
    given = {"batch": batch, "sequence": sequence}
    shape = replace(SHAPES[model], **{name: size for name, size in given.items() if size is not None})
    if only is not None:
        run_rank(only, shape, device, ratio, steps)
        return
    counts, arms = ranks or [1, 2], arm or DEFAULT_ARMS
    if strong and any(shape.batch % n for n in counts):
        raise typer.BadParameter(f"batch: {shape.batch} rows cannot be divided among {counts} ranks")
    devices = Devices(device)
    if device == "cuda" and max(counts) > len(devices.names):
        raise typer.BadParameter(f"ranks: {max(counts)} need as many GPUs, and there are {len(devices.names)}")
    wanted = [(name, n) for n in counts for name in arms if (n == 1) == (parse(name, ratio)[0] == "none")]
    samples: dict[str, list[dict[str, Any]]] = {f"{name} ×{n}": [] for name, n in wanted}
    report = {
        **environment(torch.device(device), commit),
        "shape": asdict(shape), "strong": strong, "ratio": ratio, "optimizer": "AdamW", "samples": samples,
    }  # fmt: skip
    own = [__file__, "--device", device, "--model", model, "--ratio", str(ratio), "--steps", str(steps)]
    own += ["--sequence", str(shape.sequence)]
    if again and output is not None and output.exists():
        before = earlier(report, output)
        report["command"] = f"{before['command']} && {report['command']}"
        for key, runs in before["samples"].items():
            samples.setdefault(key, []).extend(runs)
    end = time.monotonic() + limit

    def measured(name: str, n: int) -> tuple[str, dict[str, Any]]:
        """The key and what was found, nothing where the time is over."""
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        rows = ["--batch", str(shape.batch // n if strong else shape.batch)]
        with devices.taken(n) as names:
            left = min(timeout, end - time.monotonic())
            if left <= 0:
                return f"{name} ×{n}", {}
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(names)} if names else {}
            process = start([*launch, *own, *rows, "--only", name], visible)
            return f"{name} ×{n}", outcome(process, left)

    for turn in range(rounds):
        missing = [each for each in wanted if len(samples["{} ×{}".format(*each)]) <= turn]
        with ThreadPoolExecutor(max(len(devices.names), 1) if beside else 1) as threads:
            for each in as_completed([threads.submit(measured, *each) for each in missing]):
                key, record = each.result()
                samples[key] += [record] if record else []
                print(f"{key}: {record}", file=sys.stderr, flush=True)
                if output is not None:
                    output.write_text(json.dumps(report, indent=1) + "\n")
                    output.with_suffix(".md").write_text(table(report) + "\n")
    print(table(report))


if __name__ == "__main__":
    typer.run(main)
