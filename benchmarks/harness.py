"""What the kernel benchmark is made of besides its arms: shapes, data, timing, worker processes, summary and table.

A worker prints one line per measurement, so one that is killed keeps what it has measured; the parent names the case
that a worker died in and starts another one for the rest. Times are of CUDA events around each call, or of the host's
clock on the CPU; memory is the allocator's peak during a call above what was allocated before it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from triton.errors import TritonError
except ImportError:
    TritonError = RuntimeError
QUESTIONS = ("loss", "loss-quarter", "score", "score-four")
DATA = ("normal", "zipf")
WARM_UP, LEAST_STEPS = 3, 5
SECONDS_PER_MEASUREMENT = 0.5
LINE_MARK = "RECORD "

FAILURES = (torch.OutOfMemoryError, RuntimeError, ImportError, ValueError, TypeError, AssertionError, TritonError)

Record = dict[str, Any]


class AbsentError(Exception):
    """The arm cannot be run here, for the reason given."""


class Shape(NamedTuple):
    """Rows of hidden states, their width, and the vocabulary."""

    tokens: int
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return "x".join(str(size) for size in self)

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape written as in "8192x2304x256000"; ValueError for any other text."""
        sizes = [int(size) for size in text.split("x")]
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"shape: got {text!r}, expected TOKENSxHIDDENxVOCABULARY, as in 8192x2304x256000")
        return cls(*sizes)


class Case(NamedTuple):
    """One measurement of an arm: its `time`, or its `error` against the truth."""

    question: str
    shape: str
    kind: str


class Problem(NamedTuple):
    """hidden [N, D] and weight [V, D] bf16, target [N] int64, and the sorted rows int64 [N / 4] or None for all."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    rows: Tensor | None


def make_problem(question: str, shape: Shape, data: str, device: torch.device) -> Problem:
    """The seeded inputs of a question at a shape, the same in every process on a kind of device.

    "normal": hidden ~ N(0, 1) and weight ~ N(0, 4 / D), so that logits have a standard deviation of 2, and labels are
    uniform. "zipf" adds -log(rank) to the logits and draws the labels by 1 / rank, ranks being a random order of the
    vocabulary: the long tail that kernels which skip small probabilities are made for. No label is ignored.
    """
    tokens, width, vocabulary = shape
    random = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, generator=random, device=device, dtype=torch.bfloat16)
    weight.mul_(2 / math.sqrt(width))
    if data == "zipf":
        rank = 1 + torch.randperm(vocabulary, generator=random, device=device)
        hidden[:, 0] = 1
        weight[:, 0] = -rank.log()
        target = torch.multinomial(1 / rank, tokens, replacement=True, generator=random)
    else:
        target = torch.randint(vocabulary, (tokens,), generator=random, device=device)
    rows = None
    if question == "loss-quarter":
        rows = torch.randperm(tokens, generator=random, device=device)[: tokens // 4].sort().values
    if question.startswith("loss"):
        hidden.requires_grad_()
        weight.requires_grad_()
    return Problem(hidden, weight, target, rows)


def work(question: str, shape: Shape) -> tuple[int, int]:
    """FLOPs without recomputation, and the bytes of reading each input and writing each output once.

    The loss takes three products of rows x D x V and writes a gradient of the whole hidden [N, D] also where only a
    quarter of the rows is read; scoring takes one product.
    """
    tokens, width, vocabulary = shape
    rows = tokens // 4 if question == "loss-quarter" else tokens
    product = 2 * rows * width * vocabulary
    inputs = 2 * width * (rows + vocabulary) + 8 * rows
    if question.startswith("loss"):
        return 3 * product, inputs + 2 * width * (tokens + vocabulary)
    return product, inputs + 4 * rows * (4 if question == "score-four" else 1)


def measure(call: Callable[[], Tensor], leaves: tuple[Tensor, ...], device: torch.device, most_steps: int) -> Record:
    """Milliseconds and peak bytes of each timed call, one call's kernel time (CUDA only), seconds of the first call.

    Gradients of `leaves` are cleared, untimed, before each call and after the last. At least 5 calls are timed, and
    then as many as fit into half a second, up to `most_steps`.
    """

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    warm_up = []
    for _ in range(WARM_UP):
        clear()
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        warm_up.append(time.perf_counter() - start)
    steps = max(LEAST_STEPS, min(most_steps, int(SECONDS_PER_MEASUREMENT / warm_up[-1])))
    timed = _steps_on_cuda if device.type == "cuda" else _steps_on_cpu
    milliseconds, peaks = timed(call, clear, steps)
    record = {"first_seconds": warm_up[0], "milliseconds": milliseconds, "peak_bytes": peaks}
    if device.type == "cuda":
        record["kernel_milliseconds"] = _kernel_milliseconds(call, clear)
    clear()
    return record


def _kernel_milliseconds(call: Callable[[], Tensor], clear: Callable[[], None]) -> float:
    """Time in kernels and copies of one call: what is left of a call when the host does not hold it up."""
    clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1000


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _steps_on_cuda(call: Callable[[], Tensor], clear: Callable[[], None], steps: int) -> tuple[list[float], list[int]]:
    events, peaks = [], []
    for _ in range(steps):
        clear()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], peaks


def _steps_on_cpu(call: Callable[[], Tensor], clear: Callable[[], None], steps: int) -> tuple[list[float], list[int]]:
    milliseconds = []
    for _ in range(steps):
        clear()
        start = time.perf_counter()
        call()
        milliseconds.append(1000 * (time.perf_counter() - start))
    return milliseconds, []


def gpus() -> list[str]:
    """What CUDA calls the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return list(map(str, range(count))) if visible is None else visible.split(",")[:count]


