"""The optimizer's side of half-precision weights: fp32 master weights and moments at 10 to 12 bytes a parameter.

At rates near 1e-6 a bfloat16 weight never moves, so updates are made on fp32 masters. With fp32 masters, moments and
gradients beside it a weight costs 18 bytes, and a 7B model no longer fits one GPU. Kept here, in bytes a parameter:

    2  the model's weight: the master rounded to the nearest bfloat16
    2  what that rounding left, as an integer: the two together are the fp32 master, to the last bit
    4  two moments in bfloat16, rounded stochastically: to the nearest, a second moment that loses a thousandth a step
       would never get smaller, each step being less than half of the distance to the next bfloat16
    2  the gradient where an update has one backward pass; 4 where it has several, which bfloat16 would add up to an
       error of a per cent or two

A step takes one piece of one parameter at a time to fp32, lets an ordinary torch optimizer step it, and puts it away
again. Whatever that optimizer does to fp32 weights with these moments happens to the masters, bit for bit. Parameters
that are fp32 themselves, such as the shards of several processes, are stepped directly, and nothing else happens.
"""

from __future__ import annotations

import zlib
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

PIECE = 2**24  # elements in fp32 at a time: some 0.5 GB with gradient, moments and what is made on the way


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → the nearest bfloat16 (of two equally near the larger), and int16 with what is missing."""
    bits = master.view(torch.int32)
    return ((bits + 2**15) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """The fp32 that `split` took apart, exactly."""
    return ((weight.view(torch.int16).int() << 16) + rest).view(torch.float32)


def dither(value: Tensor, seed: int) -> Tensor:
    """fp32 → bfloat16, up or down with the chances that keep its mean. Equal seeds round equally."""
    generator = torch.Generator(value.device).manual_seed(seed)
    noise = torch.randint(2**16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return ((value.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)


class MasterWeights:
    """Steps a model's trained parameters by `make(parameters)`, bfloat16 ones through fp32 masters.

    `make` gives a torch optimizer whose state is of the parameter's shape, element by element, or a number.
    """

    def __init__(self, model: nn.Module, make: Callable[[list[Tensor]], torch.optim.Optimizer]):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.whole = {name: p for name, p in trained.items() if p.dtype == torch.float32}
        self.halves = {name: p for name, p in trained.items() if name not in self.whole}
        if any(hasattr(p, "full_tensor") for p in self.halves.values()):
            raise ValueError("shards are to be kept in float32: there they are their own masters")
        self.rest = {name: torch.zeros_like(p, dtype=torch.int16) for name, p in self.halves.items()}
        self.moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.halves}
        self.steps = torch.zeros((), dtype=torch.long)
        self.nothing = torch.empty(0, device=next(model.parameters()).device)
        self.piece = nn.Parameter(self.nothing)  # stands for one piece of one master after another
        self.optimizer = make([*self.whole.values()] or [self.piece])
        self.stepper = make([self.piece])

    def expect(self, passes: int) -> None:
        """Say how many backward passes the next gradient is a sum of, while there is none yet."""
        for parameter in self.halves.values():
            parameter.grad_dtype = torch.float32 if passes > 1 else parameter.dtype

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for optimizer in (self.optimizer, self.stepper):
            for group in optimizer.param_groups:
                group["lr"] = lr
        if self.whole:
            self.optimizer.step()
        self.steps += 1
        for name, parameter in self.halves.items():
            if parameter.grad is not None:
                self._step(name, parameter)

    def _step(self, name: str, parameter: Tensor) -> None:
        moments = self.moments[name]
        before = dict(moments)
        gradient = parameter.grad.reshape(-1).split(PIECE)
        weight, rest = (x.detach().view(-1).split(PIECE) for x in (parameter, self.rest[name]))
        for i, part in enumerate(gradient):
            self.piece.data, self.piece.grad = join(weight[i], rest[i]), part.float()
            self.stepper.state[self.piece] = {
                key: value.clone() if value.ndim == 0 else value.view(-1).split(PIECE)[i].float()
                for key, value in before.items()
            }
            self.stepper.step()
            for old, new in zip((weight[i], rest[i]), split(self.piece.data)):
                old.copy_(new)
            for key, value in self.stepper.state.pop(self.piece).items():
                if value.ndim == 0:
                    moments[key] = value
                    continue
                if key not in moments:
                    moments[key] = torch.empty_like(parameter, requires_grad=False)
                seed = zlib.crc32(f"{name}/{key}/{i}/{int(self.steps)}".encode())
                moments[key].view(-1).split(PIECE)[i].copy_(dither(value, seed))
        self.piece.data, self.piece.grad = self.nothing, None

    # ---- for checkpoints

    def states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, what the optimizer keeps of it) of every trained parameter; the dictionaries themselves."""
        yield from ((name, self.optimizer.state[p]) for name, p in self.whole.items())
        yield from self.moments.items()

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs beside the model's weights: the tensors themselves, by name."""
        tensors = {f"rest.{name}": rest for name, rest in self.rest.items()}
        if self.halves:
            tensors["optimizer.steps"] = self.steps
        for name, state in self.states():
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"optimizer state {key!r} of {name} is no tensor: a checkpoint would lose it")
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def make_state(self) -> None:
        """Let a fresh optimizer make its state as it likes it, by a step of rate 0 on zero gradients."""
        parameters = [*self.whole.values(), *self.halves.values()]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.step(0.0)  # the rate is set anew in every step of training
        for parameter in parameters:
            parameter.grad = None
