"""Packs and updates: one gradient, however the batch is cut and whether or not prompts are shared."""

import copy
import math

import pytest
import torch
from helpers import IMAGE, SGD, conversation, each_family, random_image, report, tiny_model, with_adapters

from mmsr import lora
from mmsr.episode import Episode, Example
from mmsr.model import Qwen2_5_VL
from mmsr.pack import input_length, pack, split_into_micro_batches, unique_tokens
from mmsr.system.parallel import SINGLE
from mmsr.update import ImageFeatures, LocalBatch, MasterWeights, Stats, Trainer, split

SUPPRESSED = torch.zeros(300, dtype=torch.bool)
SUPPRESSED[IMAGE:] = True
EXAMPLE = Example("e", b"", "", ())


def made(groups: int = 3, members: int = 4) -> list[Episode]:
    """Groups with a picture in the prompt; members of unequal length, some with a forced middle and a thumbnail."""
    episodes = []
    for g in range(groups):
        ids, images = conversation(g, 3, random_image(4, 6, g), 4 + g)
        for m in range(members):
            turn, _ = conversation(50 + 7 * g + m, 2 + (3 * m + g) % 5)
            all_ids, mask, pictures = ids.tolist() + turn.tolist(), [0] * len(ids) + [1] * len(turn), list(images)
            if m % 2:
                back, thumbs = conversation(g + m, 4, random_image(4, 4, g), 3)
                pictures += [(len(all_ids) + at, image) for at, image in thumbs]
                last, _ = conversation(90 + m, 3)
                all_ids += back.tolist() + last.tolist()
                mask += [0] * len(back) + [1] * len(last)
            logps = [-5.0 * x for x in mask]
            advantage = float((-1) ** m * (1 + g))
            episodes.append(Episode(EXAMPLE, g, m, all_ids, mask, logps, pictures, len(ids), advantage=advantage))
    return episodes


def trainer(model, **options) -> Trainer:
    return Trainer(model, SGD(model), SUPPRESSED, **options)


