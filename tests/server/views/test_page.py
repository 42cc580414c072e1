"""The live page in a browser: what it draws of made-up numbers, and two answers side by side."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Iterator
from itertools import count

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from sparseserve.testing.waiting import wait_until
from tests.helpers.server.browser import CHROMIUM, Tab, tab
from tests.helpers.server.served_app import KV_HEADS, LAYERS, Workers, busy_worker, configured, served

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
ANSWERS = {
    "tiny": ["The key ", "is <b>42</b>", " 😀 and so on"],
    "tiny@dense": ["The key ", "is <b>42</b>", " 😁 and more"],
}
CHOICES = ["tiny", "tiny@dense", *(f"tiny@budget-{tokens}" for tokens in (512, 1024, 2048, 4096))]


async def complete(request: Request) -> StreamingResponse | JSONResponse:
    """POST /v1/completions of a server whose answers are known."""
    asked = await request.json()
    assert asked["stream"] and asked["temperature"] == 0 and asked["cache_salt"]
    if asked["model"] not in ANSWERS:
        return JSONResponse({"error": {"message": "this budget is <i>refused</i>", "code": 400}}, 400)

    async def stream() -> AsyncIterator[str]:
        for text in ANSWERS[asked["model"]]:
            yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 3}})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a key; its workers have counted a little more at each look."""
    sets = ("recall_sample=0.01", "recall_floor=0.9")
    args, config = configured(tmp_path_factory.mktemp("model"), "--api-key", "secret", sets=sets)
    looks = count(1)
    with served(args, Workers(config, lambda: [busy_worker(next(looks))]), page="1") as app:
        app.router.routes.insert(0, Route("/v1/completions", complete, methods=["POST"]))
        server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()

        def started() -> bool:
            assert thread.is_alive()
            return server.started

        wait_until(started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/sparsity"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def page(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """The page, once it asked for the key and got it."""
    with tab(tmp_path_factory.mktemp("chromium")) as opened:
        opened.open(url)
        opened.wait("document.getElementById('status')?.textContent.includes('wants its API key')")
        opened.type("#key", "secret")
        opened.wait("document.getElementById('status').textContent.startsWith('live')")
        yield opened


def texts(page: Tab, selector: str) -> list[str]:
    found: list[str] = page.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
    return found


def side_by_side(page: Tab, left: str, right: str) -> tuple[str, str]:
    """Run both, and what is told of each."""
    for side, choice in (("left", left), ("right", right)):
        page.value(f"document.getElementById('{side}-choice').value = {json.dumps(choice)}")
    page.type("#prompt", "<img src=x onerror=alert(1)> what is the key?")
    page.value("document.getElementById('run').click()")
    page.wait("!document.getElementById('run').disabled")
    told = texts(page, "#left-told, #right-told")
    return told[0], told[1]


def test_the_policy_is_named_with_its_parameters(page: Tab) -> None:
    assert texts(page, "#title") == ["quest on tiny"]
    (runs_on,) = texts(page, "#runs-on")
    assert [word for word in ("CPU_ATTN", "avx2", "runner V1", "self-check passed") if word not in runs_on] == []
    assert "budget_tokens1024" in texts(page, "#parameters div")
    for side in ("left", "right"):
        assert page.value(f"[...document.getElementById('{side}-choice').options].map((e) => e.value)") == CHOICES


def test_every_kv_head_has_a_cell(page: Tab) -> None:
    cells = texts(page, "#heads .cell title")
    assert len(cells) == LAYERS * KV_HEADS
    assert cells[0] == "layer 0 (dense), KV head 0: all, 8192 tokens"
    assert cells[-1] == "layer 5 (select), KV head 1: budget, 1024 tokens"
    page.type("#length", "1000")
    page.value("document.getElementById('length').dispatchEvent(new Event('change'))")
    page.wait("document.querySelectorAll('#heads .cell.all').length === " + str(LAYERS * KV_HEADS))


def test_recall_is_a_bar_for_each_group_beside_the_floor(page: Tab) -> None:
    page.wait("document.querySelectorAll('#recall .recall-bar').length === 3")
    width = "((e) => Number(e.getAttribute('width')))"
    unseen, low, high = page.value(f"[...document.querySelectorAll('#recall .recall-bar')].map({width})")
    track = page.value(f"{width}(document.querySelector('#recall .track'))")
    assert (unseen, low / track, high / track) == (0, pytest.approx(0.65), pytest.approx(0.96))
    floor = page.value("(Number(document.querySelector('#recall .floor').getAttribute('x1')))")
    start = page.value("(Number(document.querySelector('#recall .track').getAttribute('x')))")
    assert (floor - start) / track == pytest.approx(0.9)
    assert texts(page, "#recall-floor") == ["floor 0.900"]


def test_numbers_and_rates_are_of_the_metrics(page: Tab) -> None:
    page.wait("document.querySelectorAll('#density .spark').length")
    tiles = texts(page, "#tiles .card")
    assert "Density41.7\u00a0%41.7\u00a0% since the start" in tiles
    assert "KV bytes against dense77.5\u00a0%0.80 times the rows fit" in tiles
    rate = page.value("parseFloat(document.querySelectorAll('#tiles b')[1].textContent)")
    assert 5 < rate < 25  # 40 rows each 2 s
    wanted = {"budgets widened", "requests under the floor, widen", "dense fallbacks, budget", "dense rows, guard"}
    assert wanted <= set(texts(page, "#counters th"))


def test_two_answers_stand_side_by_side_with_their_first_difference_marked(page: Tab) -> None:
    told = side_by_side(page, "tiny", "tiny@dense")
    assert texts(page, "#left, #right") == ["".join(ANSWERS["tiny"]), "".join(ANSWERS["tiny@dense"])]
    assert texts(page, "#left mark, #right mark") == ["😀", "😁"]
    assert texts(page, "#verdict") == ["First difference after 21 of 32 characters."]
    for one, choice in zip(told, ("tiny", "tiny@dense"), strict=True):
        assert one.startswith(f"{choice}: first token ") and "ms/token, 3 tokens" in one


def test_the_same_answer_is_said_to_be_the_same(page: Tab) -> None:
    side_by_side(page, "tiny", "tiny")
    assert texts(page, "#verdict") == ["The same text."]
    assert texts(page, "mark") == []


def test_a_refused_choice_is_told_in_the_servers_words(page: Tab) -> None:
    assert side_by_side(page, "tiny", "tiny@budget-512")[1] == "this budget is <i>refused</i>"


def test_nothing_that_was_entered_or_answered_became_markup(page: Tab) -> None:
    side_by_side(page, "tiny", "tiny@budget-512")
    assert page.value("document.querySelectorAll('img, pre b, i').length") == 0
    assert page.value("problems") == []
    assert page.value("fetch('http://127.0.0.1:9/').then(() => 'reached', () => 'refused')") == "refused"
    assert page.value("problems.pop()").startswith("connect-src")


def test_a_server_that_measures_no_recall_says_how_to(page: Tab) -> None:
    page.value("policy.recall.remedy = 'serve with --set recall_sample=0.01'")
    shown = page.value(
        "showRecall({ recall: null, recall_floor: null }), document.getElementById('recall').textContent"
    )
    assert shown == "Not measured: serve with --set recall_sample=0.01."


def test_the_page_fits_its_window(page: Tab) -> None:
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
