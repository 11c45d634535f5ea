import math
from datetime import UTC, datetime, timedelta, timezone
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsearch.config import UserError
from vsearch.filters import Filter

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def video(video_id: str = "v1", uri: str = "/in/a.mp4", **facts: Any) -> dict[str, Any]:
    return {
        "video_id": video_id,
        "uri": uri,
        "copies": [],
        "tags": {},
        "recorded_at": NOON,
        **facts,
    }


def window(where: Filter, of: dict[str, Any]) -> tuple[float, float]:
    first, last = where.windows([of])
    return float(first[0]), float(last[0])


def is_out(where: Filter, of: dict[str, Any]) -> bool:
    bounds = [math.isnan(bound) for bound in window(where, of)]
    assert len(set(bounds)) == 1
    return bounds[0]


def test_nothing_given_admits_everything() -> None:
    assert window(Filter(), video()) == (-math.inf, math.inf)
    first, last = Filter().windows([])
    assert first.shape == last.shape == (0,)


@pytest.mark.parametrize("name", ["v1", "/in/a.mp4", "s3://other/copy.mp4"])
def test_a_video_is_named_by_id_uri_or_that_of_a_copy(name: str) -> None:
    mine = video(copies=["/old/a.mp4", "s3://other/copy.mp4"])
    other = video("v2", "/in/b.mp4")
    assert not is_out(Filter(videos=[name]), mine)
    assert is_out(Filter(videos=[name]), other)
    assert not is_out(Filter(videos=["nothing", name]), mine)


def test_a_path_matches_whole_uris_with_regard_to_case() -> None:
    mine = video(uri="s3://cams/Gate/1.mp4", copies=["/disk/gate/one.mov"])
    for glob in ("s3://cams/*", "*.mov", "*/Gate/?.mp4", "*/[G]ate/*"):
        assert not is_out(Filter(paths=["nothing", glob]), mine)
    for glob in ("*.MP4", "Gate", "s3://cams/gate/*", "cams/*"):
        assert is_out(Filter(paths=[glob]), mine)


def test_all_tags_must_be_carried() -> None:
    mine = video(tags={"camera": "1", "site": "north"})
    assert not is_out(Filter(tags={"camera": "1"}), mine)
    assert not is_out(Filter(tags={"camera": "1", "site": "north"}), mine)
    assert is_out(Filter(tags={"camera": "1", "site": "south"}), mine)
    assert is_out(Filter(tags={"lens": "1"}), mine)
    assert not is_out(Filter(tags={"camera": "1"}), video(tags=[("camera", "1")]))


def test_times_of_recording_are_seconds_of_the_video() -> None:
    where = Filter(after=NOON + timedelta(seconds=10), before=NOON + timedelta(hours=1))
    assert window(where, video()) == (10, 3600)
    assert window(where, video(recorded_at=NOON + timedelta(minutes=30))) == (-1790, 1800)


def test_seconds_may_be_whole_numbers() -> None:
    where = Filter(from_s=1, to_s=2, after=NOON + timedelta(seconds=1.5))
    assert window(where, video()) == (1.5, 2)
    assert is_out(Filter(videos=["v2"], from_s=1, to_s=2), video())


def test_the_narrower_of_both_bounds_counts() -> None:
    where = Filter(from_s=20, to_s=30, after=NOON, before=NOON + timedelta(seconds=25))
    assert window(where, video()) == (20, 25)
    assert window(where, video(recorded_at=NOON - timedelta(seconds=22))) == (22, 30)


@pytest.mark.parametrize("away_s", [-100, -20, 20, 100])
def test_a_video_whose_bounds_leave_no_time_is_out(away_s: int) -> None:
    """A moment longer than what lies between the bounds would overlap both, and what lies between."""
    where = Filter(from_s=10, to_s=20, after=NOON, before=NOON + timedelta(seconds=10))
    at = NOON + timedelta(seconds=away_s)
    assert is_out(where, video(recorded_at=at)) == (away_s not in range(-19, 0))


