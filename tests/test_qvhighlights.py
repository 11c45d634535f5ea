import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsearch.cli import main
from vsearch.config import UserError
from vsearch.qvhighlights import judge, read_cases

THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
RANGES = {"full": (-1e9, 1e9), "long": (30, 150), "middle": (10, 30), "short": (0, 10)}


def predicted(qid: Any, *windows: list[float], **others: Any) -> dict[str, Any]:
    return {"qid": qid, "query": "?", "vid": "v", "pred_relevant_windows": [*windows], **others}


def annotated(qid: Any, *windows: list[float], **others: Any) -> dict[str, Any]:
    return {
        "qid": qid, "query": "?", "vid": "v", "duration": 150, "relevant_windows": [*windows],
        **others,
    }  # fmt: skip


def written(path: Path, entries: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def judged(tmp_path_factory):
    """Judges lists of predictions and annotations by way of their files."""
    folder = tmp_path_factory.mktemp("judged")

    def judge_lists(predictions: list[Any], truth: list[Any]) -> dict[str, Any]:
        said, true = written(folder / "said", predictions), written(folder / "true", truth)
        return judge(read_cases(said, true))

    return judge_lists


# Query 1 is answered with [20, 45], of IoU 25/30 with [20, 50], and, stronger, with [0, 10] itself;
# query 2 with [0, 60] and, weaker, [10, 100], of IoU 0.6 and 0.9 with [0, 100].
SAID = [
    predicted(1, [20, 45, 0.5], [0, 10, 0.9], [100, 110, 0.1]),
    predicted(2, [0, 60, 0.3], [10, 100, 0.2]),
]
TRUE = [annotated(1, [0, 10], [20, 50]), annotated(2, [0, 100])]


def by_threshold(*runs: tuple[int, float]) -> dict[str, float]:
    """Values by threshold, each for a run of so many."""
    values = [value for count, value in runs for _ in range(count)]
    return {str(t): value for t, value in zip(THRESHOLDS, values, strict=True)}


def test_figures_of_a_known_case(judged) -> None:
    report = judged(SAID, TRUE)
    # Query 1: both claimed in order up to 0.8, AP 1; then only the first, AP 1/2. Query 2: the first
    # claims up to 0.6, AP 1; the second up to 0.9, AP 1/2.
    full = by_threshold((3, 100), (4, 75), (2, 50), (1, 25))
    assert report["full"]["MR-mAP"] == full | {"average": (3 * 100 + 4 * 75 + 2 * 50 + 25) / 10}
    assert report["full"]["MR-R1"] == by_threshold((3, 100), (4, 50), (3, 0))
    assert report["full"]["MR-R5"] == {"0.5": 100, "0.7": 100}
    # At 0.7 query 2 has its claim at place 2: 1 / log2(3) = 0.6309.
    assert report["full"]["MR-NDCG@10"] == {"0.5": 100, "0.7": round(100 * (1 + 0.63093) / 2, 2)}
    # |20 − 20| and |45 − 50|; |0 − 0| and |60 − 100|.
    assert report["full"]["MR-boundary-error-s"] == (2.5 + 20) / 2
    # Only query 2 has a window of more than 30 s.
    long = by_threshold((3, 100), (6, 50), (1, 0))
    assert report["long"]["MR-mAP"] == long | {"average": 60}
    assert report["long"]["MR-R1"] == by_threshold((3, 100), (7, 0))
    # [20, 50] has 30 s: the stronger answer is wrong here, so AP is 1/2 up to 0.8.
    assert report["middle"]["MR-mAP"] == by_threshold((7, 50), (3, 0)) | {"average": 35}
    assert report["middle"]["MR-R1"] == by_threshold((7, 100), (3, 0))
    # [0, 10] has 10 s; it is claimed by the strongest answer, which is not the first in the list.
    assert report["short"]["MR-mAP"] == by_threshold((10, 100)) | {"average": 100}
    assert report["short"]["MR-R1"] == by_threshold((10, 0))
    assert report["short"]["MR-boundary-error-s"] is None
    assert [report[name]["queries"] for name in RANGES] == [2, 1, 1, 1]
    assert report["brief"] == {
        "MR-full-R1@0.5": 100, "MR-full-R1@0.7": 50, "MR-full-mAP": 72.5, "MR-full-mAP@0.5": 100,
        "MR-full-mAP@0.75": 75, "MR-long-mAP": 60, "MR-middle-mAP": 35, "MR-short-mAP": 100,
    }  # fmt: skip
    assert list(report) == [
        "brief", "full", "long", "middle", "short", "intervals", "bootstrap"
    ]  # fmt: skip
    assert report["intervals"]["full"]["MR-mAP"]["0.5"] == [100, 100]
    assert report["intervals"]["full"]["MR-R1"]["0.7"] == [0, 100]
    assert report["intervals"]["short"]["MR-boundary-error-s"] is None
    assert report["bootstrap"]["over"] == "queries"


def test_a_range_without_windows_has_no_figures(judged) -> None:
    report = judged([predicted("a", [0, 20, 1])], [annotated("a", [0, 20])])
    assert report["middle"]["MR-mAP"]["average"] == report["brief"]["MR-middle-mAP"] == 100
    assert report["long"]["MR-mAP"]["average"] is report["brief"]["MR-long-mAP"] is None
    assert report["long"]["queries"] == 0


def test_only_ten_windows_count_and_of_them_the_first_for_r1(judged) -> None:
    wrong = [[100, 101, 0.5]] * 10
    late = judged([predicted(1, *wrong, [0, 10, 0.9])], [annotated(1, [0, 10])])
    assert late["full"]["MR-mAP"]["0.5"] == late["full"]["MR-R5"]["0.5"] == 0
    tenth = judged([predicted(1, *wrong[1:], [0, 10, 0.9])], [annotated(1, [0, 10])])
    assert tenth["full"]["MR-mAP"]["0.5"] == 100
    assert tenth["full"]["MR-R1"]["0.5"] == tenth["full"]["MR-R5"]["0.5"] == 0


def test_a_true_window_is_claimed_once(judged) -> None:
    said = [predicted(1, [0, 10, 0.9], [0, 10, 0.8], [20, 30, 0.7])]
    report = judged(said, [annotated(1, [0, 10], [20, 30])])
    assert report["full"]["MR-mAP"]["0.95"] == pytest.approx(100 * (1 + 2 / 3) / 2, abs=0.005)


def test_a_query_without_answers_is_a_miss(judged) -> None:
    said = [predicted(1), predicted(2, [0, 10, 1])]
    report = judged(said, [annotated(1, [0, 10]), annotated(2, [0, 10])])
    assert report["brief"]["MR-full-mAP"] == report["brief"]["MR-full-R1@0.5"] == 50
    assert report["full"]["queries"] == 2
    empty = judged(said[:1], [annotated(1, [0, 10])])
    assert empty["brief"]["MR-full-mAP"] == 0


# --- an oracle: the rules written down as loops over one query at a time ---


def iou(a: list[float], b: list[float]) -> float:
    shared = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / ((a[1] - a[0]) + (b[1] - b[0]) - shared)


def precision_by_loops(said: list[list[float]], true: list[list[float]], threshold: float) -> float:
    claimed: list[int] = []
    curve = []
    for place, window in enumerate(sorted(said[:10], key=lambda w: -w[2]), 1):
        for index in sorted(range(len(true)), key=lambda i: (iou(window, true[i]), i))[::-1]:
            if iou(window, true[index]) >= threshold and index not in claimed:
                claimed.append(index)
                break
        curve.append((len(claimed) / len(true), len(claimed) / place))
    area, recall = 0.0, 0.0
    for reached, _ in curve:
        if reached > recall:
            area += (reached - recall) * max(p for r, p in curve if r >= reached)
            recall = reached
    return area


def figures_by_loops(said: list[Any], true: list[Any], name: str) -> dict[str, dict[str, float]]:
    low, high = RANGES[name]
    precisions: dict[str, list[float]] = {str(t): [] for t in THRESHOLDS}
    firsts: dict[str, list[float]] = {str(t): [] for t in THRESHOLDS}
    answers = {entry["qid"]: entry["pred_relevant_windows"] for entry in said}
    for entry in true:
        windows = [w for w in entry["relevant_windows"] if low < w[1] - w[0] <= high]
        for t in THRESHOLDS if windows else []:
            found = answers[entry["qid"]]
            precisions[str(t)].append(precision_by_loops(found, windows, t))
            firsts[str(t)].append(any(iou(found[0], w) >= t for w in windows))
    percent = {
        metric: {t: 100 * sum(values) / len(values) for t, values in by.items() if values}
        for metric, by in (("MR-mAP", precisions), ("MR-R1", firsts))
    }
    if percent["MR-mAP"]:
        percent["MR-mAP"]["average"] = sum(percent["MR-mAP"].values()) / len(THRESHOLDS)
    return percent


def case_of(rng: random.Random, qid: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A query with up to 15 answers, some of them near its up to 5 windows, with ties."""
    true = []
    for _ in range(rng.randint(1, 5)):
        start = rng.randrange(0, 140, 2)
        true.append([start, start + rng.choice([2, 6, 10, 12, 30, 32, 80])])
    said = []
    for _ in range(rng.randint(1, 15)):
        a, b = rng.choice(true)
        start = a + rng.choice([-4, -1, 0, 0, 1, 2.5])
        end = max(start + 1, b + rng.choice([-3, 0, 0, 2, 5]))
        said.append([start, end, rng.randint(0, 6) / 8])
    return predicted(qid, *said), annotated(qid, *true)


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_those_of_the_rules_as_loops(judged, seed: int) -> None:
    rng = random.Random(seed)
    said, true = map(list, zip(*(case_of(rng, qid) for qid in range(40)), strict=True))
    report = judged(said, true)
    for name in RANGES:
        for metric, expected in figures_by_loops(said, true, name).items():
            assert report[name][metric] == pytest.approx(expected, abs=0.0051)
            for key, (low, high) in report["intervals"][name][metric].items():
                assert low <= report[name][metric][key] <= high


def test_more_queries_than_are_judged_at_once(judged) -> None:
    rng = random.Random(7)
    said, true = map(list, zip(*(case_of(rng, qid) for qid in range(1100)), strict=True))
    report = judged(said, true)
    for name in RANGES:
        expected = figures_by_loops(said, true, name)["MR-mAP"]
        assert report[name]["MR-mAP"] == pytest.approx(expected, abs=0.0051)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_the_order_of_queries_and_the_scale_of_scores_do_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    said, true = map(list, zip(*(case_of(rng, qid) for qid in range(5)), strict=True))
    scaled = [
        {
            **s,
            "pred_relevant_windows": [[a, b, 4 * p - 2] for a, b, p in s["pred_relevant_windows"]],
        }
        for s in said
    ]
    with TemporaryDirectory() as name:
        first = judge(
            read_cases(written(Path(name, "said"), said), written(Path(name, "true"), true))
        )
        rng.shuffle(scaled)
        rng.shuffle(true)
        second = judge(
            read_cases(written(Path(name, "said"), scaled), written(Path(name, "true"), true))
        )
    for name in RANGES:
        for metric in ("MR-mAP", "MR-R1", "MR-R5", "MR-NDCG@10"):
            assert first[name][metric] == pytest.approx(second[name][metric], abs=0.011)


def test_perfect_answers_have_full_marks(judged) -> None:
    rng = random.Random(3)
    true = []
    for qid in range(30):
        edges = sorted(rng.sample(range(0, 150), 8))
        true.append(annotated(qid, *[list(w) for w in zip(edges[::2], edges[1::2], strict=True)]))
    said = [predicted(t["qid"], *([*w, 0.5] for w in t["relevant_windows"])) for t in true]
    report = judged(said, true)
    assert set(report["full"]["MR-mAP"].values()) == set(report["full"]["MR-R1"].values()) == {100}
    assert report["full"]["MR-NDCG@10"] == report["full"]["MR-R5"] == {"0.5": 100, "0.7": 100}
    assert report["full"]["MR-boundary-error-s"] == 0


# --- highlights ---

MARKED = {"duration": 8, "relevant_clip_ids": [1, 2], "saliency_scores": [[4, 2, 1], [3, 3, 0]]}


def test_highlights_of_a_known_case(judged) -> None:
    said = [predicted(1, [0, 2, 1], pred_saliency_scores=[0.1, 0.9, 0.5, 0.7])]
    report = judged(said, [annotated(1, [2, 6], **MARKED)])
    # The clips rank 1, 3, 2, 0. Marks of 2: clips 1 and 2 for two annotators, none for the third.
    both = (1 + 2 / 3) / 2
    fair, good, very = 2 * both / 3, (both + 1 / 3) / 3, 1 / 3
    for name, precision in (("Fair", fair), ("Good", good), ("VeryGood", very)):
        figures = report[f"HL-min-{name}"]
        assert figures == {"HL-mAP": round(100 * precision, 2), "HL-Hit1": 100}
        assert report["brief"][f"HL-min-{name}-mAP"] == figures["HL-mAP"]
        assert report["brief"][f"HL-min-{name}-Hit1"] == figures["HL-Hit1"]
    assert report["intervals"]["HL-min-Good"]["HL-Hit1"] == [100, 100]


def test_saliency_beyond_the_video_is_no_hit_and_what_lacks_is_zero(judged) -> None:
    true = [annotated(1, [2, 6], **MARKED)]
    beyond = judged([predicted(1, pred_saliency_scores=[0.1, 0.9, 0.5, 0.7, 2])], true)
    assert beyond["HL-min-Fair"] == {"HL-mAP": 55.56, "HL-Hit1": 0}
    # Clip 0 is below the three that share zero: two of three there, for two annotators.
    short = judged([predicted(1, pred_saliency_scores=[-1])], true)
    assert short["HL-min-Fair"] == {"HL-mAP": round(100 * (2 / 3 + 2 / 3) / 3, 2), "HL-Hit1": 0}


def test_without_saliency_on_both_sides_there_are_no_highlights(judged) -> None:
    with_it = predicted(1, [0, 2, 1], pred_saliency_scores=[1, 0, 0, 0])
    for said, true in (
        (with_it, annotated(1, [0, 2])),
        (predicted(1, [0, 2, 1]), annotated(1, [0, 2], **MARKED)),
    ):
        assert not any(name.startswith("HL") for name in judged([said], [true])["brief"])


# --- what is wrong is one sentence ---


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", "Expecting property name"),
        ("[]", "not an object"),
        ("[" * 100_000, "recursion"),
        ('{"pred_relevant_windows": []}', "qid must be"),
        ('{"qid": null, "pred_relevant_windows": []}', "qid must be"),
        ('{"qid": true, "pred_relevant_windows": []}', "qid must be"),
        ('{"qid": 2}', "pred_relevant_windows must be a list of lists of 3 numbers"),
        ('{"qid": 2, "pred_relevant_windows": [[0, 1]]}', "lists of 3 numbers"),
        ('{"qid": 2, "pred_relevant_windows": [[0, 1, "0.5"]]}', "lists of 3 numbers"),
        ('{"qid": 2, "pred_relevant_windows": [[0, 1, NaN]]}', "lists of 3 numbers"),
        ('{"qid": 2, "pred_relevant_windows": [[0, 1, 1e999]]}', "lists of 3 numbers"),
        ('{"qid": 2, "pred_relevant_windows": [[0, 1, 1' + "0" * 400 + "]]}", "too large"),
        ('{"qid": 2, "pred_relevant_windows": {"a": 1}}', "lists of 3 numbers"),
        ('{"qid": 2, "pred_relevant_windows": [], "pred_saliency_scores": 3}', "list of numbers"),
        ('{"qid": 2, "pred_relevant_windows": [], "pred_saliency_scores": []}', "is empty"),
        ('{"qid": 1, "pred_relevant_windows": []}', "qid 1 is there twice"),
    ],
)
def test_a_wrong_prediction_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "said.jsonl"
    path.write_text(f'{{"qid": 1, "pred_relevant_windows": []}}\n\n{line}\n')
    true = written(tmp_path / "true.jsonl", [annotated(1, [0, 1])])
    with pytest.raises(UserError, match=rf"^Line 3 of .*said.jsonl cannot be used: .*{why}"):
        read_cases(str(path), true)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"relevant_windows": []}, "relevant_windows is empty"),
        ({"relevant_windows": None}, "relevant_windows must be a list"),
        ({"relevant_windows": [[0, 1, 2]]}, "lists of 2 numbers"),
        ({"relevant_windows": [[3, 3]]}, "does not end after its start"),
        ({"duration": None}, "duration must be a number"),
        ({"duration": 1}, "shorter than a clip"),
        ({"relevant_clip_ids": None}, "relevant_clip_ids must be"),
        ({"relevant_clip_ids": [1, 4]}, "whole numbers from 0 to 3"),
        ({"relevant_clip_ids": [1, -1]}, "whole numbers from 0 to 3"),
        ({"relevant_clip_ids": [1, 1.5]}, "whole numbers from 0 to 3"),
        ({"relevant_clip_ids": [1]}, "not of the same length"),
        ({"saliency_scores": [[1, 2], [1, 2]]}, "lists of 3 numbers"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    said = written(tmp_path / "said.jsonl", [predicted(1)])
    true = written(tmp_path / "true.jsonl", [{**annotated(1, [2, 6], **MARKED), **change}])
    with pytest.raises(UserError, match=rf"^Line 1 of .*true.jsonl cannot be used: .*{why}"):
        read_cases(said, true)


def test_a_sentence_may_hold_any_character(tmp_path: Path) -> None:
    line = json.dumps({**predicted(1, [0, 1, 1]), "query": "a\u2028b é"}, ensure_ascii=False)
    (tmp_path / "said").write_text(line + "\r\n", encoding="utf-8")
    true = written(tmp_path / "true", [annotated(1, [0, 1])])
    assert len(read_cases(str(tmp_path / "said"), true)) == 1


def test_only_some_lines_with_saliency_are_refused(tmp_path: Path) -> None:
    said = [predicted(1, pred_saliency_scores=[1]), predicted(2)]
    true = written(tmp_path / "true", [annotated(1, [0, 1]), annotated(2, [0, 1])])
    with pytest.raises(UserError, match=r"Only 1 of the 2 lines .* have pred_saliency_scores"):
        read_cases(written(tmp_path / "said", said), true)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["vsearch", "evaluate", *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_prints_json_and_a_table(tmp_path: Path, monkeypatch, capsys) -> None:
    said, true = written(tmp_path / "said", SAID), written(tmp_path / "true", TRUE)
    files = ("--predictions", said, "--truth", true)
    assert run(monkeypatch, *files, "--json") == 0
    assert json.loads(capsys.readouterr().out) == judge(read_cases(said, true))
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, *files) == 0
    table = capsys.readouterr().out
    [full] = [line for line in table.splitlines() if "full" in line]
    assert [cell.strip() for cell in full.strip("│").split("│")] == [
        "full", "2", "72.5", "100", "75", "100", "50", "100", "100", "11.25"
    ]  # fmt: skip
    assert "95% interval by bootstrap over queries (1,000 resamples, seed 0)" in table


@pytest.mark.parametrize(
    ("said", "true", "sentence"),
    [
        (SAID[:1], TRUE, "said lacks 1 of the 2 queries of {true}: qid 2."),
        (SAID, TRUE[1:], "true lacks 1 of the 2 queries of {said}: qid 1."),
        ([predicted(str(n)) for n in range(5)], [annotated(9, [0, 1])], "qid 9."),
        ([predicted("1")], TRUE[:1], "said lacks 1 of the 1 queries of {true}: qid 1."),
        ([SAID[0], 3], TRUE, "Line 2 of {said} cannot be used: it is not an object."),
        ([], TRUE, "said holds no queries."),
        (None, TRUE, "said cannot be read: No such file or directory."),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch, capsys, said: list[Any] | None, true: list[Any], sentence: str
) -> None:
    paths = {"said": str(tmp_path / "said"), "true": written(tmp_path / "true", true)}
    if said is not None:
        written(tmp_path / "said", said)
    files = ("--predictions", paths["said"], "--truth", paths["true"])
    assert run(monkeypatch, *files, "--json") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence.format(**paths) in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--predictions", "a"),
        ("--truth", "b"),
        ("--queries", "c", "--truth", "b"),
        ("--queries", "c", "--predictions", "a", "--truth", "b"),
    ],
)
def test_either_a_corpus_is_asked_or_files_are_judged(monkeypatch, capsys, words) -> None:
    assert run(monkeypatch, *words) == 2
    assert "either --queries, or both of --predictions and --truth" in capsys.readouterr().err
