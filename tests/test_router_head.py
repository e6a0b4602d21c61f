"""`router_head=` end to end: rows as an independent computation of each head selects them, gradients as eager's on
those rows, state that is resumed, and nothing retraced from step to step."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from fractions import Fraction

import oracle
import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, build, token_batch

import cggr_compile as cggr
from cggr_compile.ir.router_head import Basis, cost_factor, describe
from cggr_compile.run.runtime import Runtime

RATIO, LAYERS, SEED = 0.4, 2, 7
FREQUENT, SAMPLED, RANK, REFRESH = 5, 12, 6, 2
OPTIONS = {
    "ratio": RATIO,
    "router_layers": LAYERS,
    "seed": SEED,
    "router_head_frequent": FREQUENT,
    "router_head_sampled": SAMPLED,
    "router_head_rank": RANK,
    "router_head_refresh": REFRESH,
}


class Head:
    """Hidden states in front of the eager router's head, and what its logits are made of, in float64."""

    def __init__(self, eager: torch.nn.Module, name: str, batch: dict[str, torch.Tensor]) -> None:
        router = oracle.truncated(eager, ARCHITECTURES[name], LAYERS)
        linear = router.get_output_embeddings()
        found = []
        linear.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        with torch.no_grad():
            router(**{key: tensor for key, tensor in batch.items() if key != "labels"})
        labels = batch["labels"]
        if ARCHITECTURES[name].causal:
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
        self.rows = len(labels)
        self.target = labels.flatten()
        self.counted = self.target != -100
        self.hidden = found[0].flatten(0, 1)
        self.weight = linear.weight.detach()
        self.bias = torch.zeros(len(self.weight)) if linear.bias is None else linear.bias.detach()
        self.cap = getattr(eager.config, "final_logit_softcapping", None)

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = hidden.double() @ weight.double().T + self.bias.double()
        return self.cap * (x / self.cap).tanh() if self.cap else x

    def selected(self, nll: torch.Tensor) -> list[int]:
        """The k rows of highest mean nll over counted tokens."""
        counts = self.counted.view(self.rows, -1).sum(1)
        totals = torch.where(self.counted, nll, 0.0).view(self.rows, -1).sum(1)
        assert totals.isfinite().all()
        mean = torch.where(counts > 0, totals / counts.clamp(min=1), -math.inf)
        return sorted(mean.argsort(descending=True)[: math.ceil(RATIO * self.rows)].tolist())


def sampled(head: Head, noise: torch.Tensor) -> torch.Tensor:
    counts = Counter(head.target[head.counted].tolist())
    by_frequency = sorted(range(VOCABULARY), key=lambda label: (-counts[label], label))
    others, step = sorted(by_frequency[FREQUENT:]), Fraction(VOCABULARY - FREQUENT, SAMPLED)
    rest = [others[math.floor((place + Fraction(noise.item())) * step)] for place in range(SAMPLED)]
    times = dict.fromkeys(by_frequency[:FREQUENT], 1.0) | dict.fromkeys(rest, (VOCABULARY - FREQUENT) / SAMPLED)
    x = head.logits(head.hidden, head.weight)
    nll = []
    for row, label in zip(x.tolist(), head.target.clamp(min=0).tolist(), strict=True):
        total = math.fsum(w * math.exp(row[column]) for column, w in times.items() if column != label)
        nll.append(math.log(math.exp(row[label]) + total) - row[label])
    return torch.tensor(nll, dtype=torch.float64)


def low_rank(head: Head, basis: torch.Tensor) -> torch.Tensor:
    own = head.target.clamp(min=0).unsqueeze(1)
    exact = head.logits(head.hidden, head.weight).gather(1, own)
    x = head.logits(head.hidden.double() @ basis @ basis.T, head.weight).scatter(1, own, exact)
    return x.logsumexp(1) - exact[:, 0]


def next_basis(head: Head, basis: torch.Tensor) -> torch.Tensor:
    counted, weight = head.hidden[head.counted].double(), head.weight.double()
    return torch.linalg.qr(counted.T @ counted @ weight.T @ weight @ basis).Q


def fp8(head: Head) -> torch.Tensor:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax(1, keepdim=True) / 448).clamp(min=1e-30)  # a padding token's embedding is zero
        return (x / scale).to(torch.float8_e4m3fn).double() * scale.double()

    x = head.logits(rounded(head.hidden), rounded(head.weight))
    return x.logsumexp(1) - x.gather(1, head.target.clamp(min=0).unsqueeze(1))[:, 0]


