"""Where answers begin and end, how they are ranked, when there is none, and what is not wanted.

Method: each corpus of an easy tiny world (as `vsearch demo` leaves it, with `truth.jsonl` and
`shots.jsonl`) is indexed in each space, which publishes snapshots in it, and asked

- all sentences of known moments: segments as the engine makes them, without the cuts that DINO sees, and
  as runs of the best rows with gaps of at most a second; each ranked by other statistics of their rows.
  The boundary error is that of start and end, in seconds, where the first answer reaches IoU 0.5;
- sentences about what is not there, made from the shots: a pair of colour and kind that no shot has, and
  one that is there in another place; beside them the world's own sentences about nothing it can draw;
- pairs of what is wanted and what is not ("a car", "snow") of which there are shots with both and shots
  without: the order is right if the best shot without scores above the best with, the first answer if it
  is one without.

    python benchmarks/answers.py DEMO_CORPUS… > answers.json
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import vsearch
from vsearch import build_index as stage
from vsearch.config import MIN_CONFIDENCE
from vsearch.demo.scenes import COLOURS, KINDS, SETTINGS, Scene, View
from vsearch.demo.sentences import (
    HELD_OUT_TEMPLATES,
    PLACES,
    TRAINING_TEMPLATES,
    Mention,
    sentence,
)
from vsearch.evaluate import ANSWERS, Moment, Query, read_queries, score
from vsearch.query import Term, compose
from vsearch.scoring import auroc
from vsearch.search import Engine

Floats = NDArray[np.float64]
SPACES = ("projected", "clip", "fused")
ABSENT = 60
FIGURES = ("R1@0.5", "R1@0.7", "R5@0.5", "R5@0.7", "mAP@0.5", "boundary-error-s")
STATISTICS: dict[str, Callable[[Floats, Floats], float]] = {
    "mean": lambda v, s: _mean(v, s, v > -9),
    "max": lambda v, s: float(v.max()),
    "mean of the top half": lambda v, s: _mean(v, s, v >= np.median(v)),
}


def _mean(values: Floats, seconds: Floats, chosen: NDArray[np.bool_]) -> float:
    return float(np.average(values[chosen], weights=np.maximum(seconds[chosen], 1e-6)))


class Rows:
    """All rows of an engine, in the order of their shards."""

    def __init__(self, engine: Engine) -> None:
        lines = engine._timelines
        shards = engine.index.shards
        self.vectors = np.concatenate([np.asarray(s.vectors, np.float32) for s in shards])
        numbers = np.concatenate([line.numbers[line.video] for line in lines])
        self.video = np.array([Path(engine.videos[n]["uri"]).name for n in numbers])
        self.start_s, self.end_s = (
            np.concatenate([getattr(line, name) for line in lines]) for name in ("start_s", "end_s")
        )

    def of(self, moment: Any) -> NDArray[np.int64]:
        """The rows whose middle lies in a stretch of a video."""
        middle = (self.start_s + self.end_s) / 2
        inside = (middle >= moment.start_s) & (middle < moment.end_s)
        return np.flatnonzero((self.video == Path(moment.video).name) & inside)

    def runs(self, scores: Floats, hits: int) -> list[Moment]:
        """Plain grouping: the best rows, joined where they lie within a second of each other."""
        best = np.sort(np.argsort(-scores)[:hits])
        found: list[Moment] = []
        for row in best.tolist():
            start_s, end_s = float(self.start_s[row]), float(self.end_s[row])
            last = found[-1] if found else None
            if last and last.video == self.video[row] and start_s - last.end_s <= 1:
                found[-1] = Moment(last.video, last.start_s, end_s)
            else:
                found.append(Moment(str(self.video[row]), start_s, end_s))
        return found


# ── where answers begin and end ──────────────────────────────────────────────────────────────────


def boundaries(
    engine: Engine, queries: list[Query], name: str
) -> Iterator[tuple[str, dict[str, float]]]:
    rows = Rows(engine)
    vectors = engine.encoder.encode_text([query.text for query in queries])
    candidates: dict[str, list[list[Moment]]] = {
        name: [],
        "runs of 50 rows": [],
        "runs of 200 rows": [],
    }
    own: list[list[tuple[Moment, float]]] = []
    scores = (rows.vectors @ vectors.T).astype(np.float64)
    for column, vector in enumerate(vectors):
        found = engine.search_vector(vector, ANSWERS)
        own.append([(Moment(Path(s.video).name, s.start_s, s.end_s), s.score) for s in found])
        candidates[name].append([moment for moment, _ in own[-1]])
        for hits in (50, 200):
            candidates[f"runs of {hits} rows"].append(rows.runs(scores[:, column], hits))
    yield f"{name}, as it is", score(queries, own)
    for grouping, moments in candidates.items():
        for statistic, value in STATISTICS.items():
            answers = []
            for column, found_here in enumerate(moments):
                ranked = []
                for moment in found_here:
                    mine = rows.of(moment)
                    lasting = rows.end_s[mine] - rows.start_s[mine]
                    ranked.append(
                        (moment, value(scores[mine, column], lasting) if len(mine) else -1)
                    )
                answers.append(sorted(ranked, key=lambda pair: -pair[1]))
            yield f"{grouping}, {statistic}", score(queries, answers)


# ── when there is no answer ──────────────────────────────────────────────────────────────────────


def absent(shots: list[Scene], seed: int = 0) -> list[Query]:
    """Sentences about what no shot shows."""
    rng = np.random.default_rng(seed)
    pairs = {shot.pair for shot in shots}
    whole = {(shot.colour, shot.kind, shot.setting) for shot in shots}
    found = []
    for number in range(ABSENT):
        for group, there in (("absent pair", False), ("absent place", True)):
            while True:
                colour, kind, setting = (
                    str(rng.choice(list(names))) for names in (COLOURS, KINDS, SETTINGS)
                )
                if ((colour, kind) in pairs) == there and (colour, kind, setting) not in whole:
                    break
            templates = HELD_OUT_TEMPLATES if number % 2 else TRAINING_TEMPLATES
            text = sentence(Mention(colour, kind, setting=setting), rng, templates)
            found.append(Query(text, (), group))
    return found


def no_answer(engine: Engine, queries: list[Query]) -> dict[str, Any]:
    best = [engine.search(query.text, 1)[0] for query in queries]
    there = np.array([bool(query.moments) for query in queries])
    raw = np.array([segment.score for segment in best])
    sure = np.array([segment.confidence for segment in best], float)
    figures: dict[str, Any] = {}
    groups = np.array([query.group for query in queries])
    for group in ("all", *sorted({q.group for q in queries if not q.moments})):
        chosen = np.ones(len(there), bool) if group == "all" else there | (groups == group)
        figures[group] = {
            "AUROC score": auroc(raw[chosen], there[chosen], np.ones(chosen.sum())),
            "AUROC confidence": auroc(sure[chosen], there[chosen], np.ones(chosen.sum())),
            "shown": float((sure[chosen & ~there] >= MIN_CONFIDENCE).mean()),
        }
    figures["true first answers hidden"] = float((sure[there] < MIN_CONFIDENCE).mean())
    return figures


# ── what is not wanted ───────────────────────────────────────────────────────────────────────────


def negations(shots: list[View]) -> Iterator[tuple[str, str, list[int], list[int]]]:
    """(what is wanted, what is not, shots with the first alone, shots with both)."""
    rng = np.random.default_rng(0)

    def words(mention: Mention) -> str:
        if mention.setting and mention.kind is None:
            return PLACES[mention.setting][0][1]
        return sentence(mention, rng, ("{thing} {place}",), paraphrase=False)

    kinds = [Mention(kind=kind) for kind in KINDS]
    pairs = [Mention(colour, kind) for colour in COLOURS for kind in KINDS]
    places = [Mention(setting=setting) for setting in SETTINGS]
    colours = [Mention(colour) for colour in COLOURS]
    for wanted, unwanted in [
        *((w, u) for w in [*kinds, *pairs] for u in places),
        *((w, u) for w in kinds for u in colours),
        *((w, u) for w in places for u in kinds),
    ]:
        of_both = [n for n, s in enumerate(shots) if wanted.matches(s) and unwanted.matches(s)]
        alone = [n for n, s in enumerate(shots) if wanted.matches(s) and not unwanted.matches(s)]
        if of_both and alone:
            yield words(wanted), words(unwanted), alone, of_both


def unwanted(engine: Engine, moments: list[Moment], shots: list[Scene]) -> dict[str, Any]:
    rows = Rows(engine)
    rows_of = [rows.of(moment) for moment in moments]
    asked: dict[str, Callable[[str, str], Any]] = {
        "as a plain sentence": lambda a, b: [Term(text=f"{a} without {b}")],
        "what is wanted alone": lambda a, b: [Term(text=a)],
        **{
            f"composed, weight −{weight:g}": lambda a, b, weight=weight: [
                Term(text=a),
                Term(text=b, weight=-weight),
            ]
            for weight in (0.25, 0.5, 1.0)
        },
    }
    cases = list(negations([scene.view(0) for scene in shots]))
    figures: dict[str, Any] = {"pairs": len(cases)}
    known: dict[str, Any] = {}
    for name, terms_of in asked.items():
        right = []
        for wanted, not_wanted, alone, of_both in cases:
            terms = terms_of(wanted, not_wanted)
            for term in terms:
                if term.text not in known:
                    known[term.text] = engine.encoder.encode_text([term.text])[0]
            vectors = [known[term.text] for term in terms]
            vector = _composed(engine, vectors, [term.weight for term in terms])
            scores = rows.vectors @ vector
            best = np.array([scores[mine].max() for mine in rows_of])
            right.append((best[alone].max() > best[of_both].max(), int(best.argmax()) in alone))
        order, first = np.mean(right, axis=0).tolist()
        figures[name] = {"order right": order, "first answer right": first}
    return figures


def _composed(engine: Engine, vectors: list[Any], weights: list[float]) -> Any:
    return compose(vectors, weights, engine.spreads(vectors) if len(vectors) > 1 else [1.0])


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def of_world(corpus: Path, space: str) -> dict[str, Any]:
    (truth,) = corpus.glob("**/truth.jsonl")
    lines = [json.loads(line) for line in truth.with_name("shots.jsonl").read_text().splitlines()]
    shots = [Scene(**line["scene"]) for line in lines]
    moments = [Moment(line["video"], line["start_s"], line["end_s"]) for line in lines]
    queries = read_queries(str(truth))
    answered = [query for query in queries if query.moments]
    found: dict[str, Any] = {"corpus": str(corpus), "space": space, "boundaries": {}}
    used = stage.CUT
    for name, cut in (("grown without cuts", -1.0), ("grown within shots", used)):
        stage.CUT = cut
        stage.build_index(str(corpus), space=space)
        engine = vsearch.open(str(corpus))
        of_engine = dict(boundaries(engine, answered, name))
        found["boundaries"] |= {k: v for k, v in of_engine.items() if k.startswith(name) or cut > 0}
    stage.CUT = used
    found["no answer"] = no_answer(engine, [*queries, *absent(shots)])
    found["unwanted"] = unwanted(engine, moments, shots)
    return found


def main() -> None:
    corpora = [Path(name) for name in sys.argv[1:]]
    worlds = [of_world(corpus, space) for space in SPACES for corpus in corpora]
    console = Console(stderr=True, width=140)
    table = Table(title="Segments")
    for heading in ("space", "grouping and statistic", *FIGURES):
        table.add_column(heading)
    for space in SPACES:
        mine = [world["boundaries"] for world in worlds if world["space"] == space]
        for name in mine[0]:
            means = (np.mean([world[name][figure] for world in mine]) for figure in FIGURES)
            table.add_row(space, name, *(f"{value:.3f}" for value in means))
    console.print(table)
    for part in ("no answer", "unwanted"):
        for world in worlds:
            console.print(world["corpus"], world["space"], part, world[part])
    print(json.dumps(worlds))


if __name__ == "__main__":
    main()
