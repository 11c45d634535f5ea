"""The benchmark of the embedding runs, with models of one layer and without Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, sys, torch, embed
from rich.console import Console
ways = tuple(embed.Way(dtype, None, (2,)) for dtype in (torch.float32, torch.bfloat16))
found = embed.measure("cpu", embed.Size(ways, 1, 3, 1, (1, 2, 4), 256), layers=1)
embed.show(found, Console(stderr=True, width=160))
assert "ray" not in sys.modules
print(json.dumps(found))
"""


def test_the_embedding_benchmark_gives_figures_for_each_way():
    folder = Path(__file__).parents[1] / "benchmarks"
    run = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    for name, tokens in (("dino", 201), ("clip", 197)):
        block = 24 * tokens * 768**2 + 4 * tokens**2 * 768
        expected = (block + 2 * 196 * 768**2) / 1e9
        assert found["gflop_per_frame"][name] == pytest.approx(expected, rel=0.01)
    rate = max(found["tflops"].values()) * 1e12
    assert [row["way"] for row in found["rows"]] == ["float32, eager", "bfloat16, eager"]
    for row in found["rows"]:
        limit_ms = sum(found["gflop_per_frame"].values()) * 1e9 / rate * 1000
        assert row["to_limit"] == pytest.approx(limit_ms / row["ms"])
        assert row["batch"] == 2
        assert min(row["cosine"].values()) >= 0.999
        assert ("growth" in row) == row["default"]
    (growth,) = (row["growth"] for row in found["rows"] if row["default"])
    assert growth["frames"] == [1, 2, 4]
    assert len(growth["seconds"]) == 3 and min(growth["seconds"]) > 0
    assert "not measured yet" in run.stderr or "cuda" in found["machine"]["device"]
