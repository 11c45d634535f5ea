"""API v1 over HTTP, without Ray: what it answers, what it refuses, and what it never tells."""

import base64
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import opentimelineio as otio
import pytest
from archive import add_video
from fastapi.testclient import TestClient
from PIL import Image
from test_build_index import build
from test_service import of_engine, service

from vsearch import guard
from vsearch import service as module
from vsearch.corpus import Corpus
from vsearch.keys import Keys, add_key
from vsearch.routes import make_app

PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    corpus = Corpus(str(tmp_path_factory.mktemp("corpus")))
    for number in range(4):
        add_video(corpus, f"v{number}", tags={"side": "left" if number % 2 else "right"})
    build(corpus, rows="moments")
    add_video(corpus, "late")
    return corpus.url


def client(url: str, **options: Any) -> TestClient:
    there = service(url)
    there.catalogue = there._read_catalogue()
    return TestClient(
        make_app(there, **options), base_url="http://localhost", raise_server_exceptions=False
    )


@pytest.fixture
def web(url: str) -> Iterator[TestClient]:
    with client(url) as found:
        yield found


def picture(size: tuple[int, int] = (64, 48), form: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, form)
    return data.getvalue()


def test_both_ways_to_search_answer_as_the_engine_does(web: TestClient, url: str) -> None:
    expected = of_engine(url, "a boat", 5, max_gap_s=0.5)
    found = web.get("/v1/search", params={"q": "a boat", "limit": 5, "max_gap_s": 0.5}).json()
    assert found["segments"] == expected
    assert found["partial"] is False and found["missing"] == [] and found["cursor"]
    assert set(found["took"]) == {"encode_ms", "search_ms", "rerank_ms", "group_ms"}
    body = {"q": "a boat", "limit": 5, "max_gap_s": 0.5}
    assert web.post("/v1/search", json=body).json()["segments"] == expected
    terms = {"terms": [{"text": "a boat"}], "limit": 5, "max_gap_s": 0.5}
    assert web.post("/v1/search", json=terms).json()["segments"] == expected


def test_weak_matches_are_hidden_and_counted(web: TestClient) -> None:
    def ask(**asked: Any) -> Any:
        return web.get("/v1/search", params={"q": "a boat", "limit": 20} | asked).json()

    everything = ask()
    told = [segment["confidence"] for segment in everything["segments"]]
    assert told == sorted(told, reverse=True) and 0 < told[-1] < told[0] < 1
    assert (everything["hidden"], everything["hidden_more"]) == (0, False) and everything["cursor"]
    found = ask(min_confidence=told[7])
    assert found["segments"] == [s for s in everything["segments"] if s["confidence"] >= told[7]]
    assert found["hidden"] == 20 - len(found["segments"]) > 0
    assert found["hidden_more"] is True and found["cursor"] is None
    nothing = ask(min_confidence=1)
    assert (nothing["segments"], nothing["hidden"]) == ([], 20)
    first = ask(min_confidence=told[7], limit=3)
    assert first["hidden"] == 0 and first["segments"] == found["segments"][:3]
    rest = ask(min_confidence=told[7], limit=17, cursor=first["cursor"])
    assert rest["segments"] == found["segments"][3:] and rest["hidden"] == found["hidden"]
    like = {"terms": [{"video_id": "v0", "at_s": 1.0}], "min_confidence": 1, "limit": 2}
    segments = web.post("/v1/search", json=like).json()["segments"]
    assert [segment["confidence"] for segment in segments] == [None, None]
    assert web.get("/v1/search", params={"q": "x", "min_confidence": 1.1}).status_code == 422


def test_a_sentence_says_itself_what_it_does_not_want(web: TestClient) -> None:
    read = web.get("/v1/search", params={"q": "a boat without rain"}).json()
    told = web.get("/v1/search", params={"q": "a boat", "without": "rain"}).json()
    assert read["segments"] == told["segments"] and read["query"] == told["query"]
    literal = web.get("/v1/search", params={"q": '"a boat without rain"'}).json()
    assert literal["query"] == "a boat without rain"
    assert literal["segments"] != read["segments"]


