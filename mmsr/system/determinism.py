"""Equal bits from equal inputs on the CPU, however busy the machine is."""

from __future__ import annotations

import torch


def deterministic(on: bool) -> None:
    """From now on, torch adds in a fixed order on the CPU, or (`on` false) in whichever order is fastest.

    Several trained tokens may read one row of a tensor: all completions of a group, for instance, read the last hidden
    state of their prompt. In the backward pass their gradients add up in that row. With two threads torch adds each as
    soon as it is computed, and which comes first depends on what else the machine does. The last digit follows.
    """
    torch.use_deterministic_algorithms(on)
    # Filling fresh memory costs time, and nothing here reads it before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
