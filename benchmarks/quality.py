"""What a second of training is worth: held-out loss after equal wall-clock time, every run in a process of its own.

    python benchmarks/quality_data.py tokens.npz a.txt.xz b.txt.xz
    python benchmarks/quality.py tokens.npz runs.jsonl --seconds 34 --seeds 5 --arm allx64 --arm trimmed@0.5x64
    python benchmarks/quality.py --report runs.jsonl --base allx64  # the tables again, from what there is
    python benchmarks/quality.py --quick  # every part once, small, on the CPU

The protocol is that of docs/learning.md: fp32 parameters, bf16 autocast, AdamW; the learning rate is a function of the
share of the budget that is spent (`--schedule`); what comes before the first step (captures, compilations, recordings)
is outside the clock, whatever comes later inside it; held-out loss is that of every domain on all its tokens, by the
plain forward, with the clock stopped.

An arm is `NAME[@RATIO][xBATCH][/RATE][+depth=N:SHARE[:GROW]][+matmul]`; `quality_arms.py` has the names. `--weights
DIR` starts from the GGUF file in a folder instead of a fresh model, on tokens made with `quality_data.py --tokenizer
DIR`.

Runs wait in a queue for a free GPU; finished ones are lines of the output, and are not run again. Failed ones are lines
too, and are run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import quality_data
import torch
import transformers
import typer
from harness import gpus
from quality_arms import Arm
from quality_report import page
from quality_training import SCHEDULES, SIZES, Run, Source, trained

from cggr_compile.environment import environment

MARK = "RECORD "
BESIDE = 40
"""Seconds that a run needs beside its budget, for a queue that must end in time."""


# ---- the queue ----


@dataclass
class _Place:
    """A GPU, or the CPU: the runs there, oldest first, and when the last of them should be over."""

    name: str | None
    lock: Path
    runs: list[tuple[Run, subprocess.Popen, Any]] = field(default_factory=list)
    due: float = 0.0

    def start(self, run: Run, job: list[str]) -> None:
        """A process for the run. It waits for its turn where another one trains."""
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the run
        visible = {} if self.name is None else {"CUDA_VISIBLE_DEVICES": self.name}
        command = [sys.executable, __file__, *job, "--turn", str(self.lock), "--job", json.dumps(asdict(run))]
        process = subprocess.Popen(command, env={**os.environ, **visible}, stdout=log, stderr=subprocess.STDOUT)
        self.due = self.over(run)
        self.runs.append((run, process, log))

    def over(self, run: Run) -> float:
        """When one more run would be over."""
        return max(self.due, time.monotonic()) + run.seconds + BESIDE

    def ended(self) -> Iterator[dict[str, Any]]:
        """The records of runs that have ended since."""
        for run, process, log in [each for each in self.runs if each[1].poll() is not None]:
            self.runs.remove((run, process, log))
            self.due = time.monotonic() + sum(other.seconds + BESIDE for other, *_ in self.runs)
            with log:
                log.seek(0)
                yield _record(run, log.read())


def _queue(runs: list[Run], job: list[str], output: Path, until: float) -> Iterator[dict[str, Any]]:
    """Runs that are not finished in the output, one on each GPU at a time; their records as they end.

    `job` are the arguments of each run's process beside the run. While one trains, the next of its GPU imports and
    reads its rows, on the CPU.
    """
    records = map(json.loads, output.read_text().splitlines()) if output.exists() else ()
    done = {Run.key(record) for record in records if "mean" in record}
    waiting = [run for run in runs if Run.key(asdict(run)) not in done]
    with tempfile.TemporaryDirectory() as folder:
        places = [_Place(name, Path(folder) / f"turn{name}") for name in gpus() or [None]]
        while waiting or any(place.runs for place in places):
            for place in places:
                yield from place.ended()
                if waiting and len(place.runs) < 2 and place.over(waiting[0]) < until:
                    place.start(waiting.pop(0), job)
            if waiting and not any(place.runs for place in places):
                print(f"out of time; not run: {[f'{run.arm} {run.seed}' for run in waiting]}")
                return
            time.sleep(0.2)


def _record(run: Run, text: str) -> dict[str, Any]:
    """What a run's process said at last, or what it said at all where it failed."""
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK)) if lines else {**asdict(run), "failed": text[-800:]}


