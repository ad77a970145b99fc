"""Image-search results as other projects publish them: by question id, with the paths of their pictures.

Two layouts, written down from the code that loads them; no published file was at hand.

DeepEyesV2, a JSON object:

    {"fvqa_train_1": {"tool_returned_web_title": ["Belém Tower", …], "cached_images_path": ["…/fvqa_train_1_0.jpg", …]}}

MM-DeepResearch, JSON lines, or a JSON array, or an object by id:

    {"data_id": "1", "cached_data": [{"cached_title": "Belém Tower", "cached_images_path": "…/1_0.jpg"}, …]}

The paths are those of the machine on which the cache was made. A picture is found in a folder or an archive (zip, tar,
tar.gz) by its file's name, and where paths share that, by the folders before it.
"""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mmsr.episode import Hit, Observation
from mmsr.system.errors import UserError
from mmsr.system.files import json_file, json_object, lines
from mmsr.system.images import MAX_FILE_BYTES, thumbnail
from mmsr.system.progress import progress

TITLES, PATHS = "tool_returned_web_title", "cached_images_path"  # DeepEyesV2's lists
ITEMS, TITLE, PATH = "cached_data", "cached_title", "cached_images_path"  # MM-DeepResearch's list of objects
ID = "data_id"
DAMAGE = (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)

Found = list[tuple[str, str]]  # title and path of each result, "" where there is none


def is_image_cache(path: Path) -> bool:
    """Whether the first record of a file has the form of one of the layouts. False for a file that cannot be read."""
    try:
        for _, record in _records(path):
            return ITEMS in record or PATHS in record
    except UserError:
        pass
    return False


def image_cache(path: Path, pictures: Path) -> dict[str, Observation]:
    """The results of a cache, by question id, with thumbnails from `pictures`, a folder or an archive.

    A result without a picture there keeps its title. Raises UserError for a file of another layout, or a damaged one.
    """
    found: dict[str, Found] = {}
    for where, record in _records(path):
        question, results = str(record[ID]), _results(where, record)
        if results or question not in found:  # a second answer to a question may be empty
            found[question] = results
    thumbnails = _thumbnails({name for results in found.values() for _, name in results if name}, pictures)
    observations = {}
    for question, results in found.items():
        hits = tuple(Hit(title, image=thumbnails.get(name)) for title, name in results)
        observations[question] = Observation(hits, source=path.stem, cached=True)
    return observations


