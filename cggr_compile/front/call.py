"""A model's forward under Dynamo: compiled as a whole, called, and what goes wrong said in the user's terms."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cggr_compile.capture.capture import dynamic_dims, token_ids_of
from cggr_compile.capture.causes import passed_over, recognised, refusal_of
from cggr_compile.capture.tracing import compiled_whole
from cggr_compile.errors import CannotOptimize, NotCompiled, PlanComplete, VerificationError, first_line
from cggr_compile.front.backend import Backend
from cggr_compile.torch_internals import dynamo
from cggr_compile.torch_internals.dynamo_errors import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    InternalTorchDynamoError,
    TorchRuntimeError,
    Unsupported,
    UserError,
)
from cggr_compile.values import ConfigError


class Optimized:
    """What stands at `model.cggr` of an optimised model."""


def optimized_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the optimised models in a module: itself, named "", and submodules."""
    return (part for part in model.named_modules() if isinstance(vars(part[1]).get("cggr"), Optimized))


def refuse_nested(model: nn.Module) -> None:
    """Raises `CannotOptimize` where a part of the model is optimised: only one of the two can route the step."""
    for name, part in optimized_parts(model):
        if part is not model:
            raise CannotOptimize(
                f"{type(model).__name__} holds a model that is optimized itself: {type(part).__name__} at {name}",
                hint="optimize one of the two: cggr.restore the other first",
            )


def compiled_forward(forward: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """Dynamo over a forward, with a code object of its own.

    Dynamo counts recompilations by code object; sharing the class's would let one optimised model use up another's.
    Where something keeps Dynamo from compiling a call, the call raises `NotCompiled` and runs nothing.
    """

    def entry(arguments: dict[str, Any], global_hooks: str) -> Any:
        {global_hooks}  # noqa: B018  so that Dynamo guards on them: a member of a set has to be known
        if not torch.compiler.is_dynamo_compiling():
            raise NotCompiled  # nothing has run yet
        return forward(**arguments)

    own = types.FunctionType(entry.__code__.replace(), entry.__globals__, "cggr_forward", None, entry.__closure__)
    return compiled_whole(own, backend)


def call_compiled(compiled: Callable[..., Any], arguments: dict[str, Any], model: nn.Module) -> Any:
    """Calls a model's compiled forward, batch and sequence marked dynamic; Dynamo's errors become `CannotOptimize`."""
    tensors = {name: arg for name, arg in arguments.items() if isinstance(arg, torch.Tensor)}
    dims = dynamic_dims(tensors, token_ids_of(tensors), "labels")
    try:
        with dynamo.marked_dynamic([(tensors[name], marked) for name, marked in dims.items()]):
            return dynamo.beside_other_threads(lambda: compiled(arguments, dynamo.global_hooks()))
    except NotCompiled as error:
        raise passed_over() from error
    except BackendCompilerFailed as error:
        cause = error.inner_exception
        if isinstance(cause, CannotOptimize):
            raise recognised(cause) from None
        if isinstance(cause, (ConfigError, PlanComplete, VerificationError, MemoryError, torch.OutOfMemoryError)):
            raise cause from None
        if isinstance(cause, GuardOnDataDependentSymNode):
            raise refusal_of(cause, model) from error
        raise CannotOptimize(
            f"the captured step cannot be rewritten ({type(cause).__name__}: {first_line(cause)})",
            hint="report it with the output of cggr.explain; fallback='eager' trains without routing",
        ) from error
    except FailOnRecompileLimitHit as error:
        raise CannotOptimize(
            f"the model changes so often that this step needs more than {dynamo.MAX_CAPTURES} captures of it",
            hint="see what changes with TORCH_LOGS=recompiles, and fix it; optimizing anew forgets the captures",
        ) from error
    except (
        Unsupported,
        UserError,
        TorchRuntimeError,
        InternalTorchDynamoError,
        GuardOnDataDependentSymNode,  # not wrapped where Dynamo itself iterates over a tensor (`tolist`)
    ) as error:
        raise recognised(refusal_of(error, model)) from error
    except RuntimeError as error:
        if dynamo.stance() != "fail_on_recompile" or isinstance(error, CannotOptimize):
            raise
        raise passed_over() from error