def gradient(episodes: list[Episode], **options) -> dict[str, torch.Tensor]:
    """The gradient of one update, all parameters, before clipping."""
    model = tiny_model(1)
    subject = trainer(model, **({"max_grad_norm": 1e9} | options))
    kept = {}
    subject.optimizer.step = lambda lr: kept.update({n: p.grad.clone() for n, p in model.named_parameters()})
    subject.step([episodes], 0.1)
    return kept


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference over all parameters, relative to the largest gradient."""
    assert a.keys() == b.keys() and a
    scale = max(g.abs().max() for g in a.values())
    return max(((a[n] - b[n]).abs().max() / scale).item() for n in a)


def off_policy_gradient(episodes: list[Episode], **options) -> tuple[dict[str, torch.Tensor], Stats]:
    """The gradient where π_old is another policy than π, so that ratios are not 1 and some are clipped."""
    model = tiny_model(1)
    subject = trainer(model, **options)
    batch = LocalBatch.of(episodes, SINGLE)
    present = subject.old_logps(batch, Stats())
    generator = torch.Generator().manual_seed(3)
    old = [logps + 0.3 * torch.randn(logps.shape, generator=generator) for logps in present]
    stats = subject.accumulate_gradient(batch, old)
    return {name: p.grad for name, p in model.named_parameters()}, stats


LOSSES = {  # by name, with bounds that clip some tokens
    "sequence": dict(loss_norm="sequence"),
    "token": dict(loss_norm="token"),
    "dr_grpo": dict(loss="dr_grpo", loss_norm="constant", token_limit=50),
    "gspo": dict(loss="gspo", clip_low=0.05, clip_high=0.05),
    "cispo": dict(loss="cispo", loss_norm="token", clip_low=1.0, clip_high=0.1),
    "weighted": dict(importance_cap=1.2, importance_bound=math.exp(8)),  # some rollouts are within it
}


@pytest.mark.parametrize(
    "each_family, loss",
    [("qwen3", "sequence"), *(("qwen2_5", loss) for loss in LOSSES)],
    indirect=["each_family"],
)
def test_gradient_does_not_depend_on_the_micro_batch_cut(each_family, loss, record_property):
    episodes = made()
    options = dict(**LOSSES[loss], reference=tiny_model(2), kl=0.3)
    whole, stats = off_policy_gradient(episodes, **options)
    assert 0.05 < stats.sums["clip_fraction"] / stats.sums["tokens"] < 0.95
    for budget in (1, 60, 97):
        assert len(split_into_micro_batches(episodes, budget)) > 1
        difference = relative(off_policy_gradient(episodes, micro_tokens=budget, **options)[0], whole)
        report(record_property, f"gradient cut at {budget} tokens, {loss}", difference)
        assert difference < 1e-5


def test_a_rollout_on_which_sampler_and_trainer_disagree_is_trained():
    """What it sampled with other probabilities is as if it were not there, except in the denominators."""
    episodes = made()
    exact = trainer(tiny_model(1)).old_logps(LocalBatch.of(episodes, SINGLE), Stats())
    for episode, logps in zip(episodes, exact):
        episode.logps = [0.0] * len(episode.input_ids)
        trained = [t for t, mask in enumerate(episode.loss_mask) if mask]
        for t, logp in zip(trained, logps.tolist()):
            episode.logps[t] = logp
    first = episodes[0]
    first.logps = [logp - 0.5 * mask for logp, mask in zip(first.logps, first.loss_mask)]
    silent = [copy.copy(episode) for episode in episodes]
    silent[0].advantage = 0.0
    bound = dict(importance_bound=math.exp(0.4))
    masked = gradient(episodes, **bound)
    assert relative(masked, gradient(silent)) < 1e-5 < relative(masked, gradient(episodes))
    metrics = trainer(tiny_model(1), **bound).step([episodes], 0.1)
    tokens = sum(sum(episode.loss_mask) for episode in episodes)
    assert metrics["masked_fraction"] == pytest.approx(sum(first.loss_mask) / tokens)


@each_family
def test_gradient_with_shared_prompts_equals_the_one_without(record_property):
    shared = made()
    apart = [copy.copy(episode) for episode in shared]
    for i, episode in enumerate(apart):
        episode.group_id = i
    assert unique_tokens(apart) > 1.3 * unique_tokens(shared)
    difference = relative(gradient(apart), gradient(shared))
    report(record_property, "gradient with shared prompts against unshared", difference)
    assert difference < 1e-5


@each_family
def test_gradient_of_sft_is_the_likelihood_gradient():
    """Against plain autograd on −mean log p, one episode at a time, computed without packs."""
    from mmsr.attention import Packed
    from mmsr.model import logits, mrope_positions

    episodes = made(2, 3)
    model = tiny_model(1)
    total = 0
    for e in episodes:
        where, _ = mrope_positions(len(e.input_ids), [(at, image.grid) for at, image in e.images])
        index = torch.cat([torch.arange(at, at + image.tokens) for at, image in e.images])
        features = model.encode_images([image for _, image in e.images])
        ids = torch.tensor(e.input_ids)
        scores = model(ids, where, Packed([len(ids)], "cpu"), features, index, head_fn=logits).masked_fill(
            SUPPRESSED, -1e30
        )
        picked = scores.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        total = total - (picked * torch.tensor(e.loss_mask[1:])).sum()
    (total / sum(sum(e.loss_mask) for e in episodes)).backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    assert relative(gradient(episodes, sft=True, loss_norm="token"), plain) < 1e-5


@each_family
def test_images_of_an_update_go_through_the_tower_once():
    episodes = made()
    model = tiny_model(1)
    seen = []
    encode = model.encode_images
    model.encode_images = lambda images: seen.extend(i.key for i in images) or encode(images)
    metrics = trainer(model, micro_tokens=50).step([episodes], 0.1)
    assert len(seen) == len(set(seen)) == len({i.key for e in episodes for _, i in e.images}) == metrics["encoded"]


@each_family
def test_trained_tokens_are_unique_tokens_when_nothing_is_cut():
    episodes = made()
    metrics = trainer(tiny_model(1)).step([episodes], 0.1)
    assert metrics["trained"] == metrics["trained_unique"] == unique_tokens(episodes)
    cut_up = trainer(tiny_model(1), micro_tokens=40).step([episodes], 0.1)
    assert cut_up["trained"] > cut_up["trained_unique"] == metrics["trained_unique"]


def test_a_first_update_makes_a_second_pass_for_old_log_probabilities(monkeypatch):
    """One forward pass per micro-batch: for the first update π_old is π. For the second each token has one more."""
    episodes = made(4)
    passes = []
    forward = Qwen2_5_VL.forward
    monkeypatch.setattr(
        Qwen2_5_VL, "forward", lambda self, ids, *a, **k: passes.append(len(ids)) or forward(self, ids, *a, **k)
    )
    metrics = trainer(tiny_model(1), micro_tokens=60).step([episodes], 0.1)
    assert len(passes) > 1 and sum(passes) == metrics["trained"]
    passes.clear()
    first, second = split(episodes, 2, 3)
    metrics = trainer(tiny_model(1), micro_tokens=60).step([first, second], 0.1)
    again = trainer(tiny_model(1), micro_tokens=60).step([second], 0.1)
    assert sum(passes) - again["trained"] == metrics["trained"] + again["trained"]


def test_pictures_of_the_pass_for_old_log_probabilities_go_uncounted():
    episodes = made(4)
    model = tiny_model(1)
    encode, seen = model.encode_images, []
    model.encode_images = lambda images: seen.extend(images) or encode(images)
    assert trainer(model).step(split(episodes, 2, 4), 0.1)["encoded"] == len(seen)


def test_a_group_that_fits_is_split_over_two_micro_batches():
    """At lengths of a real run that alone trained on 5 to 8 % more tokens than there are."""
    made = []
    for group in range(32):
        for sample in range(4):
            tokens = 1024 + 400 + 37 * ((group + 3 * sample) % 11)
            mask = [0] * 1024 + [1] * (tokens - 1024)
            made.append(Episode(EXAMPLE, group, sample, [0] * tokens, mask, [0.0] * tokens, prompt_length=1024))
    parts = split_into_micro_batches(made, 16384)
    assert sorted(i for part in parts for i in part) == list(range(len(made)))
    packs = [pack(made, part, "cpu") for part in parts]
    assert sum(len(p.input_ids) for p in packs) == unique_tokens(made) and len(packs) < 10
    assert max(len(p.input_ids) for p in packs) <= 16384


@pytest.mark.parametrize("budget", [1, 30, 60, 75, 97, 10**6])
def test_a_pack_is_over_the_budget_without_need(budget):
    """Only an episode larger than the budget is, alone; a group larger than it is split, and no episode is lost."""
    episodes = made(5)
    parts = split_into_micro_batches(episodes, budget)
    assert sorted(i for part in parts for i in part) == [i for i, e in enumerate(episodes) if any(e.loss_mask)]
    assert all(len(part) == 1 or len(pack(episodes, part, "cpu").input_ids) <= budget for part in parts)


def test_second_update_of_a_batch_is_clipped_against_the_first():
    """With π_old recomputed, or taken from after the first update, nothing would ever be clipped."""
    first, second = split(made(4), 2, 4)
    assert {e.group_id for e in first} == {0, 1} and {e.group_id for e in second} == {2, 3}
    model = tiny_model(1)
    once = trainer(model, clip_low=0.01, clip_high=0.01, max_grad_norm=10.0).step([first + second], 0.3)
    twice = trainer(tiny_model(1), clip_low=0.01, clip_high=0.01, max_grad_norm=10.0).step([first, second], 0.3)
    assert once["clip_fraction"] == 0 < twice["clip_fraction"]


@each_family
def test_second_update_moves_by_the_clipped_surrogate():
    """Two updates of `step` against the same two done by hand with `token_losses`."""
    from mmsr import grpo

    halves = split(made(4), 2, 4)
    options = dict(clip_low=0.05, clip_high=0.02, max_grad_norm=1e9, loss_norm="token")
    model = tiny_model(1)
    trainer(model, **options).step(halves, 0.05)
    hand = tiny_model(1)
    helper = trainer(hand, **options)
    packs = [pack(half, split_into_micro_batches(half, 10**6)[0], "cpu") for half in halves]
    with torch.no_grad():
        olds = [helper.log_probs(hand, p, ImageFeatures(hand, p.images, False))[0] for p in packs]
    for half, batch, old in zip(halves, packs, olds):
        features = ImageFeatures(hand, batch.images, True)
        logps, _ = helper.log_probs(hand, batch, features)
        advantages = torch.tensor([e.advantage for e in half])[batch.episode_index]
        grpo.token_losses(
            logps, old, advantages, grpo.LossOptions(clip_low=0.05, clip_high=0.02)
        ).loss.mean().backward()
        features.backward()
        with torch.no_grad():
            for p in hand.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    for (name, a), b in zip(model.named_parameters(), hand.parameters()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=name)


def test_reference_equal_to_the_policy_gives_no_kl():
    metrics = trainer(tiny_model(1), reference=tiny_model(1), kl=1.0).step([made()], 0.1)
    assert abs(metrics["kl"]) < 1e-9
    assert trainer(tiny_model(1), reference=tiny_model(2), kl=1.0).step([made()], 0.1)["kl"] > 1e-3


def test_episode_without_trained_tokens_changes_nothing():
    episodes = made()
    empty = copy.copy(episodes[0])
    empty.loss_mask = [0] * len(empty.input_ids)
    assert relative(gradient([*episodes, empty]), gradient(episodes)) < 1e-6
    assert trainer(tiny_model(1)).step([[empty]], 0.1)["loss"] == 0


def test_update_with_a_gradient_that_is_not_finite_leaves_the_weights():
    episodes = made()
    episodes[0].advantage = float("nan")
    model = tiny_model(1)
    metrics = trainer(model).step([episodes], 0.1)
    assert metrics["skipped_updates"] == 1
    for a, b in zip(model.parameters(), tiny_model(1).parameters()):
        assert torch.equal(a, b)


@each_family
def test_small_learning_rate_moves_bf16_weights_through_their_masters():
    model = tiny_model(1).bfloat16()
    subject = Trainer(model, MasterWeights(model, weight_decay=0.0), SUPPRESSED)
    before = copy.deepcopy(model.state_dict())
    for _ in range(30):
        subject.step([made(2, 2)], 2e-5)
    moved = sum((model.state_dict()[n] != before[n]).sum().item() for n in before)
    lost = copy.deepcopy(before["model.layers.0.mlp.up_proj.weight"])
    for _ in range(30):
        lost -= 2e-5
    assert moved > 1000
    assert (lost != before["model.layers.0.mlp.up_proj.weight"]).float().mean() < 0.2, "bf16 alone would lose these"


@each_family
def test_pack_drops_what_no_trained_token_needs():
    episode = made(1, 2)[1]
    episode.input_ids += [11, 12, 13]  # forced tokens behind the last sampled one
    episode.loss_mask += [0, 0, 0]
    episode.logps += [0.0] * 3
    batch = pack([episode], [0], "cpu")
    assert len(batch.input_ids) == input_length(episode) == len(episode.input_ids) - 4


# ---- parts that are not trained


class TowerPasses:
    """Counts what goes through a model's vision tower: pictures forward, and backward passes."""

    def __init__(self, model):
        self.seen = []
        self.backward = 0
        model.visual.register_forward_pre_hook(lambda tower, given: self.seen.extend(image.key for image in given[0]))
        model.visual.blocks[0].attn.proj.register_full_backward_hook(self.note)

    def note(self, *given) -> None:
        self.backward += 1


