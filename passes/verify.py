"""Checks, after every pass, the invariants that make the rewrite sound; the error names the pass that broke one."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from cggr_compile.errors import VerificationError
from cggr_compile.ir.program import PART, REGION, TRAINED_PARTS, Analysed, Program, value

aten = torch.ops.aten

_QUIET_PARTS = ("router", "score", "select")
# What may take the place of an operator that may draw random numbers.
_INSTEAD = {aten._flash_attention_forward.default: aten.scaled_dot_product_attention.default}


def verify(before: Program, after: Program, pass_name: str) -> None:
    """Raises `VerificationError` unless `after` is well-formed and keeps what `before` promises.

    Checked: the graph lints; the captured inputs are unchanged in order and number, added ones come last; parameters
    are read from those inputs and never copied into the graph; nodes that act by side effect survive in the main pass,
    if there still is one (`keep_scores` leaves none) with all its layers; router, scoring and selection run without
    gradients; once rows are gathered, no value of the main pass has a size that depends on the batch size, once
    documents are, none one that depends on the sequence length, nor has any of the middle layers on fewer tokens.
    """
    try:
        after.graph.lint()
    except RuntimeError as error:
        raise VerificationError(pass_name, f"the graph does not lint: {error}") from error
    _check_inputs(before, after, pass_name)
    _check_effects(before, after, pass_name)
    gathered = isinstance(after, Analysed) and after.routing.gathered
    by_token = isinstance(after, Analysed) and after.routing.documents is not None
    by_row, by_place = _Sizes(after, after.batch), _Sizes(after, after.sequence)
    for node in after.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(after.root, str(node.target)), torch.nn.Parameter):
            raise VerificationError(pass_name, "a parameter was copied into the graph", node)
        if node.meta.get(PART) in _QUIET_PARTS and node.meta[REGION].grad is not False:
            raise VerificationError(pass_name, f"the {node.meta[PART]} part records gradients", node)
        if gathered and node.meta.get(PART) in ("main", "loss"):
            if by_token:
                _check_no_size(by_place, node, pass_name, "the sequence length is left in the k-token part")
            else:
                _check_no_size(by_row, node, pass_name, "the batch size is left in the k-row part")
        if node.meta.get(PART) == "middle":
            _check_no_size(by_place, node, pass_name, "the sequence length is left in the k-token part")


def _check_inputs(before: Program, after: Program, pass_name: str) -> None:
    names = [node.name for node in after.placeholders]
    if names != [entry.name for entry in after.inputs]:
        raise VerificationError(pass_name, "placeholders and input descriptions differ")
    if names[: len(before.inputs)] != [entry.name for entry in before.inputs]:
        raise VerificationError(pass_name, "the inputs changed in order, number or name")


def _check_effects(before: Program, after: Program, pass_name: str) -> None:
    if before.loss_output >= 0 > after.loss_output or _layers_of(after) < _layers_of(before):
        return
    lost = _effects(before) - _effects(after)
    if lost:
        names = ", ".join(str(target) for target in lost)
        raise VerificationError(pass_name, f"nodes that act by side effect were dropped: {names}")


def _layers_of(program: Program) -> int:
    return len(program.layers) if isinstance(program, Analysed) and program.layers is not None else 0


def _effects(program: Program) -> Counter:
    known: dict[object, bool] = {}

    def acts(node: fx.Node) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload):
            return node.is_impure()
        if node.target not in known:  # an operator acts by its schema, whatever its arguments
            known[node.target] = node.is_impure()
        return known[node.target]

    return Counter(
        str(_INSTEAD.get(node.target, node.target))
        for node in program.graph.nodes
        if node.op == "call_function" and node.meta[PART] in TRAINED_PARTS and acts(node)
    )


class _Sizes:
    """Which sizes of a program depend on one of its symbols: few expressions, and many values that have them."""

    def __init__(self, program: Program, symbol: torch.SymInt | int) -> None:
        self._program = program
        self._symbol = symbol
        self._known: dict[object, bool] = {}

    def has(self, size: object) -> bool:
        """Whether a size is one of them."""
        if not isinstance(self._symbol, torch.SymInt) or not isinstance(size, (torch.SymInt, torch.SymFloat)):
            return False
        expression = size.node.expr
        if expression not in self._known:
            self._known[expression] = self._program.mentions(size, self._symbol)
        return self._known[expression]


def _check_no_size(sizes: _Sizes, node: fx.Node, pass_name: str, problem: str) -> None:
    val = value(node)
    shape = val.shape if isinstance(val, torch.Tensor) else (val,)
    if node.op == "call_function" and any(map(sizes.has, shape)):
        raise VerificationError(pass_name, f"{problem}, in shape {shape}", node)
