"""Which questions a step asks: shuffled epochs that can resume at any point."""

from __future__ import annotations

import random
from functools import lru_cache

from mmsr.system.errors import UserError


class Sampler:
    """Endless shuffled epochs over `size` examples, as a pure function of (seed, cursor). `cursor`, the number of
    examples drawn so far, is the only state; set it to resume. Each epoch draws every example once, and one `take` may
    cross the end of an epoch. Raises `UserError` for an empty data set."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise UserError("the data set is empty; give one with at least one example")
        self.size, self.seed, self.cursor = size, seed, 0

    def take(self, n: int) -> list[int]:
        """The next n rows."""
        draws = range(self.cursor, self.cursor + n)
        self.cursor += n
        return [_epoch(self.size, self.seed, draw // self.size)[draw % self.size] for draw in draws]


@lru_cache(2)  # a `take` may need two epochs
def _epoch(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
