"""Steps of many sizes: the inner backend compiles a program twice, and every step is eager's all the same."""

from __future__ import annotations

import copy
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import oracle
import plans
import pytest
import token_oracle
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, token_batch
from graphs_on_cpu import graphs_on_cpu  # noqa: F401  a fixture
from torch import nn
from torch._inductor.utils import fresh_inductor_cache
from toys import AS_IT_IS, Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.program import Program
from cggr_compile.run import variant
from cggr_compile.run.runtime import Runtime
from cggr_compile.run.variant import Variant

LLAMA = ARCHITECTURES["llama"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def toy() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Toy().train()
    return model, plans.captured(model, toy_batch())


def drawn(count: int, seed: int = 0) -> Iterator[tuple[int, int, float]]:
    """Batch sizes, lengths and ratios, none of which keeps a single row or token; coincidences among the first."""
    yield from [(6, 9, 0.5), (8, 8, 0.5), (4, 4, 1.0), (8, 4, 0.5), (16, 16, 0.5), (4, 16, 1.0)]
    generator = random.Random(seed)
    for _ in range(count - 6):
        yield generator.randint(4, 12), generator.randint(4, 20), generator.choice([0.375, 0.5, 0.75, 1.0])


def variants(runtime: Runtime) -> list[Variant]:
    (plan,) = runtime.plans
    return list(dict.fromkeys([plan.unrouted, *(route.variant for route in plan.routes.values())]))


def copied(gradients: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if x is None else x.clone() for name, x in gradients.items()}


ROUTES = {
    "sequence": {},
    "token": {"route": "token"},
    "loss": {"route": "loss", "selection": "trimmed"},
    "both": {"route": ("token", "loss"), "router_head": "sampled"},
    "trimmed": {"selection": "trimmed", "router_head": "sampled"},
    "importance": {"selection": "importance", "router_head": "fp8"},
    "outlined": {"outline_layers": True},
    "outlined_tokens": {"outline_layers": True, "route": "token", "selection": "random"},
}


def assert_two_compilations(model: nn.Module, program: Program, count: int, options: dict[str, Any]) -> None:
    """Against the symbolic module as it is, which other tests compare with eager for every route."""
    compiled = plans.Routed(model, program, **options, seed=0, inner="aot_eager")
    plain = plans.Routed(model, program, **options, seed=0)
    make = toy_batch if isinstance(model, Toy) else token_batch
    for seed, (rows, length, ratio) in enumerate(drawn(count)):
        batch = make(rows, length, seed=seed)
        loss, gradients = compiled.at(ratio).step(batch)
        oracle.assert_same_step(loss, copied(gradients), *plain.at(ratio).step(batch), **CLOSE)
        torch.testing.assert_close(compiled.runtime.last.found.rows, plain.runtime.last.found.rows, rtol=0, atol=0)
    assert [variant.compilations for variant in variants(compiled.runtime)] == [2, 2]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ROUTES)
def test_two_compilations_for_any_sizes(toy: tuple[nn.Module, Program], name: str) -> None:
    assert_two_compilations(*toy, 14, ROUTES[name])


@pytest.mark.long
@pytest.mark.parametrize("name", ROUTES)
def test_two_compilations_of_a_transformer(llama: tuple[nn.Module, Program], name: str) -> None:
    assert_two_compilations(*llama, 14, ROUTES[name])


@pytest.mark.long
def test_against_eager(llama: tuple[nn.Module, Program]) -> None:
    eager = copy.deepcopy(llama[0])
    rows_routed = plans.Routed(*llama, inner="aot_eager")
    tokens_routed = plans.Routed(*llama, inner="aot_eager", route="token")
    for seed, (rows, length, ratio) in enumerate(drawn(8, seed=1)):
        batch = token_batch(rows, length, seed=seed)
        actual = rows_routed.at(ratio).step(batch)
        oracle.assert_same_step(*actual, *oracle.step(eager, oracle.rows_of(batch, rows_routed.selected)), **CLOSE)
        if ratio < 1:
            actual = tokens_routed.at(ratio).step(batch)
            expected = token_oracle.step(eager, LLAMA, batch, range(1, 2), tokens_routed.selected)
            oracle.assert_same_step(*actual, *expected, **CLOSE)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_inductor(toy: tuple[nn.Module, Program]) -> None:
    eager = copy.deepcopy(toy[0])
    with fresh_inductor_cache():
        routed = plans.Routed(*toy, inner="inductor", router_layers=1)
        for seed, (rows, length, ratio) in enumerate(drawn(20)):
            batch = toy_batch(rows, length, seed)
            actual = routed.at(min(ratio, 0.75)).step(batch)
            eager.zero_grad()
            expected = eager(**oracle.rows_of(batch, routed.selected))[0]
            expected.backward()
            oracle.assert_same_step(*actual, expected.detach(), oracle.gradients(eager), **CLOSE)
    assert routed.plan.route.variant.compilations == 2


