"""A tool that looks closer: the model names a box, and sees that part of the picture at full size.

    python train.py --model Qwen2.5-VL-7B --tools zoom --max-turns 6

The box is as in `crop.py`. The part has the pixels of the file, of which the picture of the question may show fewer
(`--max-pixels`). Looking is no search: it costs no penalty, and a rollout's shape is judged without it.
"""

from mmsr.episode import Hit, Observation
from mmsr.more_tools.crop import crop
from mmsr.system.images import decode
from mmsr.tools import Backend, Call, Tool

ZOOM = "zoom"


def tools(backend: Backend) -> list[Tool]:
    def run(call: Call) -> Observation:
        picture = decode(call.image, upright=False)  # the pixels that the model sees
        part = crop(picture, call.query, upright=False)
        if part is None:  # not a box: the model's mistake, which finds nothing
            return Observation(source=ZOOM)
        return Observation((Hit(image=part),), source=ZOOM)

    return [Tool(ZOOM, ZOOM, limit=4, run=run, is_search=False, full_size=True)]