# ---- the layouts


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record, with its id in ID, and its place in the file, for messages. Raises UserError."""
    if path.suffix == ".jsonl":
        for row, (_, line) in enumerate(lines(path)):
            yield _with_id(f"{path}: row {row}", json_object(path, row, line))
        return
    content = json_file(path)
    if isinstance(content, dict):
        content = [{ID: key, **record} if isinstance(record, dict) else record for key, record in content.items()]
    if not isinstance(content, list):
        raise UserError(f"{path}: neither an object nor an array; give a cache of image searches")
    for number, record in enumerate(content):
        if not isinstance(record, dict):
            raise UserError(f"{path}: entry {number}: {record!r:.60} is not an object")
        yield _with_id(f"{path}: entry {number}", record)


def _with_id(where: str, record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(record.get(ID), str | int):
        raise UserError(f"{where}: there is no {ID}; give a cache of image searches")
    return where, record


def _results(where: str, record: dict[str, Any]) -> Found:
    """The results in a record of either layout. Raises UserError."""
    if ITEMS in record:
        items = _listed(where, record, ITEMS)
        if not all(isinstance(item, dict) for item in items):
            raise UserError(f"{where}, {ITEMS}: not a list of objects")
        for item in items:
            if not item.keys() & {TITLE, PATH}:
                raise UserError(f"{where}, {ITEMS}: neither {TITLE} nor {PATH} (found {', '.join(item) or 'nothing'})")
        titles, paths = [item.get(TITLE) for item in items], [item.get(PATH) for item in items]
    else:
        titles, paths = _listed(where, record, TITLES), _listed(where, record, PATHS)
        if len(titles) != len(paths):
            raise UserError(f"{where}: {len(titles)} titles and {len(paths)} paths; give each its own")
    for text in (*titles, *paths):
        if not isinstance(text, str | None):
            raise UserError(f"{where}: {text!r:.60} is neither text nor null")
    return [(title or "", name or "") for title, name in zip(titles, paths)]


def _listed(where: str, record: dict[str, Any], name: str) -> list:
    """The list of that name; empty for null."""
    value = record.get(name, ...)
    if value is ... or not isinstance(value, list | None):
        what = f"{value!r:.60}" if name in record else f"only {', '.join(record)}"
        raise UserError(f"{where}: no list {name}, but {what}; give a cache of image searches")
    return value or []


# ---- the pictures


def _thumbnails(wanted: set[str], source: Path) -> dict[str, bytes]:
    """By path: the thumbnail of the file in `source` that the path means.

    Raises UserError where there is no such folder or archive, or where it is damaged.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in wanted:
        by_name[_parts(path)[-1]].append(path)
    best: dict[str, int] = {}  # by path: the folders, with the name, that agree with those of the best file yet
    named: Counter[str] = Counter()  # files of the source by their names
    thumbnails: dict[str, bytes] = {}
    try:
        with progress("pictures", len(wanted), "picture") as bar:
            for name, open_it in _files(source):
                named[_parts(name)[-1]] += 1
                path, agreeing = _meant(by_name.get(_parts(name)[-1], ()), name)
                if agreeing <= best.get(path, 0):
                    continue
                with suppress(ValueError):  # no picture that can be opened
                    thumbnails[path] = thumbnail(_read(open_it))
                    bar.update(path not in best)
                    best[path] = agreeing
    except DAMAGE as error:
        raise UserError(f"{source}: cannot be read, or damaged ({error}); get it again") from None
    unclear = [path for path in thumbnails if best[path] == 1 and named[_parts(path)[-1]] > 1]
    for path in unclear:  # several files have its name, and nothing else agrees
        del thumbnails[path]
    return thumbnails


def _meant(paths: Iterable[str], name: str) -> tuple[str, int]:
    """The one of `paths` that agrees most with a file's, and in how many parts; ("", 0) where several do."""
    ranked = sorted(((_agreeing(path, _parts(name)), path) for path in paths), reverse=True)
    if not ranked or len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        return "", 0
    agreeing, path = ranked[0]
    return path, agreeing


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path.replace("\\", "/")).parts or ("",)


def _agreeing(path: str, parts: tuple[str, ...]) -> int:
    """How many parts at the end of a path are those of a file."""
    agreeing = 0
    for one, other in zip(reversed(_parts(path)), reversed(parts)):
        if one != other:
            break
        agreeing += 1
    return agreeing


def _files(source: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The path of each file in a folder or an archive, and what opens it. Nothing is unpacked onto the disk."""
    if source.is_dir():
        for file in sorted(source.rglob("*")):
            if file.is_file():
                yield file.relative_to(source).as_posix(), partial(file.open, "rb")
    elif not source.is_file():
        raise UserError(f"--images {source}: no such folder or archive; name the one with the pictures")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as zipped:
            for entry in zipped.infolist():
                if not entry.is_dir():
                    yield entry.filename, partial(zipped.open, entry)
    else:
        with _open_tar(source) as packed:
            for member in packed:  # in its order: going back would unpack it from the beginning
                if member.isfile():
                    yield member.name, partial(packed.extractfile, member)


def _open_tar(source: Path) -> tarfile.TarFile:
    """Raises UserError for another file."""
    try:
        return tarfile.open(source)
    except tarfile.ReadError:
        raise UserError(f"{source}: cannot be read, or damaged: no folder, zip or tar; name the pictures") from None


def _read(open_it: Callable[[], Any]) -> bytes:
    """A file's bytes; of one that is larger than a picture may be, only so many that it is refused."""
    with closing(open_it()) as file:
        return file.read(MAX_FILE_BYTES + 1)