def test_filters_and_pages(web: TestClient) -> None:
    left = {"q": "a boat", "tag": "side=left", "limit": 100}
    found = web.get("/v1/search", params=left).json()["segments"]
    assert {segment["video_id"] for segment in found} == {"v1", "v3"}
    where = {"tags": {"side": "left"}, "from_s": 3, "to_s": 9, "videos": ["v1", "v0"]}
    body = {"q": "a boat", "where": where, "limit": 1}
    first = web.post("/v1/search", json=body).json()
    assert {s["video_id"] for s in first["segments"]} == {"v1"}
    assert all(3 <= s["start_s"] < s["end_s"] <= 9 for s in first["segments"])
    second = web.post("/v1/search", json=body | {"cursor": first["cursor"]}).json()
    assert second["segments"][0] not in first["segments"]


def test_segments_for_other_programs(web: TestClient) -> None:
    asked = {"q": "a boat", "limit": 3}
    expected = web.get("/v1/search", params=asked).json()["segments"]
    table = web.get("/v1/search", params=asked | {"format": "csv"})
    assert table.headers["content-type"].startswith("text/csv")
    assert "attachment" in table.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [float(row["start_s"]) for row in rows] == [s["start_s"] for s in expected]
    readers = {"otio": ("otio_json", {}), "edl": ("cmx_3600", {"rate": 30})}
    for form, (adapter, options) in readers.items():
        answer = web.post(f"/v1/search?format={form}", json=asked)
        assert answer.status_code == 200
        timeline = otio.adapters.read_from_string(answer.text, adapter, **options)
        clips = list(timeline.find_clips())
        starts = [clip.source_range.start_time.to_seconds() for clip in clips]
        assert starts == pytest.approx([s["start_s"] for s in expected], abs=0.06)


def test_what_is_indexed_and_what_is_not(web: TestClient) -> None:
    status = web.get("/v1/status").json()
    assert (status["videos"], status["parts"], status["missing"]) == (4, 1, [])
    assert status["coverage"]["total"] == 5 and status["coverage"]["not_in_index"] == 1
    assert status["tags"] == {"side": ["left", "right"]}
    videos = web.get("/v1/videos", params={"limit": 2}).json()
    assert videos["total"] == 5 and len(videos["videos"]) == 2
    rest = web.get("/v1/videos", params={"limit": 9, "cursor": videos["cursor"]}).json()
    assert rest["cursor"] is None
    names = [video["video_id"] for video in videos["videos"] + rest["videos"]]
    assert sorted(names) == ["late", "v0", "v1", "v2", "v3"]
    assert web.get("/v1/videos/late").json()["in_index"] is False
    assert web.get("/v1/videos/v1").json()["in_index"] is True
    assert web.get("/v1/videos", params={"q": "v2"}).json()["total"] == 1


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/v1/search", {}, 422),
        ("GET", "/v1/search?q=", {}, 422),
        ("GET", "/v1/search?q=%20", {}, 422),
        ("GET", "/v1/search?q=x&limit=0", {}, 422),
        ("GET", "/v1/search?q=x&limit=many", {}, 422),
        ("GET", "/v1/search?q=x&lmit=5", {}, 422),
        ("GET", "/v1/search?q=x&max_gap_s=nan", {}, 422),
        ("GET", "/v1/search?q=x&from_s=5&to_s=4", {}, 422),
        ("GET", "/v1/search?q=x&tag=left", {}, 422),
        ("GET", "/v1/search?q=x&after=yesterday", {}, 422),
        ("GET", "/v1/search?q=x&cursor=abc", {}, 422),
        ("GET", "/v1/search?q=x&cursor=WyJuIiwgMV0=", {}, 410),
        ("GET", f"/v1/search?q={'x' * 501}", {}, 422),
        ("POST", "/v1/search", {"content": b"no json"}, 422),
        ("POST", "/v1/search", {"json": []}, 422),
        ("POST", "/v1/search", {"json": {}}, 422),
        ("POST", "/v1/search", {"json": {"q": "x", "wher": {}}}, 422),
        ("POST", "/v1/search", {"json": {"terms": [{"text": "x", "weight": -1}]}}, 422),
        ("POST", "/v1/search", {"json": {"terms": [{"text": "x", "weight": 0}]}}, 422),
        ("POST", "/v1/search", {"json": {"terms": [{"text": "x"}] * 9}}, 422),
        ("POST", "/v1/search", {"json": {"terms": [{"video_id": "v1"}]}}, 422),
        ("POST", "/v1/search", {"json": {"terms": [{"video_id": "none", "at_s": 1}]}}, 422),
        ("POST", "/v1/search", {"json": {"terms": [{"image": "http://169.254.169.254/"}]}}, 422),
        ("POST", "/v1/search", {"json": {"terms": [{"image": "/etc/passwd"}]}}, 422),
        ("POST", "/v1/search/image", {"content": b""}, 422),
        ("POST", "/v1/search/image", {"content": b"\x89PNG\r\n\x1a\n"}, 422),
        ("GET", "/v1/videos?status=lost", {}, 422),
        ("GET", "/v1/videos/nobody", {}, 404),
        ("GET", "/v1/videos/nobody/media", {}, 404),
        ("GET", "/v1/videos/nobody/frame?at_s=1", {}, 404),
        ("GET", "/v1/videos/v1/frame?at_s=-1", {}, 422),
        ("GET", "/v1/videos/v1/frame?at_s=1&width=100000", {}, 422),
        ("GET", "/v1/videos/v1/clip?start_s=5&end_s=4", {}, 422),
        ("GET", "/v1/videos/v1/clip?start_s=0&end_s=3600", {}, 422),
        ("POST", "/v1/videos/nobody/timeline", {"json": {"q": "x"}}, 404),
        ("GET", "/v1/nothing", {}, 404),
        ("DELETE", "/v1/search", {}, 405),
        # Nothing but a video of the index can be read, by no path and no address.
        ("GET", "/v1/videos/..%2F..%2F..%2Fetc%2Fpasswd/media", {}, 404),
        ("GET", "/v1/videos/%2Fvideos%2Fv1.mp4/media", {}, 404),
        ("GET", "/v1/videos/http:%2F%2F169.254.169.254%2F/media", {}, 404),
        ("GET", "/v1/videos/file:etc/media", {}, 422),
        ("GET", "/v1/videos/v1%00/media", {}, 422),
        ("GET", "/..%2F..%2Fpyproject.toml", {}, 404),
        ("GET", "/%2e%2e/serve.py", {}, 404),
        ("GET", "/..%2fserve.js", {}, 404),
        ("GET", "/index.html", {}, 404),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    web: TestClient, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    answer = web.request(method, path, **options, headers={"x-request-id": "asked-7"})
    assert answer.status_code == status
    assert answer.headers["content-type"] == PROBLEM
    found = answer.json()
    assert set(found) == {"title", "status", "detail", "request_id"}
    assert found["status"] == status and found["detail"] and found["request_id"] == "asked-7"
    for secret in ("Traceback", "site-packages", 'File "', "vsearch/"):
        assert secret not in answer.text