def test_a_single_row_has_code_of_its_own(toy: tuple[nn.Module, Program]) -> None:
    compiled = plans.Routed(*toy, inner=AS_IT_IS, router_layers=1)
    plain = plans.Routed(*toy, router_layers=1)
    for seed, (rows, length, kept) in enumerate(
        [(2, 5, 1), (4, 6, 1), (4, 7, 2), (2, 2, 1), (8, 3, 4), (3, 3, 1), (5, 5, 3), (2, 9, 1)]
    ):
        batch = toy_batch(rows, length, seed)
        loss, gradients = compiled.at(kept / rows).step(batch)
        oracle.assert_same_step(loss, copied(gradients), *plain.at(kept / rows).step(batch), **CLOSE)
        assert compiled.runtime.last.kept == kept
    # In numbers, for one row of any batch, and for any others.
    assert compiled.plan.route.variant.compilations == 3


def test_batches_of_one_row() -> None:
    """Dynamo captures them by themselves; each capture is compiled twice at most."""
    torch.manual_seed(0)
    eager = Toy().train()
    model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, inner=AS_IT_IS)
    for rows, length in [(1, 5), (1, 6), (1, 9), (4, 5), (6, 5), (1, 2), (8, 2), (1, 7)]:
        batch = toy_batch(rows, length, rows + length)
        assert_same_as_eager(model, eager, batch)
    plans_of_it = model.cggr.runtime.plans
    assert len(plans_of_it) == 2
    assert [plan.route.variant.compilations for plan in plans_of_it] == [2, 2]


