"""A tool that opens a page: the model names the address of a result, and reads what that page says.

    python train.py --model Qwen2.5-VL-7B --search local:my.index --tools visit --max-turns 6 --shapes any

A call is `<visit>https://example.org/belem when was it built</visit>`: an address, and what is looked for (without it,
what the question asks). Only addresses that a search of the same rollout returned are opened. An index of one's own
gives its page, a live run reads by Jina Reader; else the address is fetched, if it is public. Of the listed shapes
those with one visit before the answer earn format; `--shapes any` takes several, and searches after them.
"""

from dataclasses import replace

from mmsr.episode import Observation
from mmsr.reward import LEGAL_SHAPES
from mmsr.search.pages import page_reader
from mmsr.search.web import passages
from mmsr.tools import VISIT, Backend, Call, Tool

SEARCHES = (("image_search",), ("text_search",), ("image_search", "text_search"))


def tools(backend: Backend) -> list[Tool]:
    """The tool. Where a page cannot be read it raises ToolFailure: the engine's failure, not the model's."""
    read = page_reader(backend)

    def run(call: Call) -> Observation:
        address, _, wanted = call.query.partition(" ")
        if address not in call.found:  # the model's mistake, which finds nothing
            return Observation(source=VISIT)
        page = read(address)
        hits = [replace(hit, text=passages(wanted or call.question, hit.text)) for hit in page.hits]
        return replace(page, hits=tuple(hits))

    LEGAL_SHAPES.update((*searches, VISIT, "answer") for searches in SEARCHES)
    return [Tool(VISIT, VISIT, limit=3, run=run)]
