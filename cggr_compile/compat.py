"""Everything that depends on a private or version-dependent corner of torch or transformers, in one place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_slot, set_proxy_slot, snapshot_fake
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.symbol import SymT, symbol_is_type


def source_name(source: Any) -> str:
    """Expression by which Dynamo reads an input, e.g. `L['self']._modules['lm_head']._parameters['weight']`.

    `Source.name` became a property in torch 2.12; before, it was a method.
    """
    name = source.name
    return name() if callable(name) else name


def is_argument(source: str) -> bool:
    """Whether an input is an argument of the call, or an item of one, by the expression that Dynamo reads it by: not
    what a module, a closure or a global holds. (`data` is where transformers' batches keep their items.)"""
    return bool(re.fullmatch(r"L\['\w+'\](\.data|\[[^\[\]]+\])*", source))


def request_dynamic(example_inputs: list[Any], dims: dict[int, tuple[int, ...]]) -> None:
    """Marks dimensions of real inputs as dynamic and makes Dynamo trace the frame again.

    `TensorifyScalarRestartAnalysis` is the one exception that Dynamo lets a backend restart the analysis with. Where
    the graph ends at a graph break, Dynamo has noted the way to it, which other sizes need not go: the note is dropped.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    translator = _translator()
    if translator is not None:
        translator.speculation_log.clear()

    for index, marked in dims.items():
        torch._dynamo.maybe_mark_dynamic(example_inputs[index], list(marked))
    raise TensorifyScalarRestartAnalysis(
        restart_reason="cggr needs sizes that may be the batch or the sequence as symbols of their own"
    )


def captured_module() -> nn.Module | None:
    """The module whose forward Dynamo is tracing, asked from inside a backend; None where the frame has none."""
    translator = _translator()
    if translator is None:
        return None
    modules = [local for local in translator.output.root_tx.f_locals.values() if isinstance(local, nn.Module)]
    return modules[0] if modules else None


def stored_nodes() -> set[str]:
    """Names of the nodes of Dynamo's graph whose values the frame puts into objects that outlive it (an attribute of a
    module, a list of the caller's), asked from inside a backend."""
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting, VariableTracker
    from torch._dynamo.variables.tensor import TensorVariable

    translator = _translator()
    if translator is None:
        return set()
    effects = translator.output.side_effects
    existing = (AttributeMutationExisting, ValueMutationExisting)
    waiting = [variable for variable in effects._get_modified_vars() if isinstance(variable.mutation_type, existing)]
    found: set[str] = set()
    seen: dict[int, Any] = {}

    def add(variable: Any) -> None:
        waiting.extend(effects.store_attr_mutations.get(variable, {}).values())
        if isinstance(variable, TensorVariable):
            found.add(variable.as_proxy().node.name)

    while waiting:
        VariableTracker.visit(add, waiting.pop(), seen)
    return found


def modules_around() -> tuple[str, ...]:
    """The modules, as Dynamo names them, whose forward holds the line that it is tracing in this thread: of the calls
    that it inlines only the outermost is registered, so the innermost is looked for on Python's stack."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    frame = inspect.currentframe()
    while frame is not None:
        translator = frame.f_locals.get("self")
        if isinstance(translator, InstructionTranslatorBase):
            return tuple(path for path, _ in translator.nn_module_stack.values())
        frame = frame.f_back
    return ()


def _translator() -> Any:
    """What translates the frame that Dynamo is tracing in this thread, if it is tracing one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # no trace is under way in this thread
        return None


@contextmanager
def modes_kept(device_type: str) -> Iterator[None]:
    """Puts gradient mode and autocast back where an error leaves a graph between the nodes that switch them."""
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        if not torch.amp.is_autocast_available(device_type):
            yield
            return
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        cached, depth = torch.is_autocast_cache_enabled(), _autocast_depth()
        try:
            yield
        finally:
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
            torch.set_autocast_cache_enabled(cached)
            while _autocast_depth() > depth:
                if torch.autocast_decrement_nesting() == 0:
                    torch.clear_autocast_cache()


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def start_inductor_workers() -> None:
    """Starts the processes that compile inductor's kernels: inductor itself does when it is first called, which here is
    after the passes."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def graph_break_of(gm: fx.GraphModule) -> Any:
    """Why Dynamo ended this graph before its frame returned, as `(reason, user_stack)`; None where it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and reason.graph_break else None


def unmark_buffers(model: nn.Module) -> None:
    """Makes plain tensors of a model's `nn.Buffer`s, as moving the model to another device does: a forward that assigns
    to a marked one reads its mark, which Dynamo cannot trace. The module itself knows which of its buffers persist."""
    for buffer in model.buffers():
        for mark in ("_is_buffer", "persistent"):
            vars(buffer).pop(mark, None)


def install_output_hooks(model: nn.Module) -> None:
    """Installs transformers' output-recording hooks where a model's config asks for recorded outputs (router logits,
    say), and in models of several parts, which ask each other for theirs; transformers installs them at the first such
    forward, under a lock that Dynamo cannot trace."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # transformers without lazily installed hooks
        return
    from transformers import PreTrainedModel

    composite = bool(getattr(getattr(model, "config", None), "sub_configs", None))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and (
            composite or any(name.startswith("output_") and flag for name, flag in vars(module.config).items())
        ):
            maybe_install_capturing_hooks(module)


def data_symbols(values: Any) -> set[sympy.Symbol]:
    """The symbols of `values` (numbers, tensors, containers) that stand for data: elements read, entries counted."""
    parts = pytree.tree_leaves(values)
    sizes = [part for part in parts if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Tensor))]
    return set(free_unbacked_symbols(sizes))


def _is_read(expression: Any) -> bool:
    return bool(expression.is_Symbol) and symbol_is_type(expression, SymT.UNBACKED_INT)


def inherit_range(old: Any, new: Any) -> None:
    """Gives a number that was read from data anew what is known of the one it stands for: its range, and whether it is
    a size. Both come from what the model does with it, which the copy does as well, not from the sizes of its operands.
    """
    if not isinstance(old, torch.SymInt) or not isinstance(new, torch.SymInt):
        return
    shape_env, was, now = new.node.shape_env, old.node._expr, new.node._expr
    if was == now or not (_is_read(was) and _is_read(now)):
        return
    known = shape_env.var_to_range[was]
    shape_env.constrain_symbol_range(now, known.lower, known.upper)
    if was in shape_env.size_like:
        shape_env.size_like.add(now)


def unobserved() -> Any:
    """Keeps a trace's function modes from what is done within: they would see every attribute that is read."""
    return torch._C.DisableTorchFunction()


def traced_node(tracer: Any, value: Any) -> fx.Node | None:
    """The node that stands for a tensor or a symbolic number in the trace under way, made where a number is waiting to
    be used; None for a tensor that is not traced, or is a constant."""
    slot = get_proxy_slot(value, tracer, None)
    if not isinstance(value, torch.Tensor):
        return slot if slot is None else slot.force().node
    return None if slot is None or slot.constant is not None else slot.proxy.node


def trace_call(tracer: Any, target: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
    """Adds a call to the trace under way without running it, named as the tracer names those that run."""
    packet = getattr(target, "overloadpacket", target)
    name = tracer.graph._target_to_str(packet.__name__)
    return tracer.create_node("call_function", target, args, kwargs, name)


def track(tracer: Any, tensor: torch.Tensor, node: fx.Node) -> None:
    """Makes a node stand for a tensor in the trace under way. Its sizes are not tracked: they are another's."""
    set_proxy_slot(tensor, tracer, _ProxyTensor(tracer.proxy(node), None))


class _Computed(torch.autograd.Function):
    """What `make()` gives, as a result that requires grad."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("a trace has no backward")


_LEAF = torch.empty(0, requires_grad=True)


def copy_of_fake(value: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """A fake tensor like `value`, with its storage; where it requires grad, not a leaf, as results are (gradients must
    be enabled then: to enable them would be traced)."""
    return _Computed.apply(_LEAF, partial(snapshot_fake, value)) if requires_grad else snapshot_fake(value)


def new_fake(
    mode: FakeTensorMode,
    elements: Any,
    shape: Sequence[Any],
    stride: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
    requires_grad: bool,
) -> torch.Tensor:
    """A fake tensor, its storage of so many elements its own; where it requires grad, not a leaf, as results are."""

    def make() -> torch.Tensor:
        with (
            no_dispatch()
        ):  # from shape and strides alone, torch would work out how long a storage is, symbol by symbol
            meta = torch.empty((elements,), dtype=dtype, device="meta").as_strided(shape, stride)
        return FakeTensor(mode, meta, device)

    return _Computed.apply(_LEAF, make) if requires_grad else make()


class _ByStrides(TorchDispatchMode):
    """Makes a view of a fake tensor on its meta tensor. What runs in Python for a fake one otherwise checks sizes that
    are known to fit, and takes ten times as long."""

    def __init__(self, *geometry: Any) -> None:
        super().__init__()
        self.geometry = geometry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.alias.default:
            return func(*args, **(kwargs or {}))
        source = args[0]
        with in_kernel_invocation_manager(source.fake_mode):
            view = source.as_strided(*self.geometry)
        return FakeTensor(source.fake_mode, view, source.fake_device)


def view_of_fake(source: torch.Tensor, shape: Sequence[Any], stride: Sequence[Any], offset: Any) -> torch.Tensor:
    """The view of a fake tensor with these sizes, which must fit its memory."""
    with _ByStrides(shape, stride, offset):
        return torch.ops.aten.alias(source)  # to autograd any view is alike; this one's backward keeps no sizes


def _storage_owners(x: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


_ALONE = _storage_owners(torch.empty(0))


def shares_memory(x: torch.Tensor) -> bool:
    """Whether another tensor, a view of it too, lies in the memory of this one."""
    return _storage_owners(x) > _ALONE


def transforms_are_active() -> bool:
    """Whether a function transform (vmap, grad) is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Checkpoints(NamedTuple):
    """The checkpoints of `torch.utils.checkpoint` (not reentrant ones) that a call runs under.

    Attributes:
        first_runs: those in their forward that began within the recomputation, if there is one; innermost first.
        recomputed: the innermost that is being recomputed, and what tells backwards apart.
    """

    first_runs: tuple[Any, ...] = ()
    recomputed: tuple[Any, Any] | None = None


def checkpoints_around() -> Checkpoints:
    """The checkpoints under way in this thread, read off the hooks that they put on saved tensors: the closure of one
    in its forward holds its `frame`, that of a recomputation a reference to it (`torch/utils/checkpoint.py`)."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return _NO_CHECKPOINTS
    taken = []
    first_runs = []
    recomputed = None
    try:
        while hooks is not None and recomputed is None:
            variables = inspect.getclosurevars(inspect.unwrap(hooks[0])).nonlocals if _is_checkpoints(hooks[0]) else {}
            if "frame" in variables:
                first_runs.append(variables["frame"])
            elif "target_frame_ref" in variables:
                recomputed = (variables["target_frame_ref"](), variables["gid"])
            torch._C._autograd._pop_saved_tensors_default_hooks()
            taken.append(hooks)
            hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    finally:
        for pack, unpack in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    return Checkpoints(tuple(first_runs), recomputed)


_NO_CHECKPOINTS = Checkpoints()


def _is_checkpoints(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "torch.utils.checkpoint"


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def _size_functions() -> dict[Any, Any]:
    """torch's own functions in symbolic sizes, each with the Python function that it stands for."""
    import operator

    from torch.utils._sympy import functions

    return {
        functions.FloorDiv: operator.floordiv,
        functions.CleanDiv: operator.floordiv,
        functions.Mod: operator.mod,
        functions.PythonMod: operator.mod,
        functions.Max: torch.sym_max,
        functions.Min: torch.sym_min,
    }


SIZE_FUNCTIONS = _size_functions()
