"""Decoder models composed at random: no transformers class, no base class, odd module names.

A `Spec` says everything about one; `RandomModel.forward` takes `stop` for the oracle's router, which the compiler never
passes: the first `stop` layers, then the final norm and the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

VOCABULARY = 53
HEAD_DIM = 8
NAMES = ("ground", "upper", "attic", "roof", "sky")


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor


@dataclass(frozen=True)
class Layer:
    """One layer: order of norm and sublayer, attention, and feed-forward."""

    norm: str  # "pre", "post", "sandwich", "parallel"
    window: int | None
    feed_forward: str  # "plain", "gated", "experts", "none"


@dataclass(frozen=True)
class Spec:
    """A model. `kinds` are used in turn; `shared` uses the modules of the first layer of each kind again."""

    kinds: tuple[Layer, ...]
    layers: int
    heads: int
    groups: int
    rms: bool
    bias: bool
    positions: str  # "rotary", "learned", "none"
    naming: str  # "list", "dict", "attributes", "nested"
    shared: bool
    tied: bool
    embedding_norm: bool
    softcap: float
    scale: float

    @property
    def width(self) -> int:
        return HEAD_DIM * self.heads

    @property
    def has_layer_list(self) -> bool:
        """Whether module paths number the layers."""
        return self.naming in ("list", "nested") and not self.shared


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    heads = draw(st.sampled_from([1, 2, 4]))
    kind = st.builds(
        Layer,
        st.sampled_from(["pre", "post", "sandwich", "parallel"]),
        st.sampled_from([None, 2, 5]),
        st.sampled_from(["plain", "gated", "experts", "none"]),
    )
    return Spec(
        kinds=tuple(draw(st.lists(kind, min_size=1, max_size=2))),
        layers=draw(st.integers(2, 5)),
        heads=heads,
        groups=draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        rms=draw(st.booleans()),
        bias=draw(st.booleans()),
        positions=draw(st.sampled_from(["rotary", "learned", "none"])),
        naming=draw(st.sampled_from(["list", "dict", "attributes", "nested"])),
        shared=draw(st.booleans()),
        tied=draw(st.booleans()),
        embedding_norm=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 7.0])),
        scale=draw(st.sampled_from([1.0, 0.25])),
    )


class Attention(nn.Module):
    """Causal, grouped, windowed attention written out in torch."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        super().__init__()
        self.spec, self.window = spec, layer.window
        self.q = nn.Linear(spec.width, spec.width, spec.bias)
        self.kv = nn.Linear(spec.width, 2 * spec.groups * HEAD_DIM, spec.bias)
        self.back = nn.Linear(spec.width, spec.width, spec.bias)

    def forward(self, x: Tensor, allowed: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, -1, 2 * HEAD_DIM).transpose(1, 2).chunk(2, -1)
        if turn is not None:
            q, k = rotated(q, *turn), rotated(k, *turn)
        k, v = (t.repeat_interleave(self.spec.heads // self.spec.groups, 1) for t in (k, v))
        if self.window is not None:
            near = torch.arange(length, device=x.device)
            allowed = allowed & (near[:, None] - near[None, :] < self.window)
        scores = (q @ k.transpose(-1, -2)) * HEAD_DIM**-0.5
        weights = scores.masked_fill(~allowed, -1e9).softmax(-1)
        return self.back((weights @ v).transpose(1, 2).reshape(batch, length, width))


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], -1)


