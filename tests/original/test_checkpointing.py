"""The original's checkpointing, against the model on the hard sequences without it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import VOCABULARY, build
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutput

from cggr_compile import CGGRCheckpointedModel, CGGRScorer, SelectiveCheckpointWrapper, apply_selective_checkpointing

HARD = [3, 0, 4]
ARGUMENTS = {"use_cache", "forward", "gradient_checkpointing"}


class Layer(nn.Module):
    """Counts its runs; its dropout shows whether a second run draws as the first did."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + F.dropout(self.linear(x).tanh(), 0.5, self.training)


class Plain(nn.Module):
    """Logits, by two layers in a list; with `wrapped`, in an output that has no loss."""

    def __init__(self, wrapped: bool = False, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.stack = nn.ModuleList(Layer() for _ in range(layers))
        self.out = nn.Linear(8, VOCABULARY)
        self.wrapped = wrapped

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, weight: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        for layer in self.stack:
            x = layer(x)
        logits = self.out(x) * (1 if weight is None else weight[:, None, None])
        return CausalLMOutput(logits=logits) if self.wrapped else logits


def batch_of() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[3, 5:] = -100
    return ids, labels


def step(model: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(9)
    loss = run()
    loss = getattr(loss, "loss", loss)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys() != set()
    assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    counted = (labels[:, 1:] != -100).sum()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / counted


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model's own attributes and its configuration are the same afterwards."""

    def look() -> list[Any]:
        own = [{key: vars(module).get(key) for key in ARGUMENTS} for module in model.modules()]
        return [own, model.config.to_dict() if hasattr(model, "config") else None]

    before = copy.deepcopy(look())
    yield
    assert look() == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_wrapper_on_models_of_transformers(name: str) -> None:
    """Their caches are on by default: a layer that ran twice would write twice."""
    if name == "t5":
        sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).train()
    else:
        model = build(name)
    model.config.use_cache = True
    ids, labels = batch_of()
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    attention = [module for key, module in model.named_modules() if key.rpartition(".")[2] in ("q_proj", "c_attn", "q")]
    for module in attention:
        module.register_forward_hook(count)
    wrapper = SelectiveCheckpointWrapper(model)
    with untouched(model):
        got = step(model, lambda: wrapper(ids, labels, HARD, attention_mask=mask))
    assert runs == 2 * len(attention)  # each once more in the backward
    model.config.use_cache = False
    assert_equal(got, step(model, lambda: model(ids[HARD], labels=labels[HARD], attention_mask=mask[HARD])))
    assert runs == 3 * len(attention)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("indices", [HARD, torch.tensor(HARD)])
def test_wrapper_makes_the_loss_of_a_model_that_has_none(wrapped: bool, indices: Any) -> None:
    model = Plain(wrapped).train()
    ids, labels = batch_of()
    weight = torch.arange(1.0, 7.0)
    wrapper = SelectiveCheckpointWrapper(model)
    got = step(model, lambda: wrapper(ids, labels, indices, weight=weight))
    assert [layer.runs for layer in model.stack] == [2, 2]

    def plain() -> Tensor:
        output = model(ids[HARD], weight=weight[HARD])
        return mean_loss(output.logits if wrapped else output, labels[HARD])

    assert_equal(got, step(model, plain))


@pytest.mark.parametrize("indices", [None, [], torch.tensor([], dtype=torch.long)])
def test_wrapper_without_hard_sequences_is_the_model(indices: Any) -> None:
    model = Plain().train()
    ids, _ = batch_of()
    step(model, lambda: SelectiveCheckpointWrapper(model)(ids, hard_indices=indices).sum())
    assert [layer.runs for layer in model.stack] == [1, 1]
    assert torch.equal(SelectiveCheckpointWrapper(model.eval())(ids, hard_indices=HARD), model(ids[HARD]))


def test_checkpoint_layers() -> None:
    model = Plain(layers=3).train()
    ids, labels = batch_of()
    step(model, lambda: SelectiveCheckpointWrapper(model, [1])(ids, labels, HARD))
    assert [layer.runs for layer in model.stack] == [1, 2, 1]
    with pytest.raises(ValueError, match=r"checkpoint_layers is \[3\], expected numbers of 0 to 2"):
        SelectiveCheckpointWrapper(model, [3])(ids, labels, HARD)


def test_a_model_without_a_list_is_checkpointed_whole() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), layer := Layer(), nn.Linear(8, VOCABULARY))
    ids, _ = batch_of()
    with untouched(model):
        got = step(model, lambda: SelectiveCheckpointWrapper(model)(ids, hard_indices=HARD).logsumexp(-1).mean())
    assert layer.runs == 2
    assert_equal(got, step(model, lambda: model(ids[HARD]).logsumexp(-1).mean()))


