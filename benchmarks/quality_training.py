"""One training of the quality benchmark: its batches, its clock, its learning rate, and what is measured of it.

Nothing that is measured is on the clock: it stops for held-out losses and for scores that cost an arm nothing. What
comes before the first counted step is not on it either; the growth of a model is.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import quality_data
import torch
import transformers
from pretrained import from_gguf
from quality_arms import FILTERED, Arm, Batch, Step, row_losses
from torch import Tensor, nn

import cggr_compile as cggr

WARM_UP, STABLE, FLOOR = 0.05, 0.8, 0.02
UNCOUNTED = 6
"""Steps before the clock starts: what they compile is not counted, and nothing is updated."""
REFERENCE = 0.5
"""Of the budget: what the reference model of `excess` trains for."""
BETWEEN_WAITS = 8
"""Steps between two waits for the device: the host may be ahead by as many."""
CALIBRATION = 100
"""Batches that a router is fitted to."""
EVALUATIONS = 12
EVALUATED_AT_ONCE = 16

SIZES = {
    "55M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "heads": 8, "kv": 4},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "kv": 3},
    "1M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "heads": 4, "kv": 2},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "heads": 4, "kv": 2},
}


def linear(share: float) -> float:
    """The learning rate's fraction of its peak: up over WARM_UP of the seconds, down towards FLOOR over all of them."""
    return min(1.0, share / WARM_UP) * max(FLOOR, 1 - share)


def wsd(share: float) -> float:
    """Warm-up, stable, decay: up over WARM_UP of the seconds, at the peak until STABLE, then down to FLOOR."""
    return min(1.0, share / WARM_UP) * max(FLOOR, min(1.0, (1 - share) / (1 - STABLE)))


def stall(waits: Sequence[float]) -> float:
    """The most seconds by which the steps between two waits took longer than those between the five pairs of waits that
    follow, by their median; of steps that nothing follows none."""
    took = [after - before for before, after in pairwise(waits)]
    return max((took[i] - median(took[i + 1 : i + 6]) for i in range(len(took) - 1)), default=0.0)


SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "wsd": wsd}


@dataclass(frozen=True)
class Run:
    """One run: an arm under a regime with a seed for so many seconds.

    `size` is one of SIZES, or the name of the file that the weights are loaded from; `rows` are those that train, 0 for
    as many as there are.
    """

    arm: str
    regime: str
    seed: int
    seconds: float
    size: str
    length: int
    schedule: str = "linear"
    rows: int = 0

    @classmethod
    def key(cls, record: dict[str, Any]) -> tuple:
        """What tells the run of a record from others; fields that an older record lacks have their defaults."""
        fields = cls.__dataclass_fields__.values()
        return tuple(record.get(field.name, field.default) for field in fields)


class Batches:
    """Shuffled passes over the training rows."""

    def __init__(self, rows: Tensor, number: int, seed: int) -> None:
        if number > len(rows):
            raise ValueError(f"a batch of {number} rows from {len(rows)}; give a smaller xBATCH or more --rows")
        self.rows, self.number, self.seed = rows, number, seed
        self.restart()

    def restart(self) -> None:
        """From the first batch again."""
        self.generator = torch.Generator(self.rows.device).manual_seed(1000 + self.seed)
        self.order, self.at, self.passes, self.whole = self._shuffled(), 0, 0.0, 0

    def _shuffled(self) -> Tensor:
        return torch.randperm(len(self.rows), generator=self.generator, device=self.rows.device)

    def next(self) -> Batch:
        """The next batch; what is left of a pass that is too short for one is dropped."""
        if self.at + self.number > len(self.rows):
            self.order, self.at, self.whole = self._shuffled(), 0, self.whole + 1
        self.at += self.number
        self.passes += self.number / len(self.rows)
        places = self.order[self.at - self.number : self.at]
        return Batch(self.rows[places], places, self.whole)


class Filtered:
    """The hardest share of the rows of batches by a router, in batches of the arm's size."""

    def __init__(self, batches: Batches, router: cggr.NanoRouter, arm: Arm) -> None:
        self.batches = Batches(batches.rows, round(arm.batch / arm.ratio), batches.seed)
        self.loader = cggr.FilteredLoader(self, lambda batch: router(batch["input_ids"]), arm.batch, ratio=arm.ratio)
        self.restart()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield {"input_ids": self.batches.next().rows}

    @property
    def passes(self) -> float:
        """Over the rows in front of the filter."""
        return self.batches.passes

    def restart(self) -> None:
        """From the first batch again."""
        self.batches.restart()
        self.filtered = iter(self.loader)

    def next(self) -> Batch:
        """The next batch of hard rows."""
        rows = next(self.filtered)["input_ids"]
        return Batch(rows, rows.new_empty(0), 0)


