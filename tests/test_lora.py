"""Adapters against PEFT, the reference against a frozen copy, and the forms of one equation against each other."""

from __future__ import annotations

import copy
import math

import pytest
import test_engine
import torch
from helpers import (
    conversation,
    each_family,
    hf_logits,
    hf_twin,
    largest_difference,
    of_family,
    packed_logits,
    random_image,
    refused,
    report,
    tiny_config,
    tiny_model,
    with_adapters,
)
from test_update import made, relative, trainer

from mmsr import lora
from mmsr.lora import adapted
from mmsr.update import split

TOWER = ("vision",)
BOTH = ("decoder", "vision")


def sequences():
    """Text alone, and pictures in two turns."""
    return [conversation(0, 7), conversation(2, 3, random_image(4, 4, 2), 6, random_image(10, 14, 1), 4)]


# ---- against PEFT


def theirs(name: str) -> str:
    """PEFT's name of one of our layers or weights."""
    return "base_model.model." + (
        f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
    )


def peft_twin(model):
    """PEFT's model around transformers' one, with copies of the same weights and adapters."""
    peft = pytest.importorskip("peft")
    layers = adapted(model)
    name_of = {name: theirs(name).removeprefix("base_model.model.") for name in layers}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(name_of.values()),
        rank_pattern={name_of[name]: len(layer.lora_A) for name, layer in layers.items()},
        alpha_pattern={name_of[name]: layer.scale * len(layer.lora_A) for name, layer in layers.items()},
    )
    twin = peft.get_peft_model(hf_twin(model), config)
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for name, layer in layers.items():
            weights[f"{theirs(name)}.lora_A.default.weight"].copy_(layer.lora_A)
            weights[f"{theirs(name)}.lora_B.default.weight"].copy_(layer.lora_B)
    return twin


@each_family
@pytest.mark.parametrize("targets", [(), BOTH, ("q_proj", "down_proj", "vision.qkv")], ids=str)
def test_outputs_or_gradients_of_adapters_are_not_pefts(targets, record_property):
    ranks, alphas = {"q_proj": 2, "qkv": 5}, {"q_proj": 3.0, "down_proj": 20.0}
    model = with_adapters(tiny_model(1), targets, ranks=ranks, alphas=alphas)
    twin = peft_twin(model)
    ours = packed_logits(model, sequences())
    others = torch.cat([hf_logits(twin, *sequence) for sequence in sequences()])
    apart = ((ours - others).norm() / others.norm()).item()
    report(record_property, f"logits with adapters against PEFT, relative, {targets}", apart)
    ours.logsumexp(-1).mean().backward()
    others.logsumexp(-1).mean().backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == len(trained) == 2 * len(adapted(model)) > 0
    whole = sum(gradient.norm() ** 2 for gradient in gradients.values()) ** 0.5
    gaps = {name: (gradient - gradients[f"{theirs(name)}.default.weight"]).norm() for name, gradient in trained.items()}
    gap = (sum(value**2 for value in gaps.values()) ** 0.5 / whole).item()
    report(record_property, f"gradient of adapters against PEFT, relative, {targets}", gap)
    assert apart < 2e-6 and gap < 2e-6, "fp32: 1e-6, and a little for another processor's order of sums"


def test_a_fresh_adapter_is_drawn_otherwise_than_pefts():
    """A uniform within ±1/√in of each layer, to its ends; B zero; equal for equal seeds, other for other layers."""
    peft = pytest.importorskip("peft")
    model = tiny_model(1)
    layers = lora.linear_layers(model)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "visual.merger.mlp.0"):
        layer = layers[name]
        a, b = lora.initial(layer, name, 64, 0)
        wrapped = peft.tuners.lora.Linear(copy.deepcopy(layer), "default", peft.LoraConfig(), r=64, lora_alpha=32)
        other = wrapped.lora_A["default"].weight
        bound = 1 / math.sqrt(layer.in_features)
        assert a.shape == other.shape and b.shape == wrapped.lora_B["default"].weight.shape
        assert not b.any() and not wrapped.lora_B["default"].weight.any()
        for drawn in (a, other):
            assert 0.99 * bound < drawn.max() <= bound and -bound <= drawn.min() < -0.99 * bound
            assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert torch.equal(a, lora.initial(layer, name, 64, 0)[0])
        assert not torch.equal(a, lora.initial(layer, name, 64, 1)[0])
    first, second = (lora.initial(layers[f"model.layers.{i}.mlp.up_proj"], f"{i}", 4, 0)[0] for i in range(2))
    assert not torch.equal(first, second)


