"""Elementwise functions as one kernel each on CUDA, where every operation would otherwise be a kernel of its own.

Such kernels only move memory, so five of them on the same tensor take five times as long as one that does it all. A
decorated function is its own plain form: PyTorch that runs as it is written. On CUDA torch.compile makes one kernel of
it and one of its gradient, and the backward pass keeps only the function's arguments.

Whole blocks are not compiled: the segments of attention change with every batch, and each change would compile again.
"""

from __future__ import annotations

import warnings
from functools import lru_cache, wraps
from typing import Any, Callable, TypeVar

import torch
from torch import Tensor

from mmsr.system.errors import first_line

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """Decorator for a function of tensors; it runs where the first of them is. It must not read values on the host.

    On CUDA its intermediate results are fp32 and rounded once at the end, also where its arguments are bfloat16.
    """
    compiled: list[Callable] = []  # filled by the first call on CUDA: the compiler takes seconds to import

    @wraps(function)
    def run(*tensors: Tensor) -> Any:
        if not tensors[0].is_cuda or not compiles():
            return function(*tensors)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=True))  # for any number of tokens
        return compiled[0](*tensors)

    return run  # type: ignore[return-value]


@lru_cache
def compiles() -> bool:
    """Whether torch.compile works here, tried once. It needs Triton and a C compiler; without it, all is slower."""
    try:
        with torch.enable_grad():  # the first call may be a sampler's
            x = torch.ones(8, device="cuda", requires_grad=True)
            torch.compile(torch.sin)(x).sum().backward()
    except Exception as error:  # of the compiler, a missing program, or the device
        why = f"elementwise operations are not fused ({first_line(error)}); they run one by one, which takes longer"
        warnings.warn(why, RuntimeWarning, stacklevel=2)
        return False
    return True