def assert_same_as_eager(model: nn.Module, eager: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """One step, and eager's on the selected rows."""
    for each in (model, eager):
        each.zero_grad()
    loss = model(**batch)[0]
    loss.backward()
    expected = eager(**oracle.rows_of(batch, model.cggr.selected))[0]
    expected.backward()
    gradients = oracle.gradients(model), oracle.gradients(eager)
    oracle.assert_same_step(loss.detach(), gradients[0], expected.detach(), gradients[1], **CLOSE)


class Windowed(Toy):
    """Neighbours are averaged within windows of four, of which the last may be shorter."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, length, width = hidden.shape
        padded = F.pad(hidden, (0, 0, 0, -length % 4))
        means = padded.view(rows, -1, 4, width).mean(2).repeat_interleave(4, 1)[:, :length]
        return super().middle(hidden + means)


@pytest.mark.long
def test_sizes_that_decide_something() -> None:
    torch.manual_seed(0)
    eager = Windowed().train()
    model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, inner="aot_eager")
    generator = random.Random(0)
    for seed in range(10):
        assert_same_as_eager(model, eager, toy_batch(generator.choice([4, 6, 8]), generator.randint(2, 13), seed))


def sizes_of(inputs: Sequence[Any]) -> list[Any]:
    return [size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else (x,))]


def with_guard(check: Callable[[int], object]) -> str:
    """A backend that decides by the sizes of what it is given, as compilers do."""

    def compiler(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sizes = sizes_of(inputs)
        decided = [check(size) for size in sizes if isinstance(size, torch.SymInt)]
        expected = [bool(each) for each in decided]

        def run(*given: Any) -> Any:
            pairs = zip(sizes_of(given), sizes, strict=True)
            symbolic = [number for number, size in pairs if isinstance(size, torch.SymInt)]
            assert [bool(check(number)) for number in symbolic] == expected
            return gm.forward(*given)

        return run

    name = f"with_guard_{id(compiler)}"
    torch._dynamo.register_backend(compiler, name=name)
    return name


@pytest.mark.parametrize(
    ("check", "most"),
    [
        (lambda size: size % 4 == 0, 9),
        (lambda size: size > 7, 9),
        (lambda size: size == 8, 20),
    ],
    ids=["multiples", "threshold", "number"],
)
def test_what_the_compiler_decides_by_sizes_holds_wherever_its_code_runs(
    toy: tuple[nn.Module, Program], check: Callable[[int], object], most: int
) -> None:
    """The backend asserts it; batch, length and kept rows decide in two ways each: at most eight symbolic codes."""
    routed = plans.Routed(*toy, inner=with_guard(check), selection="random", seed=0)
    for seed, (rows, length, ratio) in enumerate(drawn(30)):
        routed.at(min(ratio, 0.75)).step(toy_batch(rows, length, seed))
    assert 2 < routed.plan.route.variant.compilations <= most


@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize("dense", [None, 27])
def test_all_sizes_of_a_schedule_are_compiled_in_the_first_step(begun: int, dense: int | None) -> None:
    """Whatever the compiler decides by them; `begun`: resumed behind that step. What comes last has the best code."""
    options = {"ratio": 0.25, "selection": "random", "warmup_steps": 16, "dense_after_steps": dense}
    model = cggr.optimize(Toy().train(), inner=with_guard(lambda size: size > 13), **options)
    batch = toy_batch(16)
    model.cggr.runtime.steps = begun
    found = []
    for _ in range(begun, 30):
        model(**batch)[0].backward()
        variants = model.cggr.runtime.plans[0].variants
        found.append({name: variant.compilations for name, variant in variants.items()})
        model.cggr.step()
    assert found == [found[0]] * len(found)
    assert found[0] == {"random": 3, **({"unrouted": 1} if begun == 0 or dense else {})}
    numbers, *symbolic = variants["random"].codes
    assert [code.symbolic for code in symbolic] == [True, True]
    assert 4 in numbers.serves.args[0].values()


def test_a_backend_that_must_know_sizes_compiles_each(toy: tuple[nn.Module, Program]) -> None:
    def compiler(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if any(isinstance(x, torch.SymInt) for x in inputs):
            raise RuntimeError("a size is not known")
        return gm.forward

    torch._dynamo.register_backend(compiler, name="numbers_only")
    routed = plans.Routed(*toy, inner="numbers_only", selection="random", seed=0)
    routed.step(toy_batch(4, 6))
    with pytest.warns(RuntimeWarning, match="compiling every batch shape by itself: .* a size is not known"):
        routed.step(toy_batch(6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows, length in [(6, 7), (4, 6), (6, 6), (6, 7)]:
            routed.step(toy_batch(rows, length))
    assert routed.plan.route.variant.compilations == 3


@pytest.mark.usefixtures("graphs_on_cpu")
def test_recordings_are_of_sizes_that_recur_and_within_a_budget(toy: tuple[nn.Module, Program]) -> None:
    options = {"seed": 0, "router_layers": 1, "outline_layers": False}
    replayed = plans.Routed(*toy, **options, inner="aot_eager", cuda_graphs=True)
    plain = plans.Routed(*toy, **options)

    def steps(*lengths: int) -> int:
        """Recordings after steps of such lengths."""
        for length in lengths:
            batch = toy_batch(6, length, length)
            loss, gradients = replayed.step(batch)
            oracle.assert_same_step(loss, copied(gradients), *plain.step(batch), **CLOSE)
            del loss, gradients
        return variant.replays.recordings

    variant = replayed.plan.route.variant
    assert steps(5, 6, 7, 8) == 0
    assert steps(5, 6, 7, 6, 5) == 3
    shelf = replayed.runtime.pool.shelf
    shelf.budget = sum(nbytes for nbytes, _ in shelf._kept.values())
    # Eight and nine come in turn with the others, and displace nothing.
    assert steps(*[5, 6, 7, 8, 9] * 4) == 3
    # One that came often since seven was replayed takes its place.
    assert steps(*[5, 6, 8] * 9) == 4
    assert len(shelf._kept) == 3
    assert steps(5, 6, 8, 7, 9, 5, 6, 8) == 4
    assert variant.compilations == 2


def test_sizes_that_come_alone_for_long_get_code_of_numbers(
    toy: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than three compilations take, without any other between; others go on with the code for many."""
    now = [0.0]
    monkeypatch.setattr(variant, "monotonic", lambda: now[0])
    compiled, plain = (plans.Routed(*toy, inner=inner, router_layers=1) for inner in (AS_IT_IS, "eager"))
    code = compiled.plan.route.variant

    def step(rows: int, seconds: float) -> int:
        now[0] += seconds
        batch = toy_batch(rows, 6)
        loss, gradients = compiled.step(batch)
        oracle.assert_same_step(loss, copied(gradients), *plain.step(batch), **CLOSE)
        return code.compilations

    code._seconds = 10.0  # that a compilation takes
    assert step(4, 0) == 1
    assert step(8, 40) == 2
    assert [step(8, 20), step(4, 20), step(8, 40)] == [2, 2, 2]
    assert [step(8, 29), step(8, 2), step(8, 50)] == [2, 3, 3]
    assert [each.symbolic for each in code.codes] == [False, False, True]
    assert step(6, 0) == 3