@pytest.mark.parametrize(("router_head", "name"), [("sampled", "gemma2"), ("low_rank", "llama"), ("fp8", "bert")])
def test_rows_are_those_of_the_head_and_gradients_those_of_eager(router_head: str, name: str) -> None:
    """Four steps, of which the first and third agree in shape. A low-rank model is pickled half-way and goes on; a
    sampled one has an inner backend that counts as a compiler."""
    eager = build(name)
    inner = "eager_noexcept" if router_head == "sampled" else "eager"
    model = cggr.optimize(copy.deepcopy(eager), router_head=router_head, inner=inner, **OPTIONS)
    generator = torch.Generator().manual_seed(SEED)
    basis = (
        torch.linalg.qr(torch.randn(32, RANK, generator=generator)).Q.double() if router_head == "low_rank" else None
    )
    different = 0
    for step, (size, length) in enumerate([(6, 12), (9, 14), (6, 12), (7, 10)], start=1):
        batch = token_batch(size, length, seed=step)
        if step == 3 and router_head == "low_rank":
            model = pickle.loads(pickle.dumps(model))
        loss, gradients = oracle.step(model, batch)
        head = Head(eager, name, batch)
        if router_head == "sampled":
            nll = sampled(head, torch.rand(1, generator=generator))
        elif router_head == "low_rank":
            nll = low_rank(head, basis)
            if step in (1, 2, 4):
                basis = next_basis(head, basis)
        else:
            nll = fp8(head)
        rows = head.selected(nll)
        assert model.cggr.selected.tolist() == rows
        expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, torch.tensor(rows)))
        oracle.assert_same_step(loss, gradients, expected_loss, expected)
        exact = head.logits(head.hidden, head.weight)
        exact_nll = exact.logsumexp(1) - exact.gather(1, head.target.clamp(min=0).unsqueeze(1))[:, 0]
        scores = torch.where(head.counted, nll - exact_nll, 0.0)
        different += bool(scores.abs().max() > 1e-3)
    assert different == 4  # the estimate is not the exact score
    assert model.cggr.captures == 1
    operator = {"sampled": "sampled_score", "low_rank": "low_rank_score", "fp8": "fp8_score"}[router_head]
    report = model.cggr.report()
    # Three shapes: the first in numbers, the others by one code with symbols.
    assert report.compilations == {"routed": 2 if router_head == "sampled" else 0}
    assert report.providers[operator] == "reference"
    assert "score" not in report.providers
    assert report.router.head == describe(model.cggr.config, VOCABULARY, 32)
    assert report.router.head in model.cggr.diff().summary()


def test_the_basis_is_refreshed_at_doubling_gaps_up_to_the_period() -> None:
    basis = Basis(8)
    first = basis.on(6, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.T @ first, torch.eye(2))
    changed = []
    for step in range(1, 41):
        before = basis.on(6, 2, torch.Generator().manual_seed(step))
        basis.update(torch.randn(6, 2, generator=torch.Generator().manual_seed(step)))
        if not torch.equal(basis.directions, before):
            changed.append(step)
    assert changed == [1, 2, 4, 8, 16, 24, 32, 40]


def test_runtime_state_is_pickled() -> None:
    runtime = Runtime(cggr.RoutingConfig(router_head="low_rank", seed=3))
    runtime.basis.on(6, 2, runtime.generator(torch.device("cpu")))
    runtime.basis.update(torch.eye(6)[:, :2])
    twin = pickle.loads(pickle.dumps(runtime))
    assert torch.equal(twin.basis.directions, runtime.basis.directions)
    assert twin.basis.due == 2
    clone = copy.deepcopy(runtime)
    runtime.basis.update(torch.eye(6)[:, 2:4])
    assert torch.equal(clone.basis.directions, twin.basis.directions)
    assert not torch.equal(clone.basis.directions, runtime.basis.directions)
    cpu = torch.device("cpu")
    expected = torch.rand(4, generator=runtime.generator(cpu))
    assert torch.equal(torch.rand(4, generator=twin.generator(cpu)), expected)
    assert torch.equal(torch.rand(4, generator=clone.generator(cpu)), expected)


def test_a_head_that_reads_everything_is_the_exact_one() -> None:
    for options in ({"router_head": "sampled"}, {"router_head": "low_rank"}):
        config = cggr.RoutingConfig(**options)
        assert describe(config, VOCABULARY, 32) == "exact head"
        assert cost_factor(config, 60, VOCABULARY, 32) == 1.0
    explained = cggr.explain(build("llama"), token_batch(), router_head="sampled")
    assert "score" in dict(explained.program.routing.providers)
    assert [entry.name for entry in explained.program.inputs if entry.kind == "added"] == ["kept"]


def test_cost_follows_the_head() -> None:
    def multiply_adds(rows: int, vocabulary: int, width: int, rank: int) -> int:
        projections = rows * width * rank + vocabulary * width * rank
        image = vocabulary * width * rank + 2 * rows * width * rank
        return projections + rows * rank * vocabulary + rows * width + image

    sizes = (1024, 50_000, 512)
    low = cggr.RoutingConfig(router_head="low_rank", router_head_rank=64)
    assert cost_factor(low, *sizes) == pytest.approx(multiply_adds(*sizes, 64) / math.prod(sizes), rel=1e-12)
    assert "rank 64 of 512" in describe(low, *sizes[1:])
    assert cost_factor(cggr.RoutingConfig(router_head="sampled"), *sizes) == 2049 / 50_000
    assert "1024 frequent + 1024 drawn of 50000" in describe(cggr.RoutingConfig(router_head="sampled"), *sizes[1:])
    assert cost_factor(cggr.RoutingConfig(router_head="fp8"), *sizes) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_head": "low-rank"}, "did you mean 'low_rank'"),
        ({"router_head": "sampled", "scoring": "margin"}, "cannot score by 'margin'.*use router_head='low_rank'"),
        ({"router_head": "sampled", "scoring": "combined"}, "cannot score by 'combined'"),
        ({"router_head_sampled": 0}, "router_head_sampled=0 is not an integer of at least 1"),
        ({"router_head_rank": 2.5}, "router_head_rank=2.5"),
        ({"router_head_frequent": -1}, "router_head_frequent=-1 is not an integer of at least 0"),
        ({"router_head_refresh": True}, "router_head_refresh=True"),
    ],
)
def test_bad_options_say_what_to_do(options: dict, message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(**options)