def test_a_time_without_a_zone_is_utc() -> None:
    naive = Filter(after=datetime(2026, 5, 1, 13), before=datetime(2026, 5, 1, 14))
    assert window(naive, video()) == (3600, 7200)
    assert naive.after == NOON + timedelta(hours=1)
    east = datetime(2026, 5, 1, 15, tzinfo=timezone(timedelta(hours=2)))
    assert window(Filter(after=east), video()) == (3600, math.inf)
    assert Filter(after=datetime(2026, 5, 1, 14), before=east + timedelta(hours=2)).before


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"from_s": math.nan}, "from_s must be a number of seconds"),
        ({"to_s": math.nan}, "to_s must be a number of seconds"),
        ({"from_s": 5, "to_s": 5}, "begins at 5 s and ends at 5 s"),
        ({"from_s": 6.5, "to_s": 5}, "begins at 6.5 s and ends at 5 s"),
        ({"after": NOON, "before": NOON}, "time of recording is empty"),
        ({"after": NOON + timedelta(1), "before": NOON.replace(tzinfo=None)}, "is empty"),
        (
            {
                "after": datetime(2026, 5, 1, 12),
                "before": datetime(2026, 5, 1, 13, tzinfo=timezone(timedelta(hours=2))),
            },
            "is empty",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Filter(**given_)


names = st.sampled_from(["a", "b", "c"])
uris = st.builds("/{}/{}.mp4".format, names, names)
tags = st.dictionaries(names, st.sampled_from(["1", "2"]), max_size=2)
times = st.integers(-40, 40).map(lambda s: NOON + timedelta(seconds=s))
videos = st.builds(
    video, names, uris, copies=st.lists(uris, max_size=2), tags=tags, recorded_at=times
)
seconds = st.none() | st.integers(-5, 45) | st.integers(-5, 45).map(float)
nothing: st.SearchStrategy[Any] = st.just(())
filters = st.fixed_dictionaries(
    {
        "videos": nothing | st.lists(names | uris, max_size=2),
        "paths": nothing
        | st.lists(st.sampled_from(["/a/*", "*/b.mp4", "*", "/c/a.mp4"]), max_size=2),
        "tags": st.just({}) | tags,
        "from_s": seconds,
        "to_s": seconds,
        "after": st.none() | times,
        "before": st.none() | times,
    }
)


def admits(given_: dict[str, Any], of: dict[str, Any], at_s: float) -> bool:
    """Whether an instant of a video is admitted: by hand, condition by condition."""
    known = [of["uri"], *of["copies"]]
    at = of["recorded_at"] + timedelta(seconds=at_s)
    return (
        (not given_["videos"] or any(name in given_["videos"] for name in [of["video_id"], *known]))
        and (not given_["paths"] or any(fnmatchcase(u, g) for u in known for g in given_["paths"]))
        and all(item in of["tags"].items() for item in given_["tags"].items())
        and (given_["from_s"] is None or at_s >= given_["from_s"])
        and (given_["to_s"] is None or at_s <= given_["to_s"])
        and (given_["after"] is None or at >= given_["after"])
        and (given_["before"] is None or at <= given_["before"])
    )


@given(filters, st.lists(videos, max_size=6))
def test_windows_hold_just_the_instants_that_are_admitted(
    given_: dict[str, Any], some: list[dict[str, Any]]
) -> None:
    try:
        where = Filter(**given_)
    except UserError:
        return
    first, last = where.windows(some)
    assert first.dtype == last.dtype == np.float64
    for of, low, high in zip(some, first, last, strict=True):
        for at_s in np.arange(-99.5, 100, 1):  # halves, as bounds are whole
            assert (low <= at_s <= high) == admits(given_, of, float(at_s))
        assert math.isnan(low) == math.isnan(high)
        assert math.isnan(low) or low < high
