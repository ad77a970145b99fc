"""What must hold on every device, in the precision large models run in. CUDA skips itself by name where there is none.

`pytest -m gpu` runs the CUDA half of this file and the kernels of test_attention.py.
"""

import copy

import pytest
import torch
from helpers import conversation, each_family, hf_logits, hf_twin, packed_logits, random_image, report, tiny_model
from test_engine import STOP, SUPPRESSED, episodes, groups, recomputed, run, texts
from test_update import made

from mmsr.engine import Engine
from mmsr.lora import add_adapter, for_sampling, linear_layers, targeted
from mmsr.system.graphs import WARM_UPS, Graphs
from mmsr.update import MasterWeights, Trainer, split

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@each_family
@torch.no_grad()
def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(device, record_property):
    sequence = conversation(5, 20, random_image(8, 6, 1), 30)
    model = tiny_model(2)
    exact = packed_logits(model, [sequence])
    ours = packed_logits(copy.deepcopy(model).to(device, torch.bfloat16), [sequence]).float().cpu()
    theirs = hf_logits(hf_twin(model).to(device, torch.bfloat16), *sequence).float().cpu()
    error, peer = ((x - exact).pow(2).mean().sqrt().item() for x in (ours, theirs))
    report(record_property, f"bf16 logits on {device}, ours, root mean square", error)
    report(record_property, f"bf16 logits on {device}, transformers', root mean square", peer)
    assert error < 1.25 * peer


@each_family
@torch.no_grad()
def test_bf16_gap_between_sampler_and_trainer_is_larger_than_transformers_own(device, record_property):
    """Ours: while sampling against the trainer. Theirs: with a cache, token by token, against without."""
    model = tiny_model(4)
    model.lm_head.weight.mul_(4)
    half = copy.deepcopy(model).to(device, torch.bfloat16)
    batch = groups(4, 4)
    run(half, batch, turns=1, turn_tokens=20)
    ours, sampled = recomputed(half, episodes(batch))
    gap = (ours - sampled).abs().mean().item()
    twin = hf_twin(model).to(device, torch.bfloat16)
    gaps = [_cached_gap(twin, group, sequence) for group in batch for sequence in group.sequences]
    peer = torch.cat(gaps).mean().item()
    report(record_property, f"bf16 gap on {device}, ours, mean", gap)
    report(record_property, f"bf16 gap on {device}, transformers', mean", peer)
    assert gap < (0.1 if device == "cpu" else 1.6) * peer  # goal on CUDA: no larger, which is to be measured there


@torch.no_grad()
def test_bf16_gap_between_sampler_and_trainer_is_larger_with_adapters(device, record_property):
    """The sampler stacks the adapters and the trainer does not; both take the same roundings."""

    def mean_gap(rank):
        model = tiny_model(4).to(device, torch.bfloat16)
        model.lm_head.weight.mul_(4)
        layers = linear_layers(model)
        for name in targeted(layers, []) if rank else []:
            generator = torch.Generator().manual_seed(len(name))
            a = torch.randn(rank, layers[name].in_features, generator=generator) / 8
            b = torch.randn(layers[name].out_features, rank, generator=generator) / 20
            add_adapter(layers[name], a.to(device), b.to(device), 0.7)
        batch = groups(4, 4)
        run(for_sampling(model, model, torch.bfloat16), batch, turns=1, turn_tokens=20)
        ours, sampled = recomputed(model, episodes(batch))
        return (ours - sampled).abs().mean().item()

    without, with_adapters = mean_gap(0), mean_gap(8)
    report(record_property, f"bf16 gap on {device}, without adapters, mean", without)
    report(record_property, f"bf16 gap on {device}, with adapters, mean", with_adapters)
    assert with_adapters < 1.2 * without + 1e-4  # goal on CUDA: no larger, which is to be measured there


def _cached_gap(twin, group, sequence) -> torch.Tensor:
    """|log p with a cache − log p without| of a sequence's tokens, by transformers."""
    from helpers import positions

    prompt, n = torch.tensor(group.ids), len(group.ids)
    whole = torch.tensor(group.ids + sequence.ids)
    full = hf_logits(twin, whole, group.images).float()
    where = positions(whole, group.images)[:, None].to(twin.device)
    images = [image for _, image in group.images]
    out = twin(
        input_ids=prompt[None].to(twin.device), position_ids=where[:, :, :n], use_cache=True,
        pixel_values=torch.cat([image.patches for image in images]).to(twin.device),
        image_grid_thw=torch.tensor([(1, *image.grid) for image in images]).to(twin.device),
    )  # fmt: skip
    steps = [out.logits[0, -1]]
    for t in range(n, len(whole) - 1):
        token = whole[t][None, None].to(twin.device)
        out = twin(input_ids=token, position_ids=where[:, :, t : t + 1], past_key_values=out.past_key_values)
        steps.append(out.logits[0, -1])
    suppressed = SUPPRESSED.to(twin.device)
    cached, uncached = (
        x.float().masked_fill(suppressed, -1e9).log_softmax(-1) for x in (torch.stack(steps), full[n - 1 : -1])
    )
    tokens = torch.tensor(sequence.ids, device=twin.device)[:, None]
    return (cached.gather(1, tokens) - uncached.gather(1, tokens)).abs()[:, 0]


