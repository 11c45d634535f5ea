"""API v1 over HTTP, and the page: a FastAPI application around a `Service`, without Ray."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from vsearch import api, exports
from vsearch.clips import PREVIEW_S
from vsearch.config import UserError
from vsearch.decoder import BusyError
from vsearch.guard import COOKIE, Guard
from vsearch.keys import Keys
from vsearch.media import ranged
from vsearch.pictures import read_picture
from vsearch.query import Term
from vsearch.search import Results
from vsearch.service import MEDIA, GoneError, Service, UnavailableError
from vsearch.video import VideoError

WEB = Path(__file__).parent / "web"
RETRY_AFTER_S = 1
KEPT_FOR = "private, max-age=604800, immutable"
"""What a browser may do with a picture: a video is known by its content, so its frames never change."""

FormatQuery = Annotated[api.Format, Query(description=api.FORMATS)]
VideoId = Annotated[str, PathParameter(pattern="^[0-9A-Za-z_-]{1,64}$")]
Second = Annotated[float, Query(ge=0, le=1e7, allow_inf_nan=False)]
MEDIA_TYPES = {
    "csv": "text/csv",
    "edl": "text/plain",
    "otio": "application/vnd.opentimelineio+json",
}
WRITERS: dict[str, Callable[[Results, Service], str]] = {
    "csv": lambda results, _: exports.to_csv(results),
    "edl": lambda results, service: exports.to_edl(results, service.rows()),
    "otio": lambda results, service: exports.to_otio(results, service.rows()),
}
SEGMENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}}
}
PROBLEM = "application/problem+json"
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": api.ProblemOut, "description": description}
    for status, description in {
        400: "the body cannot be read",
        401: "a key is needed",
        404: "there is no such thing",
        410: "the cursor's snapshot is gone: search again",
        413: "too large",
        422: "the request makes no sense; `detail` says why",
        429: "too much is under way: ask again after Retry-After seconds",
        503: "not now; `detail` says why",
    }.items()
}
TITLES = {
    400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 410: "Gone",
    422: "Unprocessable Content", 429: "Too Many Requests", 503: "Service Unavailable",
}  # fmt: skip


def make_app(
    service: Service,
    keys: Keys | None = None,
    local: bool = False,
    background: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> FastAPI:
    """The application. `keys` and `local` are the `Guard`'s; `background` runs as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(background()) if background else None
        yield
        if task:
            task.cancel()
        service.close()

    app = FastAPI(
        title="vsearch",
        version="1",
        summary="Type a sentence, get the moments in your video archive.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=PROBLEMS,
    )
    app.add_middleware(Guard, keys=keys, local=local)
    _add_errors(app)
    _add_search(app, service)
    _add_videos(app, service)
    _add_operations(app, service, keys)
    _add_page(app)
    _name_problems(app)
    return app


def _name_problems(app: FastAPI) -> None:
    """Gives errors their own media type in the OpenAPI document, where FastAPI says JSON."""
    document = app.openapi()
    for operation in (o for path in document["paths"].values() for o in path.values()):
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and "application/json" in answer.get("content", {}):
                answer["content"] = {PROBLEM: answer["content"]["application/json"]}


