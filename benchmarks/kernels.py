"""How long and how much memory the head's loss and the row scores take: this package's kernels against their peers.

    python benchmarks/kernels.py --output benchmarks/results/kernels-h100.json
    python benchmarks/kernels.py --shape 8192x2304x256000 --arm matmul --arm cce --arm ours --question loss
    python benchmarks/kernels.py --render benchmarks/results/kernels-h100.json
    python benchmarks/kernels.py --quick        # tiny shapes, on the CPU where there is no GPU

Questions: `loss` and `loss-quarter` are forward and backward of the mean cross-entropy over all rows and over a sorted
random quarter of them, with gradients for the whole hidden and the weight; `score` is the negative log-likelihood of
each row without a gradient, exactly and by the router heads, `score-four` all four quantities. Each arm runs in
processes of its own, since some peers patch globally; a round runs every arm once. For the quarter the peers gather
their rows inside the timed call.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from harness import (
    DATA,
    QUESTIONS,
    AbsentError,
    Case,
    Problem,
    Record,
    Shape,
    make_problem,
    measure,
    render,
    run_cases,
    summarise,
    work_off,
)
from torch import Tensor

import cggr_compile as cggr
from cggr_compile.environment import environment

SHAPES = ("8192x2304x256000", "8192x4096x131072", "32768x576x49152", "16384x896x151936", "16384x2048x128256")
TRUTH_SHAPE = "512x256x5000"
QUICK_SHAPES = ("64x32x500", "96x16x300")
QUANTITIES = {"score": ["nll"], "score-four": ["nll", "entropy", "margin", "confidence"]}
MOST_LOGIT_BYTES = 40 * 2**30

Loss = Callable[[Problem], Tensor]


def gathering(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """A loss of (hidden, weight, target) as one of the problem's rows."""

    def of_rows(problem: Problem) -> Tensor:
        hidden, weight, target, rows = problem
        if rows is None:
            return loss(hidden, weight, target)
        return loss(hidden.index_select(0, rows), weight, target[rows])

    return of_rows


def eager_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target)


def eager_score(problem: Problem) -> Tensor:
    return F.cross_entropy((problem.hidden @ problem.weight.T).float(), problem.target, reduction="none")


def matmul(problem: Problem) -> Tensor:
    size = 2 * problem.hidden.shape[0] * problem.weight.shape[0]
    if size > MOST_LOGIT_BYTES:
        raise AbsentError(f"bf16 logits would take {size / 2**30:.0f} GiB, more than 40 GiB")
    return problem.hidden @ problem.weight.T


def compiled(function: Loss) -> Loss:
    # Static shapes, as in training; the reset keeps the many shapes of one process within dynamo's cache limit.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def torch_chunked_loss() -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise AbsentError(f"torch {torch.__version__} has no linear_cross_entropy")
    # Without options it is the reference, which materialises the logits: the arm `eager`.
    options = torch.nn.LinearCrossEntropyOptions()
    return gathering(lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options))


def liger_loss(implementation: str = "") -> Loss:
    os.environ["LIGER_KERNEL_IMPL"] = implementation  # read when it is imported
    # Its module passes on more arguments than the CuTe back end of 0.8.5 takes; the function does not.
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return gathering(liger_fused_linear_cross_entropy)


def quack_loss() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # 4096 is the default. 0.6.5 refuses a chunk of as many rows as the hidden has columns.
        chunk = 2048 if hidden.shape[1] == 4096 else 4096
        # It takes its fastest algorithm where that can run (`scaled_exp_lce_supported`).
        return chunked_linear_cross_entropy(hidden, weight, target, chunk)

    return gathering(loss)


def cce_loss(filter_eps: str | None) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return gathering(lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target, filter_eps=filter_eps))


def cce_score() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda problem: linear_cross_entropy(problem.hidden, problem.weight, problem.target, reduction="none")


PEERS: dict[str, dict[str, Callable[[], Loss]]] = {
    "liger": {"loss": liger_loss},
    "liger_cute": {"loss": lambda: liger_loss("cutedsl")},
    "quack": {"loss": quack_loss},
    "cce": {"loss": lambda: cce_loss("auto"), "score": cce_score},
    "cce_exact": {"loss": lambda: cce_loss(None)},
    "eager": {"loss": lambda: gathering(eager_loss), "score": lambda: eager_score},
    "compile": {"loss": lambda: compiled(gathering(eager_loss)), "score": lambda: compiled(eager_score)},
    "linear_cross_entropy": {"loss": torch_chunked_loss},
}
"""By arm and operation, what makes its function; `loss` answers both row settings. Imports happen in the making."""

NEED_CUDA = ("liger", "liger_cute", "quack", "cce", "cce_exact")
OURS = "ours:"
HEADS = "head:"
ROUTER_HEADS = ("sampled", "fp8")
OPERATORS = {"loss": "masked_loss", "score": "score"}


