from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from records import CONFIG, span, video_row
from rich.console import Console

from vsearch.cli import main
from vsearch.corpus import Corpus
from vsearch.coverage import Overview, VideoState, video_state
from vsearch.evaluate import Moment, Query, evaluate
from vsearch.show import STATUS_ROWS, coverage_line, figures_table, index_line, print_videos


def states(whole: int, half: int) -> list[VideoState]:
    """Videos `w0`, `w1`, … that are indexed, among `h0`, `h1`, … of which a span lacks."""
    rows = [video_row(f"w{n}") for n in range(whole)] + [video_row(f"h{n}") for n in range(half)]
    rows.sort(key=lambda row: row["uri"][::-1])
    spans = {"w": [span(0), span(1, ended=True)], "h": [span(0)]}
    return [video_state([row], spans[row["video_id"][0]], None) for row in rows]


@pytest.mark.parametrize(
    ("whole", "half", "only_flawed", "most", "listed", "left"),
    [
        (0, 0, False, STATUS_ROWS, "", None),
        (3, 2, False, STATUS_ROWS, "hhwww", None),
        (3, 2, False, 4, "hhww", 1),
        (3, 2, False, 1, "h", 4),
        (3, 2, True, STATUS_ROWS, "hh", None),
        (3, 2, True, 1, "h", 1),
        (30, 50, True, None, "h" * 50, None),
        (3, 0, True, STATUS_ROWS, "", None),
    ],
)
def test_videos_that_are_not_indexed_in_full_come_first(
    whole: int, half: int, only_flawed: bool, most: int | None, listed: str, left: int | None
) -> None:
    out = Console(file=StringIO(), width=160)
    print_videos(out, Overview(states(whole, half), None, only_flawed, most))
    lines = out.file.getvalue().splitlines()
    assert "".join(line[2] for line in lines if ".mp4" in line) == listed
    assert [line for line in lines if "more" in line] == (
        [f"… and {left} more (--failed, or --json, lists all)"] if left else []
    )


def test_one_line_says_how_much_is_embedded() -> None:
    assert coverage_line(Overview()).startswith("[bold]0 videos[/]: none. ")
    assert coverage_line(Overview(states(3, 2))).startswith(
        "[bold]5 videos[/]: 3 indexed, 2 pending. [bold]40 frames[/] of 0:40.0 out of 0:50.0; "
    )


def test_one_line_says_whether_the_index_is_behind() -> None:
    found = states(2, 0)
    index = {"snapshot": "v1", "rows": 5, "frames": 20, "videos": frozenset({"w0", "w1"})}
    index["projector"] = None
    assert "no index yet" in index_line(Overview(found))
    assert index_line(Overview(found, index)) == (
        "Snapshot v1 answers from 5 rows, which stand for 20 frames of 2 videos."
    )
    behind = index_line(Overview(found, index | {"frames": 10, "videos": frozenset({"w0"})}))
    assert "It is behind[/]: 1 embedded videos are not in it" in behind
    projected = Overview(found, index | {"projector": "p1"})
    assert "behind" not in index_line(projected, "p1")
    assert "It is behind[/]: there is a newer projector" in index_line(projected, "p2")
    assert "behind" not in index_line(Overview(found, index), "p2")  # CLIP's own space needs none


def test_a_damaged_corpus_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Corpus(str(tmp_path))
    corpus.require(CONFIG)
    monkeypatch.setattr("sys.argv", ["vsearch", "verify", "--corpus", str(tmp_path)])
    main()
    corpus.write("frames/none.parquet", b"not Parquet")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "frames/none.parquet" in capsys.readouterr().err


def test_figures_stand_above_their_intervals() -> None:
    queries = [Query(str(n), (Moment("a.mp4", 0, 10),), "seen" if n < 4 else "") for n in range(8)]

    def search(text: str, limit: int) -> list[SimpleNamespace]:
        end_s = 10 if int(text) % 2 else 6
        return [SimpleNamespace(video="/films/a.mp4", start_s=0, end_s=end_s, score=1)]

    figures = evaluate(search, queries)
    out = Console(file=StringIO(), width=160)
    out.print(figures_table([{"space": "projected", "alpha": None, **figures}]))
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in out.file.getvalue().splitlines()
        if line.startswith("│")
    ]
    low, high = figures["intervals"]["R1@0.7"]
    assert 0 < low < 0.5 < high < 1
    assert rows[:4] == [
        ["all", "R1@0.5", "1"],
        ["8", "", "1 … 1"],
        ["", "R1@0.7", "0.5"],
        ["", "", f"{round(low, 3):g} … {round(high, 3):g}"],
    ]
    assert ["seen", "R1@0.5", "1"] in rows and ["4", "", "1 … 1"] in rows
    assert "95% interval by bootstrap over queries" in " ".join(out.file.getvalue().split())
