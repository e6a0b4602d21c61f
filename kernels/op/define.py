"""How an operator is defined once: by an annotated function, from which its schema is read.

A record (a `NamedTuple`) among the function's parameters stands for its fields: the operator takes them one by one, as
graphs need it, and the function gets the record.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

Record = TypeVar("Record", bound=tuple)

_EMPTY = inspect.Parameter.empty


def operator(name: str, like: Callable[..., Any] | None = None) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Makes a function the operator `name`, which mutates none of its arguments.

    Its schema is that of the function, or of `like` where the function hands its arguments on. A number that is an int
    may be symbolic.
    """

    def define(function: Callable[..., Any]) -> CustomOpDef:
        schema = schema_of(function if like is None else like)
        return torch.library.custom_op(name, by_fields(function), mutates_args=(), schema=schema)

    return define


def by_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called with the fields of each record among its parameters instead of the record."""
    hints = get_type_hints(function)
    records: list[Any] = [hints.get(name) for name in inspect.signature(function).parameters]
    if not any(map(_is_record, records)):
        return function

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        given, rest = [], list(args)
        for record in records:
            size = len(record._fields) if _is_record(record) else 1
            given.append(record(*rest[:size]) if _is_record(record) else rest[0])
            del rest[:size]
        return function(*given)

    return call


def save(ctx: Any, record: tuple, *outputs: Tensor) -> None:
    """Saves for a backward a record of arguments, and tensors of the forward's result."""
    ctx.constants = [None if isinstance(x, Tensor) else x for x in record]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in record), *outputs)


def saved(ctx: Any, kind: Callable[..., Record]) -> tuple[Record, tuple[Tensor, ...]]:
    """What `save` was given, the record being one of `kind`."""
    size = len(ctx.constants)
    tensors, outputs = ctx.saved_tensors[:size], ctx.saved_tensors[size:]
    arguments = (x if constant is None else constant for x, constant in zip(tensors, ctx.constants, strict=True))
    return kind(*arguments), outputs


def gradients_of(ctx: Any, fields: Sequence[str], names: Sequence[str], found: Sequence[Tensor]) -> list[Tensor | None]:
    """What a backward returns whose forward took `fields`, for the gradients of the wanted of `names`, in order."""
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    sought = (name for name, want in zip(names, wanted_of(ctx, fields, names), strict=True) if want)
    for name, gradient in zip(sought, found, strict=True):
        gradients[fields.index(name)] = gradient
    return gradients


def wanted_of(ctx: Any, fields: Sequence[str], names: Sequence[str]) -> list[bool]:
    """Whether the gradient of each of `names` is wanted of an operator that takes `fields`."""
    # The dispatcher drops trailing arguments equal to their defaults: these have no place.
    given = len(ctx.needs_input_grad)
    places = [fields.index(name) for name in names]
    return [place < given and ctx.needs_input_grad[place] for place in places]


@contextlib.contextmanager
def autograd_inside_operator() -> Iterator[None]:
    """Lets an operator's body use autograd, whose keys the dispatcher excludes below the autograd kernel."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def schema_of(function: Callable[..., Any]) -> str:
    """`torch.library.infer_schema`, which knows neither records nor lists of strings.

    A default in front of a parameter that has none is left out, as a schema cannot say it.
    """
    parameters = list(_parameters(function))
    for place in range(len(parameters) - 1, 0, -1):
        if parameters[place].default is _EMPTY:
            parameters[place - 1] = parameters[place - 1].replace(default=_EMPTY)
    of_strings = [p.name for p in parameters if p.annotation == Sequence[str]]

    def read() -> None: ...

    read.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=str) if p.name in of_strings else p for p in parameters],
        return_annotation=get_type_hints(function)["return"],
    )
    schema = torch.library.infer_schema(read, mutates_args=())
    for name in of_strings:
        schema = schema.replace(f"str {name}", f"str[] {name}")
    return schema


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    hints, found = get_type_hints(function), []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        found += _parameters(hint) if _is_record(hint) else [parameter.replace(annotation=hint)]
    return found


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and hasattr(hint, "_fields")