def ours(question: str, provider: str, device: torch.device) -> Loss:
    from cggr_compile.kernels.providers import choose

    operation = question.split("-")[0]
    try:
        run = choose(OPERATORS[operation], device, torch.bfloat16, provider).implementation
    except ValueError as error:
        raise AbsentError(str(error)) from error
    if operation == "score":
        return lambda p: run(p.hidden, p.weight, None, p.target, QUANTITIES[question])
    if question == "loss":
        return lambda p: run(p.hidden, p.weight, None, p.target)
    return lambda p: run(p.hidden, p.weight, None, p.target, rows=p.rows)


def router_head(name: str, device: torch.device) -> Loss:
    """The scores by a cheap router head with its default sizes, and all that a step of it costs."""
    from cggr_compile.kernels.providers import choose

    def operator(op: str, dtype: torch.dtype = torch.bfloat16) -> Callable[..., Any]:
        return choose(op, device, dtype).implementation

    config, nll = cggr.RoutingConfig(), ["nll"]
    if name == "fp8":
        return lambda p: operator("fp8_score")(p.hidden, p.weight, None, p.target, nll)

    def sampled(p: Problem) -> Tensor:
        sizes = p.weight.shape[0], config.router_head_frequent, config.router_head_sampled
        drawn = operator("sample_columns", torch.int64)(p.target, torch.rand(1, device=device), *sizes)
        return operator("sampled_score")(p.hidden, p.weight, None, p.target, *drawn, nll)

    return sampled


def our_arms() -> dict[str, tuple[str, ...]]:
    """The questions that each provider answers, the reference left out."""
    from cggr_compile.kernels.providers import PROVIDERS

    # `triton` is one of the algorithms by name.
    left_out = ("reference", "triton_one_pass")
    names = {name: None for operator in OPERATORS.values() for name in PROVIDERS[operator] if name not in left_out}
    return {OURS + name: tuple(q for q in QUESTIONS if name in PROVIDERS[OPERATORS[q.split("-")[0]]]) for name in names}


def all_arms() -> dict[str, tuple[str, ...]]:
    """Every arm with the questions it answers, in the order of a round, which a time budget may cut off at its end."""
    peers = {name: tuple(q for q in QUESTIONS[:3] if q.split("-")[0] in makers) for name, makers in PEERS.items()}
    fused = {name: peers.pop(name) for name in NEED_CUDA}
    heads = {HEADS + name: ("score",) for name in ROUTER_HEADS}
    return {"matmul": ("score",), "compile": peers.pop("compile"), **our_arms(), **heads, **fused, **peers}


def make(arm: str, question: str, device: torch.device) -> Loss:
    """The function that answers the question, or AbsentError or ImportError."""
    if arm.startswith(HEADS):
        return router_head(arm.removeprefix(HEADS), device)
    if arm.startswith(OURS):
        return ours(question, arm.removeprefix(OURS), device)
    if arm in NEED_CUDA and device.type != "cuda":
        raise AbsentError("needs CUDA")
    return matmul if arm == "matmul" else PEERS[arm][question.split("-")[0]]()


