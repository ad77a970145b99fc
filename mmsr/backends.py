"""`--search BACKEND` to a search engine, for every entry point.

What a back-end needs is imported when it is opened: a search of a local index must not wait for torch.
"""

from __future__ import annotations

from .episode import UserError
from .tools import Backend, NoSearch

KNOWN = "toy, local:FILE, live, replay:FILE, remote:URL or none"


def open_backend(spec: str, results: int = 5) -> Backend:
    """The back-end that `spec` names, with at most `results` hits a search. Raises UserError where there is none."""
    kind, colon, where = spec.partition(":")
    if kind in ("none", "toy", "live") and colon or kind in ("local", "replay", "remote") and not where:
        raise UserError(f"--search {spec}: not complete; give {KNOWN}")
    if kind == "none":
        return NoSearch()
    if kind == "toy":
        from .toy import World

        world = World(0)
        _ = world.train  # the toy web knows a picture once it has been drawn
        return world.web
    if kind == "local":
        from .index import Local

        return Local(where, results)
    if kind in ("live", "replay", "remote"):
        raise UserError(f"--search {spec}: not there yet; give toy, local:FILE or none")
    raise UserError(f"--search {spec}: unknown back-end; give {KNOWN}")
