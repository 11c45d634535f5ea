"""How many rows of the index moments save, and what they do to the answers.

Method: each corpus (of a tiny world of known truth, as `vsearch demo` leaves it) is indexed once a
frame a row, then once for each bound on the cosine, and asked all of its sentences; the rest of the
path is untouched. Rows a video-hour are counted over the videos' own length. `frames` is the
reference; the bound in use is the largest saving at which R1@0.5 and mAP@0.5 do not fall.

    python benchmarks/moments.py DEMO_CORPUS… > moments.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import vsearch
from vsearch import build_index as stage
from vsearch.evaluate import evaluate, read_queries

BOUNDS = (None, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85)
FIGURES = ("R1@0.5", "R1@0.7", "R5@0.5", "mAP@0.5")


def at_bound(corpus: Path, bound: float | None) -> dict[str, float]:
    (truth,) = corpus.glob("**/truth.jsonl")
    if bound is not None:
        stage.ALIKE = bound
    built = stage.build_index(str(corpus), rows="frames" if bound is None else "moments")
    found = evaluate(vsearch.open(str(corpus)).search, read_queries(str(truth)))
    hours = sum(state.indexed_s for state in vsearch.status(str(corpus))) / 3600
    return {"rows_per_hour": built.rows / hours, **{name: found[name] for name in FIGURES}}


def main() -> None:
    corpora = [Path(name) for name in sys.argv[1:]]
    used = stage.ALIKE
    table = Table(title=f"Moments, mean over {len(corpora)} worlds")
    for heading in ("bound", "rows a video-hour", "times fewer", *FIGURES):
        table.add_column(heading, justify="right")
    lines = []
    for bound in BOUNDS:
        worlds = [at_bound(corpus, bound) for corpus in corpora]
        mean = {name: float(np.mean([world[name] for world in worlds])) for name in worlds[0]}
        lines.append({"bound": bound, **mean, "worlds": worlds})
        fewer = lines[0]["rows_per_hour"] / mean["rows_per_hour"]
        mark = " (in use)" if bound == used else ""
        table.add_row(
            "frames" if bound is None else f"{bound:g}{mark}",
            f"{mean['rows_per_hour']:.0f}",
            f"{fewer:.1f}",
            *(f"{mean[name]:.3f}" for name in FIGURES),
        )
    stage.ALIKE = used
    for corpus in corpora:
        stage.build_index(str(corpus), rows="moments")  # as it was found
    Console(stderr=True).print(table)
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