def truth(question: str, problem: Problem) -> dict[str, Tensor]:
    """In float64, of the same bf16 inputs: the loss and both gradients, or each quantity of the rows."""
    wide = [x.detach().double().requires_grad_(question.startswith("loss")) for x in problem[:2]]
    exact = Problem(wide[0], wide[1], problem.target, problem.rows)
    if question.startswith("loss"):
        loss = gathering(lambda hidden, weight, target: F.cross_entropy(hidden @ weight.T, target))(exact)
        loss.backward()
        return {"loss": loss.detach(), "hidden": wide[0].grad, "weight": wide[1].grad}
    log_p = (wide[0] @ wide[1].T).log_softmax(-1)
    top = log_p.exp().topk(2, dim=-1).values
    rows = {
        "nll": -log_p.gather(1, problem.target[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "margin": 1 - (top[:, 0] - top[:, 1]),
        "confidence": top[:, 0],
    }
    return {name: rows[name] for name in QUANTITIES[question]}


def answer(question: str, problem: Problem, result: Tensor) -> dict[str, Tensor]:
    """The arm's answer under the names of `truth`."""
    if question.startswith("loss"):
        return {"loss": result.detach(), "hidden": problem.hidden.grad, "weight": problem.weight.grad}
    names = QUANTITIES[question]
    return dict(zip(names, result.view(len(names), -1), strict=True))


def run_case(arm: str, case: Case, data: str, device: torch.device, most_steps: int) -> Record:
    """What the case asks for: errors relative to the truth's norm, or times, peaks and the norms of the answer."""
    question = case.question
    function = make(arm, question, device)
    problem = make_problem(question, Shape.parse(case.shape), data, device)

    def call() -> Tensor:
        if not question.startswith("loss"):
            with torch.no_grad():
                return function(problem)
        loss = function(problem)
        loss.backward()
        return loss

    if case.kind == "error":
        exact = truth(question, problem)
        got = answer(question, problem, call())
        return {"errors": {name: float((got[name].double() - x).norm() / x.norm()) for name, x in exact.items()}}
    record = measure(call, (problem.hidden, problem.weight), device, most_steps)
    if arm != "matmul" and not arm.startswith(HEADS):
        got = answer(question, problem, call())
        norms = {name: float(torch.linalg.vector_norm(x, dtype=torch.float32)) for name, x in got.items()}
        record["fingerprint"] = norms
    return record


def cases_of(arm: str, answered: tuple[str, ...], shapes: list[str], truth_shape: str | None) -> list[Case]:
    # A router head estimates; how well is the question of benchmarks/router_head.py.
    exact = arm != "matmul" and not arm.startswith(HEADS)
    guards = [] if truth_shape is None or not exact else [Case(q, truth_shape, "error") for q in answered]
    return guards + [Case(question, shape, "time") for shape in shapes for question in answered]


def chosen(name: str, wanted: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The known names that are wanted, all of them by default; `ours` stands for every provider."""
    unknown = [w for w in wanted or [] if w not in (*known, OURS.rstrip(":"))]
    if unknown:
        raise typer.BadParameter(f"{name}: got {', '.join(unknown)}; known are {', '.join(known)}")
    return tuple(k for k in known if not wanted or k in wanted or (k.startswith(OURS) and "ours" in wanted))


def write(report: Record, output: Path | None) -> str:
    """Adds the summary, writes the JSON and the table beside it, and returns the table."""
    report["summary"] = summarise(report["records"], tuple(PEERS))
    text = render(report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(text)
    return text


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
    shape: Annotated[list[str] | None, typer.Option(help="TOKENSxHIDDENxVOCABULARY, repeatable")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="repeatable; `ours` is every provider")] = None,
    question: Annotated[list[str] | None, typer.Option(help="repeatable: " + ", ".join(QUESTIONS))] = None,
    data: Annotated[str, typer.Option(help=" or ".join(DATA))] = "normal",
    rounds: int = 1,
    steps: Annotated[int, typer.Option(help="most timed calls of a measurement")] = 20,
    budget: Annotated[float, typer.Option(help="seconds after which no worker is started")] = 360,
    timeout: Annotated[float, typer.Option(help="seconds after which a worker is stopped")] = 120,
    quick: Annotated[bool, typer.Option(help="tiny shapes")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON; the table goes beside it")] = None,
    result: Annotated[Path | None, typer.Option("--render", help="write the table of this JSON again")] = None,
    commit: Annotated[str | None, typer.Option(help="the commit measured, where there is no checkout")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    cases: Annotated[str, typer.Option(hidden=True)] = "[]",
) -> None:
    """Measures every arm, writes JSON and a markdown table, and prints the table."""
    place = torch.device(device)
    if worker is not None:
        todo = [Case(*case) for case in json.loads(cases)]
        work_off(todo, lambda case: run_case(worker, case, data, place, steps), place)
        return
    if result is not None:
        print(write(json.loads(result.read_text()), result))
        return
    chosen("data", [data], DATA)
    questions = chosen("question", question, QUESTIONS)
    arms = all_arms()
    picked = chosen("arm", arm, tuple(arms))
    # The matmul is every question's yardstick.
    arms = {name: tuple(q for q in arms[name] if q in questions or name == "matmul") for name in picked}
    shapes = [str(Shape.parse(text)) for text in shape or (QUICK_SHAPES if quick else SHAPES)]
    options = {"rounds": rounds, "steps": steps, "data": data, "quick": quick, "questions": questions}
    records: list[Record] = []
    report = {**environment(place, commit), "options": options, "shapes": shapes, "records": records}
    end = time.monotonic() + budget
    for turn in range(rounds):
        for name, answered in arms.items():
            started = time.monotonic()
            todo = cases_of(name, answered, shapes, TRUTH_SHAPE if turn == 0 else None)
            command = [sys.executable, __file__, "--device", device, "--data", data, "--steps", str(steps)]
            done = run_cases([*command, "--worker", name], todo, timeout, lambda: time.monotonic() < end)
            records += [{"round": turn, "arm": name, **record} for record in done]
            write(report, output)
            spent = time.monotonic() - started
            ok = sum(r["status"] == "ok" for r in done)
            print(f"round {turn}, {name}: {ok} of {len(done)} measured, {spent:.0f} s", file=sys.stderr)
    print(write(report, output))


if __name__ == "__main__":
    typer.run(main)
