"""The shapes of API v1: what a request may say, and what an answer looks like."""

import base64
import binascii
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vsearch.config import MIN_CONFIDENCE, UserError
from vsearch.filters import Filter
from vsearch.pictures import read_picture
from vsearch.query import AGAINST, MOST_WEIGHT, Term, read_sentence, terms_of

MOST_TERMS = 8
MOST_SEGMENTS = 1000
Text = Annotated[str, Field(max_length=500)]
Name = Annotated[str, Field(max_length=2000)]
Seconds = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]

SENTENCE = (
    "a sentence: what the moment should show. What follows 'without', 'but no' or 'and not' counts "
    "against it, unless all of it is in quotes"
)
Confidence = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
CONFIDENCE = (
    f"segments less sure than this are hidden, and counted in `hidden`; {MIN_CONFIDENCE} is what the page "
    "asks for"
)

Format = Literal["json", "csv", "edl", "otio"]
FORMATS = "csv, edl and otio: the segments as a table or a cut list"


class Strict(BaseModel):
    """Refuses fields that it does not know: a misspelt filter must not be a filter that is not there."""

    model_config = ConfigDict(extra="forbid")


class TermIn(Strict):
    """One thing that a moment should be like; with a negative weight, should not. Exactly one of
    `text`, `image`, or `video_id` with `at_s`."""

    text: Text | None = Field(None, description="what is seen")
    image: str | None = Field(
        None,
        description="a JPEG, PNG, WebP or GIF file, base64",
        json_schema_extra={"format": "byte"},
    )
    video_id: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="like a moment of this video"
    )
    at_s: Seconds | None = Field(None, description="second of the moment, as a player shows it")
    weight: float = Field(1.0, ge=-MOST_WEIGHT, le=MOST_WEIGHT, description="not 0")

    def term(self) -> Term:
        picture = None
        if self.image is not None:
            try:
                picture = read_picture(base64.b64decode(self.image, validate=True))
            except binascii.Error as error:
                raise UserError("The image is not valid base64.") from error
        return Term(self.text, picture, self.video_id, self.at_s, self.weight)


class WhereIn(Strict):
    """What moments must satisfy, all of it at once."""

    videos: list[Name] = Field([], max_length=1000, description="ids or URIs")
    paths: list[Name] = Field([], max_length=100, description="globs of the URI")
    tags: dict[Name, Name] = Field({}, max_length=100)
    from_s: Seconds | None = Field(None, description="second of the video")
    to_s: Seconds | None = None
    after: datetime | None = Field(None, description="recorded after; without a zone UTC")
    before: datetime | None = None

    def filter(self) -> Filter | None:
        where = Filter(
            self.videos, self.paths, self.tags, self.from_s, self.to_s, self.after, self.before
        )
        return None if where == Filter(videos=[], paths=[]) else where


class QueryIn(Strict):
    """What to look for, where, and how much of it."""

    q: Text | None = Field(None, description=SENTENCE)
    terms: list[TermIn] = Field([], max_length=MOST_TERMS)
    where: WhereIn = WhereIn()
    limit: int = Field(12, ge=1, le=100)
    max_gap_s: float = Field(
        1.0, ge=0, le=60, description="seconds between frames of one segment, at most"
    )
    min_score: float | None = Field(None, ge=-1, le=1)
    min_confidence: Confidence = Field(0.0, description=CONFIDENCE)
    cursor: str | None = Field(
        None, max_length=500, description="of the answer before, for the segments that follow"
    )

    def all_terms(self) -> list[Term]:
        """Raises `UserError` where they make no query, or too large a one."""
        first = read_sentence(self.q) if self.q is not None else []
        found = len(first) + len(self.terms)
        if found > MOST_TERMS + 1:  # each is encoded, those of the sentence too
            raise UserError(
                f"A query has at most {MOST_TERMS + 1} terms, those that its sentence is read as among "
                f"them, and this one has {found}."
            )
        return terms_of([*first, *(term.term() for term in self.terms)])


class ImageParameters(Strict):
    """A search by image, as parameters of its address."""

    q: Text | None = Field(None, description="what else it shows")
    limit: int = Field(12, ge=1, le=100)
    max_gap_s: float = Field(1.0, ge=0, le=60)
    min_score: float | None = Field(None, ge=-1, le=1)
    min_confidence: Confidence = Field(0.0, description=CONFIDENCE)

    format: Format = Field("json", description=FORMATS)

    def query(self) -> QueryIn:
        return QueryIn(**self.model_dump(exclude={"format"}))