class Clock:
    """Seconds of training; stands still while something is measured."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent, self.started = device, 0.0, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        """Goes on, once the device has nothing left to do."""
        self.started = self._now()

    def stop(self) -> float:
        """Stands still, once the device has done what it was given; all seconds so far."""
        self.spent = self.wait()
        return self.spent

    def seconds(self) -> float:
        """What the host has seen, without waiting for the device."""
        return self.spent + time.perf_counter() - self.started

    def wait(self) -> float:
        """Lets the device catch up; all seconds so far."""
        return self.spent + self._now() - self.started


class Source(NamedTuple):
    """The token file, and the folder of the GGUF file that a model starts from, if it does."""

    tokens: Path
    weights: Path | None

    def rows(self, run: Run) -> quality_data.Rows:
        """The rows of a run, on the CPU."""
        return quality_data.rows_of(self.tokens, run.length, run.regime, run.rows)


class Training:
    """A model that trains as an arm says, for so many seconds."""

    def __init__(self, run: Run, rows: quality_data.Rows, source: Source, device: torch.device) -> None:
        self.run, self.source, self.device, self.arm = run, source, device, Arm.parse(run.arm)
        self.batches: Batches | Filtered = Batches(torch.tensor(rows.train, device=device), self.arm.batch, run.seed)
        self.held_out = {domain: torch.tensor(each, device=device) for domain, each in rows.held_out.items()}
        vocabulary = quality_data.vocabulary_of(source.tokens)
        self.model = _model(run, self.arm.layers, vocabulary, source.weights, device).train()
        self.clock = Clock(device)
        self.optimizer, self.set_rate = _optimizer(self.model, device)
        self.steps = 0
        self.waits: list[float] = []  # the clock at each
        self.curve: list[list[float]] = []
        self.auto: list[list[float]] = []
        self.grown: list[list[float]] = []

    def compile(self) -> float:
        """The steps before the clock starts; how long they took."""
        known = self._known_losses()
        if self.arm.name == FILTERED:
            self.batches = Filtered(self.batches, self._router(), self.arm)
        self.clock.start()
        self.step = Step(self.arm, self.model, self.device, known)
        if hasattr(self.model, "cggr"):
            cggr.attach(self.model, self.optimizer)
        for _ in range(UNCOUNTED):
            self._step(self.batches.next())
        self.model.zero_grad(set_to_none=True)
        self.batches.restart()
        return self.clock.stop()

    def train(self) -> float:
        """Steps until the budget is spent; the seconds that they took."""
        factor = SCHEDULES[self.run.schedule]
        self.clock = Clock(self.device)
        self.clock.start()
        while (seconds := self.clock.seconds()) < self.run.seconds:
            share = seconds / self.run.seconds
            if share >= (len(self.curve) + 1) / EVALUATIONS:
                self._evaluate()
            if self._stage and share >= self._stage[0][1]:
                self.model.cggr.grow()
                self.grown.append([round(seconds, 2), self.steps])
            self.set_rate(self.arm.rate * factor(share))
            self._step(self.batches.next())
            self._update()
        return self.clock.stop()

    def losses(self) -> dict[str, float]:
        """Held-out loss of every domain, by the layers in use."""
        with self._in_use():
            return _losses(self.model, self.held_out, self.device)

    def _known_losses(self) -> Tensor:
        """Of the rows that train: those of a reference model, where the arm has one."""
        rows = self.batches.rows
        if self.arm.name != "excess":
            return torch.zeros(len(rows), device=rows.device)
        return row_losses(self._reference(), rows)

    def _reference(self) -> nn.Module:
        """A model that trained on clean rows for `REFERENCE` of the budget."""
        arm, seconds = f"allx{self.arm.batch}/{self.arm.rate}", REFERENCE * self.run.seconds
        other = replace(self.run, arm=arm, regime="clean", seed=self.run.seed + 1000, seconds=seconds)
        reference = Training(other, self.source.rows(other), self.source, self.device)
        reference.compile()
        reference.train()
        return reference.model

    def _router(self) -> cggr.NanoRouter:
        """A router fitted to the losses of a reference model."""
        reference = self._reference()
        router = cggr.NanoRouter.from_model(reference)
        batches = Batches(self.batches.rows, self.arm.batch, self.run.seed)

        def losses(rows: Tensor) -> tuple[Tensor]:
            return (row_losses(reference, rows)[:, None].expand(rows.shape),)

        router.calibrate(({"input_ids": batches.next().rows} for _ in range(CALIBRATION)), losses, CALIBRATION)
        return router.to(self.device)

    def _step(self, batch: Batch) -> None:
        """Forward and backward; the clock stands still for scores that cost the arm nothing."""
        if self.step.has_free_scores:
            self.clock.stop()
            self.step.score_for_free(batch.rows)
            self.clock.start()
        self.step(batch)

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.steps += 1
        if self.steps % BETWEEN_WAITS == 0:
            self.waits.append(self.clock.wait())

    def _evaluate(self) -> None:
        at = self.clock.stop()
        self.curve.append([round(at, 2), self.steps, _mean(self.losses())])
        if self.arm.name in ("auto", "default"):
            found = self.model.cggr.metrics()
            told = [found[name] for name in ("auto_selects", "auto_progress") if name in found]
            self.auto.append([round(each.item(), 3) for each in told])
        self.clock.start()

    @property
    def _stage(self) -> tuple[tuple[int, float], ...]:
        """The stages from the one in force on; none where all layers train."""
        return () if self.arm.depth is None else self.arm.depth.stages[len(self.grown) :]

    def _in_use(self) -> AbstractContextManager[Any]:
        return self.model.cggr.in_use() if self._stage else nullcontext()


def trained(run: Run, source: Source, device: torch.device, turn: Path | None = None) -> dict[str, Any]:
    """Trains one model and measures it. With `turn`, a lock's file, it uses the device once no other process does."""
    rows = source.rows(run)
    with turn.open("w") if turn is not None else nullcontext() as lock:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        return _measured(Training(run, rows, source, device))


