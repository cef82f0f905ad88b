"""What the public functions share about their arguments. Shapes and values are the C core's to check."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attention import ops  # noqa: F401  registers torch.ops.flash_attention


class KernelVerdict(NamedTuple):
    """What one kernel of this build would do with a request."""

    impl: str
    device: str
    verdict: str
    """"chosen", "slower", "not the impl asked for", or every reason for refusing."""


def verdicts(cells: list[str]) -> list[KernelVerdict]:
    """Of what an explain op returns."""
    return [KernelVerdict(*cells[i : i + 3]) for i in range(0, len(cells), 3)]


INTEGER = (int, torch.SymInt)
NUMBER = (int, float, torch.SymInt, torch.SymFloat)


def require_type(name: str, value: Any, types: tuple[type, ...], words: str) -> None:
    if not isinstance(value, types):
        raise TypeError(f"{name} is {type(value).__name__}: must be {words}")


def left_and_right(window_size: tuple[int, int]) -> tuple[int, int]:
    require_type("window_size", window_size, (tuple, list), "(left, right)")
    if len(window_size) != 2:
        raise ValueError(f"window_size {tuple(window_size)}: must be (left, right)")
    return tuple(window_size)


_TYPES = {
    "Tensor": ((Tensor,), "a tensor"),
    "int": (INTEGER, "an int"),
    "float": (NUMBER, "a number"),
    "str": ((str,), "a string"),
}  # a bool is whatever is true or false


class Checked:
    """Refuses, by name, what torch.ops would refuse in words of its own."""

    def __init__(self, op: Any) -> None:
        self._arguments = []  # place, name, types, the types in words, whether None will do
        for place, argument in enumerate(op.default._schema.arguments):
            kind = (text := str(argument.type)).removeprefix("Optional[").removesuffix("]")
            if kind in _TYPES:
                name, words = argument.name, _TYPES[kind]
                if name.startswith("window"):
                    name, words = "window_size", (INTEGER, "made of ints")
                self._arguments.append((place, name, *words, kind != text))

    def __call__(self, request: tuple[Any, ...]) -> tuple[Any, ...]:
        """The request. Raises TypeError, ValueError."""
        for place, name, types, words, may_be_none in self._arguments:
            value = request[place]
            if value is not None or not may_be_none:
                require_type(name, value, types, words)
            if types is INTEGER and not -(2**63) <= value < 2**63:
                raise ValueError(f"{name} {value}: must fit 64 bits")
        return request