def _problem(
    request: Request, status: int, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    body = api.problem(
        status, TITLES.get(status, "Error"), detail, request.headers.get("x-request-id")
    )
    return JSONResponse(body, status, headers, media_type=PROBLEM)


def _add_errors(app: FastAPI) -> None:
    """Every error is one sentence for people; what went wrong inside is in the log alone."""

    def handler(kind: type[Exception], status: int) -> None:
        @app.exception_handler(kind)
        async def answer(request: Request, error: Exception) -> Response:
            return _problem(request, status, str(error) or TITLES[status])

    handler(UserError, 422)
    handler(GoneError, 410)
    handler(UnavailableError, 503)

    @app.exception_handler(LookupError)
    async def missing(request: Request, error: LookupError) -> Response:
        if type(error) is not LookupError:  # an index or a key of ours: a fault
            raise error
        return _problem(request, 404, str(error))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> Response:
        return _problem(
            request, 429, "Too much is under way: try again.", {"Retry-After": str(RETRY_AFTER_S)}
        )

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> Response:
        return _problem(request, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("query", "body"))
        return _problem(request, 422, f"{place}: {first['msg']}" if place else first["msg"])


def _add_search(app: FastAPI, service: Service) -> None:
    async def answer(query: api.QueryIn, terms: list[Term], form: api.Format) -> Response:
        found = await service.search(
            terms,
            query.where.filter(),
            query.limit,
            query.max_gap_s,
            query.min_score,
            query.cursor,
            query.min_confidence,
        )
        if form == "json":
            return JSONResponse(found.to_dict())
        body = await run_in_threadpool(WRITERS[form], found.results, service)
        name = f"attachment; filename=segments.{form}"
        return Response(body, media_type=MEDIA_TYPES[form], headers={"Content-Disposition": name})

    @app.get("/v1/search", response_model=api.SearchOut, responses=SEGMENTS)
    async def search(
        asked: Annotated[api.SearchParameters, Query()],
    ) -> Response:
        """The strongest segments for a sentence."""
        query = asked.query()
        return await answer(query, query.all_terms(), asked.format)

    @app.post("/v1/search", response_model=api.SearchOut, responses=SEGMENTS)
    async def search_composed(query: api.QueryIn, format: FormatQuery = "json") -> Response:
        """The strongest segments for sentences, images and moments together, for and against."""
        return await answer(query, await _terms(service, query), format)

    @app.post(
        "/v1/search/image",
        response_model=api.SearchOut,
        responses=SEGMENTS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    kind: {"schema": {"type": "string", "format": "binary"}}
                    for kind in ("image/jpeg", "image/png", "image/webp", "image/gif")
                },
            }
        },
    )
    async def search_image(
        request: Request,
        asked: Annotated[api.ImageParameters, Query()],
    ) -> Response:
        """The strongest segments for an image, which is the body of the request."""
        picture = await service.read(partial(read_picture, await request.body()))
        query = asked.query()
        terms = (
            [Term(picture=picture), *query.all_terms()]
            if query.q is not None
            else [Term(picture=picture)]
        )
        return await answer(query, terms, asked.format)


async def _terms(service: Service, query: api.QueryIn) -> list[Term]:
    if any(term.image is not None for term in query.terms):
        return await service.read(query.all_terms)
    return query.all_terms()


