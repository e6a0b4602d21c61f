"""Hypothesis profiles, GPU marker, Triton's interpreter where there is no GPU, and a clean Dynamo for every test."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

# Each process sees one GPU: around a model that sees several transformers' Trainer puts DataParallel, which is refused.
# Workers of xdist get the environment of the process that starts them, and take turns at what that one saw at first.
_SEEN = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
_GPUS = os.environ.setdefault("GPUS_OF_TESTS", _SEEN).split(",")
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
os.environ["CUDA_VISIBLE_DEVICES"] = _GPUS[_WORKER % len(_GPUS)]
# Triton decides when a kernel is defined whether it is compiled or interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=24, suppress_health_check=_SLOW)
settings.register_profile("long", deadline=None, max_examples=1000, suppress_health_check=_SLOW)
settings.register_profile("fuzz", deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

import plans  # noqa: E402  behind Triton's interpreter
from architectures import build  # noqa: E402
from padded import padded  # noqa: E402

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
gc.set_threshold(50_000, 10, 20)  # a trace makes many objects and little garbage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci":
        later = pytest.mark.skip(reason="runs with the long profile (make test-long)")
        for item in [item for item in items if "long" in item.keywords] + _beyond_samples(items):
            item.add_marker(later)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What was imported stays: Python need not search it for garbage."""
    gc.collect()
    gc.freeze()


def _beyond_samples(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each test marked `sample(n)` the cases but for n, spread evenly over them; those on a GPU by themselves."""
    cases: dict[tuple[str, bool], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample") is not None:
            cases.setdefault((item.nodeid.partition("[")[0], "gpu" in item.keywords), []).append(item)
    beyond = []
    for those in cases.values():
        number = those[0].get_closest_marker("sample").args[0]
        kept = {len(those) * i // number for i in range(number)}
        beyond += [item for place, item in enumerate(those) if place not in kept]
    return beyond


@pytest.fixture(scope="session")
def llama() -> tuple[torch.nn.Module, Any]:
    """A model and its captured step, which every test leaves as it finds them."""
    torch._dynamo.reset()  # it is made in front of the reset of the test that first asks for it
    return plans.llama()


@pytest.fixture(scope="session")
def padded_llama() -> tuple[torch.nn.Module, Any]:
    """One as transformers builds it, whose captured batch is padded; tests leave it as they find it, too."""
    torch._dynamo.reset()
    model = build("llama")
    return model, plans.captured(model, padded([7, 4, 9]))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """No test may depend on what an earlier one compiled."""
    torch._dynamo.reset()