class SearchParameters(Strict):
    """A search as parameters of an address."""

    q: Text = Field(description=SENTENCE)
    without: list[Text] = Field([], max_length=MOST_TERMS - 1, description="and what it should not")
    limit: int = Field(12, ge=1, le=100)
    max_gap_s: float = Field(1.0, ge=0, le=60)
    min_score: float | None = Field(None, ge=-1, le=1)
    min_confidence: Confidence = Field(0.0, description=CONFIDENCE)
    cursor: str | None = Field(None, max_length=500)
    video: list[Name] = Field([], max_length=1000, description="id or URI")
    path: list[Name] = Field([], max_length=100, description="glob of the URI")
    tag: list[Name] = Field([], max_length=100, description="name=value")
    from_s: Seconds | None = Field(None, description="second of the video")
    to_s: Seconds | None = None
    after: datetime | None = Field(None, description="recorded after; without a zone UTC")
    before: datetime | None = None
    format: Format = Field("json", description=FORMATS)

    def query(self) -> QueryIn:
        """Raises `UserError`."""
        return QueryIn(
            q=self.q,
            terms=[TermIn(text=text, weight=AGAINST) for text in self.without],
            where=WhereIn(
                videos=self.video, paths=self.path, tags=pairs(self.tag), from_s=self.from_s,
                to_s=self.to_s, after=self.after, before=self.before,
            ),
            limit=self.limit,
            max_gap_s=self.max_gap_s,
            min_score=self.min_score,
            min_confidence=self.min_confidence,
            cursor=self.cursor,
        )  # fmt: skip


class SegmentOut(BaseModel):
    video: str = Field(description="where the video lives")
    video_id: str = Field(description="names the video in /v1/videos/…")
    start_s: float = Field(description="seconds, as a player seeks")
    end_s: float
    best_s: float = Field(description="the strongest frame")
    score: float = Field(description="mean cosine of the segment's frames")
    recorded_at: str = Field(description="absolute time of the start, ISO 8601")
    confidence: float | None = Field(
        description="0 to 1: the share of made-up sentences, which nothing shows, that score less; null "
        "where a picture or moment is looked for, and where the snapshot knows none"
    )


class SearchOut(BaseModel):
    query: str
    snapshot: str = Field(description="the version of the index that answered")
    took_ms: float
    took: dict[str, float] = Field(description="milliseconds of each step")
    background: float = Field(
        description="the query's mean score over the index: what anything scores"
    )
    partial: bool = Field(description="a part of the index did not answer in time")
    missing: list[str] = Field(description="which part, and why")
    hidden: int = Field(description="segments of this page that are less sure than min_confidence")
    hidden_more: bool = Field(description="others as weak follow")
    segments: list[SegmentOut]
    cursor: str | None = Field(description="for the segments that follow; null when there are none")


class TimelineOut(BaseModel):
    snapshot: str
    start_s: float
    step_s: float
    scores: list[float | None] = Field(description="best score of each step; null: nothing indexed")
    background: float


class CoverageOut(BaseModel):
    """Of all videos that the corpus knows: how many are in which state."""

    total: int
    indexed: int
    partial: int
    failed: int
    pending: int
    not_in_index: int = Field(
        description="embedded in full or in part, but not in this snapshot yet"
    )
    expected_s: float
    indexed_s: float


class StatusOut(BaseModel):
    snapshot: str
    space: str
    rows: int
    videos: int
    hours: float
    coverage: CoverageOut | None = Field(description="null until it was read after a start")
    tags: dict[str, list[str]] = Field(
        description="names and values to filter by, at most 100 each"
    )
    parts: int
    missing: list[str]
    problem: str | None = Field(description="why a newer snapshot is not in use, if it is so")


class VideoOut(BaseModel):
    video_id: str
    uri: str
    copies: list[str]
    status: str = Field(description="indexed, partial, failed or pending")
    reason: str | None
    in_index: bool
    frames: int
    duration_s: float | None
    expected_s: float | None
    indexed_s: float
    gaps: list[tuple[float, float]] = Field(description="seconds that are not indexed")
    recorded_at: datetime
    tags: dict[str, str]


class VideosOut(BaseModel):
    videos: list[VideoOut]
    total: int
    cursor: str | None


class ProblemOut(BaseModel):
    """An error, as RFC 9457 has it."""

    title: str
    status: int
    detail: str
    request_id: str | None


class LoginIn(Strict):
    key: str = Field(max_length=500)


def to_cursor(snapshot: str, skip: int) -> str:
    """Where the next page begins, in which snapshot."""
    return base64.urlsafe_b64encode(json.dumps([snapshot, skip]).encode()).decode()


def from_cursor(cursor: str, most: int = MOST_SEGMENTS) -> tuple[str, int]:
    """(snapshot, how many to skip, at `most`). Raises `UserError` if it is no cursor."""
    try:
        snapshot, skip = json.loads(base64.urlsafe_b64decode(cursor.encode()))
    except (ValueError, TypeError, RecursionError):
        raise UserError("The cursor is not one of an answer.") from None
    if not isinstance(snapshot, str) or type(skip) is not int or not 0 <= skip <= most:
        raise UserError("The cursor is not one of an answer.")
    return snapshot, skip


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """name=value texts as a mapping. Raises `UserError`."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"A tag is NAME=VALUE, not {text!r}.")
        found[name] = value
    return found


def problem(status: int, title: str, detail: str, request_id: str | None) -> dict[str, Any]:
    return ProblemOut(title=title, status=status, detail=detail, request_id=request_id).model_dump()
