"""A whole run on the live back-end, against a web on loopback that fails as the real one does."""

import json
import logging

import pytest
from fake_web import KEYS, FakeWeb, raw, reset, status
from test_train import every_other_right, run  # noqa: F401 - a fixture

FAULTS = {  # service: what its calls meet, again and again
    "serpapi.image": [status(503, {"error": KEYS["serpapi"]}), reset()],
    "serpapi.lens": [raw(b'{"visual_matches": '), status(429, {"error": "slow down"}, **{"Retry-After": "0"})],
    "jina": [status(422, {"message": KEYS["jina"]}), raw(b"<html>")],
    "openai": [status(500, {"error": {"message": f"key {KEYS['openai']}"}})],
}


@pytest.fixture
def web(monkeypatch):
    with FakeWeb() as opened:
        for name, value in opened.environ().items():
            monkeypatch.setenv(name, value)
        yield opened


@pytest.mark.slow
def test_a_run_on_a_failing_web_leaks_a_key_or_ends(miniature, tmp_path, web, every_other_right, capfd, caplog):  # noqa: F811
    """What fails is an observation, what is paid is counted, and no key stands in any file, line or log."""
    caplog.set_level(logging.DEBUG)
    for service, faults in FAULTS.items():
        web.then(service, *faults)
    out = tmp_path / "out"
    found = run(
        miniature, out, steps=2, search="live", budget=400, image_results="summary", no_deterministic=True,
        search_cache=tmp_path / "searches.sqlite",
    )  # fmt: skip
    assert found.steps[-1]["tool_calls"] > found.steps[-1]["tool_failures"]
    assert 0 < sum(found.steps[-1]["spent"].values()) <= 400
    said = "".join(capfd.readouterr()) + caplog.text
    for key in KEYS.values():
        assert key not in said
        for file in filter(lambda path: path.is_file(), tmp_path.rglob("*")):
            assert key.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_spent_budget_stops_paying_and_not_training(miniature, tmp_path, web, every_other_right):  # noqa: F811
    found = run(
        miniature, tmp_path / "out", steps=2, search="live", budget=3, no_deterministic=True,
        search_cache=tmp_path / "searches.sqlite",
    )  # fmt: skip
    assert found.steps[-1]["spent"] == {"serpapi": 3} and len(web.calls("serpapi.lens")) <= 3
    assert "budget" in json.dumps(found.steps[-1]["tool_errors"]) and len(found.steps) == 2
