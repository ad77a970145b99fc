"""Preprocessing and the vision tower against transformers."""

from __future__ import annotations

import io
import random

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from helpers import each_family, hf_twin, largest_difference, picture_bytes, random_image, report, tiny_model

from mmsr.qwen3_vl import QWEN3_VL, layout
from mmsr.system.images import MAX_FILE_BYTES
from mmsr.vision import (  # fmt: skip
    MAX_PIXELS,
    MIN_PIXELS,
    QWEN2_5_VL,
    Processor,
    image_tokens,
    inverse_frequencies,
    load_image,
    patchify,
    smart_resize,
    window_order,
)

# Rows and columns in patches: one window, windows that do not divide, a strip, a column, a window exactly filled.
GRIDS = [(4, 4), (10, 14), (2, 18), (22, 2), (8, 8), (16, 6)]


# What is unlike the processor's defaults, which are Qwen2-VL's, in the published preprocessor_config.json.
PUBLISHED = {
    QWEN2_5_VL: dict(),
    QWEN3_VL: dict(patch_size=16, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]),
}


def hf_preprocess(picture: PIL.Image.Image, min_pixels: int, max_pixels: int, processor: Processor = QWEN2_5_VL):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor = Qwen2VLImageProcessorPil(size=size, **PUBLISHED[processor])
    out = processor(images=picture, return_tensors="pt")
    return out["pixel_values"], tuple(out["image_grid_thw"][0, 1:].tolist())


@pytest.mark.parametrize("processor", PUBLISHED, ids=lambda processor: f"patch {processor.patch}")
@pytest.mark.parametrize(
    "width, height, min_pixels, max_pixels",
    [
        (97, 61, 56 * 56, 200 * 200),  # odd sides
        (1, 1, 56 * 56, 200 * 200),  # tiny, enlarged to the minimum
        (3, 500, 56 * 56, 200 * 200),  # elongated
        (42, 70, 28 * 28, 10**6),  # sides half-way between multiples: banker's rounding
        (300, 200, 56 * 56, 100 * 100),  # shrunk to the maximum
        (40, 30, 300 * 300, 400 * 400),  # enlarged
        (56, 84, 28 * 28, 10**6),  # already of a size that fits
    ],
)
def test_pixels_differ_from_transformers(width, height, min_pixels, max_pixels, processor, record_property):
    data = picture_bytes(width, height)
    image = load_image(data, min_pixels, max_pixels, processor=processor)
    assert image.tokens == image_tokens(data, min_pixels, max_pixels, processor)
    patches, grid = hf_preprocess(PIL.Image.open(io.BytesIO(data)), min_pixels, max_pixels, processor)
    assert image.grid == grid and image.patches.shape == patches.shape and image.patches.dtype == torch.float32
    difference = largest_difference(image.patches, patches)
    report(record_property, f"pixels of {width} x {height}", difference)
    assert difference == 0


