"""Makes documents of packed sequences independent of each other, or refuses: what is selected of them is then exact.

A document of a packed sequence begins where `position_ids` do not go up by 1. What one computes must not depend on the
others. That is proved: every operator through which tokens meet (`token_mixing`) is an attention whose mask asks for
query and key of the same document. transformers makes such masks from `position_ids` where it gets no attention mask.

A causal model predicts the first token of a document from the last of the document before; where the documents are
batched one a row, nothing predicts it. So its label is ignored. `position_ids` that would let two documents become one
where those between them are left out raise (`cggr::checked_positions`).

Before::

    main    %target = … a view of %labels, shifted

After::

    select  %documents = cggr.checked_positions(%position_ids)
    main    %first = aten.eq(%position_ids, 0)
    main    %target = … a view of aten.masked_fill(%labels, %first, -100), shifted
"""

from __future__ import annotations

import sympy
import torch
from cggr_compile.passes.rewrite.shared import own_labels
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, Refusal
from cggr_compile.ir import documents
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Analysed, Region, value
from cggr_compile.ir.roles import quiet_region, token_argument
from cggr_compile.ir.token_mixing import KEY, QUERY, Attention, attentions

aten = torch.ops.aten
_HINT = "pass position_ids that restart at every document and no attention_mask, as TRL's padding_free=True does"


def separate_documents(program: Analysed, config: RoutingConfig) -> Analysed:
    """Has the labels read through the documents; sets `routing.documents` to the checked `position_ids` [B, S].

    Raises:
        CannotOptimize: the capture fixed the sequence length, there are no `position_ids` [B, S] of int64, documents
            are not proved to be independent, or the labels are no argument of their own.
    """
    if not isinstance(program.sequence, torch.SymInt):
        raise CannotOptimize(
            f"the model fixes the sequence length to {program.sequence} while it is traced",
            hint="the segment route needs it as a symbol; use route='sequence'",
        )
    positions = token_argument(program, documents.POSITIONS)
    if positions is None or value(positions).dtype != torch.int64:
        raise CannotOptimize("route='segment' and no position_ids [batch, sequence] of int64", hint=_HINT)
    refusal = _dependence(program, positions)
    if refusal is not None:
        raise refusal.error()
    labels = own_labels(program)
    builder = Builder(program)
    builder.copy_inputs()
    builder.part, builder.region = "select", quiet_region(program)
    checked = builder.call(torch.ops.cggr.checked_positions.default, builder.env[positions])
    builder.part, builder.region = "main", Region()
    if program.head.shift:
        first = builder.call(aten.eq.Scalar, builder.env[positions], 0)
        ignored = program.head.ignore_index
        builder.env[labels] = builder.call(aten.masked_fill.Scalar, builder.env[labels], first, ignored)
    builder.copy_rest()
    return builder.finish("separate_documents", routing=builder.routing(documents=checked))


def _dependence(program: Analysed, positions: fx.Node) -> Refusal | None:
    """Why a document may depend on another."""
    found = attentions(program, documents.functions_of(program, positions))
    if isinstance(found, Refusal):
        return Refusal(
            f"documents of a packed sequence are not proved to be independent: {found.reason}",
            found.node,
            "use route='sequence', or 'token' or 'loss' on a batch of one row",
        )
    lets_through = next((attention.node for attention in found if not _within_documents(attention)), None)
    if lets_through is None:
        return None
    return Refusal("the mask of an attention is not proved to keep documents apart", lets_through, _HINT)


def _within_documents(attention: Attention) -> bool:
    """Whether a query sees itself, so that the mask decides, and none of another document."""
    apart = any(condition in documents.ONE for condition in attention.seen)
    return apart and all(condition.subs(KEY, QUERY) == sympy.true for condition in attention.seen)
