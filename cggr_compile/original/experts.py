"""The original CGGR's token-routed MLP: experts of which each token takes a few, by `cggr::grouped_mlp`.

Names, arguments and defaults are those of `persistent_cggr_kernels.py` in the original's source tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cggr_compile.kernels.op import experts as _operators  # noqa: F401  registers the operator
from cggr_compile.kernels.providers import choose


@dataclass
class PersistentKernelConfig:
    """The original's options of its kernels. They are kept and not used: tiles are chosen by dtype and device."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 32
    num_stages: int = 3
    num_warps: int = 8
    producer_warps: int = 2
    consumer_warps: int = 6
    use_cooperative_groups: bool = True
    grid_sync_frequency: int = 4
    use_async_copy: bool = True
    prefetch_distance: int = 2


class PersistentTRMLP(nn.Module):
    """Experts silu(x @ w1) @ w2, the `top_k` most probable of each token's, weighed by their probabilities as shares.

    Calling it with x [B, S, hidden_dim] or [N, hidden_dim] gives `(output, aux_loss)`: the output, in x's shape, and
    the load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) over first choices, 0-d, 1 where
    experts are loaded evenly. `use_persistent=False` computes the same in plain torch. With `mask`, bool [B, S] or [N]
    like `CGGRScorer`'s, tokens without it go to no expert: their output is 0, they cost no expert anything, and the
    loss and the metrics do not count them; no size depends on it.

    Under autocast the experts run in its dtype. Nothing is read back to the host.

    Attributes:
        router: linear without a bias, hidden_dim to num_experts.
        expert_w1: [num_experts, hidden_dim, intermediate_dim].
        expert_w2: [num_experts, intermediate_dim, hidden_dim].

    Raises ValueError for sizes below 1, a `top_k` above num_experts, and an x or a mask of another shape.
    """

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        num_experts: int = 8,
        top_k: int = 2,
        config: PersistentKernelConfig | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim, "num_experts": num_experts}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, expected 1 to num_experts={num_experts}")
        self.hidden_dim, self.intermediate_dim = hidden_dim, intermediate_dim
        self.num_experts, self.top_k = num_experts, top_k
        self.config = config or PersistentKernelConfig()
        self.router = nn.Linear(hidden_dim, num_experts, bias=False)
        self.expert_w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, intermediate_dim))
        self.expert_w2 = nn.Parameter(torch.empty(num_experts, intermediate_dim, hidden_dim))
        nn.init.normal_(self.expert_w1, std=0.02)
        nn.init.normal_(self.expert_w2, std=0.02 / (2 * num_experts) ** 0.5)
        self._metrics: dict[str, Tensor] = {}

    def forward(self, x: Tensor, use_persistent: bool = True, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, in x's shape, and the load-balancing loss."""
        if x.dim() not in (2, 3) or x.shape[-1] != self.hidden_dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected [B, S, {self.hidden_dim}] or [N, {self.hidden_dim}]"
            )
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool of {tuple(x.shape[:-1])}"
            )
        tokens = x.reshape(-1, self.hidden_dim)
        keep = None if mask is None else mask.reshape(-1)
        probabilities = self.router(tokens).softmax(-1)
        weights, experts = probabilities.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        tables = self.expert_w1.transpose(1, 2), self.expert_w2.transpose(1, 2)
        hidden, up, down = (table.to(self._dtype(tokens)) for table in (tokens, *tables))
        provider = choose(
            "grouped_mlp", x.device, hidden.dtype, None if use_persistent else "reference", hidden.shape[1]
        )
        output = provider.implementation(hidden, up, down, weights, experts, None, None, keep, "silu")
        aux_loss = self._balance(probabilities, weights, experts, keep)
        return output.view(x.shape), aux_loss

    def _dtype(self, x: Tensor) -> torch.dtype:
        device = x.device.type
        follows = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if follows and x.dtype != torch.float64 else x.dtype

    def _balance(self, probabilities: Tensor, weights: Tensor, experts: Tensor, keep: Tensor | None) -> Tensor:
        counted = torch.ones_like(experts[:, 0], dtype=torch.float32) if keep is None else keep.float()
        shares = counted / counted.sum().clamp(min=1)
        # Sums of products and no matrix products, which autocast would round.
        load = (shares[:, None] * F.one_hot(experts[:, 0], self.num_experts)).sum(0)
        probabilities = probabilities.float() if keep is None else torch.where(keep[:, None], probabilities.float(), 0)
        aux_loss = self.num_experts * (load * (shares[:, None] * probabilities).sum(0)).sum()
        with torch.no_grad():
            entropy = -(weights * weights.log().clamp(min=-100)).sum(-1).float()
            entropy = entropy if keep is None else torch.where(keep, entropy, 0)
            self._metrics = {
                "router_entropy": (shares * entropy).sum(),
                "top_expert_load": load.max(),
                "aux_loss": aux_loss.detach(),
            }
        return aux_loss

    def get_metrics(self) -> dict[str, float]:
        """`router_entropy` (nats, of the shares of a token's experts), `top_expert_load` (the share of first choices of
        the expert that has most) and `aux_loss` of the last call; reading waits for the device."""
        return {name: metric.item() for name, metric in self._metrics.items()}


def create_persistent_tr_mlp(
    hidden_dim: int, intermediate_dim: int | None = None, num_experts: int = 8, top_k: int = 2, **kwargs: Any
) -> PersistentTRMLP:
    """`PersistentTRMLP`, `intermediate_dim` being 4 hidden_dim where it is None; other options are
    `PersistentKernelConfig`'s."""
    wide = 4 * hidden_dim if intermediate_dim is None else intermediate_dim
    return PersistentTRMLP(hidden_dim, wide, num_experts, top_k, PersistentKernelConfig(**kwargs))


def persistent_grouped_gemm(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], config: PersistentKernelConfig | None = None
) -> list[Tensor]:
    """inputs[i] [M_i, K_i] @ weights[i] [K_i, N_i], differentiable; the groups' sizes are known to the host, so each is
    one product of the library. Raises ValueError where the two are not equally many."""
    if len(inputs) != len(weights):
        raise ValueError(f"there are {len(inputs)} inputs and {len(weights)} weights, expected as many")
    return [x @ weight for x, weight in zip(inputs, weights, strict=True)]