def first_line(text: str) -> str:
    """The first line of `text` that holds anything."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def work_off(cases: list[Case], run_case: Callable[[Case], Record], device: torch.device) -> None:
    """Measures the cases in this process and prints a line for each."""
    for case in cases:
        try:
            record = {"status": "ok", **run_case(case)}
        except (AbsentError, ModuleNotFoundError) as error:
            record = {"status": "absent", "reason": first_line(str(error))}
        except FAILURES as error:
            record = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(str(error))}"}
        print(LINE_MARK + json.dumps({**case._asdict(), **record}), flush=True)
        gc.collect()
        if device.type == "cuda":
            if record["status"] == "failed" and not _usable():
                return
            torch.cuda.empty_cache()


def _usable() -> bool:
    """Whether the CUDA context survived; one that did not fails every later call, so a new process has to go on."""
    with contextlib.suppress(RuntimeError):
        return torch.cuda.synchronize() is None
    return False


def run_cases(command: list[str], cases: list[Case], timeout: float, may_start: Callable[[], bool]) -> list[Record]:
    """A record for every case, from as many worker processes as it takes: each one that dies costs its case only."""
    records: list[Record] = []
    while cases:
        if not may_start():
            return records + [_unmeasured(case, "not run", "the time budget was spent") for case in cases]
        measured, death = _run_worker([*command, "--cases", json.dumps(cases)], timeout)
        records += measured
        done = {(record["question"], record["shape"], record["kind"]) for record in measured}
        cases = [case for case in cases if case not in done]
        if cases and (death or not measured):
            records.append(_unmeasured(cases.pop(0), "failed", death or "the worker ended without a word"))
    return records


def _unmeasured(case: Case, status: str, reason: str) -> Record:
    return {**case._asdict(), "status": status, "reason": reason}


def _run_worker(command: list[str], timeout: float) -> tuple[list[Record], str | None]:
    """The records a worker printed, and how it died, if it did."""
    # A session of its own: compilers start processes that would outlive the worker and hold its pipes open.
    worker = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    death = None
    try:
        out, err = worker.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        death = f"the worker was stopped after {timeout:.0f} s"
        os.killpg(worker.pid, signal.SIGKILL)
        out, err = worker.communicate()
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
    if worker.returncode != 0 and death is None:
        death = f"exit status {worker.returncode}: {first_line(''.join(reversed(err.splitlines(keepends=True))))}"
    lines = (line.removeprefix(LINE_MARK) for line in out.splitlines() if line.startswith(LINE_MARK))
    return [json.loads(line) for line in lines], death


def summarise(records: list[Record], peers: tuple[str, ...]) -> list[Record]:
    """One entry per arm, question and shape: statistics over the samples of all rounds, and the rates they mean."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] == "time" and record["status"] == "ok":
            groups[record["arm"], record["question"], record["shape"]].append(record)
    entries = []
    for (arm, question, shape), runs in groups.items():
        times = [sample for run in runs for sample in run["milliseconds"]]
        peaks = [peak for run in runs for peak in run["peak_bytes"]]
        kernels = [run["kernel_milliseconds"] for run in runs if "kernel_milliseconds" in run]
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        flops, least_bytes = work(question, Shape.parse(shape))
        entries.append(
            {
                "arm": arm, "question": question, "shape": shape, "samples": len(times),
                "median_ms": median, "min_ms": min(times), "max_ms": max(times), "iqr_ms": high - low,
                "peak_mib": max(peaks) / 2**20 if peaks else None,
                "kernel_ms": min(kernels, default=None),
                "flops": flops, "least_bytes": least_bytes, "tflops_per_second": flops / median / 1e9,
            }
        )  # fmt: skip
    _add_comparisons(entries, peers)
    return entries


def _add_comparisons(entries: list[Record], peers: tuple[str, ...]) -> None:
    rate: dict[str, float] = {}
    best: dict[tuple, float] = {}
    for entry in entries:
        place = entry["question"], entry["shape"]
        if entry["arm"] == "matmul":
            rate[entry["shape"]] = entry["tflops_per_second"]
        if entry["arm"] in peers:
            best[place] = min(entry["median_ms"], best.get(place, math.inf))
    for entry in entries:
        place = entry["question"], entry["shape"]
        entry["share_of_matmul_rate"] = (
            entry["tflops_per_second"] / rate[entry["shape"]] if entry["shape"] in rate else None
        )
        entry["ratio_to_best_peer"] = entry["median_ms"] / best[place] if place in best else None


