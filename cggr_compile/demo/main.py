"""The demo: train one small model from scratch twice for equally many seconds, plainly and by `route="depth"`.

Both arms have the same initial weights, the same batches in the same order, the same optimiser and the same learning
rate by the share of their seconds. They take turns, so whatever else the machine does slows both. Held-out loss is that
of the plain forward on the same windows.

Seconds are wall-clock seconds of training steps (forward, backward, optimiser). Evaluation is excluded; the first step,
which captures and compiles, is included.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import cggr_compile as cggr
from cggr_compile.demo.data import TEXT_PACKAGE, Windows, metadata_version, read_text, windows_of
from cggr_compile.environment import command_line
from cggr_compile.inspection.explanation import Report

LAYERS, FIRST_LAYERS, WIDTH, HEADS = 12, 3, 128, 4
GROWS_AT = 0.7
EVALUATIONS = 8
WARM_UP, FLOOR = 0.05, 0.02
BYTES = 256
ROUTED = 0.25
FILES = ("diff.html", "report.json", "loss.png", "result.json")


@dataclass(frozen=True)
class Settings:
    """What both arms share. `learning_rate` is AdamW's peak: it rises over WARM_UP of the seconds, then falls to
    FLOOR. `sequence_length` is in bytes of the text, which are the tokens."""

    text: str
    device: str
    precision: str
    seconds: float
    batch_size: int
    sequence_length: int
    seed: int
    learning_rate: float = 3e-3
    layers: int = LAYERS
    first_layers: int = FIRST_LAYERS
    grows_at: float = GROWS_AT


@dataclass(frozen=True)
class Evaluation:
    """Mean held-out loss (nats per byte) after `step` steps and `seconds` of training."""

    step: int
    seconds: float
    loss: float


@dataclass
class Arm:
    """Everything measured while one model was trained; `grown_at` is the step at which the whole model began."""

    name: str
    step_seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    grown_at: int | None = None

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return sum(self.step_seconds)

    def seconds_to(self, loss: float) -> float | None:
        """Seconds of training at the first evaluation that is no higher; None where none is."""
        return next((e.seconds for e in self.evaluations if e.loss <= loss), None)


def demo(
    text: Path | None, device: str, output: Path, seconds: float, batch_size: int, sequence_length: int, seed: int
) -> None:
    """Train both arms and write `diff.html`, `report.json`, `loss.png` and `result.json` into `output`.

    `text` is a UTF-8 file (None: the packaged book), `device` "cpu" (fp32) or "cuda" (bf16 autocast), `seconds` those
    of training of each arm, `sequence_length` in bytes.

    Raises `typer.BadParameter` on input it cannot use.
    """
    place = _check(device, seconds=seconds, batch_size=batch_size, sequence_length=sequence_length)
    windows = windows_of(*read_text(text), sequence_length, batch_size)
    settings = Settings(
        text=windows.source,
        device=str(place),
        precision="bf16 autocast" if place.type == "cuda" else "fp32",
        seconds=seconds,
        batch_size=batch_size,
        sequence_length=sequence_length,
        seed=seed,
    )
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    _introduce(console, settings, windows)
    plain, grown = Arm("plain"), Arm("cggr")
    optimized = cggr.optimize(
        build(settings), route="depth", depth_layers=FIRST_LAYERS, cuda_graphs=place.type == "cuda"
    )
    with _progress(console) as progress:
        turns = [train(build(settings), plain, windows, settings), train(optimized, grown, windows, settings)]
        _take_turns(turns, [plain, grown], settings, progress)
    explanation = cggr.explain(optimized, _batch(windows.train[:batch_size].to(place)), ratio=ROUTED)
    (output / "diff.html").write_text(explanation.diff().to_html(), encoding="utf-8")
    (output / "report.json").write_text(explanation.report().to_json(), encoding="utf-8")
    write_result(output / "result.json", settings, [plain, grown])
    plot(output / "loss.png", settings, [plain, grown])
    console.print(measured(plain, grown, settings))
    console.print(predicted(explanation.report()), markup=False, highlight=False)
    for name in FILES:
        console.print(f"{output / name}", markup=False, highlight=False, soft_wrap=True)


def build(settings: Settings) -> nn.Module:
    """A Llama of LAYERS layers over bytes, in training, with the seed's weights, on the settings' device."""
    torch.manual_seed(settings.seed)
    config = transformers.LlamaConfig(
        vocab_size=BYTES,
        hidden_size=WIDTH,
        intermediate_size=8 * WIDTH // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=settings.sequence_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train().to(settings.device)


def train(model: Any, arm: Arm, windows: Windows, settings: Settings) -> Iterator[None]:
    """Trains for the settings' seconds and yields after every step; a model on the depth route grows in between."""
    device = torch.device(settings.device)
    peak = settings.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(settings.seed)
    train_rows, held_out = windows.train, windows.held_out.to(device)
    handle = getattr(model, "cggr", None)
    while (share := arm.seconds / settings.seconds) < 1:
        if len(arm.evaluations) <= share * EVALUATIONS:
            arm.evaluations.append(Evaluation(len(arm.step_seconds), arm.seconds, held_out_loss(model, held_out)))
        if handle is not None and arm.grown_at is None and share >= GROWS_AT:
            handle.grow()
            arm.grown_at = len(arm.step_seconds)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, share / WARM_UP) * max(FLOOR, 1 - share)
        picked = torch.randint(len(train_rows), (settings.batch_size,), generator=generator)
        _step(model, optimizer, train_rows[picked].to(device), arm)
        yield
    arm.evaluations.append(Evaluation(len(arm.step_seconds), arm.seconds, held_out_loss(model, held_out)))


