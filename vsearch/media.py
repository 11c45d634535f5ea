"""A video's own bytes over HTTP: whole, or the range that a player asks for."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastapi import HTTPException, Response
from fastapi.responses import StreamingResponse

from vsearch.storage import open_url

PIECE_BYTES = 1 << 20
TYPES = {
    ".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm",
    ".mkv": "video/x-matroska", ".ts": "video/mp2t", ".mts": "video/mp2t", ".m2ts": "video/mp2t",
    ".mpg": "video/mpeg", ".mpeg": "video/mpeg", ".avi": "video/x-msvideo", ".ogv": "video/ogg",
}  # fmt: skip
MOST_DIGITS = 19


def ranged(uri: str, header: str | None, only_head: bool = False) -> Response:
    """A file from any fsspec URL, streamed; with a Range header (RFC 9110, one range) that part. Raises
    `HTTPException` where it cannot be read.
    """
    try:
        file = open_url(uri)
        size = file.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise HTTPException(404, "The video is no longer where it was ingested from.") from error
    except Exception as error:  # each storage has errors of its own
        logging.getLogger("ray.serve").warning("%s cannot be read: %r", uri, error)
        raise HTTPException(503, "The video's storage cannot be read now: try later.") from error
    kind = TYPES.get(Path(uri).suffix.lower(), "application/octet-stream")
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}
    start, stop, status = 0, size, 200
    if found := re.fullmatch(
        rf"bytes=(\d{{0,{MOST_DIGITS}}})-(\d{{0,{MOST_DIGITS}}})", header or "", re.ASCII
    ):
        first, last = found.groups()
        if first or last:
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            status = 206
            if start >= stop:
                file.close()
                return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    if only_head:
        file.close()
        return Response(None, status, headers, kind)
    return StreamingResponse(_pieces(file, start, stop), status, headers, kind)


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = stop - start
        while left > 0 and (data := file.read(min(PIECE_BYTES, left))):
            left -= len(data)
            yield data
