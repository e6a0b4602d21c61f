"""Private corners of Dynamo: what it may not overlook in a routed step, how often, and why it did not look at all."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.utils import counters
from torch.nn.modules import module as nn_module

from cggr_compile.errors import Refusal

# Captures of one model that Dynamo keeps. Each costs memory, and each step may look through all of them.
MAX_CAPTURES = 64

_NESTED = "using FX to symbolically trace a dynamo-optimized function"

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def one_at_a_time() -> AbstractContextManager[Any]:
    """Dynamo's lock, which it holds through traces and what its backends compile: these patch torch for the process."""
    return convert_frame.compile_lock


def beside_other_threads(call: Callable[[], Any]) -> Any:
    """A call of compiled code, made again once no other thread compiles where Dynamo refuses it because one does: while
    `torch.fx` traces, it takes every thread's call for a part of the trace."""
    try:
        return call()
    except RuntimeError as error:
        if _NESTED not in str(error):
            raise
    with one_at_a_time():
        return call()


@contextmanager
def step_options() -> Iterator[None]:
    """Dynamo's options for the trace of a routed step.

    Hooks registered on a module after the capture, or removed, make a new one: Dynamo looks at modules without hooks
    again only if asked to. Parameters that are changed in place, as `model.to(dtype)` does, make one too: Dynamo takes
    a tensor for the same while its module's dictionary is. So do parameters of modules that FSDP manages. The limits of
    captures are those of a model of ours, not of a function that was thought to compile once. `requires_grad_()` on a
    result is passed over (`_requires_grad_`), and what is asked of a string that a class has is answered
    (`_of_attribute`).
    """
    from torch._dynamo.variables.misc import GetAttrVariable
    from torch._dynamo.variables.tensor import TensorVariable

    config = torch._dynamo.config
    original = TensorVariable.method_requires_grad_
    of_attribute = GetAttrVariable.call_method

    def method_requires_grad_(tensor: Any, tx: Any, requires_grad: Any = True) -> Any:
        return _requires_grad_(original, tensor, tx, requires_grad)

    def call_method(attribute: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        return _of_attribute(of_attribute, attribute, tx, name, args, kwargs)

    with ExitStack() as stack:
        stack.enter_context(replaced(config, "skip_nnmodule_hook_guards", False))
        stack.enter_context(replaced(config, "skip_tensor_guards_with_matching_dict_tags", False))
        stack.enter_context(replaced(config, "skip_fsdp_guards", False))
        stack.enter_context(replaced(config, "recompile_limit", MAX_CAPTURES))
        total = max(MAX_CAPTURES, config.accumulated_recompile_limit)
        stack.enter_context(replaced(config, "accumulated_recompile_limit", total))
        stack.enter_context(replaced(TensorVariable, "method_requires_grad_", method_requires_grad_))
        stack.enter_context(replaced(GetAttrVariable, "call_method", call_method))
        yield


def _of_attribute(original: Callable[..., Any], attribute: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A method of `type(parameter).__module__`, say, as Dynamo traces it: PEFT's DoRA asks by `startswith` whether a
    weight is quantised. From torch 2.13 on Dynamo has forgotten by then that this is a string."""
    from torch._dynamo.variables.constant import ConstantVariable

    found = attribute.as_python_constant() if attribute.is_python_constant() else None
    if isinstance(found, str):
        return ConstantVariable.create(found).call_method(tx, name, args, kwargs)
    return original(attribute, tx, name, args, kwargs)


def _requires_grad_(original: Callable[..., Any], tensor: Any, tx: Any, requires_grad: Any) -> Any:
    """`result.requires_grad_()` as Dynamo traces it: nothing but the flag, where nothing of the graph needs a gradient.

    A result that does not require grad depends on nothing that does. Making it a leaf that does changes no value, and
    no gradient but its own, which nobody has asked for: PEFT and transformers do it to the embeddings, so that
    reentrant checkpoints notice the adapters behind. The checkpoints of a graph need no such hint. Dynamo itself
    refuses to return what comes of such a leaf, because what it hands graphs to may read the flag.
    """
    wanted = requires_grad if isinstance(requires_grad, bool) else requires_grad.as_python_constant()
    value = tensor.as_proxy().node.meta["example_value"]
    if tensor.source or not wanted or value.requires_grad:
        return original(tensor, tx, requires_grad)
    value.requires_grad_()
    tensor.requires_grad = True
    return tensor


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """An attribute with another value."""
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


def global_hooks() -> str:
    """What tells the hooks apart that are registered for all modules; Dynamo sees them, and does not look again."""
    return " ".join(str(key) for name in _GLOBAL_HOOKS for key in getattr(nn_module, name))


def stance() -> str:
    """The stance in force (`torch.compiler.set_stance`)."""
    return eval_frame._stance.stance


def why_not_compiled() -> Refusal:
    """What keeps Dynamo from compiling a call, and what to do about it."""
    for variable in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(variable) == "1":
            return Refusal(f"{variable}=1 in the environment switches torch.compile off", hint=f"unset {variable}")
    if torch._dynamo.config.disable:
        return Refusal("torch._dynamo.config.disable switches torch.compile off", hint="set it to False")
    if stance() != "default":
        return Refusal(
            f"torch.compile does not compile this call under the stance {stance()!r}",
            hint="train under torch.compiler.set_stance('default')",
        )
    if torch._C._len_torch_dispatch_stack():
        mode = type(torch.utils._python_dispatch._get_current_dispatch_mode()).__name__
        return Refusal(
            f"torch.compile does not compile under a dispatch mode, and {mode} is active",
            hint="train outside of it; report() predicts what a step costs",
        )
    return Refusal("torch.compile passed the forward over", hint="see why with TORCH_LOGS=dynamo")


def last_graph_break() -> str | None:
    """Why Dynamo last broke a graph in this process; it counts the reasons."""
    reasons = list(counters["graph_break"])
    return next(iter(reasons[-1].strip().splitlines()), None) if reasons else None


def is_compiled_by_others() -> bool:
    """Whether the call under way is part of one that a `torch.compile` was asked for, or would be, but for a stance
    that leaves no trace of it."""
    return get_eval_frame_callback() is not None or stance() == "force_eager"


def untraced_hook(hook: Callable[..., None], where: Callable[[], bool] = lambda: True) -> Callable[..., None]:
    """A method that a module calls as a hook: Dynamo, where it traces the module's call, finds nothing in it, and where
    it makes the call and compiles what that calls, leaves it and all that it calls alone. It is called if `where()`."""
    whole = torch.compiler.disable(hook)

    def called(*args: Any) -> None:
        if not torch.compiler.is_dynamo_compiling() and where():
            whole(*args)

    eval_frame.skip_code(called.__code__)
    return wraps(hook)(called)


def source_name(source: Any) -> str:
    """Expression by which Dynamo reads an input, e.g. `L['self']._modules['lm_head']._parameters['weight']`.

    `Source.name` became a property in torch 2.12; before, it was a method.
    """
    name = source.name
    return name() if callable(name) else name


def module_path(source: str) -> str:
    """The path `model.layers.3` of a module, or that of its state, by the expression that Dynamo reads it by; empty for
    the root.

    That is `L['self']._modules['model']…`, or, where a module has a `__getattr__` of its own (PEFT),
    `L['self'].__dict__['_modules']['model']…`.
    """
    member = r"\._(?:modules|parameters|buffers)\['([^']+)'\]|(?<!\))\[(\d+)\]|\.(\w+)(?=$|\.|\[)"
    members = re.findall(member, source.replace(".__dict__['_modules']", "._modules"))
    return ".".join(name or index or attribute for name, index, attribute in members if not attribute.startswith("_"))


def is_argument(source: str) -> bool:
    """Whether an input is an argument of the call, or an item of one, by the expression that Dynamo reads it by: not
    what a module, a closure or a global holds. (`data` is where transformers' batches keep their items.)"""
    return bool(re.fullmatch(r"L\['\w+'\](\.data|\[[^\[\]]+\])*", source))


@contextmanager
def marked_dynamic(dims: Sequence[tuple[torch.Tensor, Sequence[int]]]) -> Iterator[None]:
    """Dimensions of a user's tensors are marked dynamic meanwhile: what else compiles these tensors later sees none of
    our marks."""
    before = [{name: copy.copy(x) for name, x in vars(tensor).items() if "dynamo" in name} for tensor, _ in dims]
    for tensor, marked in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, list(marked))
    try:
        yield
    finally:
        for (tensor, _), given in zip(dims, before, strict=True):
            for name in [name for name in vars(tensor) if "dynamo" in name]:
                delattr(tensor, name)
            vars(tensor).update(given)


def request_dynamic(example_inputs: list[Any], dims: dict[int, tuple[int, ...]]) -> NoReturn:
    """Marks dimensions of real inputs as dynamic and makes Dynamo trace the frame again."""
    for index, marked in dims.items():
        torch._dynamo.maybe_mark_dynamic(example_inputs[index], list(marked))
    trace_again("cggr needs sizes that may be the batch or the sequence as symbols of their own")


def trace_again(why: str) -> NoReturn:
    """Makes Dynamo trace the frame again, asked from inside a backend: `TensorifyScalarRestartAnalysis` is the one
    exception that Dynamo lets a backend restart the analysis with.

    Dynamo has noted the way that it went, which it need not go again: sizes may be others, and a module of a function
    has our hooks by now. The note is dropped.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    translator = _translator()
    if translator is not None:
        translator.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=why)


def captured_module() -> nn.Module | None:
    """The module whose forward Dynamo is tracing, asked from inside a backend; None where the frame has none."""
    translator = _translator()
    if translator is None:
        return None
    given = translator.output.root_tx.f_locals.values()
    # A forward in a wrapper (*args, **kwargs), as transformers' decorators are, has the module among those.
    flat = (each for local in given for each in (local if isinstance(local, tuple) else (local,)))
    return next((each for each in flat if isinstance(each, nn.Module)), None)


def is_in_eval_mode() -> bool:
    """Whether nothing trains of the models that Dynamo traces calls of, asked from inside a backend: the outermost
    modules that hold tensors of the graph, however the frame reaches them."""
    modes = [module.training for _, module in _outermost_modules()]
    return bool(modes) and not any(modes)


def keep_to_modes() -> None:
    """Makes `train()` and `eval()` of these models captures of their own, asked from inside a backend: Dynamo does not
    where a forward does not read its mode."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource

    for source, _ in _outermost_modules():
        install_guard(AttrSource(source, "training").make_guard(GuardBuilder.CONSTANT_MATCH))


def _outermost_modules() -> list[tuple[Any, nn.Module]]:
    """With Dynamo's source of each."""
    from torch._dynamo.guards import _get_closure_vars

    translator = _translator()
    if translator is None:
        return []
    frame = translator.output.root_tx
    names, known = {"L": frame.f_locals, "G": frame.f_globals}, _get_closure_vars()
    found: dict[int, tuple[Any, nn.Module]] = {}
    values: dict[Any, Any] = {}
    for argument in translator.output.graphargs:
        way = _way_to(argument.source) if argument.is_tensor else ()
        modules = [(source, source.get_value(names, known, values)) for source in way]
        modules = [each for each in modules if isinstance(each[1], nn.Module)]
        if modules:
            found.setdefault(id(modules[-1][1]), modules[-1])
    return list(found.values())


def _way_to(source: Any) -> Iterator[Any]:
    """A source, and those that it is read from, the outermost last."""
    while source is not None:
        yield source
        source = getattr(source, "base", None)


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
        if issubclass(type(variable), TensorVariable):  # isinstance would make an input of what was never read
            found.add(variable.as_proxy().node.name)

    while waiting:
        VariableTracker.visit(add, waiting.pop(), seen)
    return found


def numbers_given() -> frozenset[float]:
    """The numbers among the arguments of the call that is traced, asked from inside a backend: Dynamo may have written
    them into its graph as constants."""
    translator = _translator()
    found: set[float] = set()
    waiting = [] if translator is None else list(translator.f_locals.values())
    while waiting:
        given = waiting.pop()
        if isinstance(given, dict):
            waiting.extend(given.values())
        elif isinstance(given, (int, float)) and not isinstance(given, bool):
            found.add(given)
    return frozenset(found)


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


def graph_break_of(gm: fx.GraphModule) -> Any:
    """Why Dynamo ended this graph before its frame returned, as `(reason, user_stack)`; None where it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and reason.graph_break else None


_BUFFER_MARKS = ("_is_buffer", "persistent")


def unmark_buffers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Makes plain tensors of a model's `nn.Buffer`s, as moving the model to another device does: a forward that assigns
    to a marked one reads its mark, which Dynamo cannot trace. The module itself knows which of its buffers persist.
    Returns the marks by the buffers' names, for `mark_buffers`."""
    marks = {}
    for name, buffer in model.named_buffers():
        found = {mark: vars(buffer).pop(mark) for mark in _BUFFER_MARKS if mark in vars(buffer)}
        if found:
            marks[name] = found
    return marks


def mark_buffers(model: nn.Module, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives the marks back to the buffers that are still there."""
    for name, buffer in model.named_buffers():
        vars(buffer).update(marks.get(name, {}))
