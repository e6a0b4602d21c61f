"""What a second of training is worth: held-out loss after equal wall-clock time, every run in a process of its own.

    python benchmarks/quality_data.py tokens.npz a.txt.xz b.txt.xz
    python benchmarks/quality.py tokens.npz runs.jsonl --seconds 34 --seeds 5 --arm compilex64 --arm trimmed@0.5x64
    python benchmarks/quality.py --report runs.jsonl --base allx32  # the table again, from what there is
    python benchmarks/quality.py --quick  # every part once, small, on the CPU

The protocol: fp32 parameters, bf16 autocast, AdamW; the learning rate warms up over 5 % of the budget and decays over
the rest, by time; what comes before the first step (captures, compilations, recordings) is outside the clock, whatever
comes later inside it; held-out loss is that of every domain on all its tokens, by the plain forward, with the clock
stopped.

An arm is `NAME[@RATIO][xBATCH][/RATE]`: what is kept, the rows a step draws, the peak learning rate. Names: `compile`
(torch.compile), `all` (ratio=1), a selection rule (`random`, `topk`, `trimmed`, `stratified`, `importance`, `auto`),
`easiest` (the lowest scores), `shuffled` (the router is paid, its scores are shuffled), `token-RULE`, `loss-RULE` (the
other routes).

Runs wait in a queue for a free GPU; finished ones are lines of the output, and are not run again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import quality_data
import torch
import transformers
import typer
from quality_report import page
from torch import Tensor, nn

import cggr_compile as cggr
from cggr_compile.environment import environment

MARK = "RECORD "
WARM_UP, FLOOR = 0.05, 0.02
UNCOUNTED = 6
"""Steps before the clock starts: what they compile is not counted, and nothing is updated."""
EVALUATIONS = 6
START_UP = 60
"""Seconds that a run needs beside its budget, for a queue that must end in time."""

SIZES = {
    "55M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "heads": 8, "kv": 4},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "kv": 3},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "heads": 4, "kv": 2},
}


def easiest(scores: Tensor, valid: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The k lowest scores."""
    rows = scores.masked_fill(~valid, torch.inf).argsort()[:k].sort().values
    return rows, valid[rows].float()


RULES: dict[str, Any] = {
    **{name: name for name in ("random", "topk", "trimmed", "stratified", "importance", "auto")},
    "easiest": easiest,
    "shuffled": "topk",
}


@dataclass(frozen=True)
class Run:
    """One run: an arm under a regime with a seed for so many seconds."""

    arm: str
    regime: str
    seed: int
    seconds: float
    size: str
    length: int

    @property
    def parts(self) -> tuple[str, float, int, float]:
        """Name, ratio, rows a step, and peak learning rate of the arm."""
        found = re.fullmatch(r"([\w-]+?)(?:@([\d.]+))?(?:x(\d+))?(?:/([\d.e-]+))?", self.arm)
        name = found[1].rpartition("-")[2] if found else ""
        if found is None or (name not in RULES and found[1] not in ("compile", "all")):
            raise typer.BadParameter(f"arm: got {self.arm!r}, expected NAME[@RATIO][xBATCH][/RATE]")
        return found[1], float(found[2] or 0.5), int(found[3] or 32), float(found[4] or 1.5e-3)


class Batches:
    """Shuffled passes over the training rows."""

    def __init__(self, rows: Tensor, number: int, seed: int) -> None:
        self.rows, self.number, self.seed = rows, number, seed
        self.restart()

    def restart(self) -> None:
        """From the first batch again."""
        self.generator = torch.Generator(self.rows.device).manual_seed(1000 + self.seed)
        self.order, self.at, self.passes = self._shuffled(), 0, 0.0

    def _shuffled(self) -> Tensor:
        return torch.randperm(len(self.rows), generator=self.generator, device=self.rows.device)

    def next(self) -> Tensor:
        if self.at + self.number > len(self.rows):
            self.order, self.at = self._shuffled(), 0
        self.at += self.number
        self.passes += self.number / len(self.rows)
        return self.rows[self.order[self.at - self.number : self.at]]


