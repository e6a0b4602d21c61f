"""What a routed step returns in place of logits and activations: nothing, and it says so where it is used.

None would surface in the caller's code as an attribute or an index that None does not have. Where it is only passed
on (by wrappers that cast or gather tensors, in a tuple, through `copy` and `pickle`) this object goes through as None
does: it is no tensor, is not equal to None, may be hashed and printed, and has no attributes, which `hasattr` is told.
"""

from __future__ import annotations

from typing import Any, NoReturn

from cggr_compile.errors import CannotOptimize


class OutputNotComputed(CannotOptimize, AttributeError):
    """An output that a routed step does not compute was used."""


class NotComputed:
    """An output that no routed step computes."""

    def __repr__(self) -> str:
        return "<not computed by a routed step>"

    def __eq__(self, other: object) -> bool:
        return False if other is None else _refuse()  # `None in outputs` asks, too

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        _refuse()

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        _refuse()


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise OutputNotComputed(
        "a routed training step returns its loss, and no logits or activations",
        hint="read them from a call in eval() mode; keep_logits=True returns the logits of the selected rows",
    )


_BINARY = "add sub mul matmul truediv floordiv mod divmod pow and or xor lshift rshift"
_UNARY = "neg pos abs invert bool int float complex index round trunc floor ceil array"
_OF_A_SEQUENCE = "len iter reversed contains getitem setitem delitem"
_REFLECTED = "r" + _BINARY.replace(" ", " r")
for _name in f"{_BINARY} {_REFLECTED} lt le gt ge {_UNARY} {_OF_A_SEQUENCE}".split():
    setattr(NotComputed, f"__{_name}__", _refuse)

NOT_COMPUTED = NotComputed()