def _step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, arm: Arm) -> None:
    started = _clock(ids.device)
    with _autocast(ids.device):
        loss = model(**_batch(ids)).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    arm.step_seconds.append(_clock(ids.device) - started)
    arm.train_loss.append(float(loss.detach()))


def _batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def held_out_loss(model: Any, windows: Tensor) -> float:
    """Mean next-byte loss (nats) of the model that is in use, in `eval()`, on `windows` int64 [M, S]; leaves it in
    training."""
    handle = getattr(model, "cggr", None)
    model.eval()
    with nullcontext() if handle is None or not handle.captures else handle.in_use(), _autocast(windows.device):
        losses = [model(**_batch(ids)).loss.float() * len(ids) for ids in windows.split(16)]
    model.train()
    return (torch.stack(losses).sum() / len(windows)).item()


def _take_turns(turns: list[Iterator[None]], arms: list[Arm], settings: Settings, progress: Progress) -> None:
    """Lets the arm that has trained for the fewest seconds go on, until both have theirs."""
    tasks = [progress.add_task(arm.name, total=settings.seconds, note="") for arm in arms]
    unfinished = set(range(len(arms)))
    while unfinished:
        index = min(unfinished, key=lambda index: arms[index].seconds)
        if next(turns[index], unfinished) is unfinished:
            unfinished.remove(index)
        arm = arms[index]
        note = f"step {len(arm.step_seconds)}, held-out loss {arm.evaluations[-1].loss:.3f}"
        progress.update(tasks[index], completed=min(arm.seconds, settings.seconds), note=note)


def measured(plain: Arm, grown: Arm, settings: Settings) -> Table:
    """What both arms reached, side by side."""
    goal = plain.evaluations[-1].loss
    reached = [arm.seconds_to(goal) for arm in (plain, grown)]
    rows: dict[str, list[str]] = {
        "steps": [f"{len(arm.step_seconds)}" for arm in (plain, grown)],
        "layers that train": [f"{LAYERS}", f"{FIRST_LAYERS}, from step {grown.grown_at} {LAYERS}"],
        "first step, capture included (s)": [f"{arm.step_seconds[0]:.1f}" for arm in (plain, grown)],
        f"held-out loss after {settings.seconds:g} s (nats per byte)": [
            f"{arm.evaluations[-1].loss:.3f}" for arm in (plain, grown)
        ],
        f"seconds to {goal:.3f}": ["not reached" if s is None else f"{s:.0f}" for s in reached],
    }
    shown = Table(title=f"measured in this run, on {settings.device}; the arms took turns")
    for heading in ("", plain.name, grown.name):
        shown.add_column(heading, justify="right" if heading else "left")
    for label, values in rows.items():
        shown.add_row(label, *values)
    return shown


def predicted(routed: Report) -> str:
    """What the cost model says of steps of this model, in counted operations, whatever the device."""
    whole = routed.cost
    share = 1 - sum(whole.layer_flops[FIRST_LAYERS:]) / whole.forward_flops
    return (
        "predicted from counted operations, on any device, not measured:\n"
        f"  a step of the first {FIRST_LAYERS} of {LAYERS} layers  {share:.0%} of a whole one\n"
        f"  a step on a quarter of the rows     {whole.step_ratio:.0%} of a whole one "
        "(cggr.optimize(model, ratio=0.25); the rewrite is diff.html)\n"
        "measured on GPUs: docs/performance.md, docs/learning.md"
    )


def write_result(path: Path, settings: Settings, arms: list[Arm]) -> None:
    """All samples with what it takes to repeat them; seconds, nats per byte."""
    packages = ("cggr-compile", "torch", "transformers", TEXT_PACKAGE)
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
        "arms": {arm.name: asdict(arm) for arm in arms},
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def plot(path: Path, settings: Settings, arms: list[Arm]) -> None:
    """Held-out loss against seconds of training, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, marker in zip(arms, ("o", "s"), strict=True):
        axes.plot(
            [e.seconds for e in arm.evaluations], [e.loss for e in arm.evaluations], marker=marker, label=arm.name
        )
    axes.set(xlabel="training time (s, first step included)", ylabel="held-out loss (nats per byte)")
    axes.set_title(f"{settings.text}, {LAYERS} layers, {settings.device} ({settings.precision})", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=144)


def _check(device: str, *, seconds: float, batch_size: int, sequence_length: int) -> torch.device:
    if seconds <= 0:
        raise typer.BadParameter(f"--seconds {seconds:g} is no time; pass how long each arm trains, e.g. 60")
    if batch_size < 1:
        raise typer.BadParameter(f"--batch-size {batch_size} is no batch; pass at least 1")
    if sequence_length < 2:
        raise typer.BadParameter(f"--sequence-length {sequence_length} has no next byte; pass at least 2")
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
        f"model   a Llama of {LAYERS} layers × {WIDTH} over bytes, from random weights\n"
        f"text    {settings.text}: {len(windows.train)} training and {len(windows.held_out)} held-out windows of "
        f"{settings.sequence_length} bytes\n"
        f"plain   all layers, {settings.seconds:g} s\n"
        f'cggr    cggr.optimize(model, route="depth", depth_layers={FIRST_LAYERS}), and all layers after '
        f"{GROWS_AT:.0%} of {settings.seconds:g} s\n"
        f"both    {settings.batch_size} windows a step, AdamW {settings.learning_rate:g}, {settings.device}, "
        f"{settings.precision}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<6}"),
        BarColumn(bar_width=24),
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
