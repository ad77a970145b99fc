"""A third tool: the model names a box, and that crop of the picture is searched.

    python train.py --model Qwen2.5-VL-7B --search local:my.index --tools crop

The box is x1 y1 x2 y2 in thousandths of the picture's width and height: `<crop_search>500 0 1000 1000</crop_search>`.
Text that is not a box finds nothing: it is the model's mistake, and an exception would count as the search engine's.
"""

import io
import re

import PIL.Image
import PIL.ImageOps

from mmsr.episode import Observation
from mmsr.reward import LEGAL_SHAPES
from mmsr.system.images import decode
from mmsr.tools import Backend, Call, Tool

CROP_SEARCH = "crop_search"
BOX = re.compile(r"\D*(\d{1,4})\D+(\d{1,4})\D+(\d{1,4})\D+(\d{1,4})\D*", re.ASCII)


def tools(backend: Backend) -> list[Tool]:
    def run(call: Call) -> Observation:
        picture = decode(call.image, upright=False)  # the pixels that the model sees
        part = cut(picture, call.query)
        if part is None:
            return Observation(source=CROP_SEARCH)
        upright = PIL.ImageOps.exif_transpose(part)  # as search engines know pictures
        return backend.image_search(as_png(upright), call.question)

    LEGAL_SHAPES.update({(CROP_SEARCH, "answer"), (CROP_SEARCH, "text_search", "answer")})
    return [Tool(CROP_SEARCH, CROP_SEARCH, limit=1, run=run)]


def cut(picture: PIL.Image.Image, query: str) -> PIL.Image.Image | None:
    """The part of a picture that a query names. None where it is not a box, or one without a pixel."""
    numbers = BOX.fullmatch(query)
    if numbers is None:
        return None
    width, height = picture.size
    x1, y1, x2, y2 = [min(int(number), 1000) for number in numbers.groups()]  # in thousandths
    x1 = x1 * width // 1000  # in pixels
    x2 = x2 * width // 1000
    y1 = y1 * height // 1000
    y2 = y2 * height // 1000
    if x1 >= x2 or y1 >= y2:
        return None
    return picture.crop((x1, y1, x2, y2))


def as_png(picture: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
