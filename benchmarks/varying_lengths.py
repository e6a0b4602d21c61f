"""What batches of varying shapes cost: code for one shape against code for many, and ragged steps in all.

    python benchmarks/varying_lengths.py --device cuda --output benchmarks/results/varying_lengths-h100.json
    python benchmarks/varying_lengths.py --quick      # a tiny model on the CPU

Forward and backward of a Llama of SmolLM-135M's widths with fewer layers (`--layers`), random weights and ids, bf16 on
CUDA; each arm in a process of its own, one after another, every sample is kept. Arms: `static@R` trains the fraction R
on batches of one shape, whose code knows it; `symbolic@R` the same after a step of another shape, on code for many.
`ragged@R` takes 60 steps of drawn lengths and compiles in the loop, as `ragged_compile`, torch.compile on everything,
does. `padded@R` has the same lengths, of rows that are padded on the right. `…+graphs` is `cuda_graphs=True`, `…+unpad`
`unpad=True`, `…+by64` rounds lengths up to multiples of 64, `…+flash` runs without cuDNN's attention. Each arm has a
folder of its own for what is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import WARM_UP, first_line
from padding import padded

import cggr_compile as cggr
from cggr_compile.environment import environment

FIXED = [
    f"{code}@{ratio}{graphs}" for ratio in (1.0, 0.25) for graphs in ("", "+graphs") for code in ("static", "symbolic")
]
RAGGED = ["ragged_compile", "ragged@1.0", "ragged@0.25", "ragged@0.25+graphs"]
RAGGED += [f"{RAGGED[i]}+{switch}" for switch in ("flash", "by64") for i in (0, 1)] + ["ragged@1.0+graphs+by64"]
RAGGED += ["symbolic@1.0+flash", "padded@1.0", "padded@1.0+unpad", "padded@1.0+graphs+unpad"]
TIMEOUT = 400


def build(layers: int, device: str, quick: bool) -> torch.nn.Module:
    """The model in training mode."""
    width, vocabulary = (64, 257) if quick else (576, 49152)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).train()
    return model.bfloat16() if device == "cuda" else model


def lengths_of(arm: str, length: int, steps: int) -> list[int]:
    """The length of each step of an arm."""
    step = 64 if "+by64" in arm else 1
    if arm.startswith("static"):
        return [length] * (steps + WARM_UP)
    if arm.startswith("symbolic"):
        return [length - 16] + [length] * (steps + WARM_UP)
    drawn = random.Random(0)
    return [-(-drawn.randint(length // 4, length) // step) * step for _ in range(60)]


def batch_of(arm: str, vocabulary: int, rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Random ids, in rows that an arm may want padded."""
    if arm.startswith("padded"):
        batch = padded(rows, length, vocabulary, torch.default_generator)
        return {name: tensor.to(device) for name, tensor in batch.items()}
    ids = torch.randint(0, vocabulary, (rows, length), device=device)
    return {"input_ids": ids, "labels": ids}


def worker(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every step, from its forward to the end of its backward on the device, and how often it compiled."""
    model = build(options.layers, options.device, options.quick)
    step: Callable[..., Any] = model
    torch.backends.cuda.enable_cudnn_sdp("+flash" not in arm)
    if arm.startswith("ragged_compile"):
        step = torch.compile(model)
    else:
        ratio = float(arm.partition("@")[2].partition("+")[0])
        inner = "inductor" if options.device == "cuda" else "aot_eager"
        more = {"unpad": True} if "+unpad" in arm else {}
        step = cggr.optimize(model, ratio=ratio, cuda_graphs="+graphs" in arm, inner=inner, **more)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    lengths, seconds = lengths_of(arm, options.length, options.steps), []
    vocabulary = model.config.vocab_size
    for length in lengths:
        batch = batch_of(arm, vocabulary, options.batch, length, options.device)
        model.zero_grad(set_to_none=True)
        synchronize()
        start = time.perf_counter()
        step(**batch).loss.backward()
        synchronize()
        seconds.append(time.perf_counter() - start)
    record: dict[str, Any] = {"arm": arm, "lengths": lengths, "seconds": seconds, "total": sum(seconds)}
    if hasattr(model, "cggr"):
        report = model.cggr.report()
        record |= {"compilations": report.compilations, "cuda_graphs": report.cuda_graphs}
    if options.device == "cuda":
        record["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return record


def measured(arm: str) -> dict[str, Any]:
    """A worker's record, or why there is none."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", arm]
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | caches)
        except subprocess.TimeoutExpired:
            return {"arm": arm, "failed": f"not done in {TIMEOUT} s"}
    if done.returncode != 0:
        return {"arm": arm, "failed": first_line("\n".join(done.stderr.splitlines()[::-1]))}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arm", action="append", help="one of the arms; again for more; all by default")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--commit", help="as found where the benchmark does not run in a checkout")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.batch, options.length, options.layers, options.steps = 4, 32, 3, 3
    if options.worker:
        print(json.dumps(worker(options.worker, options)))
        return
    report: dict[str, Any] = {**environment(torch.device(options.device), options.commit), "records": []}
    for arm in options.arm or [*FIXED, *RAGGED]:
        record = measured(arm)
        report["records"].append(record)
        if "failed" in record:
            print(f"{arm:24} failed: {record['failed']}", flush=True)
        else:
            middle = sorted(record["seconds"])[len(record["seconds"]) // 2]
            counted = record.get("compilations", "")
            print(f"{arm:24} median {1000 * middle:8.2f} ms, total {record['total']:7.1f} s  {counted}", flush=True)
        if options.output is not None:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
