"""Graphs as text for people: one line a node, sizes in B, S and k, names that survive the rewrite.

Passes copy nodes, and a copy in a graph that holds the router too cannot keep its name, so names alone would make every
line of a diff differ. Nodes are therefore matched by value numbering: two nodes have the same number if they apply the
same operator to arguments of the same numbers, where a gathered value counts as the value and k as the size that it
stands for. A copy is printed under the name of the captured node it repeats, with its part in front
(`%router.linear_3`) where it is not the main pass.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from cggr_compile.ir.names import gathered_of, module_of, operator_of
from cggr_compile.ir.program import PART, REGION, TRAINED_PARTS, Program, value
from cggr_compile.run.plan import Plan
from cggr_compile.torch_internals.dtypes import dtype_name

aten = torch.ops.aten

QUIET_PARTS = ("router", "score", "select")
_MAX_INT = 2**63 - 1
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')
_DROPOUTS = (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)


@dataclass(frozen=True)
class Line:
    """One printed line: `text`; `key`, the text with k written as the size it stands for, equal for lines that differ
    only by the rows or tokens; `part` the node is in ("inputs" for placeholders)."""

    text: str
    key: str
    part: str


def source_of(node: fx.Node) -> str:
    """`modeling_llama.py:217`: the innermost line outside torch that produced the node, or an empty string."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return f"{own[-1][0].rpartition('/')[2]}:{own[-1][1]}" if own else ""


