"""One implementation on one problem's inputs, ready to run again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cases import Inputs

from .implementations import Implementation
from .problem import Problem, options


class Call:
    """call() runs the problem's pass once and returns o, or the gradients of q, k, v and problem.extra_gradients.

    A backward call runs the forward here, once, and differentiates its graph each time.
    """

    def __init__(self, implementation: Implementation, problem: Problem, inputs: Inputs) -> None:
        self.implementation = implementation
        self.context = implementation.context
        self.d_o = inputs.d_o
        self.on_cuda = inputs.d_o.is_cuda
        self._attention = implementation.varlen if problem.case.packed else implementation.attention
        # What is not differentiated does not ask for it. A forward with extra gradients is one of training: it does,
        # because what it asks for decides which kernels can serve it.
        qkv = inputs.args[:3]
        is_training = problem.needs_grad or problem.extra_gradients
        self._qkv = qkv if is_training else tuple(x.detach() for x in qkv)
        given = {
            name: x.detach() if isinstance(x, Tensor) and name not in problem.extra_gradients else x
            for name, x in options(inputs).items()
        }
        self._options = implementation.prepare(*self._qkv, **given)
        # A captured backward of PyTorch's efficient kernel reads its forward's random state through a pointer: that of
        # the host, an illegal memory access, unless the forward was captured, too.
        draws = implementation.draws_own_bits and given.get("dropout_p", 0.0) > 0
        self.can_be_captured = not (draws and problem.direction == "bwd")
        self._leaves = (*self._qkv, *(given[name] for name in problem.extra_gradients))
        self._direction = problem.direction
        self._o = self._forward() if problem.direction == "bwd" else None

    def _forward(self) -> Tensor:
        with self.context():
            return self._attention(*self._qkv, **self._options)

    def __call__(self) -> tuple[Tensor, ...]:
        """To be called within self.context()."""
        if self._direction == "bwd":
            return torch.autograd.grad(self._o, self._leaves, self.d_o, retain_graph=True)
        o = self._attention(*self._qkv, **self._options)
        return torch.autograd.grad(o, self._leaves, self.d_o) if self._direction == "fwd+bwd" else (o,)