@pytest.mark.parametrize("loss", ["gspo", "cispo"])
def test_an_update_by_another_loss_is_skipped_or_another_on_a_device(device, loss, record_property):
    """Two updates, of which the second has ratios other than 1, against the same on the CPU."""
    bounds = {"gspo": 0.01, "cispo": 0.1}
    metrics = []
    for place in ("cpu", device):
        model = tiny_model(4).to(place)
        options = dict(loss=loss, clip_low=bounds[loss], clip_high=bounds[loss], importance_bound=1e40)
        trainer = Trainer(model, MasterWeights(model), SUPPRESSED.to(place), micro_tokens=60, **options)
        metrics.append(trainer.step(split(made(4), 2, 4), 1e-3))
        assert metrics[-1]["skipped_updates"] == 0 and metrics[-1]["clip_fraction"] > 0
    difference = abs(metrics[1]["grad_norm"] / metrics[0]["grad_norm"] - 1)
    report(record_property, f"{loss} on {device}, norm of the gradient, relative", difference)
    assert difference < 1e-3


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.5)])
def test_whole_step_runs_and_its_gap_is_that_of_its_precision(device, dtype, most, record_property):
    model = tiny_model(4).to(device, dtype)
    batch = groups(3, 4)
    run(model, batch)
    ours, sampled = recomputed(model, episodes(batch))
    gap = (ours - sampled).abs().max().item()
    report(record_property, f"{dtype} gap on {device}, largest", gap)
    assert gap < most * (10 if device == "cuda" else 1)
    optimizer = MasterWeights(model)
    metrics = Trainer(model, optimizer, SUPPRESSED.to(device), micro_tokens=60).step([made()], 1e-3)
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0


def test_tokens_are_the_same_on_every_device_when_greedy(device):
    """fp32 ties aside, which these weights have none of."""
    here, there = groups(3, 2), groups(3, 2)
    model = tiny_model(4)
    run(model, here, temperature=0)
    run(copy.deepcopy(model).to(device), there, temperature=0)
    assert texts(here) == texts(there)


def test_slots_that_are_divided_again_change_tokens_on_a_device(device):
    """With captured graphs of both divisions, where there are graphs."""
    model, whole, short = tiny_model(4).to(device), groups(3, 2), groups(3, 2)
    options = dict(turn_tokens=30, max_tokens=400, temperature=0)
    run(model, whole, **options)
    assert run(model, short, slot_tokens=40, **options).counts["parked"]
    assert texts(whole) == texts(short)


@each_family
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_graph_draws_other_tokens(dtype, monkeypatch):
    """On the real thing; tests/test_graphs.py plays it on the CPU. The measure: the same sizes, launched one by one."""
    model, captured, plain = tiny_model(4).to("cuda", dtype), groups(3, 4), groups(3, 4)
    engine = run(model, captured, turn_tokens=40, max_tokens=400)
    assert engine.graphs.on, "a capture failed"
    assert engine.graphs.replayed > engine.counts["decode_steps"] / 2
    monkeypatch.setattr(Graphs, "_try", lambda graphs, shape, run: None)
    engine = run(model, plain, turn_tokens=40, max_tokens=400)
    assert not engine.graphs.replayed and texts(captured) == texts(plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_capture_that_fails_spoils_the_process():
    """A pass that waits for the device cannot be captured; afterwards the process is as before."""
    graphs, total = Graphs(True), torch.zeros((), device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="not captured"):
        for _ in range(WARM_UPS + 1):
            graphs("shape", lambda: total.add_(1).item())
    assert torch.cuda.current_stream() == stream and total.item() == WARM_UPS + 1
    torch.cuda.empty_cache()
    again = Graphs(True)
    for _ in range(WARM_UPS + 2):
        again("shape", lambda: total.add_(1))
    assert again.captured and total.item() == 2 * WARM_UPS + 3


def test_engine_lives_where_its_model_does(device):
    engine = Engine(tiny_model(4).to(device), STOP, SUPPRESSED.to(device), slots=4, max_tokens=60, turn_tokens=2)
    assert engine.submit(groups(1, 2)) == []
    engine.step()
    assert engine.cache.suffix[0][0].device.type == engine.state.token.device.type == device