class FeedForward(nn.Module):
    def __init__(self, spec: Spec, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.inner = nn.Linear(spec.width, 24 * (1 + gated), spec.bias)
        self.outer = nn.Linear(24, spec.width, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.outer(F.silu(gate) * x)
        return self.outer(F.gelu(x))


class Experts(nn.Module):
    """Three experts of which each token takes two, weighed by a router of their own."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.choice = nn.Linear(spec.width, 3, bias=False)
        self.experts = nn.ModuleList(FeedForward(spec, gated=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        best = self.choice(x).topk(2, -1)
        weights = torch.zeros_like(x[..., :3]).scatter(-1, best.indices, best.values.softmax(-1))
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Block(nn.Module):
    def __init__(self, spec: Spec, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        norm = nn.RMSNorm if spec.rms else nn.LayerNorm
        self.mix = Attention(spec, layer)
        makers = {
            "plain": lambda: FeedForward(spec, gated=False),
            "gated": lambda: FeedForward(spec, gated=True),
            "experts": lambda: Experts(spec),
            "none": lambda: None,
        }
        self.think = makers[layer.feed_forward]()
        self.before, self.between, self.after, self.last = (norm(spec.width) for _ in range(4))

    def forward(self, x: Tensor, allowed: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.layer.norm == "parallel":
            y = self.before(x)
            return x + self.mix(y, allowed, turn) + (self.think(y) if self.think is not None else 0)
        x = self._around(x, self.before, self.between, lambda y: self.mix(y, allowed, turn))
        return x if self.think is None else self._around(x, self.after, self.last, self.think)

    def _around(self, x: Tensor, first: nn.Module, second: nn.Module, sublayer: nn.Module) -> Tensor:
        if self.layer.norm == "post":
            return first(x + sublayer(x))
        y = sublayer(first(x))
        return x + (second(y) if self.layer.norm == "sandwich" else y)


class Wrapped(nn.Module):
    """A layer one level deeper."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.inside = block

    def forward(self, *args: object) -> Tensor:
        return self.inside(*args)


class RandomModel(nn.Module):
    """The model of a spec: `forward(input_ids, attention_mask, labels)` returns `.loss` and `.logits`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.words = nn.Embedding(VOCABULARY, spec.width)
        if spec.positions == "learned":
            self.places = nn.Embedding(64, spec.width)
        self.at_entry = nn.LayerNorm(spec.width) if spec.embedding_norm else nn.Identity()
        self.count = min(len(spec.kinds), spec.layers) if spec.shared else spec.layers
        blocks = [Block(spec, spec.kinds[i % len(spec.kinds)]) for i in range(self.count)]
        if spec.naming == "list":
            self.tower = nn.ModuleList(blocks)
        elif spec.naming == "nested":
            self.trunk = nn.Sequential(*[Wrapped(block) for block in blocks])
        elif spec.naming == "dict":
            self.storeys = nn.ModuleDict(dict(zip(NAMES, blocks, strict=False)))
        else:
            for name, block in zip(NAMES, blocks, strict=False):
                setattr(self, name, block)
        self.final = nn.LayerNorm(spec.width)
        self.out = nn.Linear(spec.width, VOCABULARY, spec.bias)
        if spec.tied:
            self.out.weight = self.words.weight
        # Larger than usual, so that layers matter to the scores.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)

    def blocks(self) -> list[nn.Module]:
        """The layers in the order in which they run."""
        if self.spec.naming == "list":
            own = list(self.tower)
        elif self.spec.naming == "nested":
            own = list(self.trunk)
        elif self.spec.naming == "dict":
            own = list(self.storeys.values())
        else:
            own = [getattr(self, name) for name in NAMES[: self.count]]
        return [own[i % self.count] for i in range(self.spec.layers)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        stop: int | None = None,
    ) -> Output:
        length = input_ids.shape[1]
        place = torch.arange(length, device=input_ids.device)
        x = self.words(input_ids)
        if self.spec.positions == "learned":
            x = x + self.places(place)
        x = self.at_entry(x)
        turn = None
        if self.spec.positions == "rotary":
            angle = place[:, None] / 10 ** torch.arange(0, 1, 2 / HEAD_DIM, device=input_ids.device)
            turn = angle.cos(), angle.sin()
        allowed = (place[:, None] >= place[None, :])[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, None, :]
        for block in self.blocks()[:stop]:
            x = block(x, allowed, turn)
        logits = self.out(self.final(x)) * self.spec.scale
        if self.spec.softcap:
            logits = self.spec.softcap * torch.tanh(logits / self.spec.softcap)
        loss = None
        if labels is not None:
            # As transformers does: the labels move, so that head and loss see the same rows.
            targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))
        return Output(loss, logits)
