"""Another system's answers, judged by the rules of QVHighlights: its formats, and the names and values
of its published evaluator (`standalone_eval` of Moment-DETR), with some figures more.

Moments: `MR-mAP` takes the first ten windows of a query, sorts them by score, lets each claim a true
window not yet claimed, and interpolates the precision. `MR-R1` takes the first window as it stands and
the true one nearest to it. Both are for all windows (`full`) and by the true windows' length, where a
query counts if it has one in the range. Highlights: the saliency of clips of two seconds, against three
annotators. Values are percent, rounded to two decimals. A query without predicted windows is a miss.

`MR-R5` takes the first five windows as they stand, `MR-NDCG@10` the claims of `MR-mAP`;
`MR-boundary-error-s` is the mean distance in seconds of start and of end, over the queries whose first
window reaches an IoU of 0.5.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vsearch import scoring
from vsearch.config import UserError
from vsearch.scoring import Floats

Name = tuple[str, ...]
"""Where a figure stands in the report."""
Line = tuple[Floats, Floats | None]
"""Windows, and what the line says of highlights."""

THRESHOLDS = scoring.IOUS
RANGES = {"full": (-math.inf, math.inf), "long": (30, 150), "middle": (10, 30), "short": (0, 10)}
"""Lengths of true windows in seconds: above the first, up to the second."""
PREDICTED = 10
"""So many windows of a query are judged."""
SALIENT = {"Fair": 2, "Good": 3, "VeryGood": 4}
CLIP_S = 2
ANNOTATORS = 3
BOUNDARY = "MR-boundary-error-s"
BATCH = 500
"""So many queries are judged at once, which bounds the memory."""
NAMED = 3


@dataclass(frozen=True)
class Case:
    """A query's true windows (n, 2) and predicted ones (k, 3: start, end, score) as they stand in the
    file, in seconds; the annotators' marks (clips, 3) and the predicted saliency, if there are any.
    """

    truth: Floats
    found: Floats
    marks: Floats | None = None
    saliency: Floats | None = None


def read_cases(predictions: str, truth: str) -> list[Case]:
    """The queries of a file of annotations with their predictions, in the order of the annotations.
    Both must hold the same queries, each once. UserError: what is wrong, with file and line.
    """
    true, said = _read(truth, _annotation), _read(predictions, _prediction)
    _check_same(list(true), set(said), f"{predictions} lacks", f"queries of {truth}")
    _check_same(list(said), set(true), f"{truth} lacks", f"queries of {predictions}")
    marks = _all_or_none(truth, "saliency_scores", [m for _, m in true.values()])
    saliency = _all_or_none(predictions, "pred_saliency_scores", [s for _, s in said.values()])
    highlights = marks and saliency
    return [
        Case(windows, said[qid][0], *((clips, said[qid][1]) if highlights else ()))
        for qid, (windows, clips) in true.items()
    ]


def judge(cases: Sequence[Case]) -> dict[str, Any]:
    """The published figures, `brief` among them, and the further ones; the number of queries in each
    range; under `intervals` the same figures' 95 % intervals. None where no query counts.
    """
    columns: dict[Name, Floats] = {}
    parts = [_moments(cases[at : at + BATCH]) for at in range(0, len(cases), BATCH)]
    for path in parts[0]:
        columns[path] = np.concatenate([part[path] for part in parts])
    if cases[0].marks is not None:
        columns |= _highlights(cases)
    scale = np.array([1 if path[-1] == BOUNDARY else 100 for path in columns])
    figures = scoring.means(np.column_stack(list(columns.values())))
    values = scale * figures(np.ones(len(cases)))
    low, high = scale * scoring.bootstrap(figures, len(cases))
    report = _report({path: _rounded(v) for path, v in zip(columns, values, strict=True)})
    for name in RANGES:
        counted = columns[name, "MR-mAP", "average"]
        report[name]["queries"] = int((~np.isnan(counted)).sum())
    bounds = {
        path: None if math.isnan(a) else [_rounded(a), _rounded(b)]
        for path, a, b in zip(columns, low, high, strict=True)
    }
    return report | {"intervals": _report(bounds), "bootstrap": scoring.BOOTSTRAP}


def _moments(cases: Sequence[Case]) -> dict[Name, Floats]:
    """Each figure's value for each query."""
    ranked = [c.found[:PREDICTED] for c in cases]
    ranked = [w[np.argsort(-w[:, 2], kind="stable")] for w in ranked]
    listed = _padded([c.found[:5] for c in cases], 5)
    truth = _padded([c.truth for c in cases])
    length = truth[..., 1] - truth[..., 0]
    by_score = scoring.ious(_padded(ranked, PREDICTED), truth)
    by_place = scoring.ious(listed, truth)
    columns: dict[Name, Floats] = {}
    for name, (above, up_to) in RANGES.items():
        inside = (above < length) & (length <= up_to)
        count = inside.sum(axis=1)
        right = scoring.claims(np.where(inside[:, None], by_score, -1.0), THRESHOLDS)
        precision = scoring.interpolated_precision(right, count)
        near = np.where(inside[:, None], by_place, -1.0)
        nearest = truth[np.arange(len(cases)), near[:, 0].argmax(axis=1)]
        first = np.where(count > 0, _first_iou(listed[:, 0], nearest), np.nan)
        five = np.where(count > 0, near.max(axis=(1, 2)), np.nan)
        gain = scoring.ndcg(right, count)
        for i, threshold in enumerate(THRESHOLDS):
            columns[name, "MR-mAP", str(threshold)] = precision[:, i]
            columns[name, "MR-R1", str(threshold)] = _reached(first, threshold)
            if threshold in (0.5, 0.7):
                columns[name, "MR-R5", str(threshold)] = _reached(five, threshold)
                columns[name, "MR-NDCG@10", str(threshold)] = gain[:, i]
        columns[name, "MR-mAP", "average"] = precision.mean(axis=1)
        columns[name, BOUNDARY] = scoring.boundary_error_s(listed[:, 0], nearest, first)
    return columns


