"""Examines architectures in processes of their own, under limits of time and memory; results survive interruption.

A worker that raises, crashes, hangs or runs out of memory costs its class only: what it printed last is the reason.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import Progress, TextColumn

from cggr_compile.environment import environment
from cggr_compile.values import nearest
from sweep.classes import TEXT, Candidate, Record, candidates, examine
from sweep.page import render

PATIENCE = 20

_STARTED = "started"


@dataclass(frozen=True)
class _Ran:
    """A worker's message: the model has trained in eager mode, with such images."""

    images: str


Results = dict[Candidate, Record]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
# Folders above an installed package say where this was run, not what went wrong.
_FOLDERS = re.compile(
    r"(?<![\w.])/(?:[^\s:'\"]+/)?(?:site-packages/|lib/python3\.\d+/|(?=(?:torch|transformers|cggr_compile|passes|kernels)/))"
)


def run(
    todo: Sequence[Candidate],
    jobs: int,
    time_limit: float,
    memory_limit: float,
    done: Callable[[Record], None],
    work: Callable[[Candidate, Callable[[str], None]], Record] = examine,
    context: BaseContext | None = None,
) -> None:
    """Examines each candidate in a process of its own and passes its record to `done`.

    Args:
        todo: the candidates.
        jobs: processes at a time.
        time_limit: processor seconds for each, which do not depend on what else the machine does; a process that
            waits for ever is stopped after `PATIENCE` times as many seconds of the clock.
        memory_limit: GiB of data for each.
        done: called in this process, in the order of completion.
        work: what a worker does with a candidate, given what to call once its model runs.
        context: how workers are started; by a fork server with everything imported without one.
    """
    if context is None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sweep.runs", "sweep.warm_worker"])
    waiting = list(todo)
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Worker(context, work, waiting.pop(0), time_limit, memory_limit))
            wait([worker.process.sentinel for worker in running], timeout=0.2)
            for worker in [worker for worker in running if worker.ended()]:
                running.remove(worker)
                done(worker.record())
    finally:
        for worker in running:
            worker.kill()


