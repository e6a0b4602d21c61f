"""The passes one by one: proofs against brute force, the verifier against broken passes, the retrace's odd cases."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable

import pytest
import torch
from architectures import LAYERS, build, token_batch
from cggr_compile.passes.analyse.find_layers import find_layers
from cggr_compile.passes.analyse.find_loss import find_loss
from cggr_compile.passes.pipeline import analyse, passes_for, run
from cggr_compile.passes.rewrite import gather_rows as gather_module
from cggr_compile.passes.rewrite.build_router import build_router
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import cggr_compile as cggr
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import VerificationError
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import cut_vertices
from cggr_compile.ir.program import REGION, Program, Region

CONFIG = RoutingConfig(ratio=0.25, router_layers=2)


def captured(name: str) -> Program:
    return cggr.explain(build(name), token_batch(), CONFIG).runtime.plans[-1].captured


@pytest.fixture(scope="module")
def llama() -> Program:
    return captured("llama")


def without_metadata(program: Program) -> Program:
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return program


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "gpt_neox"])
def test_layers_are_found_by_repetition_where_metadata_is_missing(name: str) -> None:
    """The same number of layers; the residual of each is the tensor that metadata names or one the same layer makes."""
    program = find_loss(captured(name), CONFIG)
    named = find_layers(program, CONFIG).layers
    repeated = find_layers(without_metadata(program), CONFIG).layers
    assert (len(named), len(repeated)) == (LAYERS, LAYERS)
    assert (named.proof.split(" +")[0], repeated.proof.split(" +")[0]) == ("metadata", "repetition")
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    for index, residual in enumerate(repeated.residuals):
        before = order[named.residuals[index - 1]] if index else order[named.entry]
        assert before < order[residual] <= order[named.residuals[index]] or name == "bert"


@given(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=30))
    )
)
def test_cut_vertices_are_those_whose_removal_disconnects(case: tuple[int, set[tuple[int, int]]]) -> None:
    """Brute force on random graphs: a node is on every path exactly if removing it leaves none."""
    size, pairs = case
    edges = {(min(p), max(p)) for p in pairs if p[0] != p[1]} | {(i, i + 1) for i in range(0, size - 1, 2)}
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for index in range(size):
        sources = tuple(nodes[a] for a, b in sorted(edges) if b == index)
        nodes.append(graph.call_function(torch.stack, (sources,)) if sources else graph.placeholder(f"x{index}"))
        nodes[-1].meta["val"] = torch.empty(0)

    def reaches(removed: int | None) -> bool:
        seen, stack = set(), [0] if removed != 0 else []
        while stack:
            here = stack.pop()
            if here not in seen:
                seen.add(here)
                stack += [b for a, b in edges if a == here and b != removed]
        return size - 1 in seen

    expected = [nodes[i] for i in range(size) if reaches(None) and (i in (0, size - 1) or not reaches(i))]
    assert cut_vertices(nodes[0], nodes[-1]) == expected


def test_a_bypass_through_a_list_is_seen() -> None:
    """`split` gives a list, not a tensor; what travels through it still crosses the cut."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    pair = graph.call_function(torch.split, (source, 1))
    bypass = graph.call_function(operator.getitem, (pair, 1))
    middle = graph.call_function(torch.sin, (source,))
    target = graph.call_function(torch.add, (middle, bypass))
    for node in graph.nodes:
        node.meta["val"] = (torch.empty(1), torch.empty(1)) if node is pair else torch.empty(1)
    assert cut_vertices(source, target) == [source, target]


def drop_an_input(program: Program, config: RoutingConfig) -> Program:
    """Renames a captured placeholder."""
    builder = Builder(program)
    builder.copy_rest()
    inputs = (dataclasses.replace(program.inputs[0], name="renamed"), *program.inputs[1:])
    node = next(iter(builder.graph.nodes))
    node.name = node.target = "renamed"
    return dataclasses.replace(builder.finish("drop_an_input"), inputs=inputs)


def record_gradients_in_the_router(program: Program, config: RoutingConfig) -> Program:
    built = build_router(program, config)
    next(node for node in built.graph.nodes if node.meta["cggr_part"] == "router").meta[REGION] = Region()
    return built


def lose_a_random_operator(program: Program, config: RoutingConfig) -> Program:
    builder = Builder(program)
    for node in program.graph.nodes:
        if node.target == torch.ops.aten.scaled_dot_product_attention.default:
            builder.env[node] = builder.env[node.args[0]]
        elif node.op != "output":
            builder.copy(node)
    builder.copy_rest()
    return builder.finish("lose_a_random_operator")