class GraphText:
    """Formats the graphs of one plan, the captured one and those after each pass."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.program = plan.program
        self._cuts: tuple[int, int] | None = None
        self._numbers: dict[str, int] = {}
        self._symbols = self._symbol_table()
        self._captured = self._numbered(plan.captured.graph)
        self._find_cuts()

    def lines(self, graph: fx.Graph) -> list[Line]:
        """The lines of one graph of this plan, each part under a heading."""
        names = self._names(graph)
        lines: list[Line] = []
        heading = ""
        for node in graph.nodes:
            part = "inputs" if node.op == "placeholder" else node.meta[PART]
            if part != heading and node.op != "output":
                quiet = " (no gradient)" if part in QUIET_PARTS else ""
                lines.append(Line(f"── {part}{quiet} ──", f"── {part}{quiet} ──", part))
                heading = part
            lines.append(
                Line(
                    self._format(node, names, self._symbols),
                    self._format(node, names, self._as_captured()),
                    part,
                )
            )
        return lines

    def shape(self, val: Any) -> str:
        """`f32[B, S, 576]`, `B·S` for a size, the Python type's name otherwise."""
        return _type(val, self.program, self._symbols)

    def _symbol_table(self) -> dict[sympy.Symbol, sympy.Symbol]:
        named = [("S", self.program.sequence), ("B", self.program.batch)]
        # A second route's number of kept tokens is m.
        named += zip(("k", "m"), map(value, self._kept()), strict=False)
        table = {}
        for name, size in named:
            if isinstance(size, torch.SymInt):
                table[self.program.expression(size)] = sympy.Symbol(name, positive=True, integer=True)
        return table

    def _kept(self) -> list[fx.Node]:
        routing = self.program.routing
        return [node for node in (routing.kept, routing.kept_tokens, routing.kept_loss) if node is not None]

    def _captured_sizes(self) -> dict[sympy.Symbol, sympy.Expr]:
        """The captured size in whose place each k stands."""
        routing, program = self.program.routing, self.program
        places = ((routing.kept, program.batch), (routing.kept_tokens, program.sequence))
        return {program.expression(value(node)): program.expression(size) for node, size in places if node is not None}

    def _as_captured(self) -> dict[sympy.Symbol, sympy.Symbol]:
        """The symbols with k written as what it stands for."""
        stands = {kept: self._symbols[size] for kept, size in self._captured_sizes().items()}
        return {**self._symbols, **stands}

    # -- names -----------------------------------------------------------------------------------------------------

    def _number(self, node: fx.Node, numbers: dict[fx.Node, int]) -> str:
        """The key of a node's value number. Dropout is transparent, since the router leaves it out."""
        if isinstance(value(node), torch.SymInt):
            return f"size {self._expression(value(node))}"
        if node.op == "placeholder":
            return f"input {node.name}"
        args, kwargs = node.args, dict(node.kwargs)
        if node.target == aten.scaled_dot_product_attention.default:
            args = args[:4]
            kwargs.pop("dropout_p", None)
        plain = fx.map_arg((args, kwargs), lambda source: _Reference(numbers[source]))
        return f"{node.target} {plain}"

    def _expression(self, size: torch.SymInt) -> sympy.Expr:
        """A size in the captured symbols, k as what it stands for."""
        return self.program.expression(size).xreplace(self._captured_sizes())

    def _enter(self, key: str) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _numbered(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """Numbers of the nodes of a graph without router and selection."""
        numbers: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if _is_dropout(node):
                numbers[node] = numbers[node.args[0]]
            elif node.op != "output":
                numbers[node] = self._enter(self._number(node, numbers))
        return numbers

    def _find_cuts(self) -> None:
        """The numbers of the loss, the router's last residual and the last one, in the graph where they were found."""
        analysed, layers = self.plan.analysed, self.program.routing.router_layers
        numbers = self._numbered(analysed.graph)
        self._loss = numbers[analysed.head.loss]
        if layers:
            residuals = analysed.stack.residuals
            self._cuts = (numbers[residuals[layers - 1]], numbers[residuals[-1]])

    def _match(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """Numbers of the nodes of a rewritten graph; what the router computes from its cut reads it as the last
        residual."""
        numbers: dict[fx.Node, int] = {}
        read: dict[fx.Node, int] = {}
        cut, last = self._cuts or (-1, -1)
        for node in graph.nodes:
            if node.op == "output":
                continue
            operation = operator_of(node)
            filled = node.meta[PART] == "gather" and operation.startswith("aten.masked_fill")
            if _is_dropout(node) or operation.startswith("cggr.gather") or filled:
                numbers[node] = read[node.args[0]]
            elif (parameter := gathered_of(node)) is not None:
                numbers[node] = read[parameter]
            elif operation.startswith("cggr.scatter_tokens"):
                numbers[node] = read[node.args[1]]
            elif operation.startswith(("cggr.masked_loss", "cggr.measured_loss")):
                numbers[node] = self._loss
            else:
                numbers[node] = self._enter(self._number(node, read))
            moved = node.meta[PART] == "router" and numbers[node] == cut
            read[node] = last if moved else numbers[node]
        return numbers

    def _names(self, graph: fx.Graph) -> dict[fx.Node, str]:
        if graph is self.plan.captured.graph:
            return {node: self._own_name(node) for node in graph.nodes}
        repeated: defaultdict[tuple[int, Any], deque[str]] = defaultdict(deque)
        numbers = self._match(graph)
        for part in dict.fromkeys(node.meta[PART] for node in graph.nodes):
            for node, number in self._captured.items():
                repeated[number, (part, node.target)].append(self._own_name(node))
        names: dict[fx.Node, str] = {}
        taken: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                names[node] = self._own_name(node)
                continue
            if (parameter := gathered_of(node)) is not None:
                names[node] = names[parameter]
                continue
            part = node.meta[PART]
            originals = repeated.get((numbers[node], (part, node.target)))
            if originals:
                plain = originals.popleft() if len(originals) > 1 else originals[0]
                name = plain if part in TRAINED_PARTS else f"{part}.{plain}"
            elif operator_of(node).startswith("cggr.gather"):
                name = f"gather.{names[node.args[0]]}"
            else:
                name = f"{part}.{operator_of(node).rpartition('.')[2].partition('[')[0]}"
            taken[name] += 1
            names[node] = name if taken[name] == 1 else f"{name}_{taken[name]}"
        return names

    def _own_name(self, node: fx.Node) -> str:
        return self.program.path(node) if node.op == "placeholder" else node.name

    # -- one line --------------------------------------------------------------------------------------------------

    def _format(self, node: fx.Node, names: dict[fx.Node, str], symbols: dict[Any, Any]) -> str:
        def argument(item: Any) -> str:
            if isinstance(item, fx.Node):
                val = value(item)
                if isinstance(val, torch.SymInt):
                    return _size(val, self.program, symbols)
                return f"%{names[item]}"
            if isinstance(item, (list, tuple)):
                return f"[{', '.join(map(argument, item))}]"
            return _constant(item)

        if node.op == "output":
            return f"return {', '.join(map(argument, self._outputs(node)))}"
        typed = f"%{names[node]}: {_type(value(node), self.program, symbols)}"
        if node.op == "placeholder":
            return f"{typed} = {self.program.kind(node)}"
        arguments = [argument(arg) for arg in node.args]
        arguments += [f"{name}={argument(arg)}" for name, arg in node.kwargs.items()]
        text = f"{typed} = {operator_of(node)}({', '.join(arguments)})"
        comments = [part for part in (module_of(node), source_of(node)) if part]
        if node.meta[REGION].grad is False and node.meta[PART] not in QUIET_PARTS:
            comments.append("no gradient")
        comments += [f"autocast {cast.dtype or ''}".strip() for cast in node.meta[REGION].autocasts]
        return f"{text}    # {', '.join(comments)}" if comments else text

    @staticmethod
    def _outputs(node: fx.Node) -> Iterable[Any]:
        outputs = node.args[0]
        return outputs if isinstance(outputs, (list, tuple)) else (outputs,)


class _Reference:
    """A node's value number inside printed arguments."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _is_dropout(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in _DROPOUTS


def _size(size: Any, program: Program, symbols: dict[Any, Any]) -> str:
    if not isinstance(size, torch.SymInt):
        return "end" if size == _MAX_INT else str(size)
    expression = program.shape_env.simplify(size.node.expr)
    return str(expression.xreplace(symbols)).replace("*", "·")


def _type(val: Any, program: Program, symbols: dict[Any, Any]) -> str:
    if isinstance(val, torch.Tensor):
        return f"{dtype_name(val.dtype)}[{', '.join(_size(size, program, symbols) for size in val.shape)}]"
    if isinstance(val, torch.SymInt):
        return _size(val, program, symbols)
    if isinstance(val, (list, tuple)):
        return f"({', '.join(_type(part, program, symbols) for part in val)})"
    return type(val).__name__


def _constant(item: Any) -> str:
    if isinstance(item, torch.dtype):
        return dtype_name(item)
    if isinstance(item, bool):
        return str(item)
    if isinstance(item, int):
        return "end" if item == _MAX_INT else str(item)
    if isinstance(item, float):
        return f"{item:.6g}"
    if isinstance(item, (torch.device, torch.layout, torch.memory_format)):
        return str(item).removeprefix("torch.")
    if callable(item) and hasattr(item, "__name__"):
        return str(item.__name__)
    return repr(item)