def main(
    tokens: Annotated[Path | None, typer.Argument(help="Token file of quality_data.py.")] = None,
    output: Annotated[Path | None, typer.Argument(help="A line of JSON for each run.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    regime: Annotated[list[str] | None, typer.Option(help="clean, repeats, noise, dirty, rare; repeatable.")] = None,
    seconds: Annotated[list[float] | None, typer.Option(help="Budget; repeatable.")] = None,
    seeds: int = 5,
    size: Annotated[str, typer.Option(help="Of a fresh model: 55M, 135M, 1M or tiny.")] = "55M",
    length: int = 512,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: linear or wsd.")] = "linear",
    weights: Annotated[Path | None, typer.Option(help="Folder of a GGUF file to start from.")] = None,
    rows: Annotated[int, typer.Option(help="Rows that train; 0: as many as there are.")] = 0,
    limit: Annotated[float, typer.Option(help="Seconds for the whole queue; what does not fit is not started.")] = 1e9,
    commit: str | None = None,
    report: Annotated[Path | None, typer.Option(help="Write the tables and the plot of this output and stop.")] = None,
    base: Annotated[str, typer.Option(help="The arm that others are compared with.")] = "compile",
    loss: Annotated[list[float] | None, typer.Option(help="Of the report's second table; repeatable.")] = None,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
    turn: Annotated[Path | None, typer.Option(hidden=True)] = None,
    quick: bool = False,
) -> None:
    """Runs a queue of trainings, one a process."""
    transformers.logging.set_verbosity_error()
    if report is not None:
        print(page(report, base, loss))
        return
    if quick:
        _quick()
        return
    if tokens is None or (output is None and job is None):
        raise typer.BadParameter("give a token file and an output, or --quick, or --report OUTPUT")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if job is not None:
        record = trained(Run(**json.loads(job)), Source(tokens, weights), device, turn)
        print(MARK + json.dumps(record), flush=True)
        return
    assert output is not None
    size = _name_of(weights) if weights is not None else size
    runs = [
        Run(each, spoilt, seed, budget, size, length, schedule, rows)
        for budget in seconds or [34.0]
        for seed in range(seeds)  # whole rounds first: a queue cut short has equally many seeds of each arm
        for spoilt in regime or ["clean"]
        for each in arm or ["compile", "all"]
    ]
    _check(runs, fresh=weights is None)
    about = environment(device, commit)
    arguments = [str(tokens), *(["--weights", str(weights)] if weights is not None else [])]
    for record in _queue(runs, arguments, output, time.monotonic() + limit):
        with output.open("a") as file:
            file.write(json.dumps({**record, **about}) + "\n")
        print(record.get("failed") or f"{record['arm']} {record['regime']} {record['seed']}: {record['mean']:.4f}")


def _name_of(weights: Path) -> str:
    name = quality_data.gguf_of(weights)
    if name is None:
        raise typer.BadParameter(f"weights: {weights} has no GGUF file")
    return Path(name).stem


def _check(runs: list[Run], fresh: bool) -> None:
    """Raises `typer.BadParameter` for a run that could not start, before any does."""
    known = {"regime": quality_data.REGIMES, "schedule": SCHEDULES, **({"size": SIZES} if fresh else {})}
    for run in runs:
        Arm.parse(run.arm)
        for name, values in known.items():
            if getattr(run, name) not in values:
                raise typer.BadParameter(f"{name}: got {getattr(run, name)!r}, expected one of {', '.join(values)}")


QUICK = {"linear": ["trimmed@0.5x4", "oracle@0.5x4", "loader@0.5x4", "small=2x4"], "wsd": ["defaultx4", "allx4+matmul"]}


def _quick() -> None:
    """Every part of the benchmark once, in a folder that is thrown away; one run by the queue, the others here."""
    with tempfile.TemporaryDirectory() as folder:
        text, tokens, output = (Path(folder) / name for name in ("words.txt", "tokens.npz", "runs.jsonl"))
        words = ["a", "word", "and", "then", "another", "one", "of", "some", "length"]
        picks = torch.randint(len(words), (60000,), generator=torch.Generator().manual_seed(0)).tolist()
        text.write_text(" ".join(words[pick] for pick in picks))
        quality_data.main(tokens, [text], vocabulary=280)
        main(tokens, output, ["allx4"], ["dirty"], [1.5], seeds=1, size="tiny", length=16, rows=400)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with output.open("a") as file:
            for run in [Run(arm, "dirty", 0, 1.5, "tiny", 16, name, 400) for name in QUICK for arm in QUICK[name]]:
                file.write(json.dumps({**trained(run, Source(tokens, None), device), **environment(device)}) + "\n")
        print(page(output, "allx4"))


if __name__ == "__main__":
    typer.run(main)
