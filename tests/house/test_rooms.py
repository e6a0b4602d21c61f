"""The house: which room may import which, no module in a circle of imports, no room without a word on what it is for.

Imports for types and inside of functions count too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from cggr_compile.passes.analyse.find_layers import find_layers
from cggr_compile.passes.analyse.find_loss import find_loss
from cggr_compile.passes.pipeline import OPTIONAL, ROUTES, passes_for, passes_scores
from cggr_compile.passes.rewrite.truncate_layers import truncate_layers

from cggr_compile.config import RoutingConfig

ROOT = Path(__file__).parents[2]
PACKAGE = "cggr_compile"

# A room, and those it may import beside itself; `errors` may be imported everywhere.
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "environment": (),
    "torch_internals": (),
    "kernels": (),
    "values": ("kernels",),
    "schedule": ("kernels", "values"),
    "config": ("kernels", "schedule", "values"),
    "ir": ("config", "kernels", "schedule", "torch_internals"),
    "capture": ("ir", "torch_internals"),
    "passes": ("config", "ir", "kernels", "torch_internals"),
    "run": ("capture", "config", "ir", "kernels", "passes", "schedule", "torch_internals"),
    "inspection": ("config", "ir", "kernels", "run", "torch_internals"),
    "front": ("capture", "config", "inspection", "ir", "kernels", "run", "torch_internals", "values"),
    "checking": ("config", "front"),
    "data": ("kernels",),
    "original": ("data", "kernels", "torch_internals"),
    "demo": ("environment", "inspection", PACKAGE),
    "cli": ("config", "demo", "torch_internals", "values", PACKAGE),
    "__main__": ("cli",),
}
# The package's own names are gathered from these.
ROOMS[PACKAGE] = ("checking", "config", "data", "front", "original", "run", "values")
# torch's private modules are imported in `torch_internals` alone, but for these: two that torch's own documents name
# (pytrees, dispatch modes); and what operators are made of, since kernels import nothing of ours.
NAMED_BY_TORCH = ("torch.utils._pytree", "torch.utils._python_dispatch")
OF_OPERATORS = ("torch._ops", "torch._library.custom_ops", "torch._subclasses.fake_tensor")
# The eager side of `cggr.check` shares nothing with the compiler.
INDEPENDENT = ("checking.eager_documents", "checking.eager_layers", "checking.eager_tokens")


def modules(root: Path) -> dict[str, Path]:
    """The files of a checkout by their module's name in the package."""
    found = {}
    for top, prefix in ((PACKAGE, ()), ("passes", ("passes",)), ("kernels", ("kernels",))):
        for path in (root / top).rglob("*.py"):
            parts = (PACKAGE, *prefix, *path.relative_to(root / top).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(text: str) -> ast.Module:
    return ast.parse(text)


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(tree(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def trespasses(root: Path) -> list[str]:
    """Imports that no room allows."""
    known = modules(root)
    found = []
    for module, path in known.items():
        room = room_of(module)
        allowed = {room, "errors", *ROOMS[room]}
        if module.removeprefix(f"{PACKAGE}.") in INDEPENDENT:
            allowed = {"checking"}
        found += [f"{module} imports {target}" for target in imports(path, known) if room_of(target) not in allowed]
    return found


def private_imports(root: Path) -> list[str]:
    """Imports of private modules and names of torch and transformers outside of their room."""
    found = []
    for module, path in modules(root).items():
        room = room_of(module)
        allowed = NAMED_BY_TORCH + (OF_OPERATORS if room == "kernels" else ())
        if room == "torch_internals":
            continue
        for node in ast.walk(tree(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [
                f"{module} imports {name}" for name in names if _is_private(name) and not name.startswith(allowed)
            ]
    return found


def _is_private(name: str) -> bool:
    library, *parts = name.split(".")
    return library in ("torch", "transformers") and any(part.startswith("_") for part in parts)


def circles(root: Path) -> list[list[str]]:
    """Modules that import each other, by way of others or not."""
    known = modules(root)
    graph = {module: set(imports(path, known)) - {module} for module, path in known.items()}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    behind = {module: reached(module) for module in known}
    return sorted(
        [module, *sorted(other for other in behind[module] if module in behind[other] and other != module)]
        for module in known
        if module in behind[module]
    )


def test_rooms_import_what_is_below_them() -> None:
    assert trespasses(ROOT) == []


def test_private_parts_of_torch_have_a_room() -> None:
    assert private_imports(ROOT) == []


@pytest.mark.parametrize(
    ("room", "line", "name"),
    [
        ("ir", "from torch._dynamo import utils", "torch._dynamo.utils"),
        ("front", "def f():\n    import torch._inductor.config", "torch._inductor.config"),
        ("passes", "from torch.utils._sympy.functions import FloorDiv", "torch.utils._sympy.functions.FloorDiv"),
        ("kernels", "from torch import _guards", "torch._guards"),
    ],
)
def test_a_planted_private_import_is_found(room: str, line: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / room if room in ("passes", "kernels") else tmp_path / PACKAGE / room
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text(f"from torch.utils import _pytree\n{line}", encoding="utf-8")
    assert private_imports(tmp_path) == [f"{PACKAGE}.{room}.planted imports {name}"]


def test_no_module_is_in_a_circle() -> None:
    assert circles(ROOT) == []


def test_the_rooms_are_those_of_the_checkout() -> None:
    assert {room_of(module) for module in modules(ROOT)} == set(ROOMS)


def test_every_module_says_what_it_is_for() -> None:
    for module, path in modules(ROOT).items():
        assert ast.get_docstring(tree(path.read_text(encoding="utf-8"))), module


@pytest.mark.parametrize(
    ("line", "trespass"),
    [
        ("from cggr_compile.front import api", "cggr_compile.ir.planted imports cggr_compile.front.api"),
        ("def f():\n    import cggr_compile.run.plan", "cggr_compile.ir.planted imports cggr_compile.run.plan"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cggr_compile.run.plan import Plan",
            "cggr_compile.ir.planted imports cggr_compile.run.plan",
        ),
    ],
)
def test_a_planted_trespass_is_found(line: str, trespass: str, tmp_path: Path) -> None:
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "cggr_compile" / "ir" / "planted.py").write_text(line, encoding="utf-8")
    assert trespasses(tmp_path) == [trespass]
    program = tmp_path / "cggr_compile" / "ir" / "program.py"
    program.write_text(f"{program.read_text(encoding='utf-8')}\nfrom cggr_compile.ir import planted\n")
    (tmp_path / "cggr_compile" / "ir" / "planted.py").write_text("from cggr_compile.ir import program")
    assert circles(tmp_path)[0] == ["cggr_compile.ir.planted", "cggr_compile.ir.program"]


def test_every_pass_shows_what_it_does() -> None:
    """Its module's docstring has a few lines of a graph before and after it."""
    config, quantized = RoutingConfig(ratio=0.5), RoutingConfig(ratio=0.5, router_body="fp8")
    shown = {find_loss, find_layers, truncate_layers, *OPTIONAL, *passes_for(config), *passes_scores(quantized)}
    for route in ROUTES.values():
        shown |= set(route)
    for pass_ in shown:
        text = sys.modules[pass_.__module__].__doc__ or ""
        assert re.search(r"\nBefore::\n\n    .+\nAfter::\n\n    ", text, re.DOTALL), pass_.__name__


def test_every_warning_is_at_the_line_of_the_user() -> None:
    """`errors.warn` finds it."""
    calls = [name for name, path in modules(ROOT).items() if "warnings.warn(" in path.read_text()]
    assert calls == ["cggr_compile.errors"]
