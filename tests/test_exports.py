import csv
import io
import re
from dataclasses import replace
from typing import Any

import opentimelineio as otio
import pytest
from records import video_row

from vsearch.config import UserError
from vsearch.exports import COLUMNS, to_csv, to_edl, to_otio
from vsearch.search import Results, Segment

QUERY = 'a "red" car,\non the beach'
ONE_LINE = 'a "red" car, on the beach'


def segment(name: str, start_s: float, end_s: float, score: float = 0.5, **values: Any) -> Segment:
    return Segment(
        **{
            "video": f"/videos/{name}.mp4",
            "start_s": start_s,
            "end_s": end_s,
            "best_s": (start_s + end_s) / 2,
            "score": score,
            "recorded_at": "2026-01-01T12:00:03+00:00",
            "video_id": name,
        }
        | values
    )


def results(*segments: Segment, query: str = QUERY) -> Results:
    return Results(query, "v1", 12.5, segments)


ROWS = [
    video_row("ntsc", fps=30000 / 1001, duration_s=600.0),
    video_row("pal", fps=25.0, duration_s=None),
    video_row("film", fps=24.0, start_s=10.0, zero_s=10.0, duration_s=90.0),
    video_row("unknown", fps=None),
    video_row("nonsense", fps=float("nan")),
    video_row("slow", fps=12.5),
]
SEGMENTS = [
    segment("ntsc", 10.01, 12.512, 0.61),
    segment("pal", 1.2, 3.6, 0.6),
    segment("ntsc", 70.07, 71.071, 0.5),
    segment("film", 0.5, 89.75, 0.4),
    segment("unknown", 2.0, 3.0, 0.3),
    segment("nonsense", 2.0, 3.0, 0.2),
    segment("elsewhere", 4.0, 4.01, 0.1),
]
RATES = [30000 / 1001, 25, 30000 / 1001, 24, 25, 25, 25]


def test_a_table_holds_what_was_found() -> None:
    told = replace(SEGMENTS[0], confidence=0.97)
    found = results(told, *SEGMENTS[1:], segment('of "us", all', 1, 2))
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [tuple(row) for row in rows] == [COLUMNS] * 8
    for place, (row, true) in enumerate(zip(rows, found, strict=True), 1):
        assert row["place"] == str(place)
        assert (row["query"], row["snapshot"]) == (QUERY, "v1")
        for name, value in true.to_dict().items():
            told = row[name] == "" if value is None else type(value)(row[name]) == value
            assert told, name
    assert list(csv.reader(io.StringIO(to_csv(results())))) == [list(COLUMNS)]


def test_the_columns_stay() -> None:
    assert COLUMNS[:10] == (
        *("place", "video", "start_s", "end_s", "best_s", "score", "recorded_at", "video_id"),
        *("query", "snapshot"),
    )


def read_otio(text: str) -> Any:
    return otio.adapters.read_from_string(text, "otio_json")


def test_a_timeline_holds_a_clip_a_segment() -> None:
    timeline = read_otio(to_otio(results(*SEGMENTS), ROWS))
    assert timeline.name == ONE_LINE
    [track] = timeline.tracks
    assert track.kind == otio.schema.TrackKind.Video
    end_s = 0.0
    for clip, true, rate in zip(track, SEGMENTS, RATES, strict=True):
        source = clip.source_range
        assert source.start_time.rate == source.duration.rate == rate
        assert source.start_time.value == int(source.start_time.value)
        assert abs(source.start_time.to_seconds() - true.start_s) <= 0.501 / rate
        lasts_s = max(1 / rate, true.end_s - true.start_s)
        assert abs(source.duration.to_seconds() - lasts_s) <= 1 / rate
        assert clip.media_reference.target_url == true.video
        assert clip.name == true.video.removeprefix("/videos/")
        told = clip.metadata["vsearch"]
        assert (told["query"], told["score"], told["video_id"]) == (
            QUERY,
            true.score,
            true.video_id,
        )
        assumed = true.video_id in ("unknown", "nonsense", "elsewhere")
        assert told["rate"] == ("assumed" if assumed else "of the video")
        [marker] = clip.markers
        assert (marker.name, marker.metadata["vsearch"]["score"]) == (ONE_LINE, true.score)
        assert abs(marker.marked_range.start_time.to_seconds() - true.best_s) <= 0.501 / rate
        placed = clip.range_in_parent()
        assert placed.start_time.to_seconds() == pytest.approx(end_s)
        end_s += source.duration.to_seconds()