def test_switches() -> None:
    model = Plain().train()
    ids, _ = batch_of()
    wrapper = SelectiveCheckpointWrapper(model)

    def runs() -> int:
        before = model.stack[0].runs
        wrapper(ids).sum().backward()
        return model.stack[0].runs - before

    with untouched(model):
        assert runs() == 1
        wrapper.enable_checkpointing()
        wrapper.enable_checkpointing()
        assert runs() == 2
        with wrapper.selective_checkpointing(enable=False):
            assert runs() == 1
        assert runs() == 2
        wrapper.disable_checkpointing()
        wrapper.disable_checkpointing()
        assert runs() == 1
        with pytest.raises(KeyError, match="2"), wrapper.selective_checkpointing():
            {}[runs()]
        assert runs() == 1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_model_that_checkpoints_by_itself_keeps_doing_so() -> None:
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    ids, labels = batch_of()
    with untouched(model):
        got = step(model, lambda: SelectiveCheckpointWrapper(model)(ids, labels, HARD))
    assert model.is_gradient_checkpointing
    assert_equal(got, step(model, lambda: model(ids[HARD], labels=labels[HARD])))


def test_function() -> None:
    model = build("llama")
    ids, labels = batch_of()

    def forward(input_ids: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(model(input_ids).logits, labels)

    with untouched(model):
        got = step(model, lambda: apply_selective_checkpointing(model, forward, ids, torch.tensor(HARD), labels=labels))
    assert_equal(got, step(model, lambda: forward(ids[HARD], labels[HARD])))
    plain = Plain().train()
    apply_selective_checkpointing(plain, plain, ids, HARD).sum().backward()
    assert [layer.runs for layer in plain.stack] == [2, 2]


@pytest.mark.parametrize("use", [True, False])
def test_checkpointed_model(use: bool) -> None:
    model, router = Plain().train(), Plain()
    ids, labels = batch_of()
    weight = torch.linspace(1, 2, 6)
    trained = CGGRCheckpointedModel(model, router, min_tokens_ratio=0.5, warmup_steps=0, use_checkpointing=use)
    difficulty = CGGRScorer(router, 0.5, 0, selection="fixed_quota")(ids, weight=weight)[0]
    counted = F.pad(labels[:, 1:] != -100, (0, 1))
    means = [difficulty[row][counted[row]].mean().item() for row in range(6)]
    rows = sorted(sorted(range(6), key=lambda i: -means[i])[:3])
    got = step(model, lambda: trained(ids, labels, weight=weight))
    assert [layer.runs for layer in model.stack] == [2 if use else 1] * 2
    assert_equal(got, step(model, lambda: mean_loss(model(ids[rows], weight=weight[rows]), labels[rows])))
    trained.step()
    assert trained.scorer.step_count == 1
    assert trained.get_metrics() == {
        "step": 0,
        "token_ratio": 0.5,
        "tokens_selected": (labels[rows][:, 1:] != -100).sum().item(),
        "tokens_total": (labels[:, 1:] != -100).sum().item(),
        "checkpointing_enabled": use,
    }
    assert torch.equal(trained.eval()(ids), model(ids))
    assert CGGRCheckpointedModel(model).scorer.router is model
