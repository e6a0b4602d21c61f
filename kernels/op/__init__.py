"""The operators: schema, fake, autograd, checks. Importing this registers all of `torch.ops.cggr`."""

from cggr_compile.kernels.op import (
    documents,
    experts,
    fp8_linear,
    gather,
    labels,
    masked_loss,
    router_heads,
    score,
    select,
    selection,
    tokens,
)

__all__ = [
    "documents",
    "experts",
    "fp8_linear",
    "gather",
    "labels",
    "masked_loss",
    "router_heads",
    "score",
    "select",
    "selection",
    "tokens",
]
