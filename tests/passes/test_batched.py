"""What is batched is proved, not guessed from sizes: images, tables, positions, branches, and a decoder's labels.

The oracle is eager on the selected rows, with what the rows own of each argument.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import cggr_compile as cggr

VOCABULARY, WIDTH, ROWS, LENGTH, IMAGE = 50, 16, 4, 10, 49
Batch = dict[str, torch.Tensor]
Own = Callable[[torch.Tensor], dict[str, torch.Tensor]]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.inner(hidden).tanh()


TABLE = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))


class Model(nn.Module):
    """Three layers behind an embedding that `merge(hidden, input_ids, projector, **others)` completes."""

    def __init__(self, merge: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.projector = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.table = TABLE.clone()
        self.merge = merge

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **others: Any) -> Any:
        hidden = self.merge(self, self.embed(input_ids), input_ids, **others)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def scattered(model: Model, hidden: torch.Tensor, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The usual way: features take the image places in order."""
    mask = (ids == IMAGE).unsqueeze(-1).expand_as(hidden)
    return hidden.masked_scatter(mask, model.projector(images))


def put(model: Model, hidden: torch.Tensor, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The same, on flattened tokens, by a boolean index."""
    flat = hidden.flatten(0, 1).clone()
    flat[ids.flatten() == IMAGE] = model.projector(images)
    return flat.view(hidden.shape)


def added(model: Model, hidden: torch.Tensor, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Features are added to what stands at the image places, as deep layers of vision towers are."""
    mask = ids == IMAGE
    hidden = hidden.clone()
    hidden[mask] = hidden[mask] + model.projector(images)
    return hidden


def divided(model: Model, hidden: torch.Tensor, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Equally many entries a row, by a view."""
    return hidden + model.projector(images).view(ids.shape[0], -1, WIDTH).mean(1, keepdim=True)


def tabled(model: Model, hidden: torch.Tensor, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """A table that all rows share, in each way in which a table is read."""
    read = F.embedding(ids % 4, images) + images[ids % 4]
    return hidden + read + (hidden @ model.projector(images).t()) @ images + images.mean(0)


def elsewhere(model: Model, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tables that are no arguments: a global and a plain attribute."""
    return hidden + F.embedding(ids % 4, TABLE) + (hidden @ model.table.t()) @ model.table


def batch_of(images: Sequence[int], seed: int = 0) -> tuple[Batch, list[list[int]]]:
    """Rows with so many images each, and which entries of the images each row has."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (len(images), LENGTH), generator=generator)
    for row, count in enumerate(images):
        ids[row, 2 : 2 + count] = IMAGE
    starts = [sum(images[:row]) for row in range(len(images))]
    own = [list(range(start, start + count)) for start, count in zip(starts, images, strict=True)]
    features = torch.randn(sum(images), WIDTH, generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "images": features}, own


def step(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_is_eager_on_the_rows(routed: nn.Module, eager: nn.Module, batch: Batch, own: Own) -> None:
    loss, gradients = step(routed, batch)
    rows = cggr.handle(routed).selected
    assert len(rows) < len(batch["input_ids"])
    expected, wanted = step(eager, {**batch, **own(rows)})
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def by_row(batch: Batch, rows: torch.Tensor, *names: str) -> dict[str, torch.Tensor]:
    return {name: batch[name][rows] for name in names}


@pytest.mark.sample(1)
@pytest.mark.parametrize("merge", [scattered, put, added])
def test_rows_train_on_their_own_images(merge: Callable[..., torch.Tensor]) -> None:
    """Two a row, as many as rows but not one a row, some rows without, more rows."""
    routed, eager = Model(merge).train(), Model(merge).train()
    cggr.optimize(routed, ratio=0.5, router_layers=1, inner="eager")
    for counts in ([2, 2, 2, 2], [1, 1, 1, 1], [2, 0, 1, 1], [0, 3, 0, 2], [1, 2, 1, 2, 1, 2]):
        batch, owned = batch_of(counts, seed=len(counts))

        def own(rows: torch.Tensor, batch: Batch = batch, owned: list[list[int]] = owned) -> Batch:
            entries = [entry for row in rows.tolist() for entry in owned[row]]
            return {**by_row(batch, rows, "input_ids", "labels"), "images": batch["images"][entries]}

        assert_is_eager_on_the_rows(routed, eager, batch, own)
    report = str(routed.cggr.report())
    assert "made of all images" in report


def test_entries_that_a_view_divides_belong_to_their_rows() -> None:
    batch, _ = batch_of([2] * ROWS)

    def own(rows: torch.Tensor) -> Batch:
        images = batch["images"].view(ROWS, 2, WIDTH)[rows].flatten(0, 1)
        return {**by_row(batch, rows, "input_ids", "labels"), "images": images}

    routed = cggr.optimize(Model(divided).train(), ratio=0.5, router_layers=1, inner="eager")
    assert_is_eager_on_the_rows(routed, Model(divided).train(), batch, own)


@pytest.mark.parametrize("merge", [tabled, elsewhere])
def test_a_table_as_long_as_the_batch_is_shared(merge: Callable[..., torch.Tensor]) -> None:
    batch, _ = batch_of([1] * ROWS)
    if merge is elsewhere:
        del batch["images"]
    routed = cggr.optimize(Model(merge).train(), ratio=0.5, router_layers=1, inner="eager")
    eager = Model(merge).train()
    assert_is_eager_on_the_rows(routed, eager, batch, lambda rows: by_row(batch, rows, "input_ids", "labels"))
    gathered = dict(routed.cggr.runtime.plans[-1].program.routing.gathered)
    assert set(gathered) == {"input_ids", "labels"}


def test_a_merge_that_draws_is_refused_by_the_arguments_name() -> None:
    def dropped(model: Model, hidden: torch.Tensor, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return scattered(model, hidden, ids, F.dropout(images, 0.5, model.training))

    batch, _ = batch_of([2] * ROWS)
    routed = cggr.optimize(Model(dropped).train(), ratio=0.5, router_layers=1, inner="eager", selection="random")
    with pytest.raises(cggr.CannotOptimize, match="the entries of images are divided among the rows by the model"):
        routed(**batch)


def test_positions_may_have_the_batch_in_another_place() -> None:
    """Three kinds of positions [3, B, S], with three rows too."""

    def turned(model: Model, hidden: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions.unsqueeze(-1).float() * model.projector.bias
        return hidden * (angles[0].cos() + angles[1].sin() + angles[2])

    routed, eager = Model(turned).train(), Model(turned).train()
    cggr.optimize(routed, ratio=0.5, router_layers=1, inner="eager")
    for rows in (4, 3):
        batch, _ = batch_of([1] * rows)
        del batch["images"]
        batch["positions"] = torch.arange(3 * rows * LENGTH).view(3, rows, LENGTH) % 7

        def own(rows: torch.Tensor, batch: Batch = batch) -> Batch:
            return {**by_row(batch, rows, "input_ids", "labels"), "positions": batch["positions"][:, rows]}

        assert_is_eager_on_the_rows(routed, eager, batch, own)


def asserted(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[0] > 3
    return x


def repeated(x: torch.Tensor) -> torch.Tensor:
    for _ in range(x.shape[0] // 4):
        x = x * 2
    return x


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("branch", "ratio"),
    [
        pytest.param(lambda x: x * 2 if x.shape[0] > 3 else x, 0.5, id="greater"),
        pytest.param(lambda x: x * 2 if len(x) == 2 else x, 0.5, id="equal-to-k"),
        pytest.param(lambda x: x * 2 if x.shape[0] == 1 else x, 0.25, id="one"),
        pytest.param(repeated, 0.5, id="loop"),
        pytest.param(asserted, 0.5, id="assertion"),
    ],
)
def test_a_branch_that_fewer_rows_would_decide_otherwise_is_refused(
    branch: Callable[[torch.Tensor], torch.Tensor], ratio: float
) -> None:
    batch, _ = batch_of([1] * ROWS)
    del batch["images"]
    routed, eager = (Model(lambda model, hidden, ids: branch(hidden)).train() for _ in range(2))
    cggr.optimize(routed, ratio=ratio, router_layers=1, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"branches on the batch size: .*test_batched\.py"):
        routed(**batch)
    if ratio == 0.5 and branch is not repeated:
        cggr.optimize(routed, ratio=0.75, router_layers=1, inner="eager")
        if branch is not asserted and len(batch["input_ids"]) != 3:
            batch = {name: torch.cat([part, part.flip(0)]) for name, part in batch.items()}
            own = lambda rows: by_row(batch, rows, "input_ids", "labels")  # noqa: E731
            assert_is_eager_on_the_rows(routed, eager, batch, own)


def test_a_layer_that_branches_on_the_sequence_is_refused_on_fewer_tokens() -> None:
    class Branching(Layer):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) * (2 if hidden.shape[1] > 7 else 1)

    batch, _ = batch_of([1] * ROWS)
    del batch["images"]
    model = Model(lambda model, hidden, ids: hidden).train()
    model.layers = nn.ModuleList(Branching() for _ in range(3))
    cggr.optimize(model, ratio=0.5, route="token", inner="eager")
    with pytest.raises(cggr.CannotOptimize, match="branches on the sequence length: 5 selected tokens"):
        model(**batch)


@pytest.mark.long
def test_a_decoders_labels_have_a_length_of_their_own() -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=1,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    config.dropout_rate = 0.0
    torch.manual_seed(0)
    routed = transformers.T5ForConditionalGeneration(config).train()
    eager = copy.deepcopy(routed)
    cggr.optimize(routed, ratio=0.5, router_layers=1, inner="eager")
    for source, target in ((10, 6), (7, 11), (8, 8), (9, 5)):
        ids, labels = torch.randint(3, 50, (ROWS, source)), torch.randint(3, 50, (ROWS, target))
        batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

        def own(rows: torch.Tensor, batch: Batch = batch) -> Batch:
            return by_row(batch, rows, *batch)

        assert_is_eager_on_the_rows(routed, eager, batch, own)
    assert routed.cggr.captures == 1


def test_a_single_row_may_be_left_of_a_model_that_compares_with_one_to_broadcast() -> None:
    """transformers' masks do, where no padding mask is passed."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    routed = transformers.LlamaForCausalLM(config).train()
    eager = copy.deepcopy(routed)
    cggr.optimize(routed, ratio=0.25, router_layers=1, inner="eager")
    batch, _ = batch_of([1] * ROWS)
    del batch["images"]
    assert_is_eager_on_the_rows(routed, eager, batch, lambda rows: by_row(batch, rows, *batch))
