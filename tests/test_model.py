"""The decoder, positions, log-probabilities and folders against transformers."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from helpers import (
    IMAGE,
    conversation,
    edit_json,
    hf_logits,
    hf_twin,
    largest_difference,
    packed_logits,
    random_image,
    report,
    tiny_config,
    tiny_model,
)
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmsr import model as model_module
from mmsr import pretrained
from mmsr.attention import Packed, SharedPrefix
from mmsr.model import ModelConfig, Qwen2_5_VL, log_probs, logits, mrope_positions
from mmsr.pretrained import load, read_config, save, save_weights
from mmsr.system.errors import UserError
from mmsr.system.hub import resolve

FIRST, SECOND, THIRD = random_image(10, 14, 1), random_image(4, 4, 2), random_image(2, 22, 3)


def sequences():
    """Text alone, one picture, pictures in later turns and at both ends: four lengths."""
    return [
        conversation(0, 7),
        conversation(1, 5, FIRST, 9),
        conversation(2, 3, SECOND, 6, THIRD, 1, FIRST, 4),
        conversation(3, SECOND, 2, SECOND),
    ]


# ---- positions


def test_positions_differ_from_transformers():
    twin = hf_twin(tiny_model()).model
    for ids, images in sequences()[1:]:
        kinds = (ids == IMAGE).int()
        grids = torch.tensor([(1, *image.grid) for _, image in images])
        theirs, delta = twin.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grids)
        ours, following = mrope_positions(len(ids), [(offset, image.grid) for offset, image in images])
        # transformers cannot tell two neighbouring pictures apart; ours needs no such rule, and none of these touch.
        assert torch.equal(ours, theirs[:, 0]) and following == len(ids) + delta.item()


def test_positions_jump_between_the_pieces_of_a_conversation():
    turns = [(5, [(1, (4, 4))]), (9, []), (12, [(0, (2, 6)), (8, (4, 2))]), (0, []), (3, [])]
    start, pieces, whole, done = 0, [], [], 0
    for length, images in turns:
        piece, start = mrope_positions(length, images, start)
        pieces.append(piece)
        whole += [(done + offset, grid) for offset, grid in images]
        done += length
    together, following = mrope_positions(done, whole)
    assert torch.equal(torch.cat(pieces, 1), together) and start == following == together.max() + 1


@pytest.mark.parametrize("images", [[(3, (4, 4))], [(0, (4, 4)), (3, (2, 2))]])
def test_a_picture_over_the_edge_is_squeezed_in(images):
    with pytest.raises(ValueError, match="image tokens 3"):
        mrope_positions(6, images)


# ---- forward and backward


@pytest.mark.parametrize("tied", [True, False])
def test_packed_logits_differ_from_transformers_one_at_a_time(tied, record_property):
    model = tiny_model(tie_word_embeddings=tied)
    twin = hf_twin(model)
    with torch.no_grad():
        ours = packed_logits(model, sequences())
        theirs = torch.cat([hf_logits(twin, *sequence) for sequence in sequences()])
    difference = largest_difference(ours, theirs) / theirs.abs().max().item()
    report(record_property, f"logits, relative to the largest, {'tied' if tied else 'untied'}", difference)
    assert ours.shape == theirs.shape and difference < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_differ_from_transformers(tied, record_property):
    model = tiny_model(tie_word_embeddings=tied)
    twin = hf_twin(model)
    torch.logsumexp(packed_logits(model, sequences()), -1).sum().backward()
    torch.logsumexp(torch.cat([hf_logits(twin, *sequence) for sequence in sequences()]), -1).sum().backward()
    theirs = dict(twin.named_parameters())
    worst = 0.0
    for name, parameter in model.named_parameters():
        name = name.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1)
        scale = theirs[name].grad.abs().max().item()
        worst = max(worst, largest_difference(parameter.grad, theirs[name].grad) / scale)
    report(record_property, f"gradients, relative to each tensor's largest, {'tied' if tied else 'untied'}", worst)
    assert len(theirs) == len(list(model.parameters())) and worst < 1e-5


def test_half_precision_strays_further_than_transformers(record_property):
    exact = tiny_model()
    ids, images = sequences()[1]
    with torch.no_grad():
        wanted = packed_logits(exact, [(ids, images)])
        theirs = hf_logits(hf_twin(exact).bfloat16(), ids, images)
        ours = packed_logits(exact.bfloat16(), [(ids, images)])
    ours_off, theirs_off = ((x.float() - wanted).pow(2).mean().sqrt().item() for x in (ours, theirs))
    report(record_property, "bf16 logits from fp32 ones, root mean square: ours", ours_off)
    report(record_property, "bf16 logits from fp32 ones, root mean square: transformers", theirs_off)
    assert ours_off < 1.2 * theirs_off


def output_and_gradients(ids, where, attention_fn, copies, keep, recompute):
    """Logits at `keep` and the gradient of every parameter, of a pass that holds SECOND `copies` times."""
    model = tiny_model()
    model.checkpoint_blocks = model.visual.checkpoint_blocks = recompute
    features = model.encode_images([SECOND]).repeat(copies, 1)
    out = model(ids, where, attention_fn, features, (ids == IMAGE).nonzero()[:, 0], head_fn=logits)[keep]
    out.logsumexp(-1).square().sum().backward()
    return [out, *(parameter.grad for parameter in model.parameters())]


def shared_and_repeated(recompute: bool):
    """A prompt with three members' suffixes: the prompt once in the pass, and once per member."""
    prompt, images = conversation(0, 4, SECOND, 5)
    members = [conversation(seed, length)[0] for seed, length in ((1, 6), (2, 1), (3, 9))]
    prompt_at, following = mrope_positions(len(prompt), [(offset, image.grid) for offset, image in images])
    members_at = [mrope_positions(len(member), [], following)[0] for member in members]
    lens = [len(member) for member in members]

    once = torch.cat([prompt, *members]), torch.cat([prompt_at, *members_at], 1)
    layout = SharedPrefix([(len(prompt), lens)], "cpu")
    shared = output_and_gradients(*once, layout, 1, slice(len(prompt), None), recompute)

    whole = [torch.cat([prompt, member]) for member in members]
    where = torch.cat([torch.cat([prompt_at, at], 1) for at in members_at], 1)
    keep = torch.cat([torch.arange(len(ids)) >= len(prompt) for ids in whole])
    layout = Packed([len(ids) for ids in whole], "cpu")
    return shared, output_and_gradients(torch.cat(whole), where, layout, len(members), keep, recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_sharing_a_prompt_changes_the_update(recompute, record_property):
    worst = 0.0
    for shared, repeated in zip(*shared_and_repeated(recompute)):
        worst = max(worst, largest_difference(shared, repeated) / repeated.abs().max().item())
    report(record_property, f"shared against repeated prompt, {'recomputed' if recompute else 'kept'} blocks", worst)
    assert worst < 1e-5


@pytest.mark.parametrize("kept, recomputed", [(0, [0, 1, 2]), (1, [0, 1]), (2, [0]), (3, []), (7, [])])
def test_blocks_that_keep_everything_are_not_the_last(kept, recomputed, monkeypatch):
    """The last blocks' memory is free first in the backward pass."""
    found = []
    plain = model_module.run_block
    monkeypatch.setattr(
        "mmsr.model.run_block", lambda block, again, *rest: found.append(again) or plain(block, again, *rest)
    )
    model = tiny_model(1, num_hidden_layers=3)
    model.checkpoint_blocks, model.kept_blocks = True, kept
    ids, images = conversation(0, 7)
    model(ids, mrope_positions(len(ids), [])[0], Packed([len(ids)], "cpu")).sum().backward()
    assert [layer for layer, again in enumerate(found) if again] == recomputed


def test_a_forward_pass_without_gradient_recomputes_blocks(monkeypatch):
    monkeypatch.setattr("mmsr.vision.checkpoint", lambda *_, **__: pytest.fail("recomputed"))
    model = tiny_model()
    model.checkpoint_blocks = model.visual.checkpoint_blocks = True
    with torch.no_grad():
        packed_logits(model, sequences()[:2])


# ---- log-probabilities


def scored(rows: int = 11, size: int = 8, vocabulary: int = 30):
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
    suppressed = torch.zeros(vocabulary, dtype=torch.bool)
    suppressed[:4] = True
    return hidden, head, torch.randint(4, vocabulary, (rows,)), suppressed


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_tiles_change_log_probabilities(rows, monkeypatch):
    hidden, head, targets, suppressed = scored()
    monkeypatch.setattr("mmsr.model.TILE", rows * len(head))
    logps, entropy = log_probs(hidden, head, targets, 0.7, suppressed)
    wanted = torch.distributions.Categorical(logits=(hidden @ head[4:].T) / 0.7)
    torch.testing.assert_close(logps, wanted.log_prob(targets - 4))
    torch.testing.assert_close(entropy, wanted.entropy())
    ours = torch.autograd.grad(logps.square().sum(), (hidden, head))
    for a, b in zip(ours, torch.autograd.grad(wanted.log_prob(targets - 4).square().sum(), (hidden, head))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)  # sums of 11 squares of around 10, in fp32


def test_a_banned_token_makes_entropy_nan_or_keeps_probability():
    hidden, head, targets, suppressed = scored()
    suppressed[5:] = True  # one token is left, its probability 1
    logps, entropy = log_probs(hidden, head, torch.full_like(targets, 4), suppressed=suppressed)
    assert torch.equal(entropy, torch.zeros(11)) and not entropy.requires_grad
    logps.sum().backward()
    assert hidden.grad.isfinite().all() and logits(hidden, head, 1.0, suppressed).softmax(-1)[:, suppressed].max() == 0


def test_no_rows_to_score_raise():
    hidden, head, targets, _ = scored(rows=0)
    logps, entropy = log_probs(hidden, head, targets)
    assert logps.shape == entropy.shape == (0,)


def test_half_precision_gives_half_precision_log_probabilities():
    hidden, head, targets, _ = scored()
    logps, entropy = log_probs(hidden.bfloat16(), head.bfloat16(), targets)
    assert logps.dtype == entropy.dtype == torch.float32


def test_head_gradient_of_half_precision_is_added_up_in_half_precision(monkeypatch, record_property):
    """Against fp32; autograd would add the tiles' shares up in bfloat16."""
    monkeypatch.setattr("mmsr.model.TILE", 4 * 30)
    hidden, head, targets, suppressed = (x.detach() for x in scored(rows=800))
    exact = head.bfloat16().float().requires_grad_()
    log_probs(hidden.bfloat16().float(), exact, targets, 1.0, suppressed)[0].sum().backward()
    half = head.bfloat16().requires_grad_()
    log_probs(hidden.bfloat16(), half, targets, 1.0, suppressed)[0].sum().backward()
    error = ((half.grad.float() - exact.grad).norm() / exact.grad.norm()).item()
    report(record_property, "bf16 gradient of the head from 200 tiles, relative error", error)
    assert error < 5e-3


def peak_memory(work) -> int:
    """Most bytes that torch's CPU allocator held at a time during `work`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 0
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_are_in_memory_at_once(dtype, monkeypatch, record_property):
    """A pack of 16,384 trained tokens with a 64th of the real vocabulary, and of the tile: forward and backward."""
    tokens, vocabulary, size = 16384, 152064 // 64, 16
    monkeypatch.setattr("mmsr.model.TILE", model_module.TILE // 64)
    hidden, head, targets, suppressed = scored(tokens, size, vocabulary)
    hidden, head = (x.detach().to(dtype).requires_grad_() for x in (hidden, head))

    def work():
        log_probs(hidden, head, targets, 1.0, suppressed)[0].sum().backward()

    results = (2 * hidden.numel() + 3 * head.numel() + 4 * tokens) * 4  # gradients, and the log-probabilities
    share = (peak_memory(work) - results) / (tokens * vocabulary * 4)
    what = f"memory of log-probabilities beyond inputs and gradients, of tokens × vocabulary, {dtype}"
    report(record_property, what, share)
    assert share < 0.02


class Device(TorchDispatchMode):
    """Watches operators on the meta device, which has a GPU's branches of the code: memory in use, and products."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple] = {}  # by storage: a weak reference, and its bytes
        self.most = 0
        self.products: list[tuple] = []  # (rows, type of the result) of each product with the head

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.device.type == "meta":
                storage = x.untyped_storage()
                self.alive[storage._cdata] = weakref.ref(storage), storage.nbytes()
        self.alive = {key: (kept, size) for key, (kept, size) in self.alive.items() if kept() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        if func._schema.name == "aten::mm":
            self.products.append((tuple(result.shape), result.dtype))
        return result


def scored_on_a_gpu(tokens: int, dtype: torch.dtype) -> Device:
    """Log-probabilities and gradient of a 7B model's head, as a GPU would run them."""
    size, vocabulary = 3584, 152064
    with torch.device("meta"):
        hidden = torch.empty(tokens, size, dtype=dtype, requires_grad=True)
        head = torch.empty(vocabulary, size, dtype=dtype, requires_grad=True)
        targets, suppressed = torch.empty(tokens, dtype=torch.long), torch.empty(vocabulary, dtype=torch.bool)
    with Device() as device:
        log_probs(hidden, head, targets, 0.7, suppressed)[0].sum().backward()
    device.results = 2 * hidden.nbytes + vocabulary * size * (4 + 2 * dtype.itemsize)
    return device


def test_logits_on_a_gpu_are_rounded_to_half_precision():
    """Between 16 and 32 bfloat16 has steps of an eighth: sampler and trainer would differ by .12 nats."""
    device = scored_on_a_gpu(3000, torch.bfloat16)
    found = {dtype for shape, dtype in device.products if shape[1] == 152064}
    assert found == {torch.float32}
    assert torch.float32 == logits(*(torch.empty(4, 8, device="meta").bfloat16() for _ in "hw")).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_is_read_for_a_few_rows_or_its_tile_takes_gigabytes(dtype, record_property):
    """On a GPU: a thousand rows a product in half precision, and a gibibyte at most beside inputs and gradients."""
    device = scored_on_a_gpu(8192, dtype)
    rows = max(shape[0] for shape, _ in device.products if shape[1] == 152064)
    beside = (device.most - device.results) / 2**30
    report(record_property, f"GiB of a tile of {rows} rows, {dtype}", beside)
    assert rows >= (1000 if dtype == torch.bfloat16 else 700)
    assert beside < 1.02


# ---- folders


def same_weights(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_folder_opens_otherwise_in_transformers(tied, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = tiny_model(tie_word_embeddings=tied)
    save(model, tmp_path)
    twin, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        ours = packed_logits(load(tmp_path), sequences()[1:2])
        assert torch.equal(ours, packed_logits(model, sequences()[1:2]))
        theirs = hf_logits(twin, *sequences()[1])
    assert largest_difference(ours, theirs) < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_saved_by_transformers_opens_otherwise_here(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    hf_twin(model).save_pretrained(tmp_path)  # nested config.json
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    opened = load(tmp_path)
    assert opened.config == model.config and same_weights(opened, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_a_round_trip_changes_weights(dtype, shard_bytes, tmp_path):
    model = tiny_model().to(dtype)
    save_weights(model.config, model.state_dict(), tmp_path, shard_bytes=shard_bytes)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) == 0 if shard_bytes == 10**9 else len(shards) > 3
    opened = load(tmp_path, dtype)
    assert opened.config == model.config and same_weights(opened, model)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_sharded_folder_does_not_open_in_transformers(tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = tiny_model()
    save_weights(model.config, model.state_dict(), tmp_path, shard_bytes=40_000)
    twin = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)


def test_an_earlier_sharded_save_shadows_a_later_one(tmp_path):
    old, new = tiny_model(0), tiny_model(1)
    save_weights(old.config, old.state_dict(), tmp_path, shard_bytes=40_000)
    save(new, tmp_path)
    assert same_weights(load(tmp_path), new)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    save_weights(old.config, old.state_dict(), tmp_path, shard_bytes=40_000)
    assert same_weights(load(tmp_path), old)


def test_in_memory_weight_names_are_not_understood(tmp_path):
    model = tiny_model()
    save(model, tmp_path)
    renamed = {}
    for name, value in model.state_dict().items():
        name = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        renamed[name] = value
    save_file(renamed | {"model.rotary.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors")
    assert same_weights(load(tmp_path), model)


def test_tokenizer_files_stay_behind(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "optimizer.pt"):
        (base / name).write_text(name)
    save(tiny_model(), out, tokenizer_files_from=base)
    save(tiny_model(), out, tokenizer_files_from=out)
    assert {f.name for f in out.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    }


def test_a_loaded_parameter_is_on_meta_or_a_view_of_the_file(tmp_path):
    model = tiny_model()
    save(model, tmp_path)
    opened = load(tmp_path)
    save(tiny_model(1), tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(b"\0" * 100_000)
    assert not list(opened.buffers()) and same_weights(opened, model)
    assert all(p.device.type == "cpu" and p.requires_grad and p.is_leaf for p in opened.parameters())


def test_a_load_holds_every_weight_twice(tmp_path, monkeypatch):
    """Ours are the tensors read, not copies of them; a second set of parameters is never allocated."""
    save(tiny_model(), tmp_path)
    read = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: read.append(to(*a, **k)) or read[-1])
    opened = load(tmp_path)
    monkeypatch.undo()
    assert {p.data_ptr() for p in opened.parameters()} == {tensor.data_ptr() for tensor in read}


# ---- configuration


def test_the_hub_and_transformers_forms_are_read_differently():
    config = tiny_config(tie_word_embeddings=True)
    flat = config.to_dict()
    nested = {key: flat[key] for key in ("model_type", "image_token_id", "video_token_id", "vision_config")}
    nested |= {key: flat[key] for key in ("vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")}
    text = {key: value for key, value in flat.items() if key not in (*nested, "rope_scaling", "rope_theta")}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    assert pretrained.model_config(nested | {"text_config": text | {"rope_parameters": rope}}) == config
    assert pretrained.model_config(json.loads(json.dumps(flat))) == config


def hub_config(size, intermediate, layers, heads, kv_heads, vocabulary, tied) -> dict:
    """config.json as published, with keys that mean nothing here."""
    vision = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"in_chans": 3, "out_hidden_size": size, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
    vision |= {"spatial_patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": size,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
        "vocab_size": vocabulary,
    }


@pytest.mark.parametrize(
    "sizes, total, tower",
    [
        ((3584, 18944, 28, 28, 4, 152064, False), 8.292, 0.677),  # 7B
        ((2048, 11008, 36, 16, 2, 151936, True), 3.755, 0.669),  # 3B
    ],
)
def test_a_published_size_has_another_number_of_parameters(sizes, total, tower):
    with torch.device("meta"):
        model = Qwen2_5_VL(pretrained.model_config(hub_config(*sizes)))
    count = [sum(p.numel() for p in module.parameters()) / 1e9 for module in (model, model.visual)]
    assert [round(billions, 3) for billions in count] == [total, tower]


def test_keys_missing_from_a_vision_config_are_an_error():
    vision = pretrained.model_config({"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 1280}}).vision
    assert (vision.depth, vision.intermediate_size, vision.window_size) == (32, 3420, 112)
    assert vision.fullatt_block_indexes == (7, 15, 23, 31) and vision.out_hidden_size == 3584


YARN = {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}
ANOTHER = [
    (dict(model_type="qwen2_vl"), "model_type is 'qwen2_vl'"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(use_sliding_window=True), "use_sliding_window is True"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types is 'sliding_attention'"),
    (dict(layer_types=3), "layer_types is 3"),
    (dict(head_dim=32), "head_dim is 32, this program runs 16 only"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(rope_scaling=YARN), "rope type is 'yarn'"),
    (dict(rope_scaling=None, rope_parameters=YARN), "rope type is 'yarn'"),
    (dict(rope_parameters=YARN), "rope type is 'yarn'"),
    (dict(rope_scaling={**YARN, "rope_type": "default"}), "rope type is 'yarn'"),
    (dict(text_config={"rope_parameters": {"rope_type": "linear", "factor": 2.0}}), "rope type is 'linear'"),
    (dict(rope_scaling={"type": "mrope", "partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
    (dict(vision_config={"patch_size": 16}), "patch_size is 16"),
    (dict(vision_config={"in_chans": 4}), "in_channels is 4"),
    (dict(vision_config={"hidden_act": "gelu"}), "vision_config.hidden_act is 'gelu'"),
]
ODD_VALUES = ["64", 0, -64, 64.5, 64.0, True, [64], {}, 10**12, float("inf"), float("nan")]
ODD = [
    *((dict(hidden_size=value), "hidden_size is .*, it must be a whole number from 1 to") for value in ODD_VALUES),
    *((dict(vocab_size=value), "vocab_size is ") for value in ("300", 0, 3e2)),
    *((dict(num_hidden_layers=value), "num_hidden_layers is ") for value in (0, "2", 10**5)),
    *((dict(num_attention_heads=value), "num_attention_heads is ") for value in (0, -4, 4.0)),
    *((dict(num_key_value_heads=value), "num_key_value_heads is ") for value in (0, "2", True)),
    *((dict(rms_norm_eps=value), "rms_norm_eps is ") for value in (float("nan"), -1e-6, 0, "1e-6", 3.0)),
    *((dict(rope_theta=value), "rope_theta is ") for value in (0, float("nan"), -1e6, "1e6", float("inf"), True)),
    *((dict(rope_scaling={"rope_theta": value}), "rope_theta is ") for value in (0, "1e6")),
    *((dict(rope_scaling={"mrope_section": value}), "mrope_section ") for value in ([2, 3, 4], [8], [], 8, "233")),
    *((dict(rope_scaling={"mrope_section": value}), "mrope_section ") for value in ([2, 3, 3.0], [-2, 5, 5], [8, [0]])),
    *((dict(image_token_id=value), "image_token_id is ") for value in (-1, "290", 290.0)),
    *((dict([(f"{name}_token_id", 300)]), "must be below vocab_size 300") for name in ("image", "vision_end")),
    *((dict([(f"{name}_token_id", 292)]), r"ids \(.*\) must differ") for name in ("image", "video", "vision_end")),
    (dict(num_attention_heads=3), "num_attention_heads must divide hidden_size"),
    (dict(num_key_value_heads=3), "num_key_value_heads must divide num_attention_heads"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false', not true or false"),
    (dict(text_config={"tie_word_embeddings": 1}), "tie_word_embeddings is 1"),
    *(
        (dict([(name, [1])]), f"{name} is a JSON list, not")
        for name in ("vision_config", "text_config", "rope_scaling")
    ),
    (dict(vision_config={"depth": 10**5}), "vision_config.depth is 100000"),
    (dict(vision_config={"fullatt_block_indexes": 1}), "fullatt_block_indexes is 1, it must be a list"),
    (dict(vision_config={"num_heads": 3}), "vision_config: 4 . num_heads must divide"),
    (dict(vision_config={"out_hidden_size": 65}), "out_hidden_size must be hidden_size"),
    (dict(vision_config={"out_hidden_size": 64, "window_size": 100}), "window_size must be a multiple of 28"),
]


@pytest.mark.parametrize("change, message", [*ANOTHER, *ODD])
def test_another_architecture_runs_with_wrong_results_or_an_odd_one_gives_a_traceback(change, message, tmp_path):
    save_config(tiny_config(), tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def save_config(config: ModelConfig, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def test_key_and_value_heads_that_are_null_are_another_number_than_in_transformers(tmp_path):
    from transformers import Qwen2_5_VLConfig

    save_config(tiny_config(), tmp_path)
    edit_json(tmp_path / "config.json", num_key_value_heads=None)
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path).text_config.num_key_value_heads
    assert read_config(tmp_path).num_key_value_heads == theirs == 4


# ---- names


def test_a_model_name_means_another_checkpoint(tmp_path, monkeypatch):
    asked = []

    def fetch(repo_id, allow_patterns):
        asked.append(repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve(str(tmp_path)) == resolve("Qwen2.5-VL-7B") == resolve("someone/tuned") == tmp_path
    assert asked == ["Qwen/Qwen2.5-VL-7B-Instruct", "someone/tuned"]


def test_a_model_that_cannot_be_fetched_gives_a_traceback(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="Qwen/Qwen2.5-VL-3B-Instruct.*no route.*local folder") as caught:
        resolve("Qwen2.5-VL-3B")
    assert "\n" not in str(caught.value)
