"""The table of providers and the choice among them."""

from __future__ import annotations

import pytest
import torch
from cggr_compile.kernels import op as operators
from cggr_compile.kernels import providers
from cggr_compile.kernels.providers import LONGEST_SELECT, PROVIDERS, Place, Provider, choose, passed_over
from cggr_compile.kernels.reference import rows as reference
from cggr_compile.passes.lower.lower_kernels import forced_provider

CPU, META = torch.device("cpu"), torch.device("meta")


def needs_bf16(place: Place) -> str | None:
    return None if place.dtype == torch.bfloat16 else f"needs torch.bfloat16, not {place.dtype}"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Provider:
    """A provider preferred to the reference, for bf16 only."""
    provider = Provider("fast", needs_bf16, lambda: reference.gather)
    monkeypatch.setitem(PROVIDERS, "gather", {"fast": provider, "reference": PROVIDERS["gather"]["reference"]})
    return provider


@pytest.mark.parametrize("op", ["score", "select", "gather", "masked_loss"])
@pytest.mark.parametrize("device", [CPU, torch.device("cuda"), torch.device("mps")])
def test_the_reference_runs_everywhere_and_is_the_choice_without_a_gpu(op: str, device: torch.device) -> None:
    chosen = choose(op, device, torch.float32, forced="reference")
    assert chosen.implementation is getattr(reference, op)
    if device.type != "cuda" or not torch.cuda.is_available():
        assert choose(op, device, torch.float32) is chosen


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (torch.device("mps"), torch.bfloat16, "for CUDA, not mps"),
        (CPU, torch.float64, "bfloat16, float16 and float32, not torch.float64"),
    ],
)
def test_triton_says_where_it_cannot_run(device: torch.device, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(ValueError, match=f"score: provider 'triton' is unavailable on {device} .*{reason}"):
        choose("score", device, dtype, forced="triton")


@pytest.mark.parametrize("op", ["score", "select", "gather", "masked_loss", "grouped_mlp"])
def test_the_meta_device_says_what_cuda_would_run(op: str) -> None:
    assert choose(op, META, torch.bfloat16).name == "triton"
    assert choose("fp8_linear", META, torch.bfloat16).name == "scaled_mm"


def test_without_triton_or_its_interpreter_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the CPU needs Triton's interpreter"):
        choose("score", CPU, torch.float32, forced="triton")
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        choose("masked_loss", torch.device("cuda"), torch.bfloat16, forced="triton")


@pytest.mark.parametrize(("length", "suited"), [(LONGEST_SELECT, True), (LONGEST_SELECT + 1, False), (None, True)])
def test_long_rows_are_left_to_the_sort(length: int | None, suited: bool) -> None:
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    reasons = passed_over("select", Place(device, torch.float32, length))
    assert ("a sort is faster" in reasons.get("triton", "")) is not suited


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "dtype", "name"),
    [
        ("score", torch.bfloat16, "triton"),
        ("masked_loss", torch.float32, "triton"),
        ("gather", torch.bfloat16, "triton"),
        ("gather", torch.int64, "reference"),
        ("score", torch.float64, "reference"),
        ("select", torch.float32, "triton"),
    ],
)
def test_the_choice_on_a_gpu(op: str, dtype: torch.dtype, name: str) -> None:
    assert choose(op, torch.device("cuda"), dtype).name == name


def test_the_table_covers_the_operators_and_names_providers_by_their_keys() -> None:
    defined = {name for module in operators.__all__ for name in vars(getattr(operators, module))}
    assert all(name in defined and hasattr(torch.ops.cggr, name) for name in PROVIDERS)
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
    with pytest.raises(ValueError, match=r"score: provider 'tritan' .* available: (triton, )?reference"):
        choose("score", CPU, torch.float32, forced="tritan")


def test_no_available_provider_raises_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "gather", {"fast": Provider("fast", needs_bf16, lambda: reference.gather)})
    with pytest.raises(ValueError, match=r"gather: no provider .* \(fast: needs torch.bfloat16"):
        choose("gather", CPU, torch.float32)


def test_an_unknown_operator_raises_with_the_operators() -> None:
    with pytest.raises(ValueError, match=r"'scatter'.*score, select, gather, .*masked_loss"):
        providers.choose("scatter", CPU, torch.float32)


def test_a_provider_forced_for_masked_loss_is_forced_for_measured_loss() -> None:
    assert PROVIDERS["measured_loss"].keys() == PROVIDERS["masked_loss"].keys()
    for operator in ("masked_loss", "measured_loss"):
        assert forced_provider({"masked_loss": "triton_recompute"}, operator) == "triton_recompute"
    assert forced_provider({"score": "triton"}, "measured_loss") is None
