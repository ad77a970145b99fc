"""A third tool: the model names a box, and that crop of the picture is searched.

    python train.py --model Qwen2.5-VL-7B --tools examples.crop_and_search:tools --prompts examples/crop_prompts

The box is x1 y1 x2 y2 in thousandths of the picture's width and height: `<crop_search>500 0 1000 1000</crop_search>`.
What is no box finds nothing: that is the model's fault, and an exception would be counted as the search engine's.
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
        found = crop(decode(call.image, upright=False), call.query)  # the pixels that the model sees
        return Observation(source=CROP_SEARCH) if found is None else backend.image_search(found, call.question)

    LEGAL_SHAPES.update({(CROP_SEARCH, "answer"), (CROP_SEARCH, "text_search", "answer")})
    return [Tool(CROP_SEARCH, CROP_SEARCH, limit=1, run=run)]


def crop(picture: PIL.Image.Image, query: str) -> bytes | None:
    """The named part of a picture as a PNG file; None where the query is no box, or one without a pixel."""
    numbers, size = BOX.fullmatch(query), (*picture.size, *picture.size)
    if numbers is None:
        return None
    x1, y1, x2, y2 = (min(int(n), 1000) * side // 1000 for n, side in zip(numbers.groups(), size))
    if x1 >= x2 or y1 >= y2:
        return None
    file = io.BytesIO()
    upright = PIL.ImageOps.exif_transpose(picture.crop((x1, y1, x2, y2)))  # search engines know no other pictures
    upright.save(file, "PNG", compress_level=1)
    return file.getvalue()
