"""The memory plan against the tensors themselves, and what it says of runs that do not fit."""

import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import helpers
import pytest
import torch
import torch.distributed as dist
from crew import Crew
from helpers import conversation, each_family, random_image, report, tiny_config, tiny_model
from test_update import EXAMPLE, SUPPRESSED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmsr import attention, lora, vision
from mmsr import plan as planning
from mmsr.config import RECIPES, Config, parse
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup
from mmsr.episode import Episode
from mmsr.model import VLModel
from mmsr.pack import pack
from mmsr.plan import (
    FILLED,
    GIB,
    Activations,
    advise,
    check,
    kept_as_fits,
    known_sizes,
    main,
    plan,
    sizes,
)  # fmt: skip
from mmsr.pretrained.adapter import write_adapter
from mmsr.pretrained.config_json import read_config
from mmsr.pretrained.published import QWEN3, SHORT_NAMES, SIZES
from mmsr.shapes import trained
from mmsr.system.errors import UserError
from mmsr.system.parallel import Ranks, shard, unsharded
from mmsr.update import ImageFeatures, MasterWeights, Trainer

CONFIG = Config(
    questions=4, mini_batch=4, group_size=4, max_tokens=400, max_pixels=280 * 280, min_pixels=280 * 280, slots=16,
    max_images=0, kl=0.3, micro_tokens=3000, eval_size=1,
)  # fmt: skip


def picture():
    """20 x 20 patches, 100 merged tokens."""
    return random_image(20, 20)


def with_pictures(config: Config) -> Config:
    """`config`, with pictures of 20 x 20 patches for models of any family."""
    pixels = (20 * tiny_config().vision.processor.patch) ** 2
    return replace(config, min_pixels=pixels, max_pixels=pixels)


def nbytes(tensors) -> int:
    locals_ = (getattr(t, "to_local", lambda t=t: t)() for t in tensors)
    return sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in locals_}.values())


def group(number: int, sequences: int, prompt: int, response: int) -> list[Episode]:
    """Rollouts about one picture."""
    ids, images = conversation(number, picture(), prompt - picture().tokens)
    episodes = []
    for m in range(sequences):
        turn, _ = conversation(50 * number + m, response)
        mask = [0] * len(ids) + [1] * response
        lists = (ids.tolist() + turn.tolist(), mask, [-5.0 * x for x in mask])
        episodes.append(Episode(EXAMPLE, number, m, *lists, list(images), len(ids), advantage=(-1.0) ** m))
    return episodes


# ---- exact


VOCAB = 301
FREE = torch.cat([SUPPRESSED, torch.tensor([True])])


def adapted(model: VLModel, config: Config) -> tuple[VLModel, dict]:
    """`model` with the adapters of `config`, or with its frozen parts, as policy.py opens it."""
    weights = dict(model.named_parameters())
    layers = lora.linear_layers(model)
    names = lora.layers_to_adapt(weights, layers, config.lora_targets, config.freeze) if config.lora else []
    for name in weights if names else lora.frozen(weights, config.freeze):
        weights[name].requires_grad_(False)
    return model, {name: lora.initial(layers[name], name, config.lora, 0) for name in names}


def opened(ranks: Ranks, config: Config, compute: torch.dtype) -> VLModel:
    stored = torch.float32 if ranks.size > 1 and not config.lora else compute
    model, adapters = adapted(tiny_model(1, vocab_size=VOCAB).to(stored), config)
    if config.shard != "none":
        model = shard(model, ranks, compute, config.shard)
    for name, (a, b) in adapters.items():
        lora.add_adapter(model.get_submodule(name), a, b, 0.5)
    return model


