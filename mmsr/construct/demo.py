"""The demonstration of data construction, without a network: the toy world's web, and a scripted model on loopback.

The model answers in the real format and sometimes badly, as a function of what it is asked: it refuses, breaks off its
JSON, names the concept, makes answers up, is busy, or says nothing until the caller has given up.
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
from mmsr.toy import world as toy

ABSTRACT = ("quickly", "beautiful", "running", "idea", "2021", "nevertheless")
STALL = 3.0  # seconds; more than the demonstration waits
PICTURES = {"familiar": 9, "unfamiliar": 1}  # of each concept; few are known, so many are needed of each


class ScriptedModel:
    """A vision model's server. `asked` counts requests by what `Calls` knows them by. It thinks for `delay` seconds
    and now and then for `stall`."""

    def __init__(self, stall: float = STALL, delay: float = 0.0):
        self.stall, self.delay, self.asked = stall, delay, Counter()
        self.lock, self.server = threading.Lock(), _Server(("127.0.0.1", 0), _Handler)
        self.server.model, self.url = self, f"http://127.0.0.1:{self.server.server_address[1]}"

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
        key = key_of(*(body[field] for field in ("model", "messages", "max_tokens")))
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
    """What each of the prompts asks for."""
    if "a list of search terms" in text.lower():
        return {"visual": not any(f"\n{word}\n" in text for word in ABSTRACT)}
    if '"shows"' in text:
        return {"shows": "advertisement" not in text}
    if '"group"' in text:
        groups = re.findall(r"^(.+)$", text.split("\n\n")[1], re.MULTILINE)
        return {"group": groups[hashlib.sha256(_field("Answer", text).encode()).digest()[0] % len(groups)]}
    if "<page>" not in text:
        return {"ready": True}
    concept, page = _field("Concept", text), re.search(r"<page>\n(.*)\n</page>", text, re.DOTALL)[1]
    town = re.search(r"belongs to (\w+)", page)
    if town and hashlib.sha256(text.encode()).digest()[1] % 2:
        return {"question": toy.QUESTIONS[1], "answer": town[1], "aliases": [], "evidence": town[0]}
    asked = toy.QUESTIONS[0] if town else "What is the thing in this picture called?"
    return {"question": asked, "answer": concept, "aliases": [concept.title()], "evidence": page}


def _field(name: str, text: str) -> str:
    return re.search(rf"^{name}: (.*)$", text, re.MULTILINE)[1]


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 1024
    model: ScriptedModel

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server who we are


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
    """The toy world's web, with pages and pictures for its names. It shows a few things that are of no use, too."""

    def __init__(self, world: toy.World):
        self.web = world.web
        self.concepts = {c.name: c for pool in ("familiar", "unfamiliar") for c in world.of(pool)}
        self.shown: dict[str, list[bytes]] = {}
        for pool, n in PICTURES.items():  # all drawn at once: the web must know those of an earlier run, too
            concepts, rng = world.of(pool), np.random.default_rng([world.seed, 5, n])
            for concept in concepts:
                self.shown[concept.name] = [toy.png(p) for p in toy.render(np.stack([concept.emblem] * n), rng)]
                for image in self.shown[concept.name]:
                    self.web.add(image, concept)

    def pictures(self, concept: str) -> list[Picture]:
        about = self.concepts[concept]
        titles = (f"{about.name} of {about.town}", f"{about.name} in {about.town}", "an emblem")
        url = f"https://{about.name}.example/"
        found = [
            Picture(titles[i % 3], url, "", f"{url}{i}.png", "CC0", image)
            for i, image in enumerate(self.shown[about.name])
        ]
        tiny, other = toy.png(np.zeros((8, 8, 3), np.uint8)), toy.png(np.full((56, 56, 3), 255, np.uint8))
        return [Picture(about.name, url, "", f"{url}dot.png", "", tiny), *found, Picture("advertisement", image=other)]

    def text_search(self, query: str) -> Observation:
        about = self.concepts.get(query)
        if about is None:
            return Observation(source="toy")
        text = f"this emblem is called {about.name} . it belongs to {about.town} ."
        return Observation((Hit(f"{about.name} emblem", f"https://{about.name}.example/", text),), source="toy")

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        return self.web.image_search(image)


def prepare(folder: Path, world: toy.World) -> tuple[str, str]:
    """The toy world's metadata and counts in files, written as MetaCLIP's are."""
    folder.mkdir(parents=True, exist_ok=True)
    pools = {"familiar": 5000, "unfamiliar": 1}
    counts = {c.name: pools[pool] + i % 40 for pool in pools for i, c in enumerate(world.of(pool))}
    counts |= {word: 5000 + i for i, word in enumerate(ABSTRACT)} | {"unheard": 0}
    entries = [*counts, *(name.upper() for name in list(counts)[:5])]
    files = folder / "toy-metadata.json", folder / "toy-counts.json"
    for file, value in zip(files, (entries, counts)):
        file.write_text(json.dumps(value), encoding="utf-8")
    return str(files[0]), str(files[1])
