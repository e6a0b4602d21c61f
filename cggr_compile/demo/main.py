"""The demo: fine-tune one pretrained model twice, plainly and with `cggr.optimize`, and show what differs.

Both arms start from the same weights, see the same batches in the same order, use the same optimiser, and are
evaluated on the same held-out windows through the same unrouted forward (`eval()`), so their held-out losses
are comparable. Their training losses are not: the routed one is the mean over the hardest rows only.

Seconds are wall-clock seconds of training steps (forward, backward, optimiser). Evaluation is excluded; the
first step, which captures and compiles, is included in every total and also shown by itself.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import cggr_compile as cggr
from cggr_compile.demo.data import (
    TEXT_PACKAGE,
    WEIGHTS_PACKAGE,
    Windows,
    load_pretrained,
    make_windows,
    metadata_version,
    read_text,
)
from cggr_compile.environment import command_line

LEARNING_RATE = 5e-5
EVALUATIONS = 4
_PEAK_RSS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Settings:
    """What both arms share. `learning_rate` is AdamW's, constant; lengths are in tokens."""

    model: str
    text: str
    device: str
    precision: str
    steps: int
    ratio: float
    batch_size: int
    sequence_length: int
    seed: int
    learning_rate: float = LEARNING_RATE


@dataclass(frozen=True)
class Evaluation:
    """Mean held-out loss (nats per token) after `step` steps and `seconds` of training."""

    step: int
    seconds: float
    loss: float


@dataclass
class Arm:
    """Everything measured while one model was trained; one entry a step in each list."""

    name: str
    sequence_length: int
    step_seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    peak_memory_bytes: int | None = None

    @property
    def median_step_seconds(self) -> float:
        """Median over every step but the first, which captures and compiles."""
        return statistics.median(self.step_seconds[1:])

    @property
    def tokens_trained(self) -> int:
        """Tokens that took part in a backward pass."""
        return self.sequence_length * sum(map(len, self.rows))

    def loss_within(self, seconds: float) -> float:
        """The last held-out loss measured after at most `seconds` of training."""
        return next(e.loss for e in reversed(self.evaluations) if e.seconds <= seconds)


def demo(
    model: str | None,
    text: Path | None,
    device: str,
    output: Path,
    steps: int,
    ratio: float,
    batch_size: int,
    sequence_length: int,
    seed: int,
) -> None:
    """Train both arms and write `diff.html`, `report.json`, `loss.png` and `result.json` into `output`.

    `model` is a folder or hub id (None: the packaged SmolLM2-135M), `text` a UTF-8 file (None: the packaged
    book), `device` "cpu" (fp32) or "cuda" (bf16 autocast), `sequence_length` in tokens.

    Raises `typer.BadParameter` on input it cannot use, and `cggr.CannotOptimize` where the model cannot be
    routed.
    """
    place = _check(device, steps=steps, ratio=ratio, batch_size=batch_size, sequence_length=sequence_length)
    written, text_source = read_text(text)
    console = Console()
    console.print("loading the model and cutting the text into windows")
    pretrained = load_pretrained(model)
    windows = make_windows(written, text_source, pretrained, sequence_length=sequence_length, batch_size=batch_size)
    settings = Settings(
        model=pretrained.source,
        text=windows.source,
        device=str(place),
        precision="bf16 autocast" if place.type == "cuda" else "fp32",
        steps=steps,
        ratio=ratio,
        batch_size=batch_size,
        sequence_length=sequence_length,
        seed=seed,
    )
    output.mkdir(parents=True, exist_ok=True)
    _introduce(console, settings, windows)
    with _progress(console) as progress:
        train = partial(train_arm, windows=windows, settings=settings, progress=progress)
        plain = train("plain", deepcopy(pretrained.model), prepare=lambda m: m)
        routed_model = deepcopy(pretrained.model)
        routed = train("routed", routed_model, prepare=partial(cggr.optimize, ratio=ratio))
    diff = routed_model.cggr.diff()
    (output / "diff.html").write_text(diff.to_html(), encoding="utf-8")
    (output / "report.json").write_text(routed_model.cggr.report().to_json(), encoding="utf-8")
    write_result(output / "result.json", settings, [plain, routed])
    plot(output / "loss.png", settings, [plain, routed])
    console.print(diff.summary(), markup=False, highlight=False)
    console.print(table(plain, routed))
    for name in ("diff.html", "report.json", "loss.png", "result.json"):
        console.print(f"{output / name}", markup=False, highlight=False, soft_wrap=True)