def held(ranks: Ranks, config: Config, compute: torch.dtype) -> dict[str, tuple]:
    """Bytes that really lie on this rank, by row of the plan: while it generates, and when the optimizer steps."""
    model = opened(ranks, config, compute)
    reference = model if config.lora else opened(ranks, replace(config, freeze=()), torch.float32).to(compute)
    optimizer = MasterWeights(model)
    trainer = Trainer(model, optimizer, FREE, reference=reference, kl=0.3, micro_tokens=120, ranks=ranks)
    base = [weight for name, weight in model.named_parameters() if not lora.is_adapter(name)]
    adapters = [weight for name, weight in model.named_parameters() if lora.is_adapter(name)]
    sums, inner, reduce = {}, optimizer.step, dist.all_reduce

    def step(lr: float) -> None:
        sums["gradients"] = nbytes(p.grad for p in model.parameters() if p.grad is not None)
        inner(lr)

    def all_reduce(tensor, *given, **options):
        sums["averaged"] = max(sums.get("averaged", 0), nbytes([tensor]))
        return reduce(tensor, *given, **options)

    optimizer.step = step
    dist.all_reduce = all_reduce
    trainer.step([group(0, 2, 110, 9) if ranks.main else []], 1e-3)
    dist.all_reduce = reduce
    with unsharded(model) as whole:
        sampler = lora.for_sampling(whole, model, compute)
        layers = lora.adapted(sampler).values()
        stacks = [stack for layer in layers for stack in (layer.stack, layer.alone) if stack]
        made = [tensor for stack in stacks for tensor in (stack.a, stack.b, stack.bias) if tensor is not None]
        made += [stack.weights[0] for stack in stacks if len(stack.weights) < len(stack.widths)]  # copies
        sampling = nbytes([*adapters, *made])
    state = [value for _, entry in optimizer.states() for key, value in entry.items() if key != "step"]
    weights, of_reference = nbytes(base), 0 if config.lora else nbytes(reference.parameters())
    found = {"weights": (weights, weights), "KL reference": (of_reference, of_reference)}
    found["rest of the masters"] = (nbytes(optimizer.low_bits.values()),) * 2
    found["adapters"] = (sampling, nbytes(adapters))
    found["optimizer moments"] = (nbytes(state),) * 2
    found["gradients"] = (0, sums["gradients"])
    if config.lora:
        found["passes and scores"] = (None, sums.get("averaged", 0))
    return found


def test_the_adapters_at_the_start_are_held_or_planned_without_reason(tmp_path):
    """They are the reference of --adapter where there is a KL term."""
    model, adapters = adapted(tiny_model(1), replace(CONFIG, lora=4, lora_targets=("q_proj", "vision.qkv")))
    for name, (a, b) in adapters.items():
        lora.add_adapter(model.get_submodule(name), a, b, 0.5)
    write_adapter(tmp_path, lora.adapted(model), "base", "")
    config = replace(CONFIG, adapter=str(tmp_path))
    lora.keep_as_reference(model)
    kept = [tensor for layer in lora.adapted(model).values() for tensor in layer.start]
    rows = plan(model.config, config).rows
    assert set(rows["KL reference"]) == {nbytes(kept)} == {rows["adapters"].step}
    assert not any(plan(model.config, replace(config, kl=0.0)).rows["KL reference"])
    assert trained(model.config, config).tower


def compare(found: dict[str, tuple], config: Config, ranks: int, node: int, item: int) -> None:
    rows = plan(tiny_config(vocab_size=VOCAB), config, ranks, node, item).rows
    for name, (generate, step) in found.items():
        assert step == rows[name].step, name
        assert generate is None or generate == rows[name].generate, name


# With targets of which some make stacks, in the tower too.
ADAPTERS = replace(CONFIG, lora=4, shard="none")
SOME = replace(ADAPTERS, lora_targets=("q_proj", "down_proj", "vision"), freeze=("model.layers.0",))
WAYS = [CONFIG, replace(CONFIG, freeze=("vision",)), replace(CONFIG, freeze=("head", "model.layers.1"))]