# ---- the reference


def one_step(model, reference, **options) -> tuple[dict, dict]:
    """Gradients of adapters, and metrics, of two updates against a reference."""
    subject = trainer(model, reference=reference, kl=0.5, max_grad_norm=1e9, micro_tokens=60, **options)
    kept: dict = {}
    move = subject.optimizer.step

    def step(lr):
        kept.update({f"{len(kept)} {name}": p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        move(lr)

    subject.optimizer.step = step
    metrics = subject.step(split(made(4), 2, 4), 0.01)
    return kept, metrics


@each_family
@pytest.mark.parametrize("targets", [(), BOTH], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_that_are_off_give_another_reference_than_a_frozen_copy(targets, dtype):
    """To the bit: losses, KL and gradients, in the second update too."""
    model, twin = (with_adapters(tiny_model(1).to(dtype), targets) for _ in range(2))
    gradient, metrics = one_step(model, model)
    other, others = one_step(twin, tiny_model(1).to(dtype).requires_grad_(False))
    assert metrics == others and metrics["kl"] > 1e-3
    assert gradient.keys() == other.keys() and len(gradient) == 4 * len(adapted(model))
    assert all(torch.equal(gradient[name], other[name]) for name in other)


@pytest.mark.parametrize("targets", [(), BOTH], ids=str)
def test_a_trained_adapter_is_held_to_the_model_without_it(targets):
    """With --adapter the reference is the policy at the start, and stays it while the adapters move."""
    model, twin, start = (with_adapters(tiny_model(1), targets) for _ in range(3))
    lora.keep_as_reference(model)
    lora.keep_as_reference(start)  # which nothing moves: its adapters, and those of its reference, are one
    with lora.as_reference(start):
        off = packed_logits(start, sequences())
    assert torch.equal(off, packed_logits(start, sequences()))
    for moved in (model, twin):
        with torch.no_grad():
            for layer in adapted(moved).values():
                layer.lora_B.add_(0.02)
                layer.lora_A.mul_(1.1)
    gradient, metrics = one_step(model, model)
    other, others = one_step(twin, start.requires_grad_(False))
    assert metrics == others and metrics["kl"] > 1e-3
    assert all(torch.equal(gradient[name], other[name]) for name in other)


def test_a_reference_pass_that_fails_leaves_the_adapters_off():
    model = with_adapters(tiny_model(1))
    before = packed_logits(model, sequences())
    with pytest.raises(ZeroDivisionError), lora.as_reference(model):
        assert not torch.equal(packed_logits(model, sequences()), before)
        raise ZeroDivisionError
    assert torch.equal(packed_logits(model, sequences()), before)


def test_running_out_of_memory_in_the_reference_pass_trains_without_adapters():
    """The update is repeated with smaller micro-batches, and its gradient is the same."""
    model, twin = (with_adapters(tiny_model(1)) for _ in range(2))
    wanted, _ = one_step(twin, twin)
    calls = []

    def fail(layer, given) -> None:
        calls.append(layer.as_reference)
        if calls.count(True) == 2:
            calls.append(True)
            raise torch.OutOfMemoryError("simulated")

    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(fail)
    found, _ = one_step(model, model)
    assert calls.count(True) > 3 and relative(found, wanted) < 1e-5


# ---- sampling


PLANS = {
    "one rank": dict(),
    "a rank for each": dict(
        ranks={"q_proj": 2, "k_proj": 3, "v_proj": 5, "gate_proj": 1},
        alphas={"q_proj": 4.0, "k_proj": 6.0, "v_proj": 10.0, "gate_proj": 2.0},
    ),
    "a scale for each": dict(ranks={"q_proj": 2}, alphas={"v_proj": 30.0, "up_proj": 1.0}),
}


@each_family
@pytest.mark.parametrize("plan", PLANS)
def test_adapters_are_sampled_otherwise_than_they_are_trained(plan, record_property):
    """Layers with biases and without, of the tower too, of unequal ranks and scales."""
    model = with_adapters(tiny_model(1), BOTH, **PLANS[plan])
    sampler = lora.for_sampling(model, model, torch.float32)
    assert sum(layer.stack is not None for layer in adapted(sampler).values()) == of_family(
        qwen2_5=2 * 2 + 3,  # two in a block, one in a block of the tower
        qwen3=2 * 3,
    )
    assert not any(layer.stack for layer in adapted(model).values())
    with torch.no_grad():
        plain, stacked = packed_logits(model, sequences()), packed_logits(sampler, sequences())
    difference = largest_difference(plain, stacked) / plain.abs().max().item()
    report(record_property, f"logits of stacked adapters against plain ones, relative, {plan}", difference)
    assert difference < 2e-6


def test_a_layer_without_an_adapter_is_stacked_with_those_that_have_one():
    model = with_adapters(tiny_model(1), ("q_proj", "v_proj", "up_proj"))
    sampler = lora.for_sampling(model, model, torch.float32)
    assert not any(layer.stack for layer in adapted(sampler).values())
    with torch.no_grad():
        assert torch.equal(packed_logits(model, sequences()), packed_logits(sampler, sequences()))


def sharp(seed: int, dtype: torch.dtype):
    """A model whose probabilities are far from equal, in which bfloat16 rounds the more."""
    model = tiny_model(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return with_adapters(model.to(dtype))


def gap(seed: int, dtype: torch.dtype) -> float:
    """Mean difference of log-probabilities between a rollout and a trainer's pass over it."""
    model = sharp(seed, dtype)
    batch = test_engine.groups(6, 4)
    test_engine.run(lora.for_sampling(model, model, dtype), batch, temperature=1.0)
    episodes = test_engine.episodes(batch)
    for episode in episodes:
        episode.advantage = 1.0
    return trainer(model).step([episodes], 0.0)["logp_gap"]


@each_family
def test_rollouts_are_sampled_by_another_model_than_the_trained_one(record_property):
    """In bf16 both round A, B and A x alike. Sampling with merged weights would be ten times further off."""
    blocks = tiny_config().num_hidden_layers  # each adds its roundings
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 5e-4 * blocks)):
        gaps = [gap(seed, dtype) for seed in (1, 2)]
        report(record_property, f"mean gap of log-probabilities with adapters, {dtype}", max(gaps))
        assert max(gaps) < limit


def test_a_stack_rounds_otherwise_in_half_precision():
    model = sharp(1, torch.bfloat16)
    sampler = lora.for_sampling(model, model, torch.bfloat16)
    with torch.no_grad():
        plain, stacked = (packed_logits(one, sequences()) for one in (model, sampler))
    assert (plain != stacked).float().mean() < 0.02


def test_the_model_for_sampling_is_a_copy_of_the_weights_or_keeps_old_adapters():
    model = with_adapters(tiny_model(1), BOTH)
    trained = {name: (p.data_ptr(), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    sampler = lora.for_sampling(model, model, torch.bfloat16)
    for name, parameter in sampler.named_parameters():
        assert not parameter.requires_grad
        assert parameter.data_ptr() == trained[name][0]
    stacks = [layer.stack or layer.alone for layer in adapted(sampler).values()]
    assert {stack.b.dtype for stack in stacks if stack} == {torch.bfloat16}
    assert sampler.training == model.training and type(sampler) is type(model)
    for name, parameter in model.named_parameters():
        place, requires_grad, values = trained[name]
        assert (parameter.data_ptr(), parameter.requires_grad) == (place, requires_grad)
        assert torch.equal(parameter, values) and parameter.dtype == torch.float32
    with torch.no_grad():
        before = packed_logits(lora.for_sampling(model, model, torch.float32), sequences())
        for layer in adapted(model).values():
            layer.lora_B.mul_(2)
        after = packed_logits(lora.for_sampling(model, model, torch.float32), sequences())
        plain = packed_logits(model, sequences())
    assert not torch.allclose(before, after, atol=1e-3) and torch.allclose(after, plain, atol=1e-4)


def test_a_model_without_adapters_is_made_again_for_sampling():
    model = tiny_model(1)
    assert lora.for_sampling(model, model, torch.float32) is model


# ---- merging


@each_family
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_are_not_the_adapters(dtype, limit, tied, record_property):
    changes = {"tie_word_embeddings": tied}
    model = with_adapters(tiny_model(1, **changes).to(dtype), BOTH, ranks={"qkv": 7}, alphas={"o_proj": 30.0})
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = lora.merge(model.state_dict(), model)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in kept.items()), "merged in place"
    plain = tiny_model(2, **changes).to(dtype)
    plain.load_state_dict(merged)  # the names of a model without adapters, all of them
    assert {weight.dtype for weight in merged.values()} == {dtype}
    moved = {name for name in merged if not torch.equal(merged[name], kept[name])}
    assert moved == {f"{name}.weight" for name in adapted(model)}
    with torch.no_grad():
        unmerged = packed_logits(model, sequences())
        difference = largest_difference(packed_logits(plain, sequences()), unmerged) / unmerged.abs().max().item()
    report(record_property, f"logits of merged weights, relative, {dtype}", difference)
    assert difference < limit


def test_a_merged_bf16_weight_is_rounded_twice():
    """The sum in fp32, then rounded once: against fp64."""
    model = with_adapters(tiny_model(1).bfloat16(), rank=8)
    merged = lora.merge(model.state_dict(), model)
    for name, layer in adapted(model).items():
        exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
        assert (merged[f"{name}.weight"] != exact.bfloat16()).float().mean() < 1e-3


# ---- names


LAYERS = ["model.layers.0.mlp.up_proj", "model.layers.10.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
          "visual.blocks.0.attn.qkv", "visual.blocks.0.mlp.up_proj", "visual.merger.mlp.0"]  # fmt: skip


@pytest.mark.parametrize("targets, found", [
    ((), {0, 1, 2}), (("decoder",), {0, 1, 2}), (("vision",), {3, 4, 5}), (("up_proj",), {0}),
    (("q_proj", "merger"), {1, 2, 5}), (("vision.up_proj",), {4}), (("model.layers.1",), {2}),
    (("visual.blocks.0.attn",), {3}),
])  # fmt: skip
def test_a_target_names_other_layers(targets, found):
    assert lora.targeted(LAYERS, targets) == [LAYERS[i] for i in sorted(found)]


def test_a_name_of_nothing_is_taken_for_a_layer_or_a_part():
    refused(lambda: lora.targeted(LAYERS, ["q_proj", "wq"]), "--lora-targets wq", "q_proj", "up_proj")
    refused(lambda: lora.targeted(LAYERS, ["lm_head"]), "--lora-targets lm_head")
    refused(lambda: lora.targeted(LAYERS, ["model.layers.2"]), "--lora-targets model.layers.2")
    refused(lambda: lora.frozen(["model.norm.weight"], ["vision"]), "--freeze vision", "no such weights")
    refused(lambda: lora.frozen(["visual.a", "visual.b"], ["vision"]), "nothing is left to train")
    names = ["model.layers.1.x", "model.layers.10.x", "visual.merger.y", "lm_head.weight"]
    assert lora.frozen(names, ["model.layers.1", "merger"]) == {names[0], names[2]}


def test_the_head_gets_an_adapter():
    assert "lm_head" not in lora.linear_layers(tiny_model(1))