@pytest.mark.parametrize(
    "mode, format", [("L", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("L", "GIF")]
)
def test_a_colour_mode_is_read_differently(mode, format):
    data = picture_bytes(70, 50, mode, format)
    patches, _ = hf_preprocess(PIL.Image.open(io.BytesIO(data)), 56 * 56, 10**6)
    assert torch.equal(load_image(data, 56 * 56, 10**6).patches, patches)


def test_transparent_pixels_show_their_hidden_colour():
    hidden_red = io.BytesIO()
    PIL.Image.new("RGBA", (56, 56), (255, 0, 0, 0)).save(hidden_red, "PNG")
    white = patchify(np.full((56, 56, 3), 255, dtype=np.uint8))
    assert torch.equal(load_image(hidden_red.getvalue()).patches, white)


def test_exif_orientation_turns_the_picture():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    file = io.BytesIO()
    PIL.Image.new("RGB", (112, 56)).save(file, "JPEG", exif=exif)
    asked, thumbnail = load_image(file.getvalue()), load_image(file.getvalue(), upright=True)
    assert asked.grid == (4, 8) and thumbnail.grid == (8, 4) and asked.key != thumbnail.key
    assert image_tokens(file.getvalue()) == 8


def test_16_bit_grey_is_white():
    """The published processor makes it so. A picture of nothing teaches nothing: the one difference to its pixels."""
    values = np.linspace(0, 65535, 56 * 56).reshape(56, 56)
    deep, shallow = io.BytesIO(), io.BytesIO()
    PIL.Image.fromarray(values.astype(np.uint16)).save(deep, "PNG")
    PIL.Image.fromarray((values / 256).astype(np.uint8)).save(shallow, "PNG")
    assert torch.equal(load_image(deep.getvalue()).patches, load_image(shallow.getvalue()).patches)


def test_smart_resize_rounds_otherwise_than_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    draw = random.Random(0)
    for _ in range(2000):
        height, width = draw.randint(1, 900), draw.randint(1, 900)
        if max(height, width) <= 200 * min(height, width):
            limits = (draw.choice([784, 3136, 50_000]), draw.choice([60_000, 200_704, 10**6]))
            assert smart_resize(height, width, *limits) == theirs(height, width, 28, *limits)
            assert smart_resize(height, width, *limits, side=32) == theirs(height, width, 32, *limits)


def test_an_elongated_picture_error_hides_its_numbers():
    with pytest.raises(ValueError, match="1001 x 5 .* 200"):
        smart_resize(5, 1001, MIN_PIXELS, MAX_PIXELS)
    with pytest.raises(ValueError, match="401 x 2 .* 200"):
        load_image(picture_bytes(401, 2))
    assert smart_resize(5, 1000, MIN_PIXELS, MAX_PIXELS)[0] == 28


def bomb(width: int, height: int) -> bytes:
    """A PNG of zeros of that size; a few hundred bytes per million pixels."""
    file = io.BytesIO()
    PIL.Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


GOOD = picture_bytes(60, 60)
BAD_FILES = {
    "empty": (b"", "not a readable"),
    "text": (b"<html>404</html>", "not a readable"),
    "truncated": (GOOD[: len(GOOD) // 2], "not a readable"),
    "broken inside": (GOOD[:200] + b"\0" * 400 + GOOD[600:], "not a readable"),
    "another format": (picture_bytes(60, 60, format="BMP"), "not a readable"),
    "too many bytes": (b"\0" * (MAX_FILE_BYTES + 1), "over the limit"),
    "bomb": (bomb(9000, 9000), "9000 x 9000 is over the limit"),
    "bomb that Pillow refuses too": (bomb(16000, 16000), "not a readable"),
    "line": (bomb(100_000, 1), "aspect ratio"),
}


@pytest.mark.parametrize("what", BAD_FILES)
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bad_picture_file_escapes_as_another_error(what):
    data, message = BAD_FILES[what]
    with pytest.raises(ValueError, match=message) as caught:
        load_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_decoded_before_it_is_refused(monkeypatch):
    decoded = []
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda picture: decoded.append(picture.size))
    for what in ("bomb", "bomb that Pillow refuses too"):
        with pytest.raises(ValueError):
            load_image(BAD_FILES[what][0])
    assert not decoded


def test_damaged_bytes_escape_as_another_error():
    draw = random.Random(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = picture_bytes(40, 40, "L" if format == "GIF" else "RGB", format)
        for _ in range(60):
            damaged = bytearray(whole[: draw.randint(1, len(whole))])
            for _ in range(draw.randint(0, 8)):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            try:
                assert load_image(bytes(damaged), 784, 3136).patches.isfinite().all()
            except ValueError as error:
                assert "\n" not in str(error)


def test_the_same_bytes_at_other_limits_share_a_key():
    keys = {load_image(data, 784, limit).key for data in (GOOD, picture_bytes(60, 60, seed=1)) for limit in (784, 3136)}
    assert len(keys) == 4 and load_image(GOOD, 784, 784).key in keys
    assert load_image(GOOD, 784, 784, processor=QWEN3_VL).key not in keys


def test_patchify_accepts_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match="30 x 28"):
        patchify(np.zeros((28, 30, 3), dtype=np.uint8))


def test_a_window_loses_or_repeats_a_token():
    for grid in GRIDS:
        layout = window_order(grid, 4, 16)
        assert sorted(layout.order.tolist()) == list(range(grid[0] * grid[1] // 4))
        assert sum(layout.lens) == grid[0] * grid[1] == len(layout.angles) and max(layout.lens) <= 64


@each_family
def test_tower_features_differ_from_transformers(record_property):
    model = tiny_model()
    twin = hf_twin(model).model.visual
    images = [random_image(*grid, seed) for seed, grid in enumerate(GRIDS)]
    grids = torch.tensor([(1, *image.grid) for image in images])
    with torch.no_grad():
        found = twin(torch.cat([image.patches for image in images]), grid_thw=grids)
        levels = getattr(found, "deepstack_features", None) or []
        theirs = torch.cat([found.pooler_output, *levels], -1)
        ours = model.encode_images(images)
    difference = largest_difference(ours, theirs) / theirs.abs().max().item()
    report(record_property, "tower features, relative to the largest", difference)
    assert ours.shape == theirs.shape and ours.shape[1] == model.config.vision.feature_size and difference < 1e-5


@each_family
def test_a_picture_sees_its_neighbours_in_the_batch():
    model = tiny_model()
    images = [random_image(*grid, seed) for seed, grid in enumerate(GRIDS)]
    with torch.no_grad():
        together = model.encode_images(images)
        alone = torch.cat([model.encode_images([image]) for image in images])
    assert largest_difference(together, alone) < 1e-5 * alone.abs().max()


@each_family
def test_recomputed_tower_blocks_change_the_gradient():
    gradients = []
    for recompute in (False, True):
        model = tiny_model()
        model.visual.checkpoint_blocks = recompute
        model.encode_images([random_image(10, 6), random_image(4, 4)]).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.visual.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@each_family
def test_a_layout_cached_while_sampling_cannot_be_trained_through():
    window_order.cache_clear()
    layout.cache_clear()
    inverse_frequencies.cache_clear()
    model, images = tiny_model(), [random_image(10, 6)]
    with torch.inference_mode():
        model.encode_images(images)
    model.encode_images(images).sum().backward()
    assert model.visual.patch_embed.proj.weight.grad.abs().max() > 0
