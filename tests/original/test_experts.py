"""The original's token-routed MLP against its own loops over choices and experts, written out in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from original_models import Plain, batch_of
from torch import Tensor

import cggr_compile as cggr


def by_loops(module: cggr.PersistentTRMLP, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output and the balance as the original computes them, on the tokens that are kept alone."""
    tokens = x.reshape(-1, x.shape[-1])
    kept = torch.arange(len(tokens)) if keep is None else keep.reshape(-1).nonzero()[:, 0]
    own = tokens[kept]
    logits = module.router(own)
    shares, chosen = F.softmax(logits, dim=-1).topk(module.top_k, -1)
    shares = shares / shares.sum(-1, keepdim=True)
    rows = torch.zeros_like(own)
    for k in range(module.top_k):
        for expert in range(module.num_experts):
            token = (chosen[:, k] == expert).nonzero()[:, 0]
            result = F.silu(own[token] @ module.expert_w1[expert]) @ module.expert_w2[expert]
            rows = rows.index_add(0, token, result * shares[token, k, None])
    load = F.one_hot(chosen[:, 0], module.num_experts).float().mean(0)
    balance = (load * F.softmax(logits, dim=-1).mean(0)).sum() * module.num_experts
    return torch.zeros_like(tokens).index_copy(0, kept, rows).view(x.shape), balance


def made(**options: int) -> cggr.PersistentTRMLP:
    torch.manual_seed(0)
    module = cggr.create_persistent_tr_mlp(6, **options)
    torch.nn.init.normal_(module.expert_w1)
    torch.nn.init.normal_(module.expert_w2)
    return module


@pytest.mark.parametrize("use_persistent", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 6), (9, 6), (1, 6)])
@pytest.mark.parametrize("masked", [True, False])
def test_outputs_balance_and_gradients(use_persistent: bool, shape: tuple[int, ...], masked: bool) -> None:
    module = made(intermediate_dim=10, num_experts=4, top_k=2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    leaves = [x, *module.parameters()]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def step(output: Tensor, balance: Tensor) -> list[Tensor]:
        return [output, balance, *torch.autograd.grad((output * grad).sum() + 0.5 * balance, leaves)]

    found = step(*module(x, use_persistent=use_persistent, mask=mask))
    expected = step(*by_loops(module, x, mask))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    if mask is not None:
        assert not found[0][~mask].any()


def test_nothing_is_routed() -> None:
    module, x = made(num_experts=3), torch.randn(2, 4, 6)
    output, balance = module(x, mask=torch.zeros(2, 4, dtype=torch.bool))
    assert not output.any()
    assert balance.item() == 0
    (output.sum() + balance).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.parameters())


def test_defaults_and_metrics() -> None:
    module = cggr.create_persistent_tr_mlp(6, BLOCK_M=64)
    assert (module.intermediate_dim, module.num_experts, module.top_k, module.config.BLOCK_M) == (24, 8, 2, 64)
    assert module.get_metrics() == {}
    with torch.no_grad():
        module.router.weight.zero_()  # every expert is as probable as the others
    _, balance = module(torch.randn(5, 6))
    metrics = module.get_metrics()
    assert balance.item() == pytest.approx(1)
    assert metrics["aux_loss"] == pytest.approx(1)
    assert metrics["router_entropy"] == pytest.approx(torch.tensor(2.0).log().item())
    assert metrics["top_expert_load"] == pytest.approx(1)  # ties go to one


def test_the_scorer_says_which_tokens_skip_the_experts() -> None:
    ids, _ = batch_of(2, 6)
    _, mask, _ = cggr.CGGRScorer(Plain(), min_tokens_ratio=0.5)(ids)
    output, _ = made()(torch.randn(*ids.shape, 6), mask=mask)
    assert output.ne(0).any(-1).equal(mask)


def test_experts_follow_autocast() -> None:
    module, x = made(), torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, balance = module(x)
    assert output.dtype == torch.bfloat16
    assert balance.dtype == torch.float32
    torch.testing.assert_close(output.float(), module(x)[0], atol=0.3, rtol=0.1)


def test_products_of_groups() -> None:
    inputs = [torch.randn(rows, 4, requires_grad=True) for rows in (3, 0, 2)]
    weights = [torch.randn(4, columns) for columns in (5, 5, 1)]
    found = cggr.persistent_grouped_gemm(inputs, weights, cggr.PersistentKernelConfig(num_warps=4))
    for x, weight, product in zip(inputs, weights, found, strict=True):
        torch.testing.assert_close(product, x @ weight)
    assert cggr.persistent_grouped_gemm([], []) == []
    with pytest.raises(ValueError, match="3 inputs and 1 weights"):
        cggr.persistent_grouped_gemm(inputs, weights[:1])


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="top_k is 9, expected 1 to num_experts=8"):
        cggr.PersistentTRMLP(6, 10, top_k=9)
    with pytest.raises(ValueError, match="intermediate_dim is 0"):
        cggr.PersistentTRMLP(6, 0)
    module = made()
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\), expected \[B, S, 6\]"):
        module(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"mask is torch.float32 of shape \(3,\), expected torch.bool of \(3,\)"):
        module(torch.zeros(3, 6), mask=torch.ones(3))