def _add_videos(app: FastAPI, service: Service) -> None:
    @app.get("/v1/videos", response_model=api.VideosOut)
    async def videos(
        q: Annotated[str, Query(max_length=500, description="part of the URI")] = "",
        status: Literal["indexed", "partial", "failed", "pending"] | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        cursor: Annotated[str | None, Query(max_length=500)] = None,
    ) -> dict[str, Any]:
        """What of each video is indexed, and what is not and why."""
        _, skip = api.from_cursor(cursor, most=1 << 40) if cursor else ("", 0)
        found = await run_in_threadpool(service.videos, q, status)
        until = skip + limit
        follows = api.to_cursor("", until) if until < len(found) else None
        return {"videos": found[skip:until], "total": len(found), "cursor": follows}

    @app.get("/v1/videos/{video_id}", response_model=api.VideoOut)
    async def video(video_id: VideoId) -> dict[str, Any]:
        """One video."""
        return service.state(video_id)

    @app.post("/v1/videos/{video_id}/timeline", response_model=api.TimelineOut)
    async def timeline(
        video_id: VideoId,
        query: api.QueryIn,
        buckets: Annotated[int, Query(ge=1, le=2000)] = 400,
    ) -> dict[str, Any]:
        """How a video answers a query all along; filters and limits do not matter."""
        terms = await _terms(service, query)
        found, snapshot, background = await service.timeline(video_id, terms, buckets)
        return {
            "snapshot": snapshot,
            "start_s": found.start_s,
            "step_s": found.step_s,
            "scores": found.scores,
            "background": background,
        }

    @app.get(
        "/v1/videos/{video_id}/frame",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )
    async def frame(
        video_id: VideoId,
        at_s: Second,
        width: Annotated[int, Query(ge=16, le=1920)] = 320,
    ) -> Response:
        """The frame that is shown at a second."""
        try:
            picture = await service.picture(video_id, at_s, width)
        except (VideoError, OSError) as error:
            raise _unreadable(error) from error
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": KEPT_FOR})

    @app.get(
        "/v1/videos/{video_id}/clip",
        response_class=Response,
        responses={200: {"content": {"video/mp4": {}}}},
    )
    async def clip(video_id: VideoId, start_s: Second, end_s: Second) -> Response:
        """A stretch of at most 60 s as H.264, small and without sound, for browsers that cannot play
        the video itself."""
        if not start_s < end_s <= start_s + PREVIEW_S:
            raise UserError(f"A preview has more than 0 and at most {PREVIEW_S:g} seconds.")
        try:
            body = await service.preview(video_id, start_s, end_s)
        except (VideoError, OSError) as error:
            raise _unreadable(error) from error
        return Response(body, media_type="video/mp4", headers={"Cache-Control": KEPT_FOR})

    @app.head("/v1/videos/{video_id}/media", include_in_schema=False)
    @app.get(
        "/v1/videos/{video_id}/media",
        response_class=Response,
        responses={
            200: {"content": {"video/*": {}}},
            206: {"description": "the range asked for", "content": {"video/*": {}}},
            416: {"description": "the range lies outside"},
        },
    )
    async def media(video_id: VideoId, request: Request) -> Response:
        """The file itself, in full or the range of bytes asked for."""
        uri = service.video(video_id)["uri"]
        with ExitStack() as stack:
            stack.enter_context(service.admitted("media", MEDIA))
            wanted, only_head = request.headers.get("range"), request.method == "HEAD"
            answer = await run_in_threadpool(ranged, uri, wanted, only_head)
            # The answer is streamed after this returns, or dropped when the client has gone.
            weakref.finalize(answer, stack.pop_all().close)
            return answer


def _unreadable(error: Exception) -> HTTPException:
    if isinstance(error, FileNotFoundError):
        return HTTPException(404, "The video is no longer where it was ingested from.")
    if isinstance(error, VideoError):
        return HTTPException(404, f"Nothing can be shown there: {error}")
    return HTTPException(503, "The video's storage cannot be read now: try later.")


def _add_operations(app: FastAPI, service: Service, keys: Keys | None) -> None:
    @app.get("/v1/status", response_model=api.StatusOut)
    async def status() -> dict[str, Any]:
        """The snapshot in use, and how much of the corpus it covers."""
        return await run_in_threadpool(service.status)

    @app.post("/v1/login", status_code=204, response_class=Response)
    async def login(given: api.LoginIn, request: Request) -> Response:
        """Lets a browser in: its key goes into a cookie that scripts cannot read."""
        answer = Response(status_code=204)
        if keys is None:
            return answer
        if keys.name_of(given.key) is None:
            raise HTTPException(401, "This key is not valid.")
        secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
        answer.set_cookie(COOKIE, given.key, httponly=True, samesite="strict", secure=secure)
        return answer

    @app.post("/v1/logout", status_code=204, response_class=Response)
    async def logout() -> Response:
        """Takes the cookie away."""
        answer = Response(status_code=204)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        """Whether it answers, and from which snapshot."""
        engine = service.versions.current
        if not await service.ready(engine):
            raise UnavailableError("A part of the index is not there yet.")
        return {"status": "ok", "snapshot": engine.snapshot}


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/{name}.{suffix}", include_in_schema=False)
    async def asset(name: str, suffix: str) -> FileResponse:
        path = WEB / f"{name}.{suffix}"
        if path.parent != WEB or suffix not in ("css", "js", "svg") or not path.is_file():
            raise HTTPException(404, "There is no such page.")
        return FileResponse(path, headers={"Cache-Control": "no-cache"})
