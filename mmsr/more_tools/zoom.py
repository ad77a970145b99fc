"""A tool that looks closer: the model names a box, and sees that part of the picture by itself.

    python train.py --model Qwen2.5-VL-7B --tools zoom --max-turns 6

The box is as in `crop.py`. The part has the pixels of the file, up to `--max-pixels`, where the question's picture was
shrunk to that as a whole: so a look helps with large pictures. Looking is no search: it costs no penalty, and a
rollout's shape is judged without it.
"""

from mmsr.episode import Hit, Observation
from mmsr.more_tools.crop import as_png, cut
from mmsr.system.images import MAX_ASPECT, decode
from mmsr.tools import Backend, Call, Tool

ZOOM = "zoom"
SIDE = 2048  # pixels of a part's longer side, at most: each rollout keeps its parts


def tools(backend: Backend) -> list[Tool]:
    """The tool; it needs no search engine."""

    def run(call: Call) -> Observation:
        part = cut(decode(call.image, upright=False), call.query)  # of the pixels that the model sees
        if part is None or max(part.size) > MAX_ASPECT * min(part.size):  # the model's mistake, which finds nothing
            return Observation(source=ZOOM)
        part.thumbnail((SIDE, SIDE))
        part.info = {}  # a copy of the file's metadata would turn the part
        return Observation((Hit(image=as_png(part)),), source=ZOOM)

    return [Tool(ZOOM, ZOOM, limit=4, run=run, is_search=False, full_size=True)]