def test_a_fault_says_nothing_of_what_is_inside(
    web: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the password is swordfish")

    monkeypatch.setattr(module, "compose", fail)
    answer = web.get("/v1/search?q=x")
    assert answer.status_code == 500 and "swordfish" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    monkeypatch.undo()
    assert web.get("/v1/search?q=x").status_code == 200


def test_too_much_is_refused_with_a_time_to_wait(
    web: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEARCHES", 0)
    answer = web.get("/v1/search?q=x")
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


def test_large_bodies_are_refused_told_or_not(web: TestClient) -> None:
    size = guard.BODY_BYTES + 1
    assert web.post("/v1/search", content=b" " * size).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(size // (1 << 20) + 1):
            yield b" " * (1 << 20)

    assert web.post("/v1/search", content=pieces()).status_code == 413
    assert web.post("/v1/search", json={"q": "x"}).status_code == 200


def test_bodies_that_trickle_in_are_given_up(
    web: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    monkeypatch.setattr(guard, "BODY_S", 0.1)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/search", "raw_path": b"/v1/search",
        "query_string": b"", "headers": [(b"host", b"localhost")], "http_version": "1.1",
        "scheme": "http", "root_path": "", "client": None, "server": ("localhost", 80),
    }  # fmt: skip
    asyncio.run(web.app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


def test_every_answer_carries_the_headers_that_protect_a_browser(web: TestClient) -> None:
    for path in ("/", "/app.js", "/v1/status", "/v1/nothing", "/v1/search?q=x", "/healthz"):
        headers = web.get(path).headers
        for name, value in guard.HEADERS.items():
            assert headers[name] == value
    assert "unsafe" not in guard.HEADERS["content-security-policy"]
    assert web.get("/v1/status").headers["cache-control"] == "no-store"


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def locked(url: str, tmp_path: Path) -> Iterator[tuple[TestClient, str]]:
    file = tmp_path / "keys.json"
    add_key(file, "ben")
    key = add_key(file, "anna")
    with client(url, keys=Keys.load(file)) as found:
        yield found, key


PROTECTED = [
    ("GET", "/v1/search?q=x"),
    ("POST", "/v1/search"),
    ("POST", "/v1/search/image"),
    ("GET", "/v1/status"),
    ("GET", "/v1/videos"),
    ("GET", "/v1/videos/v1"),
    ("GET", "/v1/videos/v1/media"),
    ("HEAD", "/v1/videos/v1/media"),
    ("GET", "/v1/videos/v1/frame?at_s=1"),
    ("GET", "/v1/videos/v1/clip?start_s=0&end_s=1"),
    ("POST", "/v1/videos/v1/timeline"),
    ("GET", "/v1/nothing"),
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic YTpi"},
        {"x-api-key": ""},
        {"x-api-key": "vs_" + "A" * 43},
        {"x-api-key": "x" * 10_000},
        {"cookie": "vsearch_key=wrong"},
        {"cookie": "=;=\x07;vsearch_key"},
    ],
    ids=str,
)
def test_without_a_valid_key_nothing_is_told(
    locked: tuple[TestClient, str], method: str, path: str, headers: dict[str, str]
) -> None:
    answer = locked[0].request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_opens_in_each_of_its_ways(locked: tuple[TestClient, str]) -> None:
    web, key = locked
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
        assert web.get("/v1/status", headers=headers).status_code == 200
    for path in ("/", "/app.js", "/healthz", "/readyz"):
        assert web.get(path).status_code == 200
    assert web.post("/v1/login", json={"key": "wrong"}).status_code == 401
    answer = web.post("/v1/login", json={"key": key})
    assert answer.status_code == 204
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert web.get("/v1/status").status_code == 200
    assert web.post("/v1/logout").status_code == 204
    assert web.get("/v1/status").status_code == 401


def test_a_schema_names_every_route_and_no_secret(web: TestClient) -> None:
    schema = web.get("/openapi.json").json()
    for _, path in PROTECTED[:-1]:
        plain = path.partition("?")[0].replace("v1/v1", "v1/{video_id}")
        plain = plain.replace("/videos/v1", "/videos/{video_id}")
        assert plain in schema["paths"], plain
    assert "/tmp" not in json.dumps(schema)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example:8000", 403),
        ("", 403),
    ],
)
def test_without_keys_only_this_machines_names_are_answered(
    url: str, host: str, status: int
) -> None:
    with client(url, local=True) as web:
        assert web.get("/v1/status", headers={"host": host}).status_code == status


# ── images ───────────────────────────────────────────────────────────────────────────────────────


def test_hostile_images_are_refused(web: TestClient) -> None:
    huge = bytearray(picture())
    huge[16:24] = (200_000).to_bytes(4) + (200_000).to_bytes(4)  # claims 40 gigapixels
    for data in (bytes(huge), picture()[:60], b"GIF89a" + b"\xff" * 100, b"<svg/>", b"%PDF-1.7"):
        assert web.post("/v1/search/image", content=data).status_code == 422
        term = {"image": base64.b64encode(data).decode()}
        assert web.post("/v1/search", json={"terms": [term]}).status_code == 422


def test_an_image_asks_for_what_looks_like_it(
    web: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is another module's; here its vector goes the way of the query."""
    seen = []

    def encode(engine: Any, pixels: Any) -> Any:
        seen.append(pixels.shape)
        return engine.vector_at("v2", 7.7)

    monkeypatch.setattr(module, "_encode_picture", encode)
    best = web.post("/v1/search/image?limit=3", content=picture()).json()["segments"][0]
    assert best["video_id"] == "v2" and best["start_s"] <= 7.7 <= best["end_s"]
    term = {"image": base64.b64encode(picture(form="JPEG")).decode()}
    body = {"terms": [term, {"text": "at night", "weight": 0.1}]}
    answer = web.post("/v1/search", json=body).json()
    assert answer["query"] == "an image, at night (0.1)"
    assert seen == [(48, 64, 3), (48, 64, 3)]


def test_a_timeline_over_http(web: TestClient, url: str) -> None:
    found = web.post("/v1/videos/v1/timeline?buckets=40", json={"q": "a boat"}).json()
    assert len(found["scores"]) == 40 and found["step_s"] == pytest.approx(1)
    best = of_engine(url, "a boat", 100)
    mine = max(s["score"] for s in best if s["video_id"] == "v1")
    assert max(found["scores"]) >= mine > found["background"]
    assert np.argmax(found["scores"]) == int(
        next(s["best_s"] for s in best if s["video_id"] == "v1")
    )