def _first_iou(found: Floats, truth: Floats) -> Floats:
    """IoU (queries,) of windows (queries, 2), pair by pair, with their hull as the union."""
    hull = np.maximum(found[:, 1], truth[:, 1]) - np.minimum(found[:, 0], truth[:, 0])
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(scoring.overlaps(found, truth) / hull)


def _reached(iou: Floats, threshold: float) -> Floats:
    return np.where(np.isnan(iou), np.nan, iou >= threshold)


def _highlights(cases: Sequence[Case]) -> dict[Name, Floats]:
    """Each figure's value for each query: whether the most salient clip is marked well by anyone, and
    the mean of the annotators' average precisions.
    """
    columns: dict[Name, Floats] = {}
    for name, least in SALIENT.items():
        hits, precisions = [], []
        for case in cases:
            assert case.marks is not None and case.saliency is not None
            good, top = case.marks >= least, int(case.saliency.argmax())
            strength = np.zeros(len(good))
            strength[: len(case.saliency)] = case.saliency[: len(good)]
            hits.append(float(top < len(good) and good[top].any()))
            precisions.append(
                np.mean([scoring.ranked_precision(column, strength) for column in good.T])
            )
        columns[f"HL-min-{name}", "HL-mAP"] = np.array(precisions)
        columns[f"HL-min-{name}", "HL-Hit1"] = np.array(hits)
    return columns


def _padded(windows: Sequence[Floats], width: int | None = None) -> Floats:
    """Windows (queries, width, 2), NaN where a query has fewer."""
    padded = np.full((len(windows), width or max(map(len, windows)), 2), np.nan)
    for row, found in zip(padded, windows, strict=True):
        row[: len(found)] = found[:, :2]
    return padded


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.2f}")


def _report(flat: Mapping[Name, Any]) -> dict[str, Any]:
    """Figures by their paths as the published evaluator nests them, `brief` first."""
    brief: dict[str, Any] = {
        "MR-full-R1@0.5": flat["full", "MR-R1", "0.5"],
        "MR-full-R1@0.7": flat["full", "MR-R1", "0.7"],
        "MR-full-mAP": flat["full", "MR-mAP", "average"],
        "MR-full-mAP@0.5": flat["full", "MR-mAP", "0.5"],
        "MR-full-mAP@0.75": flat["full", "MR-mAP", "0.75"],
        **{f"MR-{n}-mAP": flat[n, "MR-mAP", "average"] for n in ("long", "middle", "short")},
    }
    nested: dict[str, Any] = {}
    for path, figure in flat.items():
        branch = nested
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = figure
        if path[0].startswith("HL-"):
            brief[f"{path[0]}-{path[1].removeprefix('HL-')}"] = figure
    return {"brief": brief} | dict(sorted(nested.items()))