class _Worker:
    """One process, its pipe, what it prints on stderr, and its deadline."""

    def __init__(
        self, context: Any, work: Callable[..., Record], candidate: Candidate, time_limit: float, memory_limit: float
    ) -> None:
        self.candidate = candidate
        self.time_limit = time_limit
        self.errors: IO[str] = tempfile.NamedTemporaryFile("r", suffix=".err", errors="replace")  # noqa: SIM115
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work,
            args=(work, candidate, sender, self.errors.name, int(time_limit), int(memory_limit * 2**30)),
            daemon=True,
        )
        self.messages: list[Any] = []
        self.start: float | None = None
        self.late = False
        self.process.start()
        sender.close()

    def ended(self) -> bool:
        """Whether the process is over; stops it where its time is. The clock starts when the process does."""
        self.messages += _received(self.receiver)
        if self.start is None and self.messages:
            self.start = time.monotonic()
        if self.start is not None and self.process.is_alive() and self._seconds() > PATIENCE * self.time_limit:
            self.late = True
            self.kill()
        return not self.process.is_alive()

    def _seconds(self) -> float:
        return 0.0 if self.start is None else time.monotonic() - self.start

    def kill(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()

    def record(self) -> Record:
        """What the process sent, or how it ended."""
        self.process.join()
        messages = self.messages = [*self.messages, *_received(self.receiver)]
        reason = last_error(self.errors.read())
        self.errors.close()
        if messages and isinstance(messages[-1], Record):
            return replace(messages[-1], reason=_without_folders(messages[-1].reason))
        code = self.process.exitcode
        if self.late or code == -signal.SIGXCPU:
            reason = f"stopped after {self.time_limit:.0f} s"
        elif not reason:
            reason = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
        ran = [message for message in messages if isinstance(message, _Ran)]
        status, images = ("failure", ran[0].images) if ran else ("not runnable", "")
        return Record(self.candidate, status, reason, images=images, seconds=self._seconds())


def _received(receiver: Connection) -> Iterator[Any]:
    """Everything that was sent before the other end closed."""
    with suppress(EOFError):
        while receiver.poll():
            yield receiver.recv()


def _work(
    work: Callable[..., Record],
    candidate: Candidate,
    sender: Connection,
    errors: str,
    time_limit: int,
    memory_limit: int,
) -> None:
    """The worker: says when it starts, when the model has trained in eager mode, and what its record is."""
    sender.send(_STARTED)
    sys.stderr = open(errors, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + time_limit, used + time_limit + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    sender.send(work(candidate, lambda images: sender.send(_Ran(images))))


def last_error(text: str) -> str:
    """The first line of the last exception that a traceback in `text` ends with, and where it was raised; else ""."""
    _, raised, trace = text.rpartition("Traceback (most recent call last):")
    lines = trace.splitlines()
    spoken = [line for line in lines if line and not line[0].isspace()]
    # An error that passes another one on names it on its second line.
    message = " ".join(spoken[: 2 if spoken and spoken[0].endswith(":") else 1])
    frames = [_FRAME.search(line) for line in lines]
    places = [match for match in frames if match]
    if not raised or not message:
        return ""
    where = f" (at {places[-1]['file']}:{places[-1]['line']})" if places else ""
    return _without_folders(message + where)


def _without_folders(text: str) -> str:
    return _FOLDERS.sub("", text)


class UnknownArchitecture(ValueError):
    """A name that is neither a model type nor a model class of the two mappings."""


def sweep(
    only: Sequence[str],
    jobs: int,
    time_limit: float,
    memory_limit: float,
    output: Path,
    page: Path,
    route: str,
    objectives: Sequence[str] = TEXT,
) -> int:
    """Examines every candidate that has no result in `output` yet, or those named by `only`; returns the number of
    failures and of what could not be checked.

    After each class the results are saved to `output` (JSON), so that an interrupted run goes on where it was; at the
    end the page is written from all of them.

    Raises:
        UnknownArchitecture: a name in `only` fits nothing.
        ValueError: `output` is a file of something else.
    """
    every = candidates(objectives)
    results = load(output)
    todo = _named(every, only) if only else [candidate for candidate in every if candidate not in results]
    surroundings = environment(torch.device("cpu"))
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[last]}")) as progress:
        task = progress.add_task("architectures", total=len(todo), last="")

        def done(record: Record) -> None:
            results[record.candidate] = replace(record, commit=surroundings["commit"])
            save(output, results, surroundings)
            progress.update(task, advance=1, last=f"{record.candidate.model_class}: {record.status}")

        run(todo, jobs, time_limit, memory_limit, done, partial(examine, route=route))
    records = [results[candidate] for candidate in every if candidate in results]
    page.write_text(
        render(records, [c for c in every if c not in results], surroundings, route, objectives), encoding="utf-8"
    )
    failures = [record for record in records if record.status in ("failure", "unchecked")]
    for record in failures:
        print(f"{record.candidate.model_class} ({record.candidate.model_type}): {record.reason}")
    return len(failures)


def _named(every: list[Candidate], only: Sequence[str]) -> list[Candidate]:
    for name in only:
        if not any(name in (candidate.model_type, candidate.model_class) for candidate in every):
            close = nearest(name, [candidate.model_type for candidate in every])
            raise UnknownArchitecture(f"{name!r} is no model type or class of transformers' mappings{close}")
    return [candidate for candidate in every if {candidate.model_type, candidate.model_class} & set(only)]


def load(path: Path) -> Results:
    """The records of an earlier run; none where there is no file.

    Raises:
        ValueError: the file is not one that `save` wrote.
    """
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["results"]
        records = [Record(**{**entry, "candidate": Candidate(**entry["candidate"])}) for entry in entries]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no results of this command; choose another --output, or delete it") from error
    return {record.candidate: record for record in records}


def save(path: Path, results: Results, environment: dict[str, Any]) -> None:
    """Writes all records, replacing the file at once, so that an interruption leaves the old one or the new."""
    document = {"environment": environment, "results": [asdict(record) for record in results.values()]}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
