"""AdamW for half-precision weights, with fp32 master weights, in 10 to 12 bytes a parameter.

With a learning rate near 1e-6 a bfloat16 weight never moves: a step is less than half of the distance to the next
bfloat16, and rounding undoes it. So updates are made on fp32 "master" weights. Masters, moments and gradients in fp32
beside a bfloat16 weight take 18 bytes a parameter, and a 7B model no longer fits one GPU. What is kept here instead, in
bytes a parameter:

    2  the model's weight: the master rounded to the nearest bfloat16
    2  the low bits: what that rounding lost, as an integer. Weight and low bits together are the master, to the bit
    4  two moments in bfloat16, rounded stochastically. Rounded to the nearest, a second moment that loses a thousandth
       a step would never get smaller, because each step is less than half of the distance to the next bfloat16
    2  the gradient if an update has one backward pass; 4 if it has several, which bfloat16 would add up to an error of
       a per cent or two

A step takes one piece of one parameter at a time: it puts the fp32 master together, applies AdamW, and splits the
result again. The masters move exactly as fp32 weights with these moments move under `torch.optim.AdamW`, bit for bit:
the same kernel of torch computes both. Parameters that are fp32 themselves, such as the shards of several processes,
are stepped by `torch.optim.AdamW` alone.
"""

from __future__ import annotations

import zlib
from typing import Iterator

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

PIECE = 2**24  # elements in fp32 at a time: about 0.5 GB with gradient, moments and temporary tensors


# ---- number formats


