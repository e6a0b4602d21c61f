"""Writing the next program: nodes copied and added, with their values and roles kept true."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import fx

from cggr_compile.errors import CannotOptimize, first_line
from cggr_compile.ir.program import PART, REGION, Analysed, Input, Program, Region, Routing, Snapshot, describe, value
from cggr_compile.ir.renaming import Renaming
from cggr_compile.torch_internals import symbols, tracing

P = TypeVar("P", bound=Program)


def map_nodes(item: Any, mapping: Callable[[fx.Node], fx.Node]) -> Any:
    """Copies a role (node, tuple, dataclass) with every node mapped."""
    if isinstance(item, fx.Node):
        return mapping(item)
    if isinstance(item, tuple):
        return tuple(map_nodes(part, mapping) for part in item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return dataclasses.replace(
            item,
            **{f.name: map_nodes(getattr(item, f.name), mapping) for f in dataclasses.fields(item)},
        )
    return item


class Builder(Generic[P]):
    """Builds the next program: copies nodes of the old graph, adds new ones and keeps `meta["val"]` true.

    `env` maps old nodes to new. New nodes inherit `region` and `part` from the builder's current setting.
    """

    def __init__(self, program: P) -> None:
        self.program = program
        self.graph = fx.Graph(program.root)
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs = list(program.inputs)
        self.region = Region()
        self.part = "main"
        self.renaming = Renaming(program)
        self._values: dict[Any, Any] = {}

    def copy_inputs(self) -> None:
        """Copies every placeholder, in order."""
        for node in self.program.placeholders:
            self.copy(node)

    def copy(self, node: fx.Node) -> fx.Node:
        """Copies one node whose arguments are already in `env`, with its value, region and part."""
        self.env[node] = self.graph.node_copy(node, lambda old: self.env[old])
        return self.env[node]

    def copy_parts(self, *parts: str) -> None:
        """Copies every node that earlier passes put into one of `parts`, in order."""
        for node in self.program.graph.nodes:
            if node.op not in ("placeholder", "output") and node.meta[PART] in parts:
                self.copy(node)

    def copy_rest(self) -> None:
        """Copies every node not copied yet, the output included."""
        for node in self.program.graph.nodes:
            if node.op != "output" and node not in self.env:
                self.copy(node)
        self.output(fx.map_arg(self.program.output.args[0], lambda old: self.env[old]))

    def copy_call(
        self,
        node: fx.Node,
        env: dict[fx.Node, fx.Node],
        args: tuple | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """Copies one call with arguments from `env` and computes its value afresh; in the builder's part, or, where
        that is the main pass, in the original's.

        The copy runs under the original's region; where the builder's region disables gradients or adds an autocast,
        that holds too. `args` and `kwargs`, already mapped, replace the arguments.
        """
        new = self.graph.node_copy(node, lambda old: env[old])
        if args is not None:
            new.args = args
        if kwargs is not None:
            new.kwargs = kwargs
        region = node.meta[REGION]
        grad = self.region.grad if self.region.grad is not None else region.grad
        new.meta[REGION] = Region(grad, self.region.autocasts + region.autocasts)
        # Within the main pass, the layers that run on fewer tokens stay a part of their own.
        new.meta[PART] = node.meta[PART] if self.part == "main" else self.part
        unchanged = all(value(env[source]) is value(source) for source in node.all_input_nodes)
        if new.op == "call_function" and not (unchanged and args is None and kwargs is None):
            self.evaluate(new, node)
            symbols.inherit_range(value(node), value(new))
        return new

    def placeholder(self, name: str, val: Any) -> fx.Node:
        """Adds an input behind the last one."""
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta.update({"val": val, REGION: Region(), PART: "main"})
        self.inputs.append(Input(node.name, name, "added"))
        return node

    def tensor_input(self, name: str, shape: Sequence[Any], like: Any) -> fx.Node:
        """Adds an input of float32 [shape] on the device of the node `like`."""
        with self.program.fake_mode:
            empty = torch.empty(tuple(shape), dtype=torch.float32, device=value(like).device)
            return self.placeholder(name, empty)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call and computes its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update({"val": None, REGION: self.region, PART: self.part})
        self.evaluate(node)
        return node

    def call_for(self, node: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call that stands in for an old node, or for a part of it: in its part, region and checkpoint."""
        before = self.part, self.region
        self.part, self.region = node.meta[PART], node.meta[REGION]
        made = self.call(target, *args, **kwargs)
        self.part, self.region = before
        made.meta = {**node.meta, **made.meta}
        return made

    def output(self, values: Any) -> None:
        """Adds the output node."""
        self.graph.output(values).meta.update({REGION: Region(), PART: "main"})

    def routing(self: Builder[Analysed], **changes: Any) -> Routing:
        """The routing role in the new graph, with `changes`."""
        return dataclasses.replace(map_nodes(self.program.routing, self._follow), **changes)

    def _follow(self, node: fx.Node) -> fx.Node:
        return self.env.get(node, node)

    def _value(self, node: fx.Node) -> Any:
        return getattr(self.program.root, str(node.target)) if node.op == "get_attr" else value(node)

    def evaluate(self, node: fx.Node, original: fx.Node | None = None) -> None:
        """Computes `meta["val"]`: from that of the original, if the node is a copy and it tells (`Renaming`), or by
        running the node on its arguments' fake values under its region.

        The layers of a stack are alike, and a fake run with symbols is slow: calls of one operator on values of the
        same description share one result, unless it has a size that depends on data.
        """
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        key = (node.target, node.meta[REGION], describe(args), describe(kwargs))
        if key in self._values:
            node.meta["val"] = self._values[key]
            return
        known = None
        if original is not None:
            before = fx.map_arg((original.args, original.kwargs), self._value)
            known = self.renaming.result(original, node, before, (args, kwargs))
        node.meta["val"] = self._run(node, args, kwargs) if known is None else known
        if not symbols.data_symbols(node.meta["val"]) - symbols.data_symbols((args, kwargs)):
            self._values[key] = node.meta["val"]

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        modes = (self.program.fake_mode, tracing.enable_python_dispatcher(), self.program.shape_env.suppress_guards())
        with modes[0], modes[1], modes[2], node.meta[REGION].active():
            try:
                return node.target(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise CannotOptimize(
                    f"the rewritten graph does not fit together: {first_line(error)}",
                    node=node,
                    hint="the model fixes a size that routing must change; please report it with this line",
                ) from error

    def finish(self, name: str, **changes: Any) -> P:
        """The new program: roles follow their nodes through `env`; `changes` replaces fields; a snapshot is kept.

        A role whose node was not copied keeps pointing at nothing in the graph and must be in `changes`.
        """
        roles = {role: map_nodes(getattr(self.program, role), self._follow) for role in self.program.ROLES}
        fields = {**roles, **changes, "graph": self.graph, "inputs": tuple(self.inputs)}
        snapshot = Snapshot(name, self.graph)
        return dataclasses.replace(self.program, **fields, snapshots=(*self.program.snapshots, snapshot))
