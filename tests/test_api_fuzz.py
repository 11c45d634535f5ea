"""More than ten thousand requests that nobody would send: none is a fault, none tells of what is inside."""

import base64
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from httpx2 import InvalidURL
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_routes import PROTECTED, client, picture, url  # noqa: F401  the corpus of those tests

pytestmark = pytest.mark.long
EXAMPLES = 150
REQUESTS = 8000
SECRETS = ("Traceback", "site-packages", 'File "', "vsearch/", "/tmp/", "0x7f", "Error(")
NASTY = [
    "", " ", "\x00", "\x7f", "é", "😀", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "../../etc/passwd", "..\\..\\windows", "%2e%2e%2f", "/etc/passwd", "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data", "s3://secret/key", "';DROP TABLE videos;--",
    "<script>alert(1)</script>", "{{7*7}}", "${jndi:ldap://x}", "A" * 600, "-1", "0", "1e309", "nan",
    "inf", "-0", "9" * 400, "true", "null", "[]", "{}", "1;2", "\r\nSet-Cookie: a=b", "*" * 200,
    "[!-]" * 30, "2026-13-45T99:99:99Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
    "v1", "v0",
]  # fmt: skip

FIELDS = [
    "q", "terms", "where", "text", "image", "video_id", "at_s", "weight", "limit", "cursor", "videos",
    "paths", "tags", "from_s", "after", "min_score", "max_gap_s", "\x00", "x" * 99,
]  # fmt: skip
PARAMETERS = [
    "q", "without", "limit", "max_gap_s", "min_score", "cursor", "video", "path", "tag", "from_s", "to_s",
    "after", "before", "format", "at_s", "width", "start_s", "end_s", "buckets", "status", "x",
]  # fmt: skip


@pytest.fixture(scope="module")
def web(url: str) -> Iterator[TestClient]:  # noqa: F811
    with client(url) as found:
        yield found


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_the_document_allows_and_forbids(
    url: str,  # noqa: F811
    mode: GenerationMode,
) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", client(url).app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 14
    for operation in operations:
        ask_all(operation, mode)


def ask_all(operation: Any, mode: GenerationMode) -> None:
    """Sends what the document allows for an operation, or what it forbids."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ]
        )

    try:
        ask()
    except Unsatisfiable:  # an operation without parameters has nothing to forbid
        assert mode is GenerationMode.NEGATIVE


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that a field of JSON may hold, but should not."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return rng.choice(NASTY)
    if kind == 3:
        return rng.choice([0, -1, 1e308, 10**30, 1.5, float(rng.randrange(100))])
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return base64.b64encode(
            rng.randbytes(rng.randrange(80)) + picture()[: rng.randrange(90)]
        ).decode()
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(FIELDS): value(rng, depth + 1) for _ in range(rng.randrange(5))}


def body(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.2:
        return {"content": rng.randbytes(rng.randrange(200))}
    if rng.random() < 0.2:
        data = bytearray(picture(form=rng.choice(["PNG", "JPEG", "WEBP", "GIF"])))
        for _ in range(rng.randrange(6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return {"content": bytes(data[: rng.randrange(1, len(data) + 1)])}
    if rng.random() < 0.5:
        found = value(rng)
        return {"json": {"q": "a boat"} | found if isinstance(found, dict) else found}
    return {"json": value(rng)}


def test_what_nobody_would_send(web: TestClient) -> None:
    rng = random.Random(0)
    answers: Counter[int] = Counter()
    for _ in range(REQUESTS):
        method, path = rng.choice(PROTECTED)
        path = path.partition("?")[0]
        if rng.random() < 0.3:
            path = path.replace("/v1/v1", f"/v1/{rng.choice(NASTY)}")
            path = path.replace("videos/v1", f"videos/{rng.choice(NASTY).strip() or 'v9'}")
        parameters = [(rng.choice(PARAMETERS), rng.choice(NASTY)) for _ in range(rng.randrange(5))]
        if method == "GET" and rng.random() < 0.7:
            parameters.append(("q", rng.choice(["a boat", *NASTY])))
        options = body(rng) if method == "POST" else {}
        if rng.random() < 0.2:
            options["headers"] = {"range": rng.choice(["bytes=0-", "bytes=-0", "bytes=9-1", "x"])}
        try:
            answer = web.request(method, path, params=parameters, **options)
        except (InvalidURL, ValueError):  # what the client itself does not send
            continue
        answers[answer.status_code] += 1
        told = (method, path, parameters, options, answer.text[:300])
        assert answer.status_code < 500 or answer.status_code == 503, told
        if answer.headers.get("content-type", "").startswith("application/problem"):
            assert not any(secret in answer.text for secret in SECRETS), told
    assert sum(answers.values()) > 0.9 * REQUESTS
    assert answers[200] > 100 and answers[422] > 100 and answers[404] > 100