def test_the_media_is_as_long_as_the_video() -> None:
    timeline = read_otio(to_otio(results(*SEGMENTS), ROWS))
    known = {clip.name: clip.media_reference.available_range for clip in timeline.find_clips()}
    assert known["pal.mp4"] is None and known["elsewhere.mp4"] is None
    for name, length_s in (("ntsc.mp4", 600), ("film.mp4", 90), ("unknown.mp4", 10)):
        assert known[name].start_time.value == 0
        assert known[name].duration.to_seconds() == pytest.approx(length_s, abs=0.03)


def edl_events(text: str, rate: float) -> list[Any]:
    timeline = otio.adapters.read_from_string(text, "cmx_3600", rate=rate)
    [track] = timeline.tracks
    return list(track)


@pytest.mark.parametrize(
    ("names", "rate", "kind"),
    [
        (["ntsc", "pal", "ntsc"], 30000 / 1001, "DROP"),
        (["pal", "pal", "film"], 25, "NON-DROP"),
        (["film"], 24, "NON-DROP"),
        (["unknown", "film", "nonsense"], 25, "NON-DROP"),
        (["slow"], 25, "NON-DROP"),
    ],
)
def test_an_edl_reads_back_as_what_was_found(names: list[str], rate: float, kind: str) -> None:
    true = [segment(name, 700 + 3.1 * place, 702.5 + 4.2 * place, 0.3 + place / 10)
            for place, name in enumerate(names)]  # fmt: skip
    text = to_edl(results(*true), ROWS)
    assert text.splitlines()[:2] == [f"TITLE: {ONE_LINE}", f"FCM: {kind} FRAME"]
    events = edl_events(text, rate)
    for event, wanted in zip(events, true, strict=True):
        assert event.name == f"{wanted.video_id}.mp4"
        assert event.media_reference.target_url == wanted.video
        source = event.source_range
        assert source.start_time.to_seconds() == pytest.approx(wanted.start_s, abs=0.6 / rate)
        lasts_s = wanted.end_s - wanted.start_s
        assert source.duration.to_seconds() == pytest.approx(lasts_s, abs=1.1 / rate)
        notes = event.metadata["cmx_3600"]["comments"]
        assert f"SCORE: {wanted.score:g}" in notes
        if kind == "NON-DROP":  # the reader passes over markers in drop-frame time code
            assert [marker.name for marker in event.markers] == [ONE_LINE.upper()]
    marks = re.findall(r"^\* LOC: (\S+) GREEN +(.*)$", text, re.MULTILINE)
    assert [name for _, name in marks] == [ONE_LINE.upper()] * len(names)
    for (code, _), wanted in zip(marks, true, strict=True):
        best_s = otio.opentime.from_timecode(code, rate).to_seconds()
        assert best_s == pytest.approx(wanted.best_s, abs=0.6 / rate)


def test_reels_have_names_of_eight_letters_that_differ() -> None:
    names = ["holiday-2024", "holiday-2025", "holiday-2026", "küche", "…", "?", "a b", "ab"]
    found = results(*(segment(name, 1, 2) for name in [*names, names[0]]))
    lines = [line for line in to_edl(found, []).splitlines() if re.match(r"\d{3} ", line)]
    reels = [line.split()[1] for line in lines]
    assert all(re.fullmatch("[A-Z0-9]{1,8}", reel) for reel in reels)
    assert reels[0] == reels[-1] == "HOLIDAY2"
    assert len(set(reels)) == len(names)


def test_nothing_found_is_an_empty_list_too() -> None:
    assert list(read_otio(to_otio(results(), ROWS)).find_clips()) == []
    assert to_edl(results(), ROWS).splitlines()[0] == f"TITLE: {ONE_LINE}"


def test_an_edl_cannot_number_more_than_999() -> None:
    many = [segment("pal", n, n + 1) for n in range(1000)]
    assert len(edl_events(to_edl(results(*many[:999]), ROWS), 25)) == 999
    with pytest.raises(UserError, match="999 segments, not 1000"):
        to_edl(results(*many), ROWS)
