"""inductor's own CUDA-graph trees with static parameters against `cuda_graphs=True`: milliseconds of a step.

    python benchmarks/graph_trees.py trees.json

Every arm has a process of its own. `trees` hands the rewritten step to inductor with `triton.cudagraphs` on and with
its parameters marked static, as Dynamo marks those of a module: unmarked, each would be copied at every step.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._functorch.aot_autograd as aot
import typer
from harness import WARM_UP
from step_time import SHAPES, build

import cggr_compile as cggr
from cggr_compile.environment import environment
from cggr_compile.run import inner
from cggr_compile.run.router_time import mark, seconds_between

ARMS = ("none", "cuda_graphs", "trees")


def static_parameters() -> None:
    """Lets AOTAutograd take the parameters of every module that is compiled for static inputs."""
    compile_in, metadata = inner.compile_in, aot._try_get_metadata_from_dynamo
    parameters: list[int] = []

    def remember(mode: Any, module: Any, inputs: Sequence[Any], *rest: Any) -> Any:
        tensors = [x for x in inputs if not isinstance(x, int)]
        parameters[:] = [place for place, x in enumerate(tensors) if isinstance(x, torch.nn.Parameter)]
        return compile_in(mode, module, inputs, *rest)

    def marked(*given: Any) -> tuple[Any, list[int]]:
        return metadata(*given)[0], list(parameters)

    inner.compile_in, aot._try_get_metadata_from_dynamo = remember, marked


def measure(arm: str, model: str, ratio: float, steps: int) -> dict[str, Any]:
    """Seconds of each step after the warm-up, of the first, and GiB reserved."""
    shape = SHAPES[model]
    if arm == "trees":
        torch._inductor.config.triton.cudagraphs = True
        static_parameters()
    trained = build(shape, "cuda")
    cggr.optimize(trained, ratio=ratio, selection="topk", cuda_graphs=arm == "cuda_graphs")
    ids = torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), device="cuda")
    marks = [mark(torch.device("cuda"))]
    for _ in range(steps + WARM_UP):
        trained.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        trained(input_ids=ids, labels=ids).loss.backward()
        marks.append(mark(torch.device("cuda")))
    seconds = [seconds_between(*pair) for pair in pairwise(marks)]
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    reserved = torch.cuda.max_memory_reserved() / 2**30
    return {"steps": seconds[WARM_UP:], "first": seconds[0], "GiB": round(reserved, 1), "cudagraph_skips": skipped}


def main(
    output: Path,
    model: str = "SmolLM-135M",
    ratio: Annotated[list[float] | None, typer.Option(help="Repeatable.")] = None,
    steps: int = 20,
    commit: str | None = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every arm at every ratio and writes JSON."""
    if only is not None:
        print(json.dumps(measure(only, model, (ratio or [1.0])[0], steps)))
        return
    found = []
    for kept in ratio or [1.0, 0.25]:
        for arm in ARMS:
            command = [sys.executable, __file__, str(output), "--model", model, "--ratio", str(kept)]
            done = subprocess.run([*command, "--steps", str(steps), "--only", arm], capture_output=True, text=True)
            result = (
                json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-800:]}
            )
            found.append({"arm": arm, "ratio": kept, **result})
            what = f"{1000 * statistics.median(result['steps']):.2f} ms" if "steps" in result else result["failed"]
            about = environment(torch.device("cuda"), commit)
            output.write_text(json.dumps({**about, "model": model, "runs": found}, indent=1) + "\n")
            print(arm, kept, what, {name: x for name, x in result.items() if name not in ("steps", "failed")})


if __name__ == "__main__":
    typer.run(main)
