"""How much encoder work `--max-change` saves, and what it does to the answers.

Method: a tiny world of known truth (20 videos, 120 scenes, sensor noise, moving objects, native rate)
is ingested, trained on and indexed once for each bound, each time from nothing, and asked all of its
sentences. Real clips, for which no truth of this kind exists, are decoded only: the table gives the
share of frames that would have gone through the encoders. Rows `off` are the reference.

    python benchmarks/redundancy.py WORKDIR [CLIPS_FOLDER] > redundancy.json
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import vsearch
from vsearch.build_index import build_index
from vsearch.config import PRESETS, Sampling
from vsearch.demo.world import make_world
from vsearch.evaluate import evaluate, read_queries
from vsearch.ingest import ingest
from vsearch.sources import list_videos
from vsearch.train import train
from vsearch.video import VideoError, decode, probe

BOUNDS = (None, 2.0, 4.0, 8.0)
CONSOLE = Console(stderr=True)


def on_the_world(folder: Path, bound: float | None) -> dict[str, object]:
    world = folder / "world"
    if not (world / "truth.jsonl").exists():
        make_world(world, seed=7, videos=20)
    corpus = str(folder / f"corpus-{bound}")
    summary = ingest(corpus, [str(world)], PRESETS["demo"], max_change=bound)
    train(corpus)
    build_index(corpus)
    found = evaluate(vsearch.open(corpus).search, read_queries(str(world / "truth.jsonl")))
    frames = sum(state.frames for state in vsearch.status(corpus))
    embedded = sum(state.embedded for state in vsearch.status(corpus))
    return {
        "clips": "tiny world",
        "bound": bound,
        "frames": frames,
        "embedded": embedded,
        "R1@0.5": found["R1@0.5"],
        "R5@0.5": found["R5@0.5"],
        "mAP@0.5": found["mAP@0.5"],
        "encode_s": summary.frames and sum(s.encode_s for s in vsearch.status(corpus)),
    }


def on_clip(uri: str, bound: float | None) -> dict[str, object]:
    frames = embedded = 0
    with open(uri, "rb") as file:
        for span in decode(file, probe(file), 64, Sampling(max_change=bound)):
            frames += len(span.pts_s)
            embedded += len(span.pixels) if span.pts_s else 0
    return {"clips": Path(uri).name, "bound": bound, "frames": frames, "embedded": embedded}


def main() -> None:
    folder = Path(sys.argv[1])
    rows = [on_the_world(folder, bound) for bound in BOUNDS]
    if len(sys.argv) > 2:
        for entry in list_videos([sys.argv[2]]):
            try:
                rows += [on_clip(entry.uri, bound) for bound in BOUNDS]
            except VideoError:
                continue  # the clips that no decoder reads
        for bound in BOUNDS:
            of_bound = [r for r in rows if r["bound"] == bound and r["clips"] != "tiny world"]
            rows.append(
                {"clips": "all real clips", "bound": bound}
                | {k: sum(int(str(r[k])) for r in of_bound) for k in ("frames", "embedded")}
            )
    table = Table("clips", "bound", "frames", "embedded", "share", "R1@0.5", "R5@0.5", "mAP@0.5")
    for row in rows:
        frames, embedded = int(str(row["frames"])), int(str(row["embedded"]))
        share = f"{embedded / max(1, frames):.2f}"
        figures = [str(row.get(name, "")) for name in ("R1@0.5", "R5@0.5", "mAP@0.5")]
        bound = "off" if row["bound"] is None else str(row["bound"])
        table.add_row(str(row["clips"]), bound, str(frames), str(embedded), share, *figures)
    CONSOLE.print(table)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
