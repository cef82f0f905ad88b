"""One implementation on one problem's inputs, ready to run again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cases import Inputs

from .implementations import Implementation
from .problem import Problem, options


class Call:
    """call() runs the problem's pass once and returns o, or the gradients of q, k and v.

    A backward call runs the forward here, once, and differentiates its graph each time.
    """

    def __init__(self, implementation: Implementation, problem: Problem, inputs: Inputs) -> None:
        self.implementation = implementation
        self.context = implementation.context
        self.d_o = inputs.d_o
        self._options = options(inputs)
        # A forward that is not differentiated gets inputs that do not ask for it.
        self._qkv = inputs.args if problem.needs_grad else tuple(x.detach() for x in inputs.args)
        self._direction = problem.direction
        self._o = self._forward() if problem.direction == "bwd" else None

    def _forward(self) -> Tensor:
        with self.context():
            return self.implementation.attention(*self._qkv, **self._options)

    def __call__(self) -> tuple[Tensor, ...]:
        """To be called within self.context()."""
        if self._direction == "bwd":
            return torch.autograd.grad(self._o, self._qkv, self.d_o, retain_graph=True)
        o = self.implementation.attention(*self._qkv, **self._options)
        return torch.autograd.grad(o, self._qkv, self.d_o) if self._direction == "fwd+bwd" else (o,)
