"""The table of providers and the choice among them."""

from __future__ import annotations

import pytest
import torch
from cggr_compile.kernels import ops, providers, reference
from cggr_compile.kernels.providers import PROVIDERS, Provider, choose

CPU, META = torch.device("cpu"), torch.device("meta")


def needs_bf16(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype == torch.bfloat16 else f"needs torch.bfloat16, not {dtype}"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Provider:
    """A provider preferred to the reference, for bf16 only."""
    provider = Provider("fast", needs_bf16, reference.gather)
    monkeypatch.setitem(PROVIDERS, "gather", {"fast": provider, **PROVIDERS["gather"]})
    return provider


@pytest.mark.parametrize("op", ["score", "select", "gather", "masked_loss"])
@pytest.mark.parametrize("device", [CPU, META, torch.device("cuda"), torch.device("mps")])
def test_the_reference_runs_everywhere(op: str, device: torch.device) -> None:
    chosen = choose(op, device, torch.float32)
    assert chosen.implementation is getattr(reference, op)
    assert choose(op, device, torch.float32, forced="reference") is chosen


def test_the_table_covers_the_operators_and_names_providers_by_their_keys() -> None:
    assert all(isinstance(getattr(ops, op), torch.library.CustomOpDef) for op in PROVIDERS)
    assert all(name == provider.name for table in PROVIDERS.values() for name, provider in table.items())


def test_preference_is_the_order_of_the_table(fast: Provider) -> None:
    assert choose("gather", CPU, torch.bfloat16) is fast
    assert choose("gather", CPU, torch.float32).name == "reference"
    assert choose("gather", CPU, torch.bfloat16, forced="reference").name == "reference"


def test_an_unavailable_provider_raises_with_the_reason_and_the_alternatives(fast: Provider) -> None:
    message = (
        r"gather: provider 'fast' is unavailable on cpu for torch.float32: "
        r"needs torch.bfloat16, not torch.float32; available: reference"
    )
    with pytest.raises(ValueError, match=message):
        choose("gather", CPU, torch.float32, forced="fast")


def test_an_unknown_provider_raises_with_the_alternatives() -> None:
    with pytest.raises(ValueError, match=r"score: provider 'tritan' .* available: reference"):
        choose("score", CPU, torch.float32, forced="tritan")


def test_no_available_provider_raises_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "gather", {"fast": Provider("fast", needs_bf16, reference.gather)})
    with pytest.raises(ValueError, match=r"gather: no provider .* \(fast: needs torch.bfloat16"):
        choose("gather", CPU, torch.float32)


def test_an_unknown_operator_raises_with_the_operators() -> None:
    with pytest.raises(ValueError, match=r"'scatter'.*score, select, gather, masked_loss"):
        providers.choose("scatter", CPU, torch.float32)