class Clock:
    """Seconds of training; stands still while something is measured."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent, self.started = device, 0.0, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        self.started = self._now()

    def stop(self) -> float:
        self.spent += self._now() - self.started
        return self.spent

    def seconds(self) -> float:
        """What the host has seen, without waiting for the device."""
        return self.spent + time.perf_counter() - self.started


def trained(run: Run, tokens: Path, device: torch.device) -> dict[str, Any]:
    """Trains one model and measures it."""
    name, ratio, batch, rate = run.parts
    rows = quality_data.rows_of(tokens, run.length, run.regime)
    batches = Batches(torch.tensor(rows.train, device=device), batch, run.seed)
    held_out = {domain: torch.tensor(each, device=device) for domain, each in rows.held_out.items()}
    model = _model(run, quality_data.vocabulary_of(tokens), device)
    started = time.perf_counter()
    step = _arm(name, ratio, model, device)
    for _ in range(UNCOUNTED):
        step(batches.next())
    model.zero_grad(set_to_none=True)
    batches.restart()
    clock = Clock(device)
    first = time.perf_counter() - started
    update, set_rate = _optimizer(model, device)
    steps, longest, curve = 0, 0.0, []
    clock.start()
    while (seconds := clock.seconds()) < run.seconds:
        share = seconds / run.seconds
        if share >= (len(curve) + 1) / EVALUATIONS:
            at = clock.stop()
            curve.append([round(at, 2), steps, _mean(_losses(model, held_out, 32, device))])
            clock.start()
        set_rate(rate * min(1, share / WARM_UP) * max(FLOOR, 1 - share))
        before = time.perf_counter()
        step(batches.next())
        update()
        if name != "compile":
            model.cggr.step()
        steps += 1
        if steps % 8 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # the clock may not run ahead of the device
        longest = max(longest, time.perf_counter() - before)
    seconds = clock.stop()
    losses = _losses(model, held_out, quality_data.MOST_HELD_OUT, device)
    peak = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None
    return {
        **asdict(run),
        "first_steps": round(first, 1),
        "spent": round(seconds, 2),
        "steps": steps,
        "passes": round(batches.passes, 2),
        "longest_step": round(longest, 3),
        "curve": curve,
        "held_out": losses,
        "mean": _mean(losses),
        "GiB": peak,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _model(run: Run, vocabulary: int, device: torch.device) -> nn.Module:
    size = dict(SIZES[run.size])
    heads, kv = size.pop("heads"), size.pop("kv")
    config = transformers.LlamaConfig(
        **size,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=run.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).train()


def _arm(name: str, ratio: float, model: nn.Module, device: torch.device) -> Callable[[Tensor], None]:
    """Forward and backward of one step of an arm."""
    on_gpu = device.type == "cuda"
    autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu)

    def step(rows: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = forward(input_ids=rows, labels=rows).loss
        loss.backward()

    if name == "compile":
        forward: Callable[..., Any] = torch.compile(model)
        return step
    forward = model
    cggr.optimize(model, cuda_graphs=on_gpu, **_options(name, ratio, on_gpu))
    if name == "shuffled":

        def shuffled(rows: Tensor) -> None:
            with autocast:
                scores = model.cggr.score({"input_ids": rows, "labels": rows})
            model.cggr.use_scores(scores[torch.randperm(len(scores), device=device)])
            step(rows)

        return shuffled
    return step


def _options(name: str, ratio: float, on_gpu: bool) -> dict[str, Any]:
    if name == "all":
        return {"ratio": 1.0}
    route, _, rule = name.rpartition("-")
    options = {"ratio": ratio, "selection": RULES[rule], "route": route or "sequence"}
    if rule not in ("random", "easiest") and on_gpu:
        options["router_head"] = "sampled"
    return options


def _optimizer(model: nn.Module, device: torch.device) -> tuple[Callable[[], None], Callable[[float], None]]:
    parameters = list(model.parameters())
    rate = torch.tensor(0.0, device=device)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    return update, lambda value: rate.fill_(value) and None


@torch.no_grad()
def _losses(model: nn.Module, held_out: dict[str, Tensor], most: int, device: torch.device) -> dict[str, float]:
    model.eval()
    found = {}
    for domain, rows in held_out.items():
        total = torch.zeros((), device=device)
        for some in rows[:most].split(16):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
                total += model(input_ids=some, labels=some).loss * len(some)
        found[domain] = total.item() / len(rows[:most])
    model.train()
    return found


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


# ---- the queue ----


def _queue(runs: list[Run], tokens: Path, output: Path, until: float) -> Iterator[dict[str, Any]]:
    """Runs that are not in the output yet, one on each GPU at a time; their records as they finish."""
    done = {_key(json.loads(line)) for line in output.read_text().splitlines()} if output.exists() else set()
    waiting = [run for run in runs if _key(asdict(run)) not in done]
    places = list(range(torch.cuda.device_count())) or [None]
    running: dict[Any, tuple[subprocess.Popen, Run, Any]] = {}
    while waiting or running:
        for place in places:
            if place in running and running[place][0].poll() is not None:
                _, run, log = running.pop(place)
                with log:
                    log.seek(0)
                    text = log.read()
                lines = [line for line in text.splitlines() if line.startswith(MARK)]
                yield json.loads(lines[-1].removeprefix(MARK)) if lines else {**asdict(run), "failed": text[-800:]}
            if place not in running and waiting and time.monotonic() + waiting[0].seconds + START_UP < until:
                run, log = waiting.pop(0), tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the run
                visible = {} if place is None else {"CUDA_VISIBLE_DEVICES": str(place)}
                command = [sys.executable, __file__, str(tokens), "--job", json.dumps(asdict(run))]
                process = subprocess.Popen(command, env={**os.environ, **visible}, stdout=log, stderr=subprocess.STDOUT)
                running[place] = process, run, log
        if waiting and not running:
            print(f"out of time; not run: {[f'{run.arm} {run.seed}' for run in waiting]}")
            return
        time.sleep(0.5)


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record[name] for name in Run.__dataclass_fields__)


def main(
    tokens: Annotated[Path | None, typer.Argument(help="Token file of quality_data.py.")] = None,
    output: Annotated[Path | None, typer.Argument(help="A line of JSON for each run.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    regime: Annotated[list[str] | None, typer.Option(help="clean, repeats, noise, dirty; repeatable.")] = None,
    seconds: Annotated[list[float] | None, typer.Option(help="Budget; repeatable.")] = None,
    seeds: int = 5,
    size: str = "55M",
    length: int = 512,
    limit: Annotated[float, typer.Option(help="Seconds for the whole queue; what does not fit is not started.")] = 1e9,
    commit: str | None = None,
    report: Annotated[Path | None, typer.Option(help="Write the table and the plot of this output and stop.")] = None,
    base: Annotated[str, typer.Option(help="The arm that others are compared with.")] = "compile",
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
    quick: bool = False,
) -> None:
    """Runs a queue of trainings, one a process."""
    transformers.logging.set_verbosity_error()
    if report is not None:
        print(page(report, base))
        return
    if quick:
        _quick()
        return
    if tokens is None or (output is None and job is None):
        raise typer.BadParameter("give a token file and an output, or --quick, or --report OUTPUT")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if job is not None:
        record = trained(Run(**json.loads(job)), tokens, device)
        print(MARK + json.dumps(record), flush=True)
        return
    assert output is not None
    runs = [
        Run(each, spoilt, seed, budget, size, length)
        for budget in seconds or [34.0]
        for seed in range(seeds)  # whole rounds first: a queue cut short has equally many seeds of each arm
        for spoilt in regime or ["clean"]
        for each in arm or ["compile", "all"]
    ]
    for run in runs:
        assert run.parts
    about = environment(device, commit)
    for record in _queue(runs, tokens, output, time.monotonic() + limit):
        with output.open("a") as file:
            file.write(json.dumps({**record, **about}) + "\n")
        print(record.get("failed") or f"{record['arm']} {record['regime']} {record['seed']}: {record['mean']:.4f}")


def _quick() -> None:
    """Every part of the benchmark once, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        text, tokens, output = (Path(folder) / name for name in ("words.txt", "tokens.npz", "runs.jsonl"))
        words = ["a", "word", "and", "then", "another", "one", "of", "some", "length"]
        picks = torch.randint(len(words), (60000,), generator=torch.Generator().manual_seed(0)).tolist()
        text.write_text(" ".join(words[pick] for pick in picks))
        quality_data.main(tokens, [text], vocabulary=280)
        arms = ["compilex4", "allx4", "trimmed@0.5x4", "easiest@0.5x4", "shuffled@0.5x4", "loss-random@0.5x4"]
        main(tokens, output, arms, ["dirty"], [2.0], seeds=1, size="tiny", length=16)
        print(page(output, "compilex4"))


if __name__ == "__main__":
    typer.run(main)
