"""What a routed step returns in place of logits and activations: nothing, and it says so where it is used.

None would surface in the caller's code as an attribute or an index that None does not have. Where it is only passed
on (by wrappers that cast or gather tensors, in a tuple, through `copy` and `pickle`) this object goes through as None
does: it is false, is no tensor, and has no attributes, which `hasattr` is told.
"""

from __future__ import annotations

from typing import Any, NoReturn

from cggr_compile.errors import CannotOptimize


class OutputNotComputed(CannotOptimize, AttributeError):
    """An output that a routed step does not compute was used."""


class NotComputed:
    """An output that no routed step computes."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "<not computed by a routed step>"

    def __getattr__(self, name: str) -> Any:
        _refuse()

    def __getitem__(self, index: Any) -> Any:
        _refuse()

    def __iter__(self) -> Any:
        _refuse()

    def __len__(self) -> int:
        _refuse()

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        _refuse()


def _refuse() -> NoReturn:
    raise OutputNotComputed(
        "a routed training step returns its loss, and no logits or activations",
        hint="read them from a call in eval() mode; keep_logits=True returns the logits of the selected rows",
    )


NOT_COMPUTED = NotComputed()
