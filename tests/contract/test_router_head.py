"""`router_head=` end to end: rows as an independent computation of each head selects them, gradients as eager's on
those rows, and nothing retraced from step to step."""

from __future__ import annotations

import copy
import math
from collections import Counter
from fractions import Fraction

import oracle
import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, build, token_batch
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.router_head import cost_factor, describe

RATIO, LAYERS, SEED = 0.4, 2, 7
FREQUENT, SAMPLED = 5, 12
OPTIONS = {
    "ratio": RATIO,
    "selection": "topk",
    "router_layers": LAYERS,
    "seed": SEED,
    "router_head_frequent": FREQUENT,
    "router_head_sampled": SAMPLED,
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


def fp8(head: Head) -> torch.Tensor:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax(1, keepdim=True) / 448).clamp(min=1e-30)  # a padding token's embedding is zero
        return (x / scale).to(torch.float8_e4m3fn).double() * scale.double()

    x = head.logits(rounded(head.hidden), rounded(head.weight))
    return x.logsumexp(1) - x.gather(1, head.target.clamp(min=0).unsqueeze(1))[:, 0]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("router_head", "name"), [("sampled", "gemma2"), ("fp8", "bert"), ("sampled", "llama")])
def test_rows_are_those_of_the_head_and_gradients_those_of_eager(router_head: str, name: str) -> None:
    """Four steps, of which the first and third agree in shape. A sampled model has an inner backend that counts as a
    compiler."""
    eager = build(name)
    inner = "eager_noexcept" if router_head == "sampled" else "eager"
    model = cggr.optimize(copy.deepcopy(eager), router_head=router_head, inner=inner, **OPTIONS)
    generator = torch.Generator().manual_seed(SEED)
    different = 0
    for step, (size, length) in enumerate([(6, 12), (9, 14), (6, 12), (7, 10)], start=1):
        batch = token_batch(size, length, seed=step)
        loss, gradients = oracle.step(model, batch)
        head = Head(eager, name, batch)
        nll = sampled(head, torch.rand(1, generator=generator)) if router_head == "sampled" else fp8(head)
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
    report = model.cggr.report()
    # Three shapes: the first in numbers, the others by one code with symbols.
    assert report.compilations == {"routed": 2 if router_head == "sampled" else 0}
    assert report.providers[f"{router_head}_score"] == "reference"
    assert "score" not in report.providers
    assert report.router.head == describe(model.cggr.config, VOCABULARY)
    assert report.router.head in model.cggr.diff().summary()


def test_a_head_that_reads_everything_is_the_exact_one() -> None:
    config = cggr.RoutingConfig(ratio=0.5, router_head="sampled")
    assert describe(config, VOCABULARY) == "exact head"
    assert cost_factor(config, VOCABULARY) == 1.0
    explained = cggr.explain(Toy(), toy_batch(), ratio=0.5, selection="topk", router_head="sampled")
    assert "score" in dict(explained.program.routing.providers)
    assert [entry.name for entry in explained.program.inputs if entry.kind == "added"] == ["kept"]


def test_cost_follows_the_head() -> None:
    vocabulary = 50_000
    sampled, fp8 = (cggr.RoutingConfig(ratio=0.5, router_head=head) for head in ("sampled", "fp8"))
    assert cost_factor(sampled, vocabulary) == 2049 / vocabulary  # 1024 frequent, 1024 drawn, and the target's own
    assert "1024 frequent + 1024 drawn of 50000" in describe(sampled, vocabulary)
    assert cost_factor(fp8, vocabulary) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_head": "sample"}, "did you mean 'sampled'"),
        (
            {"ratio": 0.5, "router_head": "sampled", "scoring": "margin"},
            "cannot score by 'margin'.*use router_head='fp8'",
        ),
        ({"ratio": 0.5, "router_head": "sampled", "scoring": "combined"}, "cannot score by 'combined'"),
        ({"router_head_sampled": 0}, "router_head_sampled=0 is not an integer of at least 1"),
        ({"router_head_sampled": 2.5}, "router_head_sampled=2.5"),
        ({"router_head_frequent": -1}, "router_head_frequent=-1 is not an integer of at least 0"),
        ({"router_head_frequent": True}, "router_head_frequent=True"),
    ],
)
def test_bad_options_say_what_to_do(options: dict, message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(**options)
