"""The house rules: who may import Ray, and who may import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vsearch

PACKAGE = Path(vsearch.__file__).parent
WITHOUT_RAY = [
    "schema", "config", "corpus", "video", "sampling", "encoders", "projector", "moments", "index",
    "search", "evaluate", "storage", "sources", "decoder", "coverage", "probing", "show", "recall",
    "snapshots", "filters", "verify", "parts", "keys", "clips", "exports", "pictures", "query", "api",
    "guard", "media", "versions", "service", "routes", "sizing", "placement", "buckets", "tasks", "laws",
    "plan", "scoring", "qvhighlights", "fusion", "spaces", "report", "confidence", "drift", "gallery",
    "packed", "segments",
]  # fmt: skip
STAGES = {"ingest", "train", "build_index", "serve"}
ORDER = [
    "config", "placement", "keys", "query", "confidence", "schema", "sampling", "storage", "buckets",
    "sources", "video", "clips", "decoder", "coverage", "corpus", "probing", "tasks", "laws", "plan",
    "packed", "encoders", "projector", "drift", "fusion", "pictures", "moments", "sizing", "index",
    "recall", "snapshots", "filters", "gallery", "segments", "search", "exports", "scoring", "evaluate",
    "qvhighlights", "verify", "parts", "spaces", "report", "api", "guard", "media", "versions", "service",
    "routes", "runtime", "learning", "submit",
]  # fmt: skip
FLOORS = [*({name} for name in ORDER), STAGES, {"demo"}, {"show"}, {"cli"}]
ABOVE = {
    name: set().union(*FLOORS[:height]) for height, floor in enumerate(FLOORS) for name in floor
}
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
DEMO = sorted((PACKAGE / "demo").rglob("*.py"))

REFUSE_RAY = """
import importlib, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, NoRay())
for module in sys.argv[1:]:
    importlib.import_module(f"vsearch.{module}")
assert not any(name.partition(".")[0] == "ray" for name in sys.modules)
"""


def own_imports(path: Path) -> set[str]:
    """Names directly under `vsearch` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in dotted if name.startswith("vsearch.")}
    return found


def test_modules_work_without_ray() -> None:
    # All in one process: the heavy packages below are loaded once.
    command = [sys.executable, "-c", REFUSE_RAY, *WITHOUT_RAY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_what_stands_above(module: str) -> None:
    assert module in ABOVE, f"{module} has no place in the house"
    assert own_imports(MODULES[module]) <= ABOVE[module]


@pytest.mark.parametrize("path", DEMO, ids=lambda path: path.stem)
def test_demo_imports_only_config(path: Path) -> None:
    assert own_imports(path) <= {"config", "demo"}


def test_contributing_shows_the_house_as_it_is() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)\.py`", text[text.index("| module |") : text.index("## Rules")])
    assert [name for name in named if name in ORDER] == ORDER
    assert sorted(named) == sorted(MODULES)


def test_every_layer_exists() -> None:
    assert set(WITHOUT_RAY) | STAGES <= set(MODULES)
