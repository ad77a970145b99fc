"""Adapters' folders: read and written in PEFT's form, refused where they are something else, told from other bases'."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    conversation,
    each_family,
    edit_json,
    hf_logits,
    hf_twin,
    packed_logits,
    random_adapter,
    random_image,
    refused,
    report,
    tiny_model,
    with_adapters,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmsr import lora
from mmsr.pretrained import adapter as module
from mmsr.pretrained.adapter import CONFIG, DIGEST, WEIGHTS, base_digest, check_base, read_adapter, write_adapter
from mmsr.pretrained.save import save, save_weights


def talk():
    return conversation(3, 5, random_image(8, 12), 9, random_image(4, 4), 3)


A, B = "model.layers.0.self_attn.q_proj.lora_A", "model.layers.0.self_attn.q_proj.lora_B"  # ends of stored names
ROUNDING = 2e-6  # of float32, in which a processor with AVX2 alone comes to 1.0e-6


def read_into(folder: Path, model):
    """`model` with the adapter in a folder."""
    layers = lora.linear_layers(model)
    for name, (a, b, scale) in read_adapter(folder, layers).layers.items():
        lora.add_adapter(layers[name], a, b, scale)
    return model


@torch.no_grad()
def difference(ours, theirs) -> float:
    """Between the logits of a model of ours and one of transformers, as a share of the logits: Frobenius norms."""
    expected = hf_logits(theirs, *talk())
    return ((packed_logits(ours, [talk()]) - expected).norm() / expected.norm()).item()


def renamed(folder: Path, rename) -> None:
    """The adapter in a folder with other names of its tensors."""
    tensors = load_file(folder / WEIGHTS)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def as_before_4_52(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


# ---- PEFT

TARGETS = {
    "the decoder": [()],
    "one layer of a decoder whose tower has layers of that name": [("gate_proj",)],
    "the tower": [("vision",)],
    "one block": [("model.layers.1", "visual.blocks.0")],
    "several ranks and scales": [("q_proj", "vision.qkv"), ("v_proj", "merger"), ("down_proj",)],
}


@each_family
@pytest.mark.first_is_quick
@pytest.mark.parametrize("which", TARGETS)
def test_peft_adapts_other_layers_than_ours_or_computes_something_else(which, tmp_path, record_property):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    for i, targets in enumerate(TARGETS[which]):
        with_adapters(model, targets, rank=2 + i, alpha=(8.0, 5.5, 32.0)[i])
    write_adapter(tmp_path, lora.adapted(model), "Qwen/Qwen2.5-VL-7B-Instruct", "digest")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that are missing, of patterns that match nothing
        theirs = peft.PeftModel.from_pretrained(hf_twin(tiny_model()), tmp_path)
    adapted = [name for name, layer in theirs.named_modules() if isinstance(layer, peft.tuners.lora.Linear)]
    assert len(adapted) == len(lora.adapted(model))
    worst = difference(model, theirs)
    report(record_property, f"logits in PEFT, {which}", worst)
    assert worst < ROUNDING and difference(tiny_model(), theirs) > 1e-3
    for name, layer in lora.adapted(read_into(tmp_path, tiny_model())).items():
        written = lora.adapted(model)[name]
        assert torch.equal(layer.lora_A, written.lora_A) and torch.equal(layer.lora_B, written.lora_B)
        assert layer.scale == written.scale


THEIRS = {
    "all linear layers": dict(target_modules="all-linear", r=4, lora_alpha=8),
    "a regular expression": dict(target_modules=r".*language_model.*\.(q_proj|up_proj)", r=2, lora_alpha=4),
    "patterns and rslora": dict(
        target_modules=["q_proj", "v_proj", "qkv"],
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"v_proj": 3, r"^model\.visual.*qkv": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 5},
    ),
}


@pytest.mark.parametrize(
    "each_family, names",
    [("qwen3", "of today"), *(("qwen2_5", names) for names in ("of today", "before 4.52", "with the adapter's own"))],
    indirect=["each_family"],
)
@pytest.mark.parametrize("which", THEIRS)
def test_an_adapter_of_peft_computes_something_else(each_family, which, names, tmp_path, record_property):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.LoraConfig(**THEIRS[which], init_lora_weights=False)
        theirs = peft.get_peft_model(hf_twin(tiny_model()), wanted)
    theirs.save_pretrained(tmp_path)
    if names == "before 4.52":
        renamed(tmp_path, as_before_4_52)
        # Patterns are of the saved model's names, and these would be other ones.
        edit_json(
            tmp_path / CONFIG, rank_pattern={k.replace("model\\.", ""): v for k, v in wanted.rank_pattern.items()}
        )
    elif names == "with the adapter's own":
        renamed(tmp_path, lambda name: name.replace(".weight", ".default.weight"))
    worst = difference(read_into(tmp_path, tiny_model()), theirs.eval())
    report(record_property, f"logits of PEFT's adapter, {which}, names {names}", worst)
    assert worst < ROUNDING


def test_half_precision_tensors_are_cast_wrongly_or_stay_views_of_the_file(tmp_path):
    model = with_adapters(tiny_model(), ("q_proj",))
    write_adapter(tmp_path, lora.adapted(model), "", "")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
        save_file(tensors, tmp_path / WEIGHTS)
        found = read_adapter(tmp_path, lora.linear_layers(tiny_model()))
        (tmp_path / WEIGHTS).write_bytes(bytes(os.path.getsize(tmp_path / WEIGHTS)))
        for name, tensor in tensors.items():
            pair = found.layers[as_before_4_52(name.split(".", 2)[2]).rpartition(".lora_")[0]]
            read = pair["AB".index(name[-8])]
            assert read.dtype == torch.float32 and torch.equal(read, tensor.float())
        write_adapter(tmp_path, lora.adapted(model), "", "")


# ---- what is refused


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter of all of the decoder."""
    write_adapter(tmp_path / "adapter", lora.adapted(with_adapters(tiny_model())), "someone/base", "digest")
    return tmp_path / "adapter"