@each_family
@pytest.mark.parametrize("config", [*WAYS, ADAPTERS, SOME])
@pytest.mark.parametrize("dtype, item", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_weights_gradients_and_optimizer_are_other_bytes_than_planned(config, dtype, item):
    compare(held(Ranks(), config, dtype), config, 1, 1, item)


@pytest.fixture(scope="module")
def pair():
    crew = Crew(2)
    yield crew
    crew.stop()


@pytest.mark.slow
@pytest.mark.parametrize("config", [*WAYS[:2], ADAPTERS, SOME, replace(ADAPTERS, shard="node")])
@pytest.mark.parametrize("dtype, item", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_shards_are_other_bytes_than_planned(pair, config, dtype, item):
    """A vocabulary of 301 does not divide: the first rank has the larger half, as planned."""
    config = replace(config, shard="node" if config.shard == "auto" else config.shard)
    first, second = pair(held, config, dtype)
    compare(first, config, 2, 2, item)
    assert second["weights"] <= first["weights"]


@pytest.mark.slow
def test_hybrid_shards_are_other_bytes_than_planned():
    four = Crew(4, node_size=2)
    for config in (CONFIG, ADAPTERS):
        for across in ("node", "all"):
            sharded = replace(config, shard=across)
            compare(four(held, sharded, torch.bfloat16)[0], sharded, 4, 2, 2)
    four.stop()


@each_family
@pytest.mark.parametrize("groups, slots, tokens", [(4, 16, 0), (4, 9, 0), (1, 16, 0), (4, 16, 100), (1, 2, 50)])
def test_the_cache_grows_beyond_the_plan(groups, slots, tokens):
    config, model = with_pictures(replace(CONFIG, slots=slots, slot_tokens=tokens)), tiny_model()
    sizes = dict(slots=slots, slot_tokens=tokens, max_tokens=400, turn_tokens=400)
    engine = Engine(model, 299, SUPPRESSED, **sizes)
    ids, images = conversation(0, picture())  # as short as a prompt can be
    engine.submit(
        [SequenceGroup(ids.tolist(), images, [GeneratedSequence(m) for m in range(4)]) for _ in range(groups)]
    )
    prefix, suffix = (nbytes(t for pair in part for t in pair) for part in (engine.cache.prefix, engine.cache.places))
    rows, slots = len(engine.cache.prefix[0][0]), len(engine.cache.suffix[0][0])
    kept = Activations(tiny_config(), config, 4)
    longest = kept.longest
    assert suffix + prefix // len(ids) * longest == kept.cache(groups, 4), (rows, slots)


# ---- activations


def saved(work, model) -> int:
    """Bytes that the backward pass of `work` keeps, parameters left out."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = 0

    def keep(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)
            total += storage.nbytes()
        return tensor

    kept: list = []  # so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = work()
    del out
    return total


@each_family
@pytest.mark.first_is_quick
@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("recompute, keep", [(False, 0), (True, 0), (True, 2)])
@pytest.mark.parametrize("dtype, item", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_a_backward_pass_keeps_is_far_from_the_plan(
    recompute, keep, rank, dtype, item, record_property, monkeypatch
):
    """For packs in which prompts and responses are as long as the plan assumes.

    The copies that attention makes on the CPU are left out. Beside adapters the last norm's weight is frozen, and keeps
    a row (T, d) less of the few that recomputing leaves. What is one kernel on CUDA, such as a norm, keeps its
    arguments alone, as here by `checkpoint`.
    """
    monkeypatch.setattr(attention, "_sum_dtype", lambda q: q.dtype)
    monkeypatch.setattr(vision, "gated", partial(checkpoint, vision.gated, use_reentrant=False))
    norm = torch.nn.RMSNorm.forward
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda *given: checkpoint(norm, *given, use_reentrant=False))
    shape = dict(num_hidden_layers=6, hidden_size=128, intermediate_size=512)
    base = tiny_config()
    shape |= helpers.of_family(qwen2_5=dict(mrope_section=(4, 6, 6)), qwen3=dict(head_dim=32, mrope_section=(6, 5, 5)))
    shape["vision"] = replace(base.vision, depth=6, intermediate_size=110, out_hidden_size=128)
    model = tiny_model(1, **shape).to(dtype)
    model.checkpoint_blocks = model.visual.checkpoint_blocks = recompute
    model.kept_blocks = keep
    config = with_pictures(replace(CONFIG, recompute=recompute, keep_blocks=keep, max_tokens=612 + 200, lora=rank))
    model, adapters = adapted(model, config)
    for name, (a, b) in adapters.items():
        lora.add_adapter(model.get_submodule(name), a, b, 0.5)
    kept = Activations(model.config, config, item)
    assert kept.longest == 612
    batch = pack(episodes := [e for n in range(2) for e in group(n, 4, 612, 200)], range(len(episodes)), "cpu")
    images = list({image.key: image for image in batch.images}.values())
    trainer = Trainer(model, MasterWeights(model), SUPPRESSED, features={})
    features = trainer._known_features(images) if rank else ImageFeatures(model, images, True)
    passes = saved(lambda: trainer.log_probs(model, batch, features), model)
    found = {"micro-batch": (passes, kept.decoder(len(batch.input_ids)))}
    if rank:
        trainer.features.clear()
        assert saved(lambda: trainer._known_features(images), model) == 0
        assert plan(model.config, config, item=item).rows["kept of the pictures"].update == 0
    else:
        found["pictures"] = (saved(lambda: model.encode_images(images), model), kept.tower(100))
    for name, (real, planned) in found.items():
        report(
            record_property,
            f"planned / kept, {name}, recompute {recompute}, keep {keep}, rank {rank}, {dtype}",
            planned / real,
        )
        assert {"micro-batch": 1.0, "pictures": 0.95}[name] < planned / real < 1.2, (name, planned / real)


@pytest.mark.parametrize("dtype, item", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_wider_adapters_keep_more_or_less_than_planned(dtype, item):
    """A x of each layer, A, and B times α / r, as they are used. A in fp32 is used as it is."""
    real, planned = [], []
    for rank in (8, 72):
        config = replace(CONFIG, lora=rank)
        model = opened(Ranks(), config, dtype)
        batch = pack(group(0, 2, 110, 90), range(2), "cpu")
        trainer = Trainer(model, MasterWeights(model), FREE, features={})
        features = trainer._known_features(batch.images)
        real.append(saved(lambda t=trainer, b=batch, f=features: t.log_probs(t.model, b, f), model))
        planned.append(Activations(model.config, config, item).decoder(len(batch.input_ids)))
        if item == 4:
            real[-1] += sum(weight.nbytes for name, weight in model.named_parameters() if name.endswith("lora_A"))
    assert planned[1] - planned[0] == pytest.approx(real[1] - real[0], rel=0.05)


class Made(TorchDispatchMode):
    """Shapes and types of all that is made in its block."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.add((tuple(out.shape), out.dtype))
        return out


@pytest.mark.parametrize("given", [{}, {"lora": 4}, {"freeze": ("head",)}, {"freeze": ("vision",)}])
def test_a_frozen_head_gets_a_gradient_or_another_is_planned_without(given):
    config, shape = replace(CONFIG, **given), tiny_config()
    model = opened(Ranks(), config, torch.bfloat16)
    trainer = Trainer(model, MasterWeights(model), FREE)
    batch = pack(group(0, 2, 110, 9), range(2), "cpu")
    logps, _ = trainer.log_probs(model, batch, ImageFeatures(model, batch.images, train=True))
    with Made() as made:
        logps.sum().backward()
    has_gradient = ((VOCAB, shape.hidden_size), torch.float32) in made.seen
    bare = Activations(shape, replace(CONFIG, lora=4), 2).head(100)
    assert has_gradient == (Activations(shape, config, 2).head(100) > bare)


def test_features_of_a_frozen_tower_are_planned_for_an_update_alone():
    """Those of all pictures of a step are there from its rollouts to its end, and have no gradient."""
    model, config = SIZES["Qwen2.5-VL-7B"], blog(lora=64)
    features = 2 * model.hidden_size * 512 * (1152 + 5 * 64)
    assert set(plan(model, config).rows["features of pictures"]) == {features}
    tower = plan(model, replace(config, lora_targets=("decoder", "vision"))).rows
    assert tower["features of pictures"][1:] == (features // 4 * 4, 0), "of an update, thrice, and the reference's"
    assert tower["kept of the pictures"].update > 60 * GIB


# ---- what is said


def test_a_short_name_is_of_other_sizes():
    """Billions of parameters as their pages on the hub have them."""
    counts = {name: round(sizes(known_sizes(name)).count() / 1e9, 2) for name in SHORT_NAMES}
    assert {name: count for name, count in counts.items() if not name.endswith("Thinking")} == {
        "Qwen2.5-VL-3B": 3.75,
        "Qwen2.5-VL-7B": 8.29,
        "Qwen2.5-VL-32B": 33.45,
        "Qwen2.5-VL-72B": 73.41,
        "Qwen3-VL-2B": 2.13,
        "Qwen3-VL-4B": 4.44,
        "Qwen3-VL-8B": 8.77,
        "Qwen3-VL-32B": 33.36,
    }
    assert all(known_sizes(SHORT_NAMES[name]) == known_sizes(name) for name in SHORT_NAMES)
    assert all(known_sizes(f"{name}-Thinking") == known_sizes(name) for name in QWEN3)
    assert known_sizes("me/my-model") is None
    kept = Activations(SIZES["Qwen2.5-VL-7B"], CONFIG, 2)
    assert kept.cache(4, 4) % 57_344 == 0


def blog(**changes) -> Config:
    return Config(**{**RECIPES["blog"], "recipe": "blog", "model": "x", **changes})


def option(given: list[str]) -> dict:
    """A part of a command line as fields of Config."""
    found, words = {}, iter(given)
    for word in words:
        name = word.removeprefix("--").replace("-", "_")
        found[name] = True if name == "recompute" else type(getattr(Config(), name))(next(words))
    return found


def test_a_run_that_cannot_fit_names_options_and_what_they_save():
    model, room = SIZES["Qwen2.5-VL-3B"], 80 * GIB
    with pytest.raises(UserError) as caught:
        check(model, blog(recompute=False), room)
    said = str(caught.value)
    assert "\n" not in said and "--recompute saves" in said and "--mini-batch 64 saves" in said
    (together,) = re.findall(r"(--[^,]*) would do", said)
    changes = option(together.split())
    changes["min_pixels"] = min(blog().min_pixels, changes.get("max_pixels", math.inf))
    assert check(model, blog(**{"recompute": False, **changes}), room).peak < room
    assert "--freeze vision saves" in said
    for saving in re.findall(r"(--(?!freeze)[^,]*) saves ([\d.]+)", said):
        changes = {"recompute": False, **option(saving[0].split())}
        changes["min_pixels"] = min(blog().min_pixels, changes.get("max_pixels", math.inf))
        saved = plan(model, blog(recompute=False)).peak - plan(model, blog(**changes)).peak
        assert saved / GIB == pytest.approx(float(saving[1]), abs=0.06)


def test_blocks_are_recomputed_that_there_is_memory_for():
    """The recipe of the paper on eight devices of 80 GB keeps as many blocks as three quarters of the peak take."""
    model, place = SIZES["Qwen2.5-VL-7B"], (80 * GIB, 8)
    paper = Config(**{**RECIPES["paper"], "recipe": "paper", "model": "x"})
    chosen = kept_as_fits(model, paper, *place)
    assert 9 <= chosen.keep_blocks < 28
    assert plan(model, chosen, 8).peak <= FILLED * 80 * GIB
    assert plan(model, replace(chosen, keep_blocks=chosen.keep_blocks + 1), 8).peak > FILLED * 80 * GIB
    assert check(model, paper, *place) == plan(model, chosen, 8)
    assert kept_as_fits(model, replace(paper, keep_blocks=2), *place).keep_blocks == 2
    assert kept_as_fits(model, paper, 48 * GIB, 8).keep_blocks == 0
    assert kept_as_fits(model, paper, 800 * GIB, 8).keep_blocks == 28
    with pytest.raises(UserError, match="--keep-blocks 0 saves"):
        check(model, replace(paper, keep_blocks=28), *place)


def test_a_run_that_more_devices_would_hold_says_how_many():
    model = SIZES["Qwen2.5-VL-7B"]
    with pytest.raises(UserError, match=r" 8 processes would do \(") as caught:
        check(model, blog(), 80 * GIB)
    assert "4 processes" not in str(caught.value)
    assert advise(model, blog(), 32 * GIB, 8).processes == 0, "128 questions of an update are too few for 256 devices"
    assert check(model, blog(), 80 * GIB, 8).peak < 80 * GIB
    with pytest.raises(UserError):
        check(model, blog(), 80 * GIB, 4)


def said_by(capsys, line: str) -> tuple[int, list[str], str]:
    """Exit status, lines of output, and messages of `python -m mmsr.plan`."""
    status = 0
    try:
        main(line.split())
    except SystemExit as stop:
        status = stop.code
    told = capsys.readouterr()
    return status, told.out.splitlines(), told.err


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_the_command_wants_weights_or_network_or_ends_without_a_verdict(capsys, monkeypatch, name):
    monkeypatch.setattr(planning, "fetched", lambda *given, **where: pytest.fail("the hub is asked"))
    status, lines, err = said_by(capsys, f"--gpus 8 --gpu-gb 80 --model {name}")
    assert status == 0 and not err and any(line.startswith("KV cache") for line in lines)
    assert any(line.startswith("together") and " 67.83 " in line for line in lines)
    assert lines[-1].startswith("VERDICT: fits (67.8 GiB")
    assert lines[-1].endswith(f": torchrun --nproc-per-node 8 train.py --model {name}")


def test_a_folder_with_a_published_models_name_is_taken_for_that_model(miniature, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(miniature, "Qwen2.5-VL-7B")
    assert known_sizes("Qwen2.5-VL-7B") == read_config(miniature)


def test_a_run_that_does_not_fit_is_not_told_which_line_to_type(capsys):
    status, lines, err = said_by(capsys, "--gpus 1 --gpu-gb 80 --model Qwen2.5-VL-3B --lr 1e-6")
    assert status == 1 and not err and "python -m mmsr.plan" not in lines[-1]
    assert lines[-1].startswith("VERDICT: does not fit (172.2 GiB")
    first, second, third = re.findall(r"((?:python|torchrun)[^,(]*train.py [^,(]*)", lines[-1])
    assert first.strip() == "python train.py --model Qwen2.5-VL-3B --lr 1e-6 --mini-batch 16"
    assert "(--mini-batch: changes what is learned)" in lines[-1]
    assert second == "torchrun --nproc-per-node 4 train.py --model Qwen2.5-VL-3B --lr 1e-6"
    assert third.strip() == "python train.py --model Qwen2.5-VL-3B --lr 1e-6 --lora 64"
    for line in (first, third):
        assert said_by(capsys, f"--gpus 1 --gpu-gb 80 {line.split('train.py ')[1]}")[0] == 0
    assert said_by(capsys, "--gpus 4 --gpu-gb 80 --model Qwen2.5-VL-3B")[0] == 0
    status, lines, err = said_by(capsys, "--gpus 8 --gpu-gb 44 --recipe paper")
    assert " --max-pixels 451584 (--max-pixels: changes what is learned), or" in lines[-1]


@pytest.mark.parametrize(
    "wrong",
    "--gpus 0; --gpus x; --gpus 12; --node-gpus 0; --gpu-gb 0; --gpu-gb nan; --gpu-gb 81559; --nonsense 3".split("; "),
)
def test_nonsense_is_planned_or_ends_in_more_than_a_line(capsys, wrong):
    status, lines, err = said_by(capsys, wrong)
    assert status == 2 and not lines and err.count("\n") == 1 and wrong.split()[0] in err


def test_the_help_lacks_what_the_command_takes(capsys):
    status, lines, _ = said_by(capsys, "--help")
    said = " ".join(lines)
    assert status == 0 and all(word in said for word in ("--gpus", "--node-gpus", "--gpu-gb", "options of train.py"))


def test_advice_leaves_no_room_to_work_or_changes_the_training_for_nothing():
    """Slots and micro-batches come before what is learned, and nothing shrinks to where no rollout fits."""
    for name, model in SIZES.items():
        for ranks, room in ((8, 24), (8, 48), (8, 141)):
            options = advise(model, blog(), room * GIB, ranks).options
            values = dict(re.findall(r"--([\w-]+) (\d+)", options))
            for option, least in planning.LEAST.items():
                assert int(values.get(option.replace("_", "-"), least)) >= least, (name, room, options)
    assert advise(SIZES["Qwen2.5-VL-7B"], blog(), 46 * GIB, 8).options == "--micro-tokens 12288"


@pytest.mark.parametrize(
    "given, other",
    [
        ("--model Qwen2.5-VL-7B --gpu-gb 80", ""),
        ("--model Qwen2.5-VL-7B --gpu-gb 79 --recipe paper", ""),
        ("--model Qwen2.5-VL-7B --gpu-gb 44", ""),
        ("--model Qwen2.5-VL-3B --gpu-gb 23.5", "--slots 32"),
        ("--model Qwen2.5-VL-3B --gpu-gb 23.5 --recipe paper", "--slots 32"),
        ("--model Qwen2.5-VL-3B --gpu-gb 23.5 --gpus 8", ""),
    ],
)
def test_one_card_is_not_enough_for_adapters(capsys, given, other):
    """As they are typed, or with an option that changes nothing of what is learned, which the verdict names."""
    status, lines, err = said_by(capsys, f"{given} --lora 64")
    assert not err and status == bool(other)
    if other:
        assert lines[-1].split(", or")[0].endswith(f"--lora 64 {other}")
        assert said_by(capsys, f"{given} --lora 64 {other}")[0] == 0
    with pytest.raises(UserError, match=r"LoRA would do: --lora 64( --slots 32)? needs \d"):
        given = given.replace("--gpus 8", "").split()
        check(known_sizes(given[1]), blog(recipe="x"), float(given[3]) * GIB)


def test_ranks_shard_frozen_weights_that_fit_or_keep_whole_ones_that_do_not(capsys):
    """With adapters each device has its own weights, where they fit; without, they are shared as before."""
    model, config = SIZES["Qwen2.5-VL-7B"], blog(lora=64)
    assert kept_as_fits(model, config, 44 * GIB, 8).shard == "none"
    assert kept_as_fits(model, blog(), 800 * GIB, 8).shard == "node"
    assert kept_as_fits(model, replace(config, shard="all"), 800 * GIB, 8).shard == "all"
    long = blog(lora=64, micro_tokens=2**16)  # its updates take more than its rollouts
    whole, node, all_ = (plan(model, replace(long, shard=shard), 16, 8).peak for shard in ("none", "node", "all"))
    assert all_ < node < whole
    for room, chosen in ((whole, "none"), (node, "node"), (all_, "all"), (all_ / 2, "all")):
        assert planning.decided(model, long, 1.001 * room / planning.USABLE, 16, 8).shard == chosen
    said = "the devices of a machine share one copy of the weights (--shard node)"
    assert said in said_by(capsys, f"--gpus 16 --gpu-gb {1.01 * node / 0.92 / GIB} --lora 64 --micro-tokens 65536")[1]


def test_nothing_is_planned_for_what_is_not_there_to_train(capsys):
    for wrong in ("--lora 64 --lora-targets quaver", "--freeze towr", "--lora 4 --freeze decoder"):
        status, lines, err = said_by(capsys, f"--gpus 8 {wrong}")
        assert status == 2 and not lines and err.count("\n") == 1 and wrong.split()[-2] in err
    assert said_by(capsys, "--gpus 8 --freeze head --model Qwen2.5-VL-3B")[2].endswith("give embedding\n")


def test_host_memory_forgets_that_a_save_builds_whole_files():
    model = SIZES["Qwen2.5-VL-7B"]
    needs = planning.host_memory(model, blog(), 8)
    assert needs["a save"] == 8 * 2 * 2 * GIB
    assert planning.host_memory(model, blog(lora=64), 8)["a save"] < 4 * GIB
    assert planning.host_memory(model, blog(lora=64, merge=True))["a save"] == 2 * sizes(model).count()
    assert needs["pictures"] == pytest.approx(512 * (4608 + 5 * 256) * 1176 * 4, rel=0.01)


@pytest.mark.parametrize(
    "given, gib",
    [
        ("--mini-batch 64", 80),
        ("--lora 64 --grammar hermes", 48),
        ("--lora 64 --slots 16 --slot-tokens 1024", 24),
    ],
)
def test_the_readmes_cards_are_too_small_for_the_smallest_model(given, gib, capsys):
    status, lines, _ = said_by(capsys, f"--model Qwen3-VL-2B --gpu-gb {gib} {given}")
    assert status == 0 and lines[-1].startswith("VERDICT: fits"), lines[-1]


PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_scale_page_has_other_numbers_than_the_plan():
    for name in ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-2B", "Qwen3-VL-4B", "Qwen3-VL-8B"):
        model = SIZES[name]
        for count in (1, 8):
            found = plan(model, blog(), count)
            numbers = " | ".join(f"{value / GIB:.1f}" for value in (*found.moments, found.peak))
            assert f"| {name} | {count} | {numbers} |" in PAGE
    shown = re.findall(r"^\| (Qwen\S+) `(.*)` \| (\d) \| (.*) \|$", PAGE, re.M)
    for name, given, count, said in shown:
        found = plan(SIZES[name], parse(["--model", name, *given.split()]), int(count))
        assert " | ".join(f"{value / GIB:.1f}" for value in (*found.moments, found.peak)) == said
    assert len(shown) == 7
    cells = dict(re.findall(r"^\| (stacks.*?) \|(?:[^|]*\|){2} ([^|]*) \|", PAGE, re.M))
    run = trained(SIZES["Qwen2.5-VL-7B"], blog(lora=64))
    numbers = run.numbers()
    assert (
        cells["stacks of rounded adapters (`lora.Stack`)"] == f"{2 * run.stacked() / 1e9:.1f} GB while generating (7B)"
    )
    assert f"a = {numbers / 1e6:.0f} million" in PAGE