def _read(path: str, parse: Callable[[dict[str, Any]], Line]) -> dict[int | str, Line]:
    """What `parse` makes of each line's object, by qid."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8.") from error
    found: dict[int | str, Line] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("it is not an object")
            qid = entry.get("qid")
            if isinstance(qid, bool) or not isinstance(qid, int | str):
                raise ValueError("qid must be a number or a string")
            if qid in found:
                raise ValueError(f"qid {qid!r} is there twice")
            found[qid] = parse(entry)
        except (ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"Line {number} of {path} cannot be used: {error}.") from error
    if not found:
        raise UserError(f"{path} holds no queries.")
    return found


def _prediction(entry: dict[str, Any]) -> Line:
    """Windows (k, 3) and the saliency of the clips, if it is there."""
    windows = _numbers(entry, "pred_relevant_windows", 3)
    if "pred_saliency_scores" not in entry:
        return windows, None
    saliency = _numbers(entry, "pred_saliency_scores")
    if not len(saliency):
        raise ValueError("pred_saliency_scores is empty")
    return windows, saliency


def _annotation(entry: dict[str, Any]) -> Line:
    """Windows (n, 2) and the marks (clips, 3) of the whole video, if they are there."""
    windows = _numbers(entry, "relevant_windows", 2)
    if not len(windows):
        raise ValueError("relevant_windows is empty")
    if (windows[:, 1] <= windows[:, 0]).any():
        raise ValueError("a window of relevant_windows does not end after its start")
    if "saliency_scores" not in entry:
        return windows, None
    duration_s = entry.get("duration")
    if not isinstance(duration_s, int | float) or not math.isfinite(duration_s):
        raise ValueError("duration must be a number")
    clips = _numbers(entry, "relevant_clip_ids")
    marks = np.zeros((max(0, int(duration_s / CLIP_S)), ANNOTATORS))
    if not len(marks):
        raise ValueError(f"duration is shorter than a clip of {CLIP_S} s")
    if (clips % 1 != 0).any() or (clips < 0).any() or (clips >= len(marks)).any():
        raise ValueError(f"relevant_clip_ids are not whole numbers from 0 to {len(marks) - 1}")
    given = _numbers(entry, "saliency_scores", ANNOTATORS)
    if len(given) != len(clips):
        raise ValueError("saliency_scores and relevant_clip_ids are not of the same length")
    marks[clips.astype(np.intp)] = given
    return windows, marks


def _numbers(entry: dict[str, Any], name: str, width: int | None = None) -> Floats:
    """A list of finite numbers, or of lists of `width` of them; ValueError if it is anything else."""
    given = entry.get(name)
    rows = given if width else [given]
    if not isinstance(rows, list) or not all(
        isinstance(row, list)
        and len(row) == (width or len(row))
        and all(type(n) in (int, float) and math.isfinite(n) for n in row)
        for row in rows
    ):
        form = f"lists of {width} numbers" if width else "numbers"
        raise ValueError(f"{name} must be a list of {form}")
    return np.array(given, float).reshape(-1, width) if width else np.array(given, float)


def _check_same(asked: list[int | str], there: set[int | str], lacks: str, of: str) -> None:
    missing = [qid for qid in asked if qid not in there]
    if missing:
        named = ", ".join(repr(qid) for qid in missing[:NAMED])
        more = ", …" if len(missing) > NAMED else ""
        raise UserError(f"{lacks} {len(missing)} of the {len(asked)} {of}: qid {named}{more}.")


def _all_or_none(path: str, name: str, given: list[Floats | None]) -> bool:
    """Whether all lines have it; a UserError if only some have."""
    have = sum(values is not None for values in given)
    if 0 < have < len(given):
        raise UserError(f"Only {have} of the {len(given)} lines of {path} have {name}.")
    return have > 0