def deviations(records: list[Record]) -> dict[tuple, float]:
    """By arm and question: how far its loss and norms lie from the median arm's at the timed shapes, at most.

    Relative differences. The error against the truth is measured at one small shape only; this shows an arm that is
    wrong where offsets are large.
    """
    timed = [r for r in records if r["kind"] == "time" and "fingerprint" in r]
    groups: dict[tuple, list[float]] = defaultdict(list)
    for record in timed:
        for name, value in record["fingerprint"].items():
            if math.isfinite(value):
                groups[record["question"], record["shape"], name].append(value)
    found: dict[tuple, float] = defaultdict(float)
    for record in timed:
        question, shape, arm = record["question"], record["shape"], record["arm"]
        for name, value in record["fingerprint"].items():
            apart = math.inf
            if math.isfinite(value):
                middle = statistics.median(groups[question, shape, name])
                apart = abs(value - middle) / max(middle, sys.float_info.min)
            found[arm, question] = max(found[arm, question], apart)
    return found


def render(report: Record) -> str:
    """The report's summary as markdown: a table for each question, arms by shapes, and what was not measured."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    header = (
        f"{report['device']}, commit {report['commit']}, {versions}; data {report['options']['data']}.\n\n"
        "Cells: median ms (min to max), summed kernel time of one call, MiB above the inputs at the peak, time "
        "relative to the best peer's, achieved share of the `matmul` arm's FLOP rate, counting no recomputation. "
        "Error: relative to the norm of a float64 truth at one small shape. "
        "Deviation: of the loss and the norms at the timed shapes from the median arm's, at most.\n"
    )
    asked = {record["question"] for record in report["records"]}
    questions = [question for question in report["options"]["questions"] if question in asked]
    parts = [_question_table(question, report) for question in questions]
    return "\n".join([header, *parts, _roofline(questions, report), _unmeasured_list(report["records"])])


def _question_table(question: str, report: Record) -> str:
    records = [record for record in report["records"] if record["question"] == question]
    cells = {
        (entry["arm"], entry["shape"]): _cell(entry) for entry in report["summary"] if entry["question"] == question
    }
    status = {(record["arm"], record["shape"]): record["status"] for record in records}
    errors = {record["arm"]: record["errors"] for record in records if "errors" in record}
    apart = deviations(records)
    lines = [f"## {question}\n", f"| arm | {' | '.join(report['shapes'])} | error | deviation |"]
    lines.append("| --- " * (len(report["shapes"]) + 3) + "|")
    for arm in dict.fromkeys(record["arm"] for record in records):
        row = [cells.get((arm, shape), status.get((arm, shape), "")) for shape in report["shapes"]]
        row.append(", ".join(f"{name} {error:.1e}" for name, error in errors.get(arm, {}).items()))
        row.append(f"{apart[arm, question]:.1e}" if (arm, question) in apart else "")
        lines.append(f"| {arm} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _roofline(questions: list[str], report: Record) -> str:
    rate = {entry["shape"]: entry["tflops_per_second"] for entry in report["summary"] if entry["arm"] == "matmul"}
    lines = ["## Roofline\n", "| question | shape | TFLOP | least GB | ms at the `matmul` arm's rate |"]
    lines.append("| --- " * 5 + "|")
    for question in questions:
        for shape in report["shapes"]:
            flops, least_bytes = work(question, Shape.parse(shape))
            bound = f"{flops / rate[shape] / 1e9:.2f}" if shape in rate else ""
            lines.append(f"| {question} | {shape} | {flops / 1e12:.2f} | {least_bytes / 1e9:.2f} | {bound} |")
    return "\n".join(lines) + "\n"


def _cell(entry: Record) -> str:
    parts = [f"{entry['median_ms']:.2f} ({entry['min_ms']:.2f} to {entry['max_ms']:.2f}) ms"]
    if entry["peak_mib"] is not None:
        parts.append(f"{entry['peak_mib']:.0f} MiB")
    if entry["kernel_ms"] is not None:
        parts.insert(1, f"kernels {entry['kernel_ms']:.2f} ms")
    if entry["ratio_to_best_peer"] is not None:
        parts.append(f"×{entry['ratio_to_best_peer']:.2f}")
    if entry["share_of_matmul_rate"] is not None:
        parts.append(f"{entry['share_of_matmul_rate']:.0%}")
    return ", ".join(parts)


def _unmeasured_list(records: list[Record]) -> str:
    places: dict[tuple, list[str]] = defaultdict(list)
    for record in records:
        if record["status"] != "ok":
            place = f"{record['question']} {record['shape']}"
            places[record["arm"], record["status"], record["reason"]].append(place)
    lines = [
        f"* {arm}, {status}: {reason} ({'; '.join(dict.fromkeys(where))})"
        for (arm, status, reason), where in places.items()
    ]
    return "\n".join(["## Not measured\n", *(lines or ["Everything was."])]) + "\n"
