"""The operators `cggr::select_documents` and `cggr::checked_positions`: which documents of packed sequences train.

Registered as `cggr::select` is (`ops`); the semantics are those of `reference/documents.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cggr_compile.kernels.op.checks import check_dtype, check_shape, no_gradient, no_gradient_backward
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference import documents, selection
from torch import Tensor

RULES = tuple(name for name, rule in selection.RULES.items() if rule.weighting == "none")
"""The rules that select documents: those that weigh nothing."""


def selected(
    position_ids: Tensor,
    counted: Tensor,
    scores: Tensor | None,
    k: int,
    rule: str,
    noise: Tensor | None,
    names: Sequence[str],
    values: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """`documents.select_documents`, with options `names` of `values`."""
    options = dict(zip(names, values, strict=True))
    return documents.select_documents(position_ids, counted, scores, k, rule, noise, options)


def _check(
    position_ids: Tensor, counted: Tensor, scores: Tensor | None, k: int, rule: str, noise: Tensor | None
) -> None:
    torch._check_value(
        counted.dim() == 2, lambda: f"cggr::select_documents: counted has shape {tuple(counted.shape)}, expected [B, S]"
    )
    check_dtype("select_documents", "counted", counted, (torch.bool,))
    check_shape("select_documents", "position_ids", position_ids, counted.shape, "[B, S]")
    check_dtype("select_documents", "position_ids", position_ids, (torch.int64,))
    for name, x in (("scores", scores), ("noise", noise)):
        if x is not None:
            check_shape("select_documents", name, x, counted.shape, "[B, S]")
            check_dtype("select_documents", name, x, (torch.float32,))
    torch._check_value(k >= 1, lambda: f"cggr::select_documents: k is {k}, expected at least 1")
    torch._check_value(
        rule in RULES, lambda: f"cggr::select_documents: rule is {rule!r}, expected one of {list(RULES)}"
    )


@operator("cggr::select_documents")
def select_documents(
    position_ids: Tensor,
    counted: Tensor,
    scores: Tensor | None,
    k: int,
    rule: str,
    noise: Tensor | None,
    names: Sequence[str],
    values: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """`selected`, not differentiable."""
    _check(position_ids, counted, scores, k, rule, noise)
    return selected(position_ids, counted, scores, k, rule, noise, names, values)


@select_documents.register_fake
def _select_documents_fake(
    position_ids: Tensor,
    counted: Tensor,
    scores: Tensor | None,
    k: int,
    rule: str,
    noise: Tensor | None,
    names: Sequence[str],
    values: Sequence[float],
) -> tuple[Tensor, Tensor]:
    _check(position_ids, counted, scores, k, rule, noise)
    rows = counted.shape[0]
    return position_ids.new_empty((rows, k)), position_ids.new_empty((rows, len(documents.FIGURES)))


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
