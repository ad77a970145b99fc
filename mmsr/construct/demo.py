"""The demonstration of data construction, without a network: the toy world's web, and a scripted model on loopback.

The model answers in the real format. As a function of the question it sometimes answers badly: it refuses, ends in the
middle of its JSON, names the concept, makes up an answer, is busy, or stays silent until the caller gives up.
"""

from __future__ import annotations

import hashlib
import json
import re
import socketserver
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from mmsr.construct.sources import Picture
from mmsr.episode import Hit, Observation
from mmsr.system.journal import key_of
from mmsr.toy.world import QUESTIONS, World, png, render

ABSTRACT = ("quickly", "beautiful", "running", "idea", "2021", "nevertheless")
STALL = 3.0  # seconds of silence; the demonstration gives up earlier
PICTURES = {"familiar": 9, "unfamiliar": 1}  # of each concept; few are familiar, so each needs many


class ScriptedModel:
    """A vision model's server. It answers after `delay` seconds, and sometimes after `stall`.

    `asked` counts requests by the same key as `Calls`.
    """

    def __init__(self, stall: float = STALL, delay: float = 0.0):
        self.stall = stall
        self.delay = delay
        self.asked: Counter = Counter()
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.model = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> ScriptedModel:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reply(self, body: dict) -> tuple[int, dict]:
        """Status and JSON body."""
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        mood = hashlib.sha256(json.dumps([text, len(body["messages"])]).encode()).digest()[0]
        key = key_of(body["model"], body["messages"], body["max_tokens"])
        with self.lock:
            self.asked[key] += 1
            first = self.asked[key] == 1
        time.sleep(self.stall if mood < 2 and first else self.delay)
        if mood in (2, 3) and first:
            return 503, {"error": {"message": "the server is busy"}}
        answer = _badly(mood, text, json.dumps(_well(text)))
        message = {"role": "assistant", "content": answer}
        return 200, {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }


def _badly(mood: int, text: str, answer: str) -> str:
    """The answer, with a fault for some moods."""
    if 4 <= mood < 14:
        return "I'm sorry, but I can't help with that."
    if 14 <= mood < 24:
        return answer[: len(answer) // 2]
    if 24 <= mood < 34 and "question" in answer:
        return json.dumps(json.loads(answer) | {"question": f"what is {_field('Concept', text)} ?"})
    if 34 <= mood < 44 and "evidence" in answer:
        return json.dumps(json.loads(answer) | {"answer": "nobody knows that"})
    if 44 <= mood < 54:
        return f"<think>Let me see.</think>Here it is:\n```json\n{answer}\n```"
    return answer


def _well(text: str) -> dict:
    """The right answer to each of the prompts."""
    if "a list of search terms" in text.lower():
        return {"visual": not any(f"\n{word}\n" in text for word in ABSTRACT)}
    if '"shows"' in text:
        return {"shows": "advertisement" not in text}
    if '"group"' in text:
        groups = re.findall(r"^(.+)$", text.split("\n\n")[1], re.MULTILINE)
        return {"group": groups[hashlib.sha256(_field("Answer", text).encode()).digest()[0] % len(groups)]}
    if "<page>" not in text:
        return {"ready": True}
    concept = _field("Concept", text)
    page = re.search(r"<page>\n(.*)\n</page>", text, re.DOTALL)[1]
    town = re.search(r"belongs to (\w+)", page)
    if town and hashlib.sha256(text.encode()).digest()[1] % 2:
        return {"question": QUESTIONS[1], "answer": town[1], "aliases": [], "evidence": town[0]}
    asked = QUESTIONS[0] if town else "What is the thing in this picture called?"
    return {"question": asked, "answer": concept, "aliases": [concept.title()], "evidence": page}


def _field(name: str, text: str) -> str:
    return re.search(rf"^{name}: (.*)$", text, re.MULTILINE)[1]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    model: ScriptedModel

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks a name server for this machine's name


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        with suppress(OSError):  # the caller has gone
            sent = self.rfile.read(length)
            if len(sent) < length:
                return
            status, reply = self.server.model.reply(json.loads(sent))
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class ToyFinder:
    """The toy world's web, with pages and pictures for its names, and a few useless pictures."""

    def __init__(self, world: World):
        self.web = world.web
        self.concepts = {concept.name: concept for concept in world.of("familiar", "unfamiliar")}
        self.shown: dict[str, list[bytes]] = {}
        for pool, n in PICTURES.items():  # all pictures are drawn now: the web must know those of an earlier run, too
            rng = np.random.default_rng([world.seed, 5, n])
            for concept in world.of(pool):
                pictures = render(np.stack([concept.emblem] * n), rng)
                self.shown[concept.name] = [png(picture) for picture in pictures]
                for image in self.shown[concept.name]:
                    self.web.add(image, concept)

    def pictures(self, concept: str) -> list[Picture]:
        about = self.concepts[concept]
        titles = (f"{about.name} of {about.town}", f"{about.name} in {about.town}", "an emblem")
        url = f"https://{about.name}.example/"
        tiny = png(np.zeros((8, 8, 3), np.uint8))
        white = png(np.full((56, 56, 3), 255, np.uint8))
        found = [Picture(about.name, url, "", f"{url}dot.png", "", tiny)]
        for i, image in enumerate(self.shown[about.name]):
            found.append(Picture(titles[i % 3], url, "", f"{url}{i}.png", "CC0", image))
        found.append(Picture("advertisement", image=white))
        return found

    def text_search(self, query: str) -> Observation:
        about = self.concepts.get(query)
        if about is None:
            return Observation(source="toy")
        text = f"this emblem is called {about.name} . it belongs to {about.town} ."
        return Observation((Hit(f"{about.name} emblem", f"https://{about.name}.example/", text),), source="toy")

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        return self.web.image_search(image)


def prepare(folder: Path, world: World) -> tuple[str, str]:
    """Write the toy world's metadata and counts in MetaCLIP's format. Returns the two files."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for i, concept in enumerate(world.of("familiar")):
        counts[concept.name] = 5000 + i % 40
    for i, concept in enumerate(world.of("unfamiliar")):
        counts[concept.name] = 1 + i % 40
    for i, word in enumerate(ABSTRACT):
        counts[word] = 5000 + i
    counts["unheard"] = 0
    entries = list(counts)
    entries += [name.upper() for name in entries[:5]]
    metadata_file = folder / "toy-metadata.json"
    counts_file = folder / "toy-counts.json"
    metadata_file.write_text(json.dumps(entries), encoding="utf-8")
    counts_file.write_text(json.dumps(counts), encoding="utf-8")
    return str(metadata_file), str(counts_file)