def copy_a_parameter(program: Program, config: RoutingConfig) -> Program:
    builder = Builder(program)
    builder.copy_inputs()
    program.root.register_parameter("stolen", nn.Parameter(torch.zeros(1)))
    node = builder.graph.get_attr("stolen")
    node.meta.update({REGION: Region(), "cggr_part": "main"})
    builder.copy_rest()
    return builder.finish("copy_a_parameter")


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (drop_an_input, "the inputs changed in order, number or name"),
        (record_gradients_in_the_router, "the router part records gradients"),
        (lose_a_random_operator, "nodes that act by side effect were dropped: aten.scaled_dot_product_attention"),
        (copy_a_parameter, "a parameter was copied into the graph"),
    ],
)
def test_the_verifier_names_the_pass_that_broke_the_graph(llama: Program, broken: Callable, problem: str) -> None:
    with pytest.raises(VerificationError, match=f"^pass '{broken.__name__}' broke the graph: {problem}"):
        run(analyse(llama, CONFIG), CONFIG, [broken])


def leave_a_batch_size(program: Program, config: RoutingConfig) -> Program:
    """A constant of B rows in the part that has k."""
    passes = passes_for(config)
    gathered = run(program, config, passes[: passes.index(gather_module.gather_rows) + 1])
    builder = Builder(gathered)
    builder.copy_inputs()
    size = next(node for node in gathered.placeholders if gathered.same_size(node.meta["val"], gathered.batch))
    builder.call(torch.ops.aten.arange.default, builder.env[size], device=torch.device("cpu"))
    builder.copy_rest()
    return builder.finish("leave_a_batch_size")


def test_the_verifier_finds_a_batch_size_left_behind(llama: Program) -> None:
    with pytest.raises(VerificationError, match=r"^pass 'leave_a_batch_size' broke the graph: the batch size is left"):
        run(analyse(llama, CONFIG), CONFIG, [leave_a_batch_size])


def test_rows_and_batch_cannot_be_mixed_up_unnoticed(llama: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather that forgets the labels does not survive the fake run of the copied nodes."""

    class Forgetful(gather_module.RowFlow):
        def __init__(self, program: Program) -> None:
            super().__init__(program)
            self.dims = {node: dims for node, dims in self.dims.items() if program.path(node) != "labels"}

    monkeypatch.setattr(gather_module, "RowFlow", Forgetful)
    with pytest.raises(cggr.CannotOptimize, match=r"the rewritten graph does not fit together: .*batch_size.*node %"):
        run(analyse(llama, CONFIG), CONFIG, passes_for(CONFIG))


def test_every_pass_leaves_a_snapshot(llama: Program) -> None:
    names = [snapshot.name for snapshot in run(analyse(llama, CONFIG), CONFIG, passes_for(CONFIG)).snapshots]
    found = ("join_loss", "join_head", "find_loss", "elide_causal_masks", "find_layers")
    assert names == ["capture", *found, *(pass_.__name__ for pass_ in passes_for(CONFIG))]


def test_the_router_shares_parameters_and_has_no_dropout() -> None:
    program = cggr.explain(build("bert"), token_batch(), CONFIG).program
    router = [node for node in program.graph.nodes if node.meta["cggr_part"] == "router"]
    assert router
    assert not [node for node in router if node.target == torch.ops.aten.dropout.default]
    read = {node for r in router for node in r.all_input_nodes if node.op == "placeholder"}
    assert any(program.path(node) == "bert.encoder.layer.0.intermediate.dense.weight" for node in read)
    assert not any(".layer.2." in program.path(node) for node in read)


class Doubled(torch.autograd.Function):
    """Backward is not the derivative of forward: only a backward that is kept gives these gradients."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad * 7


@pytest.mark.parametrize("in_place", [False, True])
def test_autograd_functions_keep_their_own_backward(in_place: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, 16)
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.head = nn.Linear(16, 31)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> tuple:
            hidden = self.embed(input_ids)
            for layer in self.layers:
                update = Doubled.apply(layer(hidden))
                if in_place:
                    update = update + 0
                    update.mul_(0.5)
                hidden = hidden + update.tanh()
            logits = self.head(hidden)
            return (torch.nn.functional.cross_entropy(logits.view(-1, 31), labels.view(-1)),)

    torch.manual_seed(0)
    eager = Model().train()
    model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, inner="eager")
    ids = torch.randint(0, 31, (4, 5))
    model(input_ids=ids, labels=ids)[0].backward()
    rows = model.cggr.selected
    eager(input_ids=ids[rows], labels=ids[rows])[0].backward()
    for actual, expected in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)
