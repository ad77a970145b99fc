"""Tiny models and pictures that several tests share, and the same model built by transformers."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from mmsr import lora
from mmsr.attention import Packed
from mmsr.model import ModelConfig, VLModel, logits, mrope_positions, random_model
from mmsr.pretrained.adapter import base_digest, write_adapter
from mmsr.pretrained.load import skeleton
from mmsr.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig
from mmsr.system.errors import UserError
from mmsr.vision import Image, VisionConfig, to_image

torch.set_num_threads(1)  # on tensors this small a second thread only waits: five times the time on a busy machine

IMAGE = 290  # the tiny vocabulary's placeholder
FAMILIES = ("qwen2_5", "qwen3")
FAMILY = "qwen2_5"  # of the models and pictures that are made here; the fixture `each_family` sets it
each_family = pytest.mark.usefixtures("each_family")  # of a test that runs once with each of them

# Real files, which not every machine has.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FVQA = SHARED / "fvqa_sample.parquet"
TRANSCRIPTS = SHARED / "mmsearch_r1_7b_transcripts.jsonl"
real_files = pytest.mark.skipif(
    not (FVQA.exists() and TRANSCRIPTS.exists()), reason=f"{FVQA.name} and {TRANSCRIPTS.name} are not in {SHARED}"
)


def of_family(**values):
    """What a test needs of its own for each family: of_family(qwen2_5=…, qwen3=…)."""
    return values[FAMILY]


def refused(work, *words: str) -> None:
    """`work()` must raise a UserError of one line that holds all these words."""
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def in_threads(*works) -> None:
    """Call these functions at the same time, and wait for them: a minute at most."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def tiny_config(**changes) -> ModelConfig:
    """Grouped heads; untied unless `changes` say otherwise.

    Qwen2.5-VL: window and full blocks, windows of 4 x 4 tokens. Qwen3-VL: heads that are wider than their share of the
    hidden size, a table of 6 x 6 places, two DeepStack levels.
    """
    tower = dict(depth=3, hidden_size=32, intermediate_size=44, num_heads=2, out_hidden_size=64)
    family = ModelConfig
    of_family = dict(
        mrope_section=(2, 3, 3), num_hidden_layers=2, vision=VisionConfig(**tower, fullatt_block_indexes=(1,))
    )
    if FAMILY == "qwen3":
        family = Qwen3VLConfig
        vision = Qwen3VisionConfig(**tower, num_position_embeddings=36, deepstack_visual_indexes=(0, 2))
        of_family = dict(mrope_section=(4, 4, 4), head_dim=24, num_hidden_layers=3, vision=vision)
    config = family(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        image_token_id=IMAGE,
        video_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
        **of_family,
    )
    return replace(config, **changes)


def tiny_model(seed: int = 0, **changes) -> VLModel:
    """Weights an order of magnitude larger than a fresh model's, so that no part of it can be wrong unnoticed."""
    model = random_model(tiny_config(**changes), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.2 if parameter.ndim == 1 else 0.1)
    return model


def with_adapters(
    model: VLModel,
    targets: Sequence[str] = (),
    rank: int = 2,
    alpha: float = 8.0,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    seed: int = 0,
) -> VLModel:
    """The model with adapters, their B not zero, and all else frozen. `ranks`, `alphas`: by the last part of a name."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = lora.linear_layers(model)
    for name in lora.targeted(layers, targets):
        last = name.rpartition(".")[2]
        r = (ranks or {}).get(last, rank)
        a, b = lora.initial(layers[name], name, r, seed)
        b.normal_(0, 0.05, generator=generator)
        place = layers[name].weight.device
        place = torch.device("cpu") if place.type == "meta" else place
        lora.add_adapter(layers[name], a.to(place), b.to(place), (alphas or {}).get(last, alpha) / r)
    return model


def random_adapter(folder: Path, base: Path, *targets: str, base_named: str = "") -> Path:
    """`folder`, with an adapter for the model in the folder `base`."""
    model = with_adapters(skeleton(base), targets)
    write_adapter(folder, lora.adapted(model), base_named or str(base), base_digest(base))
    return folder


def hf_twin(model: VLModel):
    """transformers' model with copies of the same weights, fp32, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(**model.config.to_dict())
    twin = AutoModelForImageTextToText.from_config(config).float().eval()
    weights = {}
    for name, value in model.state_dict().items():
        if lora.is_adapter(name):
            continue
        renamed = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        weights["model." + name if name.startswith("visual.") else renamed] = value.clone()
    unset = twin.load_state_dict(weights, strict=False)
    assert not unset.unexpected_keys and set(unset.missing_keys) <= {"lm_head.weight"}  # tied: the embedding serves
    twin.tie_weights()
    return twin


