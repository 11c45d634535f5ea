"""How well sentences find their moments, in each space and world: the README's table.

Method: worlds of the demo, easy and hard, of seeds that trained and tuned nothing, are drawn, ingested with
the demo's models, and a projector is trained in each, all as `vsearch demo` does it. Each is asked all of
its sentences in the projected, CLIP, fused and random space (`vsearch evaluate --spaces`), and without what
DINO knows of cuts ("plain grouping"): the best 50 rows, joined where they lie within a second of each
other, ranked by their best row; projected so is the article's recipe. The answers of the worlds of a
difficulty are judged together; `unseen` are the sentences about pairs of colour and kind on which no model
was trained. Intervals are 95 % bootstrap over the sentences; so are those of the gain of the default over
each other system on the same sentences.

    python benchmarks/quality.py --out /tmp/quality            # 7 minutes on 2 cores that compute in bf16

What is there already of the worlds is not done again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from answers import Rows
from rich.console import Console

from vsearch import evaluate, scoring
from vsearch.config import PRESETS
from vsearch.demo.world import make_world
from vsearch.evaluate import MEANS, Query, judge, read_queries
from vsearch.ingest import ingest
from vsearch.search import Engine
from vsearch.spaces import SPACES, Comparison
from vsearch.train import train

VIDEOS = 20
SEEDS = {"easy": (201, 202), "hard": (201, 202)}
HITS = 50
"""So many rows a plain grouping joins."""
DEFAULT = "fused"
PLAIN = {"projected": "projected, plain grouping", "clip": "clip, plain grouping"}
SMALLER = ("boundary-error-s", "FPR")
"""Figures of which less is better."""
COLUMNS = ("R1@0.5", "R1@0.7", "R5@0.5", "mAP", "NDCG@10", "boundary-error-s", "AUROC", "negation")
console = Console(stderr=True)


def corpus_of(folder: Path, difficulty: str, seed: int) -> tuple[str, list[Query]]:
    """A world as a corpus with a projector, and its sentences."""
    home = folder / f"{difficulty}-{seed}"
    world, url = home / "world", str(home / "corpus")
    if not (home / "done").exists():
        if not (world / "truth.jsonl").exists():
            make_world(world, seed, VIDEOS, difficulty=difficulty)
        ingest(url, [str(world)], PRESETS["demo"])
        train(url)
        (home / "done").touch()
    queries = read_queries(str(world / "truth.jsonl"))
    return url, [
        query if query.pair is None else replace(query, pair=1000 * seed + query.pair)
        for query in queries
    ]


def plainly(engine: Engine, queries: Sequence[Query]) -> list[list[Any]]:
    """What the best rows give without cuts: runs of them, ranked by their best row. Sentences are taken
    as they stand.
    """
    rows = Rows(engine)
    scores = rows.vectors @ engine.encoder.encode_text([query.text for query in queries]).T
    found = []
    for of_query in scores.T.astype(np.float64):
        runs = [
            SimpleNamespace(**vars(run), score=float(of_query[rows.of(run)].max(initial=-1.0)))
            for run in rows.runs(of_query, HITS)
        ]
        found.append(sorted(runs, key=lambda run: -run.score))
    return found


def answers_in(url: str, queries: Sequence[Query]) -> dict[str, list[Sequence[Any]]]:
    """What each system answers in a world."""
    compared, found = Comparison(url), {}
    for space in SPACES:
        with compared.engine(space) as engine:
            found[space] = evaluate.ask(engine.search, queries)
            if space in PLAIN:
                found[PLAIN[space]] = plainly(engine, queries)
            console.print(f"{url}: {space}, alpha {engine.manifest['alpha']}")
    return found


def difference(
    queries: Sequence[Query], ours: Sequence[Any], other: Sequence[Any]
) -> dict[str, list[float]]:
    """By how much the default is better than another system on the same sentences: value, bounds."""
    tables = [
        evaluate._table(queries, [evaluate.answers_of(segments) for segments in found])
        for found in (ours, other)
    ]
    first, second = (scoring.means(table.values) for table in tables)
    sign = np.array([-1.0 if name in SMALLER else 1.0 for name in MEANS])

    def gain(counts: scoring.Floats) -> scoring.Floats:
        return sign * (first(counts) - second(counts))

    value = gain(np.ones((1, len(queries))))[0]
    low, high = scoring.bootstrap(gain, len(queries))
    return {
        name: [round(float(v), 4) for v in (value[n], low[n], high[n])]
        for n, name in enumerate(MEANS)
        if not np.isnan(value[n])
    }


def of_difficulty(folder: Path, difficulty: str) -> dict[str, Any]:
    """The figures of each system over the worlds of a difficulty."""
    queries: list[Query] = []
    found: dict[str, list[Sequence[Any]]] = {}
    for seed in SEEDS[difficulty]:
        url, asked = corpus_of(folder, difficulty, seed)
        queries += asked
        for system, answers in answers_in(url, asked).items():
            found.setdefault(system, []).extend(answers)
    return {
        system: judge(queries, answers)
        | {"gain of the default": difference(queries, found[DEFAULT], answers)}
        for system, answers in found.items()
    }


def rows_of(difficulty: str, systems: dict[str, Any]) -> list[str]:
    """Lines of the table, in Markdown."""
    lines = []
    for group in (None, "unseen"):
        for place, (system, figures) in enumerate(systems.items()):
            of_group = figures if group is None else figures["groups"][group]
            world = f"{difficulty}{', unseen pairs' if group else ''} ({of_group['queries']})"
            cells = [cell(of_group, name) for name in COLUMNS]
            lines.append(f"| {world if place == 0 else ''} | {system} | {' | '.join(cells)} |")
    return lines


def cell(figures: dict[str, Any], name: str) -> str:
    if name not in figures:
        return ""
    low, high = figures["intervals"][name]
    return f"{figures[name]:.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the worlds are kept")
    parser.add_argument("--json", type=Path, help="where to write all figures, by group too")
    options = parser.parse_args()
    began = time.monotonic()
    found = {difficulty: of_difficulty(options.out, difficulty) for difficulty in SEEDS}
    console.print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")
    print(f"| world (sentences) | system | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for difficulty, systems in found.items():
        print("\n".join(rows_of(difficulty, systems)))
    print("\nGain of the default, with its interval:\n")
    for difficulty, systems in found.items():
        for system, figures in systems.items():
            gains = figures["gain of the default"]
            told = (
                f"{name} {gains[name][0]:+.3f} ({gains[name][1]:+.3f} to {gains[name][2]:+.3f})"
                for name in ("R1@0.5", "boundary-error-s")
            )
            if system != DEFAULT:
                print(f"- {difficulty}, over {system}: {', '.join(told)}")


if __name__ == "__main__":
    main()