def _measured(training: Training) -> dict[str, Any]:
    began = time.perf_counter()
    first = training.compile()
    seconds = training.train()
    losses = training.losses()
    peak = torch.cuda.max_memory_reserved() / 2**30 if training.device.type == "cuda" else None
    return {
        **asdict(training.run),
        "first_steps": round(first, 1),
        "spent": round(seconds, 2),
        "held": round(time.perf_counter() - began, 2),
        "steps": training.steps,
        "passes": round(training.batches.passes, 2),
        "stall": round(stall(training.waits), 3),
        "grown": training.grown,
        "curve": training.curve,
        "auto": training.auto,
        "held_out": losses,
        "mean": _mean(losses),
        "GiB": peak,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
    }


def _model(run: Run, layers: int | None, vocabulary: int, weights: Path | None, device: torch.device) -> nn.Module:
    """The model of a run, with its first `layers` only if so many are given."""
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    if weights is not None:
        return _pretrained(weights, layers, vocabulary).to(device)
    size = dict(SIZES[run.size])
    heads, kv = size.pop("heads"), size.pop("kv")
    config = transformers.LlamaConfig(
        **{**size, "num_hidden_layers": layers or size["num_hidden_layers"]},
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=run.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config)


def _pretrained(folder: Path, layers: int | None, vocabulary: int) -> nn.Module:
    """A model with the weights of a folder's GGUF file, for tokens of a vocabulary of that size."""
    model = from_gguf(folder, quality_data.gguf_of(folder), layers)
    if model.config.vocab_size != vocabulary:
        raise ValueError(f"tokens of a vocabulary of {vocabulary}; make them with quality_data.py --tokenizer {folder}")
    model.config.use_cache = False
    return model


def _optimizer(model: nn.Module, device: torch.device) -> tuple[torch.optim.Optimizer, Callable[[float], None]]:
    parameters = list(model.parameters())
    rate = torch.tensor(0.0, device=device)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    return optimizer, lambda value: rate.fill_(value) and None


@torch.no_grad()
def _losses(model: nn.Module, held_out: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    model.eval()
    found = {}
    for domain, rows in held_out.items():
        total = torch.zeros((), device=device)
        for some in rows.split(EVALUATED_AT_ONCE):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
                total += model(input_ids=some, labels=some).loss * len(some)
        found[domain] = total.item() / len(rows)
    model.train()
    return found


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)