def says(**values):
    return lambda folder: edit_json(folder / CONFIG, **values)


def tensors(change):
    """`change` of the tensors, by their names without what all begin with."""

    def spoil(folder: Path):
        begin = "base_model.model.model.language_model."
        found = {name.removeprefix(begin): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
        change(found)
        save_file({begin + name: tensor for name, tensor in found.items()}, folder / WEIGHTS)

    return spoil


def poisoned(value: float):
    def change(found):
        found["layers.0.self_attn.q_proj.lora_A.weight"][1, 63] = value

    return tensors(change)


def cut(folder: Path):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def pickled(folder: Path):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def without(name: str):
    return lambda folder: (folder / name).unlink()


def moves(old: str, new: str):
    return lambda folder: renamed(folder, lambda name: name.replace(old, new))


def inside(folder: Path):
    (folder / "adapter").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / "adapter" / name)


def a_run(folder: Path):
    without(CONFIG)(folder)
    (folder / "metrics.jsonl").touch()


def a_model(folder: Path):
    without(CONFIG)(folder)
    without(WEIGHTS)(folder)
    save(tiny_model(), folder)


Q = "layers.0.self_attn.q_proj.lora_A.weight"
UNFIT = {
    "no adapter_config.json": (without(CONFIG), "has no adapter_config.json"),
    "a run's folder": (inside, "is no adapter's folder, but .*adapter/adapter is: give that"),
    "a run that has not ended": (a_run, "is a run's folder without adapter/: .*--lora.*--resume"),
    "a whole model": (a_model, "holds a whole model, no adapter: give it as --model"),
    "damaged JSON": (lambda folder: (folder / CONFIG).write_text('{"r": 2'), "adapter_config.json is not valid JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "not an object"),
    "pickled tensors": (pickled, "pickled adapter.*save it again"),
    "no tensors": (without(WEIGHTS), "no adapter_model.safetensors"),
    "none in the file": (tensors(lambda found: found.clear()), "holds no tensors"),
    "cut short": (cut, "truncated or corrupt"),
    "no kind": (says(peft_type=None), "peft_type is None, and only LORA"),
    "another kind": (says(peft_type="IA3"), "peft_type is IA3, and only LORA is read here: merge it"),
    "DoRA": (says(use_dora=True), "use_dora makes it DoRA"),
    "aLoRA": (says(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens makes it aLoRA"),
    "biases of its own": (says(lora_bias=True), "lora_bias makes it an adapter with biases"),
    "the base's biases": (says(bias="all"), "bias is all"),
    "layers beside it": (says(modules_to_save=["lm_head"]), "modules_to_save makes it"),
    "tokens beside it": (says(trainable_token_indices=[7]), "trainable_token_indices makes it"),
    "repeated layers": (says(layer_replication=[[0, 2], [1, 2]]), "layer_replication makes it"),
    "PiSSA": (says(init_lora_weights="pissa_niter_4"), "init_lora_weights is pissa_niter_4, which changes the base"),
    "OLoRA": (says(init_lora_weights="olora"), "init_lora_weights is olora, which changes .*initial_model"),
    "CorDA": (says(init_lora_weights="corda"), "init_lora_weights is corda"),
    "LoftQ": (says(init_lora_weights="loftq"), "init_lora_weights is loftq"),
    "no rank": (says(r=None), "r is None, not a number"),
    "a rank in words": (says(r="two"), "r is two, not a number"),
    "no α": (says(lora_alpha=True), "lora_alpha is True, not a number"),
    "a pattern that is a list": (says(rank_pattern=["q_proj"]), "rank_pattern is no object"),
    "a pattern of no regular expression": (says(alpha_pattern={"(": 3}), r"\( is no regular expression"),
    "a pattern of words": (says(alpha_pattern={"q_proj": "3"}), "q_proj is 3, not a number"),
    "another rank": (says(r=4), r"lora_A.weight has shape \(2, \d+\), and .*adapter_config.json gives it rank 4"),
    "A alone": (
        tensors(lambda found: found.pop(Q.replace("_A", "_B"))),
        "model.layers.0.self_attn.q_proj has lora_A and no lora_B",
    ),
    "B alone": (tensors(lambda found: found.pop(Q)), "q_proj has lora_B and no lora_A"),
    "a wider model": (
        tensors(lambda found: found.update({Q: torch.ones(2, 3584)})),
        r"q_proj.lora_A.weight has shape \(2, 3584\), the model needs \(2, 64\): .* give its base, someone/base",
    ),
    "a narrower model": (
        tensors(lambda found: found.update({Q.replace("_A", "_B"): torch.ones(32, 2)})),
        r"lora_B.weight has shape \(32, 2\), the model needs \(64, 2\): .* give its base, someone/base",
    ),
    "a deeper model": (
        moves("layers.1.", "layers.35."),
        r"7 of its 14 layers are not in the model \(model.language_model.layers.35.* give its base, someone/base",
    ),
    "another architecture": (moves("language_model.", ""), None),  # the names before 4.52: read
    "the head": (moves("model.language_model.layers.0.self_attn.q_proj", "lm_head"), "lm_head has no adapter here"),
    "the embedding": (moves("lora_A.weight", "lora_embedding_A"), "lora_embedding_A .* is not of plain LoRA: merge it"),
    "DoRA's tensors": (moves("lora_A.weight", "lora_magnitude_vector"), "is not of plain LoRA"),
    "whole layers": (moves("lora_A.weight", "weight"), "is not of plain LoRA"),
    "whole numbers": (tensors(lambda found: found.update({Q: torch.ones(2, 64, dtype=torch.int8)})), r"\(I8\)"),
    "a layer by two names": (
        lambda folder: save_file(
            load_file(folder / WEIGHTS) | {"base_model.model.model." + Q: torch.ones(2, 64)}, folder / WEIGHTS
        ),
        "is there twice, by two names",
    ),
    "NaN": (poisoned(float("nan")), "q_proj.lora_A.weight holds NaN or infinite numbers"),
    "infinity": (poisoned(float("inf")), "holds NaN or infinite numbers"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_an_unfit_adapter_is_taken_or_gives_a_traceback(what, folder):
    spoil, said = UNFIT[what]
    spoil(folder)
    if said is None:
        assert len(read_adapter(folder, lora.linear_layers(tiny_model())).layers) == 14
        return
    with pytest.raises(module.UserError, match=said) as caught:
        read_adapter(folder, lora.linear_layers(tiny_model()))
    print(caught.value)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_what_is_not_used_of_an_adapter_is_not_said(folder):
    layers = lora.linear_layers(tiny_model())
    assert read_adapter(folder, layers).notes(training=True) == []
    edit_json(folder / CONFIG, lora_dropout=0.05, lorap_emb_lr=1e-6, some_field=None)
    found = read_adapter(folder, layers)
    unknown, dropout = found.notes(training=True)
    assert (
        "has lorap_emb_lr, not known here: not used" in unknown and "lora_dropout 0.05: nothing is dropped" in dropout
    )
    assert found.notes(training=False) == [unknown]


# ---- saves that are killed


@pytest.mark.parametrize("dies", range(3))
@pytest.mark.parametrize("same", [True, False])
def test_a_killed_save_leaves_two_files_that_do_not_belong_together(same, dies, folder, monkeypatch):
    layers = lora.linear_layers(tiny_model())
    before = read_adapter(folder, layers)
    model = with_adapters(tiny_model(), rank=2 if same else 3)
    for layer in lora.adapted(model).values():
        layer.lora_B.data.fill_(7)
    writes = []
    whole = module.write_whole

    def write(path, pieces):
        writes.append(path.name)
        if len(writes) == dies + 1:
            raise KeyboardInterrupt
        whole(path, pieces)

    monkeypatch.setattr(module, "write_whole", write)
    try:
        write_adapter(folder, lora.adapted(model), "someone/base", "digest")
    except KeyboardInterrupt:
        pass
    assert writes[: dies + 1] == [WEIGHTS, CONFIG][: dies + 1]
    if not same and dies < 2:
        refused(lambda: read_adapter(folder, layers), f"has no {CONFIG}")
        return
    found = read_adapter(folder, layers)
    for name, (a, b, scale) in found.layers.items():
        assert scale == 8.0 / len(a) and (b == 7).all() == (dies > 0)
        assert dies or torch.equal(b, before.layers[name][1])


# ---- the base


@pytest.fixture
def base(tmp_path) -> Path:
    save(tiny_model(tie_word_embeddings=True), tmp_path / "base")
    return tmp_path / "base"


def test_the_same_base_in_another_form_is_another_one(base, tmp_path):
    model = tiny_model(tie_word_embeddings=True).bfloat16()
    save(model, base)
    weights = model.state_dict()
    digest = base_digest(base)
    wider = {name: weight.float() for name, weight in weights.items()}
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    renamed = {name.replace("visual.", "model.visual."): weight for name, weight in weights.items()}
    forms = {
        "fp32": wider,
        "with a head": weights | head,
        "other names": renamed,
        "backwards": dict(reversed(wider.items())),
    }
    for name, form in forms.items():
        save_weights(model.config, form, tmp_path / name)
        assert base_digest(tmp_path / name) == digest, name
    save_weights(model.config, weights, tmp_path / "shards", shard_bytes=40_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3 and base_digest(tmp_path / "shards") == digest


def test_another_base_has_the_same_digest(base, tmp_path):
    """Another seed, one with one adapter merged, with one norm changed by a step, and with a head of its own."""
    model = tiny_model(tie_word_embeddings=True)
    digests = [base_digest(base)]
    adapted = with_adapters(tiny_model(tie_word_embeddings=True), ("model.layers.1.mlp.up_proj",), rank=1)
    merged = lora.merge(adapted.state_dict(), adapted)
    stepped = model.state_dict() | {"model.norm.weight": model.model.norm.weight.detach() + 1e-6}
    other = tiny_model(1, tie_word_embeddings=True).state_dict()
    for i, weights in enumerate((merged, stepped, other)):
        save_weights(model.config, weights, tmp_path / str(i))
        digests.append(base_digest(tmp_path / str(i)))
    config = replace(model.config, tie_word_embeddings=False)
    head = {"lm_head.weight": model.model.embed_tokens.weight.detach() + 1}
    save_weights(config, model.state_dict() | head, tmp_path / "head")
    digests.append(base_digest(tmp_path / "head"))
    assert len(set(digests)) == 5


def test_an_adapter_is_taken_by_another_base(base, tmp_path):
    save(tiny_model(1, tie_word_embeddings=True), tmp_path / "other")
    adapter = random_adapter(tmp_path / "adapter", base)
    found = read_adapter(adapter, lora.linear_layers(tiny_model()))
    said: list[str] = []
    check_base(found, base, str(base), said.append)
    assert not said
    wrong = f"{adapter}: its base is {base}, and someone/other has other weights: give {base} as --model"
    refused(lambda: check_base(found, tmp_path / "other", "someone/other", said.append), wrong)
    save(tiny_model(2, tie_word_embeddings=True), base)
    refused(
        lambda: check_base(found, base, str(base), said.append), f"is {base}, but has other weights by now: restore"
    )
    check_base(replace(found, digest=""), base, "someone/tuned", said.append)
    (line,) = said
    assert f"it names {found.settings.base} as its base; whether someone/tuned has the same weights cannot be" in line


def test_the_digest_of_the_base_is_lost_in_the_file_or_offends_peft(base, tmp_path):
    adapter = random_adapter(tmp_path / "adapter", base)
    with safe_open(adapter / WEIGHTS, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt", DIGEST: base_digest(base)}
        assert all(stored.get_tensor(name).dtype == torch.float32 for name in stored.keys())
    config = json.loads((adapter / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base) and config["task_type"] == "CAUSAL_LM"
    peft = pytest.importorskip("peft")
    assert peft.LoraConfig.from_pretrained(adapter).r == 2
    assert len(peft.utils.load_peft_weights(str(adapter))) == 28