def train_arm(
    name: str,
    model: Any,
    *,
    prepare: Callable[[Any], Any],
    windows: Windows,
    settings: Settings,
    progress: Progress,
) -> Arm:
    """Train `model`, moved to the device and then passed through `prepare`, on the settings' batches.

    Returns the measurements; the model ends on the device, its optimiser state and gradients freed.
    """
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    model = prepare(model.to(device).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    batches = windows.batches(steps=settings.steps, batch_size=settings.batch_size, seed=settings.seed)
    due = {round(settings.steps * i / EVALUATIONS) for i in range(EVALUATIONS + 1)}
    arm = Arm(name, settings.sequence_length)
    task = progress.add_task(name, total=settings.steps, note="held-out loss before training")
    _reset_peak_memory(device)
    for step in range(settings.steps + 1):
        if step > 0:
            _train_step(model, optimizer, batches[step - 1].to(device), arm)
        if step in due:
            loss = held_out_loss(model, windows.held_out.to(device), settings.batch_size)
            arm.evaluations.append(Evaluation(step, sum(arm.step_seconds), loss))
        took = f"{arm.step_seconds[-1]:.2f} s/step, " if arm.step_seconds else ""
        note = f"{took}held-out loss {arm.evaluations[-1].loss:.3f}"
        progress.update(task, completed=step, note=note)
    arm.peak_memory_bytes = _peak_memory(device)
    model.zero_grad(set_to_none=True)
    del optimizer
    gc.collect()
    return arm


def _train_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, arm: Arm) -> None:
    handle = getattr(model, "cggr", None)
    started = _clock(ids.device)
    with _autocast(ids.device):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if handle is not None:
        handle.step()
    arm.step_seconds.append(_clock(ids.device) - started)
    arm.train_loss.append(float(loss.detach()))
    arm.rows.append(list(range(len(ids))) if handle is None else handle.selected.tolist())


@torch.no_grad()
def held_out_loss(model: Any, windows: Tensor, batch_size: int) -> float:
    """Mean next-token loss (nats) of `model.eval()` on `windows` int64 [M, S]; leaves it in training."""
    model.eval()
    total = 0.0
    for ids in windows.split(batch_size):
        with _autocast(ids.device):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        total += float(loss) * len(ids)
    model.train()
    return total / len(windows)


