"""Build a data set from 50,000 concepts against a scripted model on loopback: calls a second, and memory at its peak.

    python bench/construct_scale.py                       # 50,000 concepts; about as many minutes as CPU allows
    python bench/construct_scale.py --concepts 2000 --workers 64

The model is another process that answers after `--delay` seconds, and sometimes badly; pictures are drawn on request,
so that only the pipeline is in this process. Both run on one machine. The figures show that memory does not grow with
the calls in flight, and how many calls a second one process can make.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from mmsr.construct.__main__ import build, options
from mmsr.construct.demo import ScriptedModel
from mmsr.construct.sources import Picture
from mmsr.episode import Observation


class Drawn:
    """A picture like no other, and a page, for every name."""

    def pictures(self, concept: str) -> list[Picture]:
        seed = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "little")
        cells = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(cells).resize((224, 224)).save(file, "JPEG")
        url = f"https://{concept}.example/"
        return [Picture(concept, url, f"This is called {concept} .", f"{url}1.jpg", "CC0", file.getvalue())]

    def text_search(self, query: str) -> Observation:
        return Observation(source="drawn")

    image_search = text_search


def serve(delay: float, pipe) -> None:
    with ScriptedModel(stall=0, delay=delay) as model:
        pipe.send(model.url)
        pipe.recv()
        pipe.send(model.asked.total())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--delay", type=float, default=0.5, help="seconds that the model thinks")
    o = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(o.delay, theirs), daemon=True)
    server.start()
    url = ours.recv()
    with tempfile.TemporaryDirectory() as folder:
        names = [f"thing{i:06d}" for i in range(o.concepts)]
        for option, value in (("metadata", names), ("counts", {n: 1 + 999 * (i % 2) for i, n in enumerate(names)})):
            (Path(folder) / option).write_text(json.dumps(value))
        files = [part for option in ("metadata", "counts") for part in (f"--{option}", f"{folder}/{option}")]
        sizes = ["--concepts", str(o.concepts), "--train", str(o.concepts // 3), "--test", str(o.concepts // 10)]
        more = ["--familiar", "500", "--unfamiliar", "100", "--required", "0.5", "--no-rollouts", "--search", "drawn"]
        argv = ["--out", f"{folder}/out", "--workers", str(o.workers), *files, *sizes, *more]
        begun, idle = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        build(options(argv), Drawn(), {"OPENAI_BASE_URL": url})
        seconds, threads = time.monotonic() - begun, threading.active_count()
        ours.send("how many?")
        peak, calls = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ours.recv()
    speed = f"{calls} calls in {seconds:.0f} s, {calls / seconds:.0f} a second"
    print(f"{o.concepts} concepts, {o.workers} workers: {speed}")
    print(f"memory at its peak {peak / 1024:.0f} MiB, {idle / 1024:.0f} before; {threads} threads left")


if __name__ == "__main__":
    main()
