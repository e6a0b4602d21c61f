"""How long a training step takes: plain eager, torch.compile, routed, random rows; each in a process of its own.

    python benchmarks/step_time.py --device cuda --output benchmarks/results/step_time-h100.json
    python benchmarks/step_time.py --quick        # tiny shapes on the CPU

Forward and backward, random weights and ids. Every round runs each arm once; the median over all steps is
quoted, and every sample is kept.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

import cggr_compile as cggr
from cggr_compile.environment import environment

ARMS = ("eager", "compile", "routed", "random")


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


SMOLLM = Shape("SmolLM2-135M 32x1024", 576, 1536, 30, 9, 3, 49152, 32, 1024)
TINY = Shape("tiny 8x32", 64, 96, 4, 4, 2, 257, 8, 32)


def build(shape: Shape, device: str) -> torch.nn.Module:
    """The model with random weights, bf16 on CUDA and fp32 on the CPU, in training mode."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.sequence,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return transformers.LlamaForCausalLM(config).to(device, dtype).train()


def measure(arm: str, shape: Shape, device: str, ratio: float, steps: int) -> dict:
    """Seconds of each step after two warm-up steps, seconds of the first step and peak memory in bytes."""
    model = build(shape, device)
    step = model
    if arm == "compile":
        step = torch.compile(model)
    elif arm in ("routed", "random"):
        cggr.optimize(model, ratio=ratio, selection="topk" if arm == "routed" else "random")
    ids = torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), device=device)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for index in range(steps + 2):
        if index == 2 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        sync()
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        step(input_ids=ids, labels=ids).loss.backward()
        sync()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"first": seconds[0], "steps": seconds[2:], "peak_bytes": peak}


def main(
    device: str = "cpu",
    ratio: float = 0.25,
    steps: int = 6,
    rounds: int = 2,
    quick: bool = False,
    output: Path | None = None,
    commit: str | None = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every arm and writes JSON; prints a markdown table."""
    shape = TINY if quick else SMOLLM
    if only is not None:
        print(json.dumps(measure(only, shape, device, ratio, steps)))
        return
    results: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    arguments = ["--device", device, "--ratio", str(ratio), "--steps", str(steps)] + ["--quick"] * quick
    for _ in range(rounds):
        for arm in ARMS:
            command = [sys.executable, __file__, "--only", arm, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise typer.BadParameter(f"arm {arm} failed:\n{done.stderr[-2000:]}")
            results[arm].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {arm: statistics.median(s for run in runs for s in run["steps"]) for arm, runs in results.items()}
    print(f"| {shape.name}, r = {ratio} | ms | against compile | first step s | peak GiB |")
    print("| --- | --- | --- | --- | --- |")
    for arm, runs in results.items():
        peak = max(run["peak_bytes"] or 0 for run in runs) / 2**30
        first = statistics.median(run["first"] for run in runs)
        ratio_to_compile = medians[arm] / medians["compile"]
        memory = f"{peak:.1f}" if peak else "not measured"
        print(f"| {arm} | {medians[arm] * 1000:.1f} | {ratio_to_compile:.2f} | {first:.1f} | {memory} |")
    if output is not None:
        record = {
            **environment(torch.device(device), commit),
            "shape": asdict(shape),
            "ratio": ratio,
            "samples": results,
        }
        output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    typer.run(main)
