"""The operators `cggr::select_documents` and `cggr::checked_positions`: which documents of packed sequences train.

Registered as `cggr::select` is (`ops`); the semantics are those of `reference/documents.py`.
"""

from __future__ import annotations

import torch
from cggr_compile.kernels.op.checks import check_dtype, check_shape, no_gradient, no_gradient_backward
from cggr_compile.kernels.op.define import by_fields, operator
from cggr_compile.kernels.reference import documents, selection
from cggr_compile.kernels.reference.documents import DocumentArguments
from torch import Tensor

RULES = tuple(name for name, rule in selection.RULES.items() if rule.weighting == "none")
"""The rules that select documents: those that weigh nothing."""


def _check(given: DocumentArguments) -> None:
    op, counted, rule = "select_documents", given.counted, given.rule
    torch._check_value(
        counted.dim() == 2, lambda: f"cggr::{op}: counted has shape {tuple(counted.shape)}, expected [B, S]"
    )
    check_dtype(op, "counted", counted, (torch.bool,))
    check_shape(op, "position_ids", given.position_ids, counted.shape, "[B, S]")
    check_dtype(op, "position_ids", given.position_ids, (torch.int64,))
    for name in ("scores", "noise"):
        if (x := getattr(given, name)) is not None:
            check_shape(op, name, x, counted.shape, "[B, S]")
            check_dtype(op, name, x, (torch.float32,))
    torch._check_value(given.k >= 1, lambda: f"cggr::{op}: k is {given.k}, expected at least 1")
    torch._check_value(rule in RULES, lambda: f"cggr::{op}: rule is {rule!r}, expected one of {list(RULES)}")


@operator("cggr::select_documents")
def select_documents(given: DocumentArguments) -> tuple[Tensor, Tensor]:
    """`documents.select_documents`, not differentiable."""
    _check(given)
    return documents.select_documents(*given)


@select_documents.register_fake
@by_fields
def _select_documents_fake(given: DocumentArguments) -> tuple[Tensor, Tensor]:
    _check(given)
    rows, new = given.counted.shape[0], given.position_ids.new_empty
    return new((rows, given.k)), new((rows, len(documents.FIGURES)))


select_documents.register_autograd(no_gradient_backward, setup_context=no_gradient)


@operator("cggr::checked_positions")
def checked_positions(position_ids: Tensor) -> Tensor:
    """A copy of `position_ids` int64 [B, S], of which every document but the first of a sequence begins at 0.

    Otherwise two documents could become one where what lay between them is left out: then it raises ValueError on the
    CPU; on CUDA an assertion fails on the device, and nothing is read back. Other devices do not check.
    """
    _check_positions(position_ids)
    begun = documents.document_ids(position_ids).diff(dim=1) != 0
    right = ~begun | (position_ids[:, 1:] == 0)
    if position_ids.device.type == "cuda":
        torch._assert_async(right.all(), "position_ids: a document of a packed sequence does not begin at 0")
    elif position_ids.device.type == "cpu" and not right.all():
        row, place = (~right).nonzero()[0].tolist()
        raise ValueError(
            f"position_ids: at place {place + 1} of sequence {row} they go from {position_ids[row, place].item()} to "
            f"{position_ids[row, place + 1].item()}; let every document of a packed sequence begin at 0, or use "
            "route='sequence'"
        )
    return position_ids.clone()


@checked_positions.register_fake
def _checked_positions_fake(position_ids: Tensor) -> Tensor:
    _check_positions(position_ids)
    return torch.empty_like(position_ids)


def _check_positions(position_ids: Tensor) -> None:
    torch._check_value(
        position_ids.dim() == 2,
        lambda: f"cggr::checked_positions: position_ids has shape {tuple(position_ids.shape)}, expected [B, S]",
    )
    check_dtype("checked_positions", "position_ids", position_ids, (torch.int64,))