def random_image(rows: int, columns: int, seed: int = 0) -> Image:
    """A picture of noise, `rows` x `columns` patches."""
    processor = tiny_config().vision.processor
    size = (rows * processor.patch, columns * processor.patch, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return to_image(pixels, f"noise {rows} x {columns}, seed {seed}", processor)


def picture_bytes(width: int, height: int, mode: str = "RGB", format: str = "PNG", seed: int = 0) -> bytes:
    """An encoded picture file of noise."""
    bands = len(PIL.Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise.squeeze(-1) if bands == 1 else noise, mode).save(file, format)
    return file.getvalue()


def conversation(seed: int, *pieces: int | Image) -> tuple[Tensor, list[tuple[int, Image]]]:
    """Token ids (N,) and pictures with their offsets, from pieces: a number of random text tokens, or a picture."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    images = []
    for piece in pieces:
        if isinstance(piece, Image):
            images.append((len(ids), piece))
            ids += [IMAGE] * piece.tokens
        else:
            ids += torch.randint(0, IMAGE, (piece,), generator=generator).tolist()
    return torch.tensor(ids), images


def positions(ids: Tensor, images: list[tuple[int, Image]]) -> Tensor:
    """(3, N)"""
    return mrope_positions(len(ids), [(offset, image.grid) for offset, image in images])[0]


def packed_logits(model: VLModel, sequences: list[tuple[Tensor, list[tuple[int, Image]]]]) -> Tensor:
    """Logits (N, V) of whole sequences in one packed pass, wherever the model is."""
    device = model.head_weight.device
    ids = torch.cat([ids for ids, _ in sequences]).to(device)
    where = torch.cat([positions(*sequence) for sequence in sequences], 1).to(device)
    pictures = [image for _, images in sequences for _, image in images]
    features = model.encode_images(pictures) if pictures else None
    index = (ids == IMAGE).nonzero()[:, 0] if pictures else None
    attention_fn = Packed([len(ids) for ids, _ in sequences], device)
    return model(ids, where, attention_fn, features, index, head_fn=logits)


def hf_logits(twin, ids: Tensor, images: list[tuple[int, Image]]) -> Tensor:
    """Logits (N, V) of one sequence by transformers. Without explicit positions it would fall back to 1-D ones."""
    inputs = {"input_ids": ids[None], "position_ids": positions(ids, images)[:, None]}
    if images:
        inputs["pixel_values"] = torch.cat([image.patches for _, image in images])
        inputs["image_grid_thw"] = torch.tensor([(1, *image.grid) for _, image in images])
    return twin(**{name: value.to(twin.device) for name, value in inputs.items()}).logits[0]


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours.double() - theirs.double()).abs().max().item()


class SGD:
    """Plain gradient descent in the place of a trainer's optimizer: what it does can be worked out by hand."""

    def __init__(self, model: nn.Module):
        self.model = model

    def expect(self, passes: int) -> None:
        pass

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad


def report(record_property, what: str, value: float) -> None:
    """A measured difference, into the JUnit file and (with -s or on failure) onto the screen."""
    record_property(what, float(value))
    print(f"largest difference, {what}: {value:.2e}")


def edit_json(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def documented(section: str) -> set[str]:
    """The keys that docs/files.md lists in the table of a section: what stands in its first column in backticks."""
    page = (Path(__file__).parents[1] / "docs" / "files.md").read_text("utf-8")
    (found,) = (part for part in page.split("\n## ") if part.startswith(section))
    return {key for line in re.findall(r"^\| `.*?` \|", found, re.MULTILINE) for key in re.findall("`(.*?)`", line)}


# (query, page that it has to find first among all of these)
SEARCHES = [
    ("塔霍河上有什么桥？", "这座悬索桥横跨塔霍河，连接里斯本与阿尔马达。"),
    ("埃菲尔铁塔是谁设计的", "埃菲尔铁塔由古斯塔夫·埃菲尔的公司设计，建成于1889年。"),
    ("iPhone手机 发布", "2007年苹果发布了第一代iPhone手机。"),
    ("東京タワーの高さ", "東京タワーは港区にある高さ333メートルの電波塔です。"),
    ("ｹﾞｰﾑ会社", "任天堂は京都市に本社を置くゲーム会社である。"),
    ("富士山 標高", "日本最高峰の富士山は、標高3776メートルの火山である。"),
    ("한강에 있는 다리", "서울을 가로지르는 한강에는 서른 개가 넘는 다리가 놓여 있다."),
    ("경복궁", "조선의 법궁인 경복궁은 1395년에 지어졌다."),
    ("วัดพระแก้วอยู่ที่ไหน", "พระบรมมหาราชวังและวัดพระแก้วตั้งอยู่ในกรุงเทพมหานคร"),
    ("ພະທາດຫຼວງ", "ພະທາດຫຼວງແມ່ນສັນຍາລັກຂອງປະເທດລາວ"),
    ("អង្គរវត្ត", "ប្រាសាទអង្គរវត្តស្ថិតនៅខេត្តសៀមរាប"),
    ("ရွှေတိဂုံဘုရား", "ရန်ကုန်မြို့ရှိရွှေတိဂုံဘုရားသည်ထင်ရှားသည်"),
    ("GROSSE STRASSE", "Die Große Straße führt zum Marktplatz von Osnabrück."),
    ("Floss Donau", "Er baute ein Floß und fuhr die Donau hinab."),
    ("izmir saat kulesi", "İZMİR SAAT KULESİ 1901 yılında Konak Meydanı'na yapıldı."),
    ("Isparta gülü", "Isparta'da yetişen gül, parfüm yapımında kullanılır."),
    ("cau rong Da Nang", "Cầu Rồng bắc qua sông Hàn tại thành phố Đà Nẵng."),
    ("العربية", "اللُّغَةُ العَرَبِيَّةُ لُغَةُ القُرآن"),
    ("برج خليفة", "يقع بُرْجُ خَلِيفَة في دبي"),
    ("می‌خواهم", "من میخواهم به اصفهان بروم"),
    ("שלום", "הוא אמר שָׁלוֹם והלך"),
    ("हिन्दी दिवस", "भारत में १४ सितंबर को हिन्दी दिवस मनाया जाता है।"),
    ("தஞ்சை கோயில்", "தஞ்சை பெரிய கோயில் சோழர் காலத்தில் கட்டப்பட்டது"),
    ("fins de siecle Paris", "Le café « Fin de siècle » se trouve à Paris."),
    ("office flow final", "The oﬃce ﬂow chart and the ﬁnal plan."),
    ("Lodz film school", "Łódź has a famous film school."),
    ("елка", "Новогодняя ЁЛКА стоит на площади."),
    ("ακροπολη", "Η ΑΚΡΌΠΟΛΗ των Αθηνών"),
    ("cooperation treaty", "A treaty of coope­ration was signed."),
]
