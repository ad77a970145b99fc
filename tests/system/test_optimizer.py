"""Half-precision weights learn as fp32 ones do, in the memory that they are promised to need."""

import copy

import pytest
import torch
from helpers import report, tiny_model
from test_update import SUPPRESSED, made

from mmsr.system import optimizer
from mmsr.system.optimizer import MasterWeights, join_fp32, split_fp32, stochastic_round
from mmsr.update import Trainer


def torch_adamw(parameters) -> torch.optim.Optimizer:
    """With the defaults of `MasterWeights`."""
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True)


def masters(subject: MasterWeights) -> dict[str, torch.Tensor]:
    return {name: join_fp32(p.detach(), subject.low_bits[name]) for name, p in subject.bf16_params.items()}


def test_master_is_taken_apart_and_put_together_without_loss():
    """Ties and both signs too: rounding ties to even, as a cast does, would make two masters the same 32 bits."""
    exponents = torch.randn(300_000, generator=torch.Generator().manual_seed(0)) * 20
    values = torch.cat([exponents.exp(), -exponents.exp(), torch.tensor([0.0, -0.0, 1e-42])])
    ties = (torch.arange(-40_000, 40_000, dtype=torch.int32) << 16) + 2**15
    values = torch.cat([values, ties.view(torch.float32)[ties.view(torch.float32).isfinite()]])
    weight, low_bits = split_fp32(values)
    assert torch.equal(join_fp32(weight, low_bits).view(torch.int32), values.view(torch.int32))
    cast, finite = values.bfloat16(), weight.isfinite() & values.bfloat16().isfinite()
    away, near = (weight.double() - values.double()).abs(), (cast.double() - values.double()).abs()
    assert torch.equal(away[finite], near[finite]), "the weight is a nearest bfloat16"


def test_masters_move_as_fp32_weights_do_bit_for_bit(monkeypatch):
    """Against AdamW on fp32 weights given the same gradients and, before each step, the same moments."""
    monkeypatch.setattr(optimizer, "PIECE", 1000)  # several pieces, the last one shorter
    model = tiny_model(1).bfloat16()
    subject = MasterWeights(model)
    plain = {name: torch.nn.Parameter(p.detach().float()) for name, p in subject.bf16_params.items()}
    theirs = torch_adamw(list(plain.values()))
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for name, p in subject.bf16_params.items():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            plain[name].grad = p.grad.float()
            for key, value in subject.bf16_state[name].items():
                theirs.state[plain[name]][key].copy_(value)
        subject.step(1e-6)
        theirs.param_groups[0]["lr"] = 1e-6
        theirs.step()
        for name, master in masters(subject).items():
            assert torch.equal(master, plain[name].detach()), f"{name}, step {step}"
            assert torch.equal(subject.bf16_params[name].detach(), split_fp32(master)[0])


def test_fp32_weights_are_stepped_as_by_torch_alone():
    ours, theirs = tiny_model(1), tiny_model(1)
    subject, plain = MasterWeights(ours), torch_adamw(theirs.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters()):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        subject.step(1e-3)
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert not subject.low_bits and not any(name.startswith("rest") for name in subject.tensors())


def test_moments_fall_when_gradients_stop(record_property):
    """A second moment rounded to the nearest bfloat16 stays where it is for ever at β₂ = 0.999."""
    model = torch.nn.Linear(64, 64).bfloat16()
    subject = MasterWeights(model)
    for step in range(1500):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
        subject.step(0.0)
    state = subject.bf16_state["weight"]
    left = (state["exp_avg_sq"].float() / (0.001 * 0.999**1499)).mean().item()
    report(record_property, "second moment after 1,500 steps, against fp32", left)
    assert 0.97 < left < 1.03
    assert state["exp_avg"].float().abs().max() < 1e-30
    stuck = torch.tensor(0.001).bfloat16()
    assert stuck * 0.999 == stuck, "to the nearest"


def test_stochastic_rounding_keeps_the_mean_and_equal_seeds_round_equally():
    value = torch.full((200_000,), 1.003)
    rounded = stochastic_round(value, 1)
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert abs(rounded.double().mean().item() - 1.003) < 5e-5
    assert torch.equal(rounded, stochastic_round(value, 1)) and not torch.equal(rounded, stochastic_round(value, 2))


def held(model, subject: MasterWeights) -> float:
    """Bytes per parameter in weights, gradients and all that the optimizer keeps, without its few counters."""
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *subject.tensors().values()]
    return sum(t.nbytes for t in tensors if t.ndim) / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype, micro_tokens, most", [
    (torch.bfloat16, 10**6, 10), (torch.bfloat16, 60, 12), (torch.float32, 60, 16),
])  # fmt: skip
def test_bytes_per_parameter_are_those_promised(dtype, micro_tokens, most, record_property):
    """Counted on the real tensors, gradients still there, after an update of one micro-batch and of several."""
    model = tiny_model(1).to(dtype)
    subject = MasterWeights(model)
    trainer = Trainer(model, subject, SUPPRESSED, micro_tokens=micro_tokens)
    counted = []
    plain_step = subject.step

    def step(lr: float) -> None:
        plain_step(lr)
        counted.append(held(model, subject))

    subject.step = step
    trainer.step([made()], 1e-3)
    report(record_property, f"bytes a parameter, {dtype}, micro-batches of {micro_tokens}", counted[0])
    assert counted == [most]


def test_gradients_of_micro_batches_are_added_up_in_fp32(monkeypatch, record_property):
    """Against the fp32 sum of each micro-batch's own gradient; added up in bfloat16 they are off by half a per cent."""

    def gradient() -> dict[str, torch.Tensor]:
        model = tiny_model(1).bfloat16()
        subject = Trainer(model, MasterWeights(model), SUPPRESSED, micro_tokens=1, max_grad_norm=1e9)
        kept = {}
        subject.optimizer.step = lambda lr: kept.update({n: p.grad.float() for n, p in model.named_parameters()})
        subject.step([made(6, 4)], 0.0)
        return kept

    ours = gradient()
    total = {}
    run = Trainer.forward_backward

    def alone(self, *args):
        run(self, *args)
        for name, p in self.model.model.named_parameters(prefix="model"):
            total[name] = total.get(name, 0) + p.grad.float()
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)

    monkeypatch.setattr(Trainer, "forward_backward", alone)
    gradient()
    assert len(total) > 20 and all(torch.equal(ours[name], total[name]) for name in total)
    monkeypatch.setattr(Trainer, "forward_backward", run)
    monkeypatch.setattr(MasterWeights, "expect", lambda self, passes: None)
    name = "model.layers.0.mlp.up_proj.weight"
    lost = ((gradient()[name] - total[name]).norm() / total[name].norm()).item()
    report(record_property, "gradient added up in bf16 instead, relative error", lost)
    assert lost > 2e-3


def test_resumed_masters_continue_bit_for_bit():
    """The low halves and the count that seeds the rounding are state like any other."""
    model = tiny_model(1).bfloat16()
    subject = MasterWeights(model)

    def walk(model, subject, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            subject.step(1e-5)

    walk(model, subject, range(3))
    other = copy.deepcopy(model)
    resumed = MasterWeights(other)
    resumed.make_state()
    for name, tensor in resumed.tensors().items():
        tensor.copy_(subject.tensors()[name])
    walk(model, subject, range(3, 6))
    walk(other, resumed, range(3, 6))
    ours, theirs = subject.tensors(), resumed.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
