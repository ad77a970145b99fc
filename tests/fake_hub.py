"""A Hugging Face hub on 127.0.0.1 that serves folders, and notes what is asked of it."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import pytest

SHA = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Of one revision of every repository. `server.folders`: "models/OWNER/NAME" or "datasets/OWNER/NAME" → folder."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *given) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        for name, folder in self.server.folders.items():
            if path.startswith(f"api/{name}"):
                self.answer_json(self.tree(folder) if "/tree/" in path else self.info(name, folder))
                return
            place = f"{name.removeprefix('models/')}/resolve/"
            if path.startswith(place):
                self.answer_file(folder / path.removeprefix(place).partition("/")[2])
                return
        missing = {"X-Error-Code": "RepoNotFound"} if "/" in path else {}
        self.answer(404 if path else 200, b"", missing)

    def info(self, name: str, folder: Path) -> dict:
        files = [{"rfilename": file.name, "size": file.stat().st_size} for file in sorted(folder.iterdir())]
        return {"id": name.partition("/")[2], "sha": SHA, "siblings": files}

    def tree(self, folder: Path) -> list[dict]:
        files = sorted(folder.iterdir())
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)} for f in files]

    def answer_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer_file(self, file: Path) -> None:
        if not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self.answer(200, file.read_bytes(), {"ETag": f'"{digest(file)}"', "X-Repo-Commit": SHA})

    def answer(self, status: int, body: bytes, headers: dict) -> None:
        self.send_response(self.server.status or status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def fake_hub(folders: dict[str, Path], cache: Path, status: int = 0) -> Iterator[list[str]]:
    """The process's hub is this one, its cache empty; gives what is asked. `status`: the answer to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folders, server.asked, server.status = folders, [], status
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        at_address(patch, f"http://127.0.0.1:{server.server_port}", cache)
        yield server.asked
    server.shutdown()
    server.server_close()


def at_address(patch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """As HF_ENDPOINT and HF_HUB_CACHE would have it, had they been set before the hub's client was imported."""
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
