"""The query service: Ray Serve, one FastAPI application with the page, the API and the media."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application

from vsearch import runtime
from vsearch.config import UserError
from vsearch.search import Engine
from vsearch.storage import open_url

WEB = Path(__file__).parent / "web"
PIECE_BYTES = 1 << 20
MEDIA_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class SegmentOut(BaseModel):
    video: str = Field(description="where the video lives")
    video_id: str = Field(description="names the video in /v1/media")
    start_s: float = Field(description="seconds, as a player seeks")
    end_s: float
    best_s: float = Field(description="the strongest frame")
    score: float = Field(description="mean cosine of the segment's frames")
    recorded_at: str = Field(description="absolute time of the start, ISO 8601")


class SearchOut(BaseModel):
    query: str
    snapshot: str
    took_ms: float
    segments: list[SegmentOut]


class StatusOut(BaseModel):
    snapshot: str
    space: str
    videos: int
    rows: int


# Ray Serve copies the application when it decorates the class: what its methods call stands above.


def _ranged(uri: str, header: str | None) -> Response:
    """A file from any fsspec URL, streamed; with a Range header (RFC 9110, one range) that part."""
    try:
        file = open_url(uri)
        size = file.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise HTTPException(404, "The video is no longer where it was ingested from.") from error
    except Exception as error:  # each storage has errors of its own
        logging.getLogger("ray.serve").warning("%s cannot be read: %r", uri, error)
        raise HTTPException(503, "The video's storage cannot be read now: try later.") from error
    kind = MEDIA_TYPES.get(Path(uri).suffix.lower(), "application/octet-stream")
    headers = {"Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not asked or asked.groups() == ("", ""):
        headers["Content-Length"] = str(size)
        return StreamingResponse(_pieces(file, 0, size), 200, headers, kind)
    first, last = asked.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        file.close()
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    return StreamingResponse(_pieces(file, start, stop), 206, headers, kind)


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = stop - start
        while left > 0 and (data := file.read(min(PIECE_BYTES, left))):
            left -= len(data)
            yield data


api = FastAPI(
    title="vsearch",
    version="1",
    summary="Type a sentence, get the moments in your video archive.",
    docs_url=None,
    redoc_url=None,
)


@api.middleware("http")
async def _secure(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    response.headers.update(SECURITY_HEADERS)
    return response


@serve.deployment(max_ongoing_requests=32)
@serve.ingress(api)
class SearchService:
    """Answers from one snapshot, in one process."""

    def __init__(self, corpus_url: str) -> None:
        self._engine = Engine(corpus_url)
        self._engine.search("warm-up", limit=1)
        self._videos = {video["video_id"]: video["uri"] for video in self._engine.videos}

    @api.get("/v1/search", response_model=SearchOut)
    def search(
        self,
        q: Annotated[str, Query(min_length=1, max_length=500, description="what to look for")],
        limit: Annotated[int, Query(ge=1, le=100)] = 12,
        max_gap_s: Annotated[float, Query(ge=0, le=60)] = 1.0,
    ) -> dict[str, Any]:
        """The strongest segments for a sentence."""
        try:
            return self._engine.search(q, limit, max_gap_s).to_dict()
        except UserError as error:
            raise HTTPException(422, str(error)) from error

    @api.get("/v1/status", response_model=StatusOut)
    def status(self) -> dict[str, Any]:
        """The snapshot in use."""
        return {
            "snapshot": self._engine.snapshot,
            "space": self._engine.manifest["space"],
            "videos": len(self._videos),
            "rows": self._engine.rows,
        }

    @api.get("/v1/media/{video_id}", response_class=Response)
    def media(self, video_id: str, request: Request) -> Response:
        """A video of the snapshot, in full or the range of bytes asked for."""
        if video_id not in self._videos:
            raise HTTPException(404, "There is no such video in the index.")
        return _ranged(self._videos[video_id], request.headers.get("range"))

    @api.get("/healthz")
    def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/", include_in_schema=False)
    def page(self) -> FileResponse:
        return FileResponse(WEB / "index.html")

    @api.get("/{name}.{suffix}", include_in_schema=False)
    def asset(self, name: str, suffix: str) -> FileResponse:
        path = WEB / f"{name}.{suffix}"
        if path.parent != WEB or suffix not in ("css", "js", "svg") or not path.is_file():
            raise HTTPException(404, "There is no such page.")
        return FileResponse(path)


def _require_free(host: str, port: int) -> None:
    """Ray's proxy would share a taken port without a word."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"Cannot listen on {host}:{port} ({error.strerror}): choose another --port."
            ) from error


def stop() -> None:
    """Takes the service down, also from a cluster that goes on."""
    serve.delete("vsearch")


class ServeArgs(BaseModel):
    """Arguments of the application in a Serve config file."""

    corpus: str


def build_app(args: ServeArgs) -> Application:
    """The application for `serve deploy`: `import_path: vsearch.serve:build_app`."""
    application: Application = SearchService.bind(args.corpus)  # type: ignore[attr-defined]
    return application


def start(corpus_url: str, host: str = "127.0.0.1", port: int = 8000) -> str:
    """Serves a corpus from this machine until Ray ends; returns the page's address."""
    engine = Engine(corpus_url)  # a missing index is said here, in one sentence
    if not runtime.on_cluster():
        _require_free(host, port)
    runtime.connect()
    serve.start(http_options={"host": host, "port": port})
    with runtime.user_errors():
        serve.run(build_app(ServeArgs(corpus=engine.corpus.url)), name="vsearch", route_prefix="/")
    return f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}/"
