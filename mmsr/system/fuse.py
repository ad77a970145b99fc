"""Elementwise functions as one kernel each on CUDA, where every operation would otherwise be a kernel of its own.

Such kernels only move memory, so five of them on the same tensor take five times as long as one that does it all. A
function that is decorated here is plain PyTorch. On CUDA torch.compile makes one kernel of it, and one of its gradient,
which also keeps the function's arguments alone for the backward pass. Anywhere else it runs as it is written.

Whole blocks are not compiled: what attends changes with every batch, and a compiler would compile it again each time.
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
    """`function` of tensors, of which the first says where it runs. It may not look at values or wait for the device.

    On CUDA its intermediate results are fp32 and rounded once at the end, also where its arguments are bfloat16.
    """
    compiled: list[Callable] = []  # made when it is first needed: the compiler takes seconds to import

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
    """Whether torch.compile works here, tried once: it needs Triton and a C compiler. Without it all is only slower."""
    try:
        with torch.enable_grad():  # the first call may be a sampler's
            x = torch.ones(8, device="cuda", requires_grad=True)
            torch.compile(torch.sin)(x).sum().backward()
    except Exception as error:  # of the compiler, a missing program, or the device
        why = f"elementwise operations are not fused ({first_line(error)}); they run one by one, which takes longer"
        warnings.warn(why, RuntimeWarning, stacklevel=2)
        return False
    return True
