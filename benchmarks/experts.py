"""How long and how much memory a mixture's experts take: this package's providers of `grouped_mlp` against their peers.

    python benchmarks/experts.py --output benchmarks/results/experts-h100.json
    python benchmarks/experts.py --model qwen3-30b-a3b --tokens 8192 --arm dense --arm ours --question step
    python benchmarks/experts.py --render benchmarks/results/experts-h100.json
    python benchmarks/experts.py --quick        # tiny sizes, on the CPU where there is no GPU

Questions: `forward`, without gradients; `step`, forward and backward with gradients of tokens, tables, biases and
routing weights; `step-half`, a step of which a random half of the tokens goes to no expert (the peers get that half
alone). Sizes are those of one layer of each model. Each arm runs in processes of its own. `dense` is the yardstick: the
same FLOPs as products of the library with one table, without activation, sorting or routing; a rate is that of the
FLOPs of the pairs. `original` needs `--original persistent_cggr_kernels.py`: its own module and router, without a gate;
its kernels give the experts no gradient.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from harness import AbsentError, Case, Record, measure, run_cases, work_off
from torch import Tensor

from cggr_compile.environment import environment


class Sizes(NamedTuple):
    """One layer: width, features, experts, choices of a token, activation."""

    width: int
    features: int
    count: int
    choices: int
    activation: str = "silu_gated"


MODELS = {
    "mixtral-8x7b": Sizes(4096, 14336, 8, 2),
    "qwen3-30b-a3b": Sizes(2048, 768, 128, 8),
    "olmoe-1b-7b": Sizes(2048, 1024, 64, 8),
    "gpt-oss-20b": Sizes(2880, 2880, 32, 4, "clamped_gated"),
    "cggr-readme": Sizes(1024, 4096, 8, 2, "silu"),
}
QUICK = {"tiny": Sizes(32, 16, 4, 2), "tiny-clamped": Sizes(32, 24, 4, 2, "clamped_gated")}
TRUTH = {name: Sizes(128, 96, 8, 2, name) for name in ("silu_gated", "clamped_gated", "silu")}
EVERY = {**MODELS, **QUICK, **TRUTH}
TOKENS, QUICK_TOKENS, TRUTH_TOKENS = (8192, 32768), (64,), 256
QUESTIONS = ("forward", "step", "step-half")
TENSORS = ("hidden", "gate_up", "down", "weights", "gate_up_bias", "down_bias")


class Problem(NamedTuple):
    """The arguments of `cggr::grouped_mlp`, in bfloat16 but for routing weights in fp32."""

    hidden: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    experts: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    keep: Tensor | None
    activation: str
    interleaved: bool

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient."""
        return {name: x for name in TENSORS if (x := getattr(self, name)) is not None and x.requires_grad}


Call = Callable[[], Tensor]
Arm = Callable[[Problem], Call]
"""Makes what is timed of a problem, once."""


