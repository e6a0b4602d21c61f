"""What a route keeps, in words, for reports, diffs and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cggr_compile.ir.amounts import Amount

# Of each route: what its ratio is of, and what it keeps.
SIZES = {"sequence": "B", "segment": "S", "token": "S", "loss": "B · S"}
WHAT = {
    "sequence": "rows",
    "segment": "tokens of each sequence, in whole documents",
    "token": "tokens of each sequence",
    "loss": "tokens in the loss",
}


def formula(route: str, ratio: float) -> str:
    """`k = ceil(0.25 · B)`."""
    return f"k = ceil({ratio:g} · {SIZES[route]})"


def kept_text(route: str, ratio: float, amount: Amount) -> str:
    """`k = ceil(0.25 · B) = 8 of 32 rows`."""
    return f"{formula(route, ratio)} = {amount.kept} of {amount.total} {WHAT[route]}"


def all_kept_text(amounts: Mapping[str, Amount]) -> str:
    """The texts of all routes: `8 of 32 rows, 16 of 64 tokens in the loss`."""
    return ", ".join(f"{amount.kept} of {amount.total} {WHAT[route]}" for route, amount in amounts.items())


def schedule_text(warmup_steps: int, dense_after_steps: int | None) -> str:
    """`, from all over 100 warm-up steps, to all again by step 1000`, or an empty string."""
    text = f", from all over {warmup_steps} warm-up steps" if warmup_steps else ""
    return f"{text}, to all again by step {dense_after_steps}" if dense_after_steps is not None else text


def depth_text(stages: Sequence[tuple[int, float | None]], of: int, grow: str) -> str:
    """`layers 0–2 of 12 until step 400, then all, as copies`; `all 12 layers` after the last stage."""
    if not stages:
        return f"all {of} layers"
    texts = [f"{layer_range(layers)} of {of} until {_until(until)}" for layers, until in stages]
    return ", then ".join([*texts, "all"]) + f", {'as copies' if grow == 'copy' else 'from their own values'}"


def _until(until: float | None) -> str:
    return "model.cggr.grow()" if until is None else f"step {until}" if until >= 1 else f"{until:.0%} of all steps"


def middle_text(config: Mapping[str, Any], layers: int) -> str:
    """`layers 1–28 of 30`, or `experts of layers 1–28 of 30`: what runs on the kept tokens on the token route."""
    first, last = config["first_layers"], layers - config["last_layers"] - 1
    text = f"layer {first} of {layers}" if first == last else f"layers {first}–{last} of {layers}"
    return f"experts of {text}" if config["skip"] == "experts" else text


def others_text(config: Mapping[str, Any]) -> str:
    """What the other tokens do on the token route."""
    return f"the other tokens {'skip these' if config['skip'] == 'experts' else 'pass on the residual'}"


def score_text(route: str | tuple[str, ...] | list[str]) -> str:
    """What is scored: rows and documents by the mean of their tokens, tokens each by its own."""
    routes = [route] if isinstance(route, str) else list(route)
    if "segment" in routes:
        return "mean over a document's counted tokens"
    texts = ["mean over counted tokens"] * ("sequence" in routes) + ["each token by itself"] * (routes != ["sequence"])
    return "; ".join(texts)


def layer_range(count: int) -> str:
    """`layer 0` or `layers 0–n`."""
    return "layer 0" if count == 1 else f"layers 0–{count - 1}"


def tail_text(tail: tuple[str, ...]) -> str:
    """`final norm, ` for a single norm after the last layer, else the modules' names."""
    if len(tail) == 1 and any(word in tail[0].rpartition(".")[2].lower() for word in ("norm", "ln")):
        return "final norm, "
    return "".join(f"{name}, " for name in tail)