def frozen(parts: list[str], model=None):
    """A model of which these parts are not trained."""
    model = model or tiny_model(1)
    names = lora.frozen([name for name, _ in model.named_parameters()], parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return model


def pictures(episodes) -> set[str]:
    return {image.key for episode in episodes for _, image in episode.images}


@each_family
@pytest.mark.parametrize("what", ["weights", "adapters"])
def test_a_frozen_tower_encodes_a_picture_for_every_mini_batch_or_runs_backward(what):
    """Once a step: not again for π_old, the reference, or a micro-batch of another update."""
    episodes = made(4)
    for episode in episodes:  # the thumbnails of one group are those of the next mini-batch too
        episode.images = [(at, image if at < 10 else random_image(4, 4, 0)) for at, image in episode.images]
    model = frozen(["vision"]) if what == "weights" else with_adapters(tiny_model(1))
    reference = tiny_model(1) if what == "weights" else model
    passes = TowerPasses(model)
    other = TowerPasses(reference) if what == "weights" else passes
    features: dict = {}
    subject = trainer(model, reference=reference, kl=0.3, features=features, micro_tokens=60)
    metrics = subject.step(split(episodes, 4, 4), 0.05)
    assert sorted(passes.seen) == sorted(pictures(episodes)) and metrics["encoded"] == len(passes.seen)
    assert not passes.backward and not any(rows.requires_grad for rows in features.values())
    assert other.seen == (passes.seen if other is passes else [])
    again = subject.step(split(episodes, 4, 4), 0.05)
    assert again["encoded"] == 0 and len(passes.seen) == metrics["encoded"], (
        "a step's features, known from its rollouts"
    )


def test_a_trained_tower_takes_features_from_before_the_update():
    """Counted by the same hooks, so that they are seen to count."""
    model = tiny_model(1)
    passes = TowerPasses(model)
    trainer(model, micro_tokens=60).step(split(made(4), 2, 4), 0.05)
    assert passes.backward == 2 and len(passes.seen) > len(set(passes.seen))


PARTS = {
    "vision": ("visual.",),
    "merger": ("visual.merger.", "visual.deepstack_merger_list."),
    "decoder": ("model.layers.",),
    "embedding": ("model.embed_tokens.",),
    "head": ("lm_head.",),
    "model.layers.0": ("model.layers.0.",),
}


@each_family
@pytest.mark.parametrize("part", PARTS)
def test_a_frozen_part_gets_a_gradient_or_changes_that_of_the_rest(part):
    episodes = made()
    whole = gradient(episodes, kl=0.3, reference=tiny_model(1))
    model = frozen([part])
    features = None if lora.trains_tower(model) else {}
    subject = Trainer(
        model, MasterWeights(model), SUPPRESSED, kl=0.3, reference=tiny_model(1), features=features, max_grad_norm=1e9
    )
    kept = {}
    step = subject.optimizer.step

    def note(lr):
        kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        step(lr)

    subject.optimizer.step = note
    subject.step([episodes], 0.1)
    begins = PARTS[part]
    assert kept.keys() == {name for name in whole if not name.startswith(begins)} and len(kept) < len(whole)
    assert relative(kept, {name: whole[name] for name in kept}) < 1e-6
    for (name, after), before in zip(model.named_parameters(), tiny_model(1).parameters()):
        assert torch.equal(after, before) == name.startswith(begins), name


def test_adapters_in_the_tower_alone_cannot_be_trained_on_text():
    """Nothing that is trained is in such a micro-batch: it adds nothing."""
    episodes = made(2)
    texts = [copy.copy(episode) for episode in made(1)]
    for episode in texts:
        episode.group_id, episode.images = 2, []
    for batch in ([*episodes, *texts], texts):
        model = with_adapters(tiny_model(1), ("vision",))
        metrics = trainer(model, reference=model, kl=0.1, micro_tokens=50).step([batch], 0.1)
        assert metrics["skipped_updates"] == 0 and math.isfinite(metrics["loss"])
        assert (metrics["grad_norm"] > 0) == (batch is not texts)