def make_problem(question: str, shape: str, device: torch.device) -> Problem:
    """Seeded normal tokens and tables, and the choices of a random router; the clamped gate has GPT-OSS's layout."""
    name, tokens = shape.split("@")
    sizes, clamped = EVERY[name], EVERY[name].activation == "clamped_gated"
    random = torch.Generator(device).manual_seed(0)

    def normal(*size: int, by: int = 1) -> Tensor:
        x = torch.randn(size, generator=random, device=device, dtype=torch.bfloat16).mul_(by**-0.5)
        return x.requires_grad_(question != "forward")

    rows = sizes.features * (1 if sizes.activation == "silu" else 2)
    if clamped:
        gate_up, down = (
            normal(sizes.count, sizes.width, rows, by=sizes.width),
            normal(sizes.count, sizes.features, sizes.width, by=sizes.features),
        )
        gate_up, down = (x.detach().transpose(1, 2).requires_grad_(x.requires_grad) for x in (gate_up, down))
    else:
        gate_up = normal(sizes.count, rows, sizes.width, by=sizes.width)
        down = normal(sizes.count, sizes.width, sizes.features, by=sizes.features)
    logits = torch.randn(int(tokens), sizes.count, generator=random, device=device)
    weights, experts = logits.softmax(-1).topk(sizes.choices, -1)
    keep = None
    if question == "step-half":
        keep = torch.zeros(int(tokens), dtype=torch.bool, device=device)
        keep[torch.randperm(int(tokens), generator=random, device=device)[: int(tokens) // 2]] = True
    return Problem(
        normal(int(tokens), sizes.width),
        gate_up,
        down,
        (weights / weights.sum(-1, keepdim=True)).requires_grad_(question != "forward"),
        experts,
        normal(sizes.count, rows) if clamped else None,
        normal(sizes.count, sizes.width) if clamped else None,
        keep,
        sizes.activation,
        clamped,
    )


def flops(question: str, shape: str) -> int:
    """Of the products of the pairs that are counted, three times for a step."""
    name, tokens = shape.split("@")
    sizes = EVERY[name]
    pairs = int(tokens) * sizes.choices // (2 if question == "step-half" else 1)
    once = 2 * pairs * sizes.width * sizes.features * (2 if sizes.activation == "silu" else 3)
    return once if question == "forward" else 3 * once


def dense(p: Problem) -> Call:
    tokens = p.hidden.repeat(p.experts.shape[1], 1).detach()
    leaves = (tokens[: len(tokens) // 2] if p.keep is not None else tokens), p.gate_up[0], p.down[0]
    rows, up, down = (x.detach().clone().requires_grad_(p.hidden.requires_grad) for x in leaves)

    def call() -> Tensor:
        rows.grad = up.grad = down.grad = None
        return (rows @ up.T)[:, : down.shape[1]] @ down.T

    return call


def ours(p: Problem, provider: str) -> Call:
    from cggr_compile.kernels.providers import choose

    try:
        implementation = choose("grouped_mlp", p.hidden.device, torch.bfloat16, provider).implementation
    except ValueError as error:
        raise AbsentError(str(error)) from error
    return lambda: implementation(*p)


def transformers_experts(p: Problem, implementation: str) -> Call:
    """The module of a model, the problem's tables being its parameters."""
    import transformers as T
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if p.activation == "silu":
        raise AbsentError("transformers has no such experts with a SiLU and no gate")
    count, width, features = p.down.shape
    config = {"hidden_size": width, "intermediate_size": features, "num_local_experts": count}
    clamped = p.activation == "clamped_gated"
    with torch.device("meta"):
        module = GptOssExperts(T.GptOssConfig(**config)) if clamped else MixtralExperts(T.MixtralConfig(**config))
    module.config._experts_implementation = implementation
    tables = {n: x.transpose(1, 2) if clamped else x for n, x in (("gate_up_proj", p.gate_up), ("down_proj", p.down))}
    for name, x in {**tables, "gate_up_proj_bias": p.gate_up_bias, "down_proj_bias": p.down_bias}.items():
        if x is not None:  # as a view of the problem's leaf, which gets the gradient
            delattr(module, name)
            setattr(module, name, x)
    half = len(p.hidden) // 2 if p.keep is not None else len(p.hidden)
    return lambda: module(p.hidden[:half], p.experts[:half], p.weights[:half])


def scattermoe(p: Problem) -> Call:
    """ScatterMoE's products (github.com/shawntan/scattermoe, 0.3.0), with weights in bfloat16 as its modules have."""
    try:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear
    except ImportError as error:
        raise AbsentError(str(error)) from error
    if p.activation == "clamped_gated":
        raise AbsentError("scattermoe's modules have no clamped gate")
    count, choices = len(p.down), p.experts.shape[1]
    half = len(p.hidden) // 2 if p.keep is not None else len(p.hidden)

    def call() -> Tensor:
        order = flatten_sort_count(p.experts[:half], num_experts=count)
        products = parallel_linear(p.hidden[:half], p.gate_up.transpose(1, 2), choices, *order, grouped_out=True)
        gate, *up = products.chunk(1 if p.activation == "silu" else 2, dim=-1)
        activations = F.silu(gate) * up[0] if up else F.silu(gate)
        weights = p.weights[:half].to(p.hidden.dtype)
        return parallel_linear(activations, p.down.transpose(1, 2), 1, *order, gates=weights, grouped_in=True)

    return call


def original(p: Problem, path: str | None) -> Call:
    """The original's module; it has parameters, a router and a balance of its own."""
    if path is None:
        raise AbsentError("needs --original, the path of persistent_cggr_kernels.py")
    if p.activation != "silu" or p.hidden.requires_grad:
        raise AbsentError("the original has no gate, and its kernels no gradient")
    spec = importlib.util.spec_from_file_location("persistent_cggr_kernels", path)
    if spec is None or spec.loader is None:
        raise AbsentError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    count, width, features = p.down.shape
    layer = module.create_persistent_tr_mlp(width, features, count, p.experts.shape[1])
    layer = layer.to(p.hidden.device, p.hidden.dtype)
    return lambda: layer(p.hidden)[0]


def arms(original_path: str | None) -> dict[str, Arm]:
    """The arms by name, in the order of a round; imports happen in the making."""

    def compiled(arm: Arm) -> Arm:
        return lambda p: torch.compile(arm(p), dynamic=False)

    grouped, torchs = partial(transformers_experts, implementation="grouped_mm"), partial(ours, provider="torch")
    return {
        "dense": dense,
        "ours:triton": partial(ours, provider="triton"),
        "transformers:grouped_mm": grouped,
        "transformers:grouped_mm compiled": compiled(grouped),
        "ours:torch": torchs,
        "ours:torch compiled": compiled(torchs),
        "scattermoe": scattermoe,
        "transformers:sonicmoe": partial(transformers_experts, implementation="sonicmoe"),
        "original": partial(original, path=original_path),
    }


def errors(call: Call, problem: Problem) -> dict[str, float]:
    """The relative error of the result and the gradients, by norm, against the reference in float64."""
    from cggr_compile.kernels.reference.experts import grouped_mlp

    def step(function: Call, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        out = function()
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))}

    wide = {name: x.detach().double().requires_grad_() for name, x in problem.leaves.items()}
    exact = {name: x.detach() for name, x in step(lambda: grouped_mlp(*problem._replace(**wide)), wide).items()}
    found = {name: x.detach() for name, x in step(call, problem.leaves).items()}
    return {name: float((found[name].double() - x).norm() / x.norm()) for name, x in exact.items()}


def run_case(arm: Arm, case: Case, device: torch.device, steps: int) -> Record:
    problem = make_problem(case.question, case.shape, device)
    run = arm(problem)
    if case.kind == "error":
        return {"errors": errors(run, problem)}

    def call() -> Tensor:
        with torch.set_grad_enabled(case.question != "forward"):
            out = run()
        if case.question != "forward":
            out.backward(torch.ones_like(out))
        return out

    record = measure(call, tuple(problem.leaves.values()), device, steps)
    rate = flops(case.question, case.shape) / statistics.median(record["milliseconds"]) / 1e9
    return {**record, "tflops": rate}


def render(report: Record) -> str:
    """The tables: median milliseconds, those in kernels, the rate as a share of the dense one, a call's peak memory."""
    times: dict[tuple, list[float]] = defaultdict(list)
    kernels: dict[tuple, list[float]] = defaultdict(list)
    peaks: dict[tuple, int] = {}
    for record in report["records"]:
        if record["kind"] == "time" and record["status"] == "ok":
            key = record["arm"], record["question"], record["shape"]
            times[key] += record["milliseconds"]
            kernels[key] += [record["kernel_milliseconds"]] if "kernel_milliseconds" in record else []
            peaks[key] = max([peaks.get(key, 0), *record["peak_bytes"]])
    names = list(dict.fromkeys(record["arm"] for record in report["records"]))
    lines = [
        f"{report['device']}, commit {report['commit']}, torch {report['versions']['torch']}; median ms of a call "
        "(in kernels), its share of the dense rate, peak GiB above what was there.\n"
    ]
    for question in report["options"]["questions"]:
        lines += [f"| {question} | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
        for shape in report["shapes"]:
            cells = []
            for name in names:
                found, yardstick = times.get((name, question, shape)), times.get(("dense", question, shape))
                if not found:
                    cells.append("–")
                    continue
                median = statistics.median(found)
                share = f", {statistics.median(yardstick) / median:.0%}" if yardstick else ""
                key = name, question, shape
                of_kernels = f" ({statistics.median(kernels[key]):.2f})" if kernels[key] else ""
                cells.append(f"{median:.2f}{of_kernels}{share}, {peaks[key] / 2**30:.2f}")
            lines.append(f"| {shape} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["Relative error by norm against float64, of a step on 256 tokens:\n"]
    for record in report["records"]:
        if record["kind"] == "error" and record["status"] == "ok":
            found = ", ".join(f"{name} {error:.1e}" for name, error in record["errors"].items())
            lines.append(f"* {record['arm']}, {record['shape'].partition('@')[0]}: {found}")
    lines += ["", "Not measured:\n"]
    reasons: dict[str, list[str]] = defaultdict(list)
    for record in report["records"]:
        if record["status"] != "ok":
            case = f"{record['question']} of {record['shape']}"
            reasons[f"{record['arm']}: {record['status']}: {record['reason']}"].append(case)
    lines += [
        f"* {reason} ({len(cases)}: {', '.join(cases[:3])}{', …' * (len(cases) > 3)})"
        for reason, cases in reasons.items()
    ]
    return "\n".join(lines) + "\n"


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
    model: Annotated[list[str] | None, typer.Option(help="repeatable: " + ", ".join(MODELS))] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="repeatable")] = None,
    question: Annotated[list[str] | None, typer.Option(help="repeatable: " + ", ".join(QUESTIONS))] = None,
    original_path: Annotated[str | None, typer.Option("--original", help="its persistent_cggr_kernels.py")] = None,
    rounds: int = 1,
    steps: Annotated[int, typer.Option(help="most timed calls of a measurement")] = 20,
    budget: Annotated[float, typer.Option(help="seconds after which no worker is started")] = 540,
    timeout: Annotated[float, typer.Option(help="seconds after which a worker is stopped")] = 240,
    quick: Annotated[bool, typer.Option(help="tiny sizes")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON; the table goes beside it")] = None,
    result: Annotated[Path | None, typer.Option("--render", help="write the table of this JSON again")] = None,
    commit: Annotated[str | None, typer.Option(help="the commit measured, where there is no checkout")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    cases: Annotated[str, typer.Option(hidden=True)] = "[]",
) -> None:
    """Measures every arm, writes JSON and a markdown table, and prints the table."""
    place = torch.device(device)
    if worker is not None:
        made = arms(original_path)[worker]
        work_off([Case(*case) for case in json.loads(cases)], lambda case: run_case(made, case, place, steps), place)
        return
    if result is not None:
        print(write(json.loads(result.read_text()), result))
        return
    known = arms(None)
    for name, wanted, valid in (("arm", arm, known), ("question", question, QUESTIONS), ("model", model, EVERY)):
        if unknown := [x for x in wanted or () if x not in valid]:
            raise typer.BadParameter(f"{name}: got {', '.join(unknown)}; known are {', '.join(valid)}")
    questions = [q for q in QUESTIONS if not question or q in question]
    sizes = tokens or (QUICK_TOKENS if quick else TOKENS)
    shapes = [f"{name}@{size}" for name in model or (QUICK if quick else MODELS) for size in sizes]
    records: list[Record] = []
    options = {"rounds": rounds, "steps": steps, "quick": quick, "questions": questions}
    report = {**environment(place, commit), "options": options, "shapes": shapes, "records": records}
    end = time.monotonic() + budget
    for turn in range(rounds):
        for name in (x for x in known if not arm or x in arm):
            todo = [Case(q, shape, "time") for shape in shapes for q in questions]
            if turn == 0 and name not in ("dense", "original"):
                kinds = dict.fromkeys(EVERY[shape.split("@")[0]].activation for shape in shapes)
                todo = [Case("step", f"{kind}@{TRUTH_TOKENS}", "error") for kind in kinds] + todo
            command = [sys.executable, __file__, "--device", device, "--steps", str(steps), "--worker", name]
            command += ["--original", original_path] if original_path else []
            done = run_cases(command, todo, timeout, lambda: time.monotonic() < end)
            records += [{"round": turn, "arm": name, **record} for record in done]
            write(report, output)
            ok = sum(record["status"] == "ok" for record in done)
            print(f"round {turn}, {name}: {ok} of {len(done)} measured", file=sys.stderr)
    print(write(report, output))


def write(report: Record, output: Path | None) -> str:
    """Writes the JSON and the table beside it, and returns the table."""
    text = render(report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    typer.run(main)