def write_result(path: Path, settings: Settings, arms: list[Arm]) -> None:
    """All samples with what it takes to repeat them; seconds, bytes, nats per token, rows by index."""
    packages = ("cggr-compile", "torch", "transformers", "numpy", WEIGHTS_PACKAGE, TEXT_PACKAGE)
    result = {
        "command": command_line(),
        "versions": {"python": platform.python_version(), **{p: metadata_version(p) for p in packages}},
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if settings.device.startswith("cuda") else None,
        },
        "settings": asdict(settings),
        "arms": {
            arm.name: asdict(arm)
            | {"median_step_seconds": arm.median_step_seconds, "tokens_trained": arm.tokens_trained}
            for arm in arms
        },
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def plot(path: Path, settings: Settings, arms: list[Arm]) -> None:
    """Held-out loss against steps and against seconds of training, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for arm, marker in zip(arms, ("o", "s"), strict=True):
        losses = [e.loss for e in arm.evaluations]
        by_step.plot([e.step for e in arm.evaluations], losses, marker=marker, label=arm.name)
        by_time.plot([e.seconds for e in arm.evaluations], losses, marker=marker, label=arm.name)
    by_step.set(xlabel="training steps", ylabel="held-out loss (nats per token)", title="at equal steps")
    by_time.set(xlabel="training time (s, first step included)", title="at equal time")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"{settings.model} on {settings.text}\n"
        f"batch {settings.batch_size} of {settings.sequence_length} tokens, "
        f"ratio {settings.ratio:g}, {settings.device} ({settings.precision})",
        fontsize=10,
    )
    figure.savefig(path, dpi=144)


def table(plain: Arm, routed: Arm) -> Table:
    """The measurements of both arms side by side."""
    arms = (plain, routed)
    shared = min(sum(arm.step_seconds) for arm in arms)
    rows: dict[str, list[str]] = {
        "steps": [f"{len(arm.step_seconds)}" for arm in arms],
        "rows trained per step (last step)": [f"{len(arm.rows[-1])}" for arm in arms],
        "tokens trained": [f"{arm.tokens_trained:,}" for arm in arms],
        "first step, capture and compile included (s)": [f"{arm.step_seconds[0]:.2f}" for arm in arms],
        "later steps, median (s)": [f"{arm.median_step_seconds:.2f}" for arm in arms],
        "training time, all steps (s)": [f"{sum(arm.step_seconds):.1f}" for arm in arms],
        "held-out loss before (nats per token)": [f"{arm.evaluations[0].loss:.4f}" for arm in arms],
        "held-out loss after all steps": [f"{arm.evaluations[-1].loss:.4f}" for arm in arms],
        f"last held-out loss within {shared:.1f} s": [f"{arm.loss_within(shared):.4f}" for arm in arms],
        "peak memory (GB)": [
            "not measured" if arm.peak_memory_bytes is None else f"{arm.peak_memory_bytes / 1e9:.2f}" for arm in arms
        ],
    }
    shown = Table(title="measured in this run; evaluation time excluded")
    shown.add_column("")
    for arm in arms:
        shown.add_column(arm.name, justify="right")
    for label, values in rows.items():
        shown.add_row(label, *values)
    return shown


def _check(device: str, *, steps: int, ratio: float, batch_size: int, sequence_length: int) -> torch.device:
    if steps < 2:
        raise typer.BadParameter(f"--steps {steps} is too few; pass at least 2, for the first step compiles")
    if not 0 < ratio <= 1:
        raise typer.BadParameter(f"--ratio {ratio:g} is outside (0, 1]; pass the fraction of rows to keep")
    if batch_size < 2:
        raise typer.BadParameter(f"--batch-size {batch_size} leaves nothing to select; pass at least 2")
    if sequence_length < 2:
        raise typer.BadParameter(f"--sequence-length {sequence_length} has no next token; pass at least 2")
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("the demo draws with matplotlib; run `pip install 'cggr-compile[demo]'`")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device '{device}' is unknown; pass cpu or cuda\n{error}") from error
    if place.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device '{device}' is not supported; pass cpu or cuda")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"--device '{device}' is not available: this torch sees {torch.cuda.device_count()} CUDA devices"
            "; pass --device cpu, or install a CUDA build of torch and a driver"
        )
    return place


def _introduce(console: Console, settings: Settings, windows: Windows) -> None:
    console.print(
        f"model   {settings.model}\n"
        f"text    {settings.text}: {len(windows.train)} training and {len(windows.held_out)} held-out "
        f"windows of {settings.sequence_length} tokens\n"
        f"run     {settings.steps} steps of {settings.batch_size} windows, ratio {settings.ratio:g}, AdamW "
        f"{settings.learning_rate:g}, {settings.device}, {settings.precision}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<7}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak_memory(device: torch.device) -> None:
    """Start a new peak: of CUDA's allocator, or of the resident set (Linux: 5 resets VmHWM, see proc(5))."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_PEAK_RSS, os.W_OK):
        _PEAK_RSS.write_text("5")


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.access(_PEAK_RSS, os.W_OK):
        return None
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