def split_fp32(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → the nearest bfloat16 (of two equally near ones the larger) and int16 low bits, all of one shape.

    A bfloat16 is the upper half of an fp32's 32 bits. Adding half a unit before the lower half is cut off rounds to
    the nearest. The lower half, read as a signed number, is then the difference from the rounded value.
    """
    bits = master.view(torch.int32)
    upper_half = (bits + 2**15) >> 16
    bf16 = upper_half.to(torch.int16).view(torch.bfloat16)
    low_bits = bits.to(torch.int16)
    return bf16, low_bits


def join_fp32(bf16: Tensor, low_bits: Tensor) -> Tensor:
    """The fp32 that `split_fp32` took apart, bit for bit."""
    upper_half = bf16.view(torch.int16).int() << 16
    return (upper_half + low_bits).view(torch.float32)


def stochastic_round(value: Tensor, seed: int) -> Tensor:
    """fp32 → bfloat16, up or down with the probabilities that keep the mean. Equal seeds round equally."""
    generator = torch.Generator(value.device).manual_seed(seed)
    # A carry into the upper half rounds up. Its probability is the lower half's share of one unit.
    noise = torch.randint(
        2**16,
        value.shape,
        generator=generator,
        device=value.device,
        dtype=torch.int32,
    )
    upper_half = (value.view(torch.int32) + noise) >> 16
    return upper_half.to(torch.int16).view(torch.bfloat16)


# ---- the optimizer


class MasterWeights:
    """AdamW on a model's trained parameters: equation (8) of docs/algorithm.md, with weight decay λ,

        u ← β₁ u + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²
        θ ← θ − η λ θ − η (u / (1 − β₁^j)) / (√(v / (1 − β₂^j)) + eps)

    for the gradient g of the j-th step. bfloat16 parameters are stepped through fp32 masters. `fused` False is for a
    device that lacks torch's fused kernel. Raises ValueError for a sharded model that is not kept in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool = True,
    ):
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.fused = fused

        self.fp32_params: dict[str, Tensor] = {}
        self.bf16_params: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype == torch.float32:
                self.fp32_params[name] = parameter
            elif hasattr(parameter, "full_tensor"):
                raise ValueError("shards are to be kept in float32: there they are their own masters")
            else:
                self.bf16_params[name] = parameter

        self.fp32_adamw: torch.optim.AdamW | None = None
        if self.fp32_params:
            self.fp32_adamw = torch.optim.AdamW(
                list(self.fp32_params.values()),
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                fused=fused,
            )
        self.low_bits: dict[str, Tensor] = {}
        self.bf16_state: dict[str, dict[str, Tensor]] = {}  # of each parameter: what torch's AdamW keeps, in bfloat16
        for name, parameter in self.bf16_params.items():
            self.low_bits[name] = torch.zeros_like(parameter, dtype=torch.int16)
            self.bf16_state[name] = {}  # filled by the first step that has a gradient
        self.steps = torch.zeros((), dtype=torch.long)  # calls of `step`; seeds the rounding

    def expect(self, passes: int) -> None:
        """Say how many backward passes the next gradient is a sum of. Call it while there is no gradient."""
        for parameter in self.bf16_params.values():
            parameter.grad_dtype = torch.float32 if passes > 1 else parameter.dtype

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Step every parameter that has a gradient."""
        self.steps += 1
        if self.fp32_adamw is not None:
            for group in self.fp32_adamw.param_groups:
                group["lr"] = lr
            self.fp32_adamw.step()
        for name, parameter in self.bf16_params.items():
            if parameter.grad is not None:
                self._step_bf16(name, parameter, lr)

    def _step_bf16(self, name: str, parameter: Tensor, lr: float) -> None:
        """AdamW on the fp32 master of one bfloat16 parameter, piece by piece."""
        state = self.bf16_state[name]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)

        # Views of n = PIECE elements each, the last one shorter.
        gradients = parameter.grad.reshape(-1).split(PIECE)
        weights = parameter.detach().view(-1).split(PIECE)
        low_bits = self.low_bits[name].view(-1).split(PIECE)
        first_moments = state["exp_avg"].view(-1).split(PIECE)
        second_moments = state["exp_avg_sq"].view(-1).split(PIECE)

        for i, gradient in enumerate(gradients):
            master = join_fp32(weights[i], low_bits[i])  # (n,) fp32
            exp_avg = first_moments[i].float()  # (n,)
            exp_avg_sq = second_moments[i].float()  # (n,)
            self._adamw(master, gradient.float(), exp_avg, exp_avg_sq, state["step"].clone(), lr)
            new_weight, new_low_bits = split_fp32(master)
            weights[i].copy_(new_weight)
            low_bits[i].copy_(new_low_bits)
            first_moments[i].copy_(stochastic_round(exp_avg, self._seed(name, "exp_avg", i)))
            second_moments[i].copy_(stochastic_round(exp_avg_sq, self._seed(name, "exp_avg_sq", i)))
        state["step"] += 1

    def _adamw(
        self,
        weight: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        step: Tensor,
        lr: float,
    ) -> None:
        """Update `weight`, `exp_avg` and `exp_avg_sq`, all (n,) fp32, in place. `step` is j − 1, and becomes j."""
        adamw(
            [weight],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],  # AMSGrad's maxima: not used
            [step],
            fused=self.fused,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def _seed(self, name: str, moment: str, piece: int) -> int:
        """The seed depends only on what is rounded and on the step: a resumed run rounds as the uninterrupted one."""
        return zlib.crc32(f"{name}/{moment}/{piece}/{int(self.steps)}".encode())

    # ---- for checkpoints

    def states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, AdamW's state) of every trained parameter. The dictionaries themselves, not copies."""
        for name, parameter in self.fp32_params.items():
            yield name, self.fp32_adamw.state[parameter]
        yield from self.bf16_state.items()

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs beside the model's weights, by name. The tensors themselves, not copies."""
        tensors = {}
        for name, low_bits in self.low_bits.items():
            tensors[f"rest.{name}"] = low_bits
        if self.bf16_params:
            tensors["optimizer.steps"] = self.steps
        for name, state in self.states():
            for key, value in state.items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def make_state(self) -> None:
        """Make the state of every parameter, which a checkpoint is loaded into: by a step of rate 0, gradient 0."""
        parameters = [*self.fp32_params.values(), *self.bf16_params.values()]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.step(0.0)
        for parameter in parameters:
            parameter.grad = None
