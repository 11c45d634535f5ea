"""What each part of the projector's training is worth, on footage that it has not seen.

Method: the frames of the corpora are taken eight apart. A training is that of `vsearch.train` on one
process, with a hidden layer of 256 and batches of 512; a tenth of the videos decides when it stops.
Sentences with their true moments lie in `truth.jsonl`, in the corpus or in the folder of the videos; a
sentence hits if the frame nearest to it lies in one of its moments, AP is the average precision of all
frames in the order of their similarity to it. Means and standard deviations are over seeds.

    ablation  one corpus is held out in turn, the others train: each change against what is kept
    content   frames of like content (k-means of DINO vectors) are held out in turn: how the projector
              fares on them against one that knew the like, what drift tells, what fine-tuning mends
    prompts   sentences as they are, and averaged with templates around them

    python benchmarks/projector.py CORPUS CORPUS… --json out.json
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vsearch.config import TrainConfig
from vsearch.corpus import Corpus, vector_matrix
from vsearch.encoders import ClipEncoder
from vsearch.evaluate import read_queries
from vsearch.learning import warm_cosine
from vsearch.parts import SENTENCES
from vsearch.projector import Projector, paired_metrics, projection_loss
from vsearch.train import FINE_TUNING

PARTS = ("ablation", "content", "prompts")
APART = 8
CONFIG = replace(TrainConfig(), hidden=256, batch_size=512)
TUNING = replace(FINE_TUNING, hidden=256, batch_size=512)
KINDS_OF_CONTENT = 6
TEMPLATES = ("{}", "a photo of {}", "a video of {}", "a view of {}", "there is {}")


@dataclass(frozen=True)
class World:
    """The frames of a corpus, by video and time: unit vectors, and which frames answer which sentence."""

    name: str
    dino: Tensor
    clip: Tensor
    video: NDArray[np.str_]
    sentences: list[str]
    asked: Tensor
    right: NDArray[np.bool_]


@dataclass(frozen=True)
class Recipe:
    """A training as an ablation changes it. `head` is mlp, linear or residual (both added up).
    `negatives` are all of the batch, those of other videos, or soft: the distribution of CLIP's own
    similarities in the batch is matched instead of the one right answer. `text` weighs the match of the
    distributions of similarities to a bank of sentences. `ema` is the decay of averaged weights, `mix`
    the parameter of mixup's beta distribution, `noise` in deviations of the input, `smooth` over how
    many frames to either side the vectors of CLIP (`of_clip`) or DINO are averaged.
    """

    config: TrainConfig = CONFIG
    head: str = "mlp"
    negatives: str = "all"
    learned_temperature: bool = False
    text: float = 0.0
    bank: str = "general"
    ema: float = 0.0
    mix: float = 0.0
    noise: float = 0.0
    smooth: int = 0
    of_clip: bool = True


def load(url: str, encoder: ClipEncoder) -> World:
    corpus = Corpus(url)
    spans = corpus.spans()
    parts = []
    for name in corpus.files("frames"):
        for table in corpus.frames(name, ["video_id", "span_id", "pts_s", "dino", "clip"]):
            mine = [spans[span][0] == name for span in table["span_id"].to_pylist()]
            parts.append(table.filter(pa.array(mine)))
    table = pa.concat_tables(parts).sort_by([("video_id", "ascending"), ("pts_s", "ascending")])
    videos = {row["video_id"]: (Path(row["uri"]).name, row["zero_s"]) for row in corpus.videos()}
    ids = table["video_id"].to_pylist()
    files = np.array([videos[v][0] for v in ids])
    at_s = table["pts_s"].to_numpy() - np.array([videos[v][1] for v in ids])
    (truth,) = [*Path(url).glob("truth.jsonl"), *Path(url).glob("*/truth.jsonl")]
    queries = [query for query in read_queries(str(truth)) if query.moments]
    right = np.zeros((len(queries), len(ids)), bool)
    for mask, query in zip(right, queries, strict=True):
        for moment in query.moments:
            mask |= (files == moment.video) & (at_s >= moment.start_s) & (at_s < moment.end_s)
    some = slice(None, None, APART)
    known = right[:, some].any(1)
    sentences = [query.text for query, there in zip(queries, known, strict=True) if there]
    return World(
        Path(url).name,
        torch.from_numpy(vector_matrix(table["dino"])[some]).float(),
        torch.from_numpy(vector_matrix(table["clip"])[some]).float(),
        np.array(ids)[some],
        sentences,
        torch.from_numpy(encoder.encode_text(sentences)),
        right[:, some][known],
    )


# ── training ─────────────────────────────────────────────────────────────────────────────────────


class Head(nn.Module):
    """A projector whose head may be another one than the product's."""

    def __init__(self, recipe: Recipe, x: Tensor, clip_dim: int) -> None:
        super().__init__()
        self.body = Projector(x.shape[1], clip_dim, recipe.config.hidden)
        self.body.standardise_by(x.mean(0), x.std(0))
        self.line = nn.Linear(x.shape[1], clip_dim) if recipe.head != "mlp" else None
        self.only_line = recipe.head == "linear"
        self.log_temperature = nn.Parameter(torch.tensor(recipe.config.temperature).log())

    def forward(self, dino: Tensor) -> Tensor:
        if self.line is None:
            return self.body(dino)
        straight = self.line((dino - self.body.mean) / self.body.std)
        return straight if self.only_line else straight + self.body(dino)


def loss_of(
    recipe: Recipe, model: Head, x: Tensor, y: Tensor, video: Tensor, bank: Tensor
) -> Tensor:
    """The loss of a batch, x (b, d), y (b, c), of the videos that `video` (b,) numbers."""
    config = recipe.config
    projected = model(x)
    temperature: Any = config.temperature
    if recipe.learned_temperature:
        temperature = model.log_temperature.exp().clamp(0.01, 1.0)
    found, true = F.normalize(projected, dim=-1), F.normalize(y, dim=-1)
    logits = found @ true.T / temperature
    if recipe.negatives == "all":
        loss = projection_loss(projected, y, config.info_nce_weight, temperature)
    else:
        wanted = torch.eye(len(x))
        if recipe.negatives == "others":
            near = (video[:, None] == video) & ~torch.eye(len(x), dtype=torch.bool)
            logits = logits.masked_fill(near, -torch.inf)
            wanted = wanted.argmax(1)
        else:
            wanted = F.softmax(true @ true.T / config.temperature, 1)
        loss = 1 - (found * true).sum(1).mean()
        loss = loss + config.info_nce_weight * F.cross_entropy(logits, wanted)
    if recipe.text:
        wanted = F.softmax(true @ bank.T / BANK_TEMPERATURE, 1)
        loss = loss + recipe.text * F.cross_entropy(found @ bank.T / BANK_TEMPERATURE, wanted)
    return loss


BANK_TEMPERATURE = 0.05


def smoothed(vectors: Tensor, video: NDArray[np.str_], reach: int) -> Tensor:
    """The mean of each row with so many neighbours of its video to either side."""
    out = torch.empty_like(vectors)
    for name in np.unique(video):
        (rows,) = np.nonzero(video == name)
        sums = F.pad(vectors[rows].double().cumsum(0), (0, 0, 1, 0))
        places = torch.arange(len(rows))
        first, stop = (places - reach).clamp(min=0), (places + reach + 1).clamp(max=len(rows))
        out[rows] = ((sums[stop] - sums[first]) / (stop - first)[:, None]).float()
    return out


def fit(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    video: NDArray[np.str_],
    seed: int,
    bank: Tensor,
    start: Head | None = None,
) -> Head:
    """What a training on pairs x (n, d), y (n, c) gives, in evaluation mode; from the weights of `start`
    if there is one."""
    config = recipe.config
    torch.manual_seed(seed)
    names = np.unique(video)
    held = np.random.default_rng(seed).permutation(names)[: max(1, round(0.1 * len(names)))]
    unseen = torch.from_numpy(np.isin(video, held))
    numbers = torch.from_numpy(np.searchsorted(names, video))[~unseen]
    x_val, y_val, x, y = x[unseen], y[unseen], x[~unseen], y[~unseen]
    if recipe.smooth and recipe.of_clip:
        y = smoothed(y, video[~unseen.numpy()], recipe.smooth)
    model = Head(recipe, x, y.shape[1])
    if start:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    batch = min(config.batch_size, len(x))
    steps = len(x) // batch
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    best, best_epoch, kept, epoch = -1.0, 0, averaged, 0
    while epoch < config.max_epochs and epoch - best_epoch <= config.patience:
        order = torch.randperm(len(x))
        for step in range(steps):
            done = epoch * steps + step
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * warm_cosine(done, config.max_epochs * steps)
            rows = order[step * batch : (step + 1) * batch]
            inputs, targets = x[rows], y[rows]
            if recipe.noise:
                inputs = inputs + recipe.noise * model.body.std * torch.randn_like(inputs)
            if recipe.mix:
                share = torch.distributions.Beta(recipe.mix, recipe.mix).sample((len(rows), 1))
                other = torch.randperm(len(rows))
                inputs = share * inputs + (1 - share) * inputs[other]
                targets = share * targets + (1 - share) * targets[other]
            loss = loss_of(recipe, model, inputs, targets, numbers[rows], bank)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            now = model.state_dict()
            decay = min(recipe.ema, (1 + done) / (10 + done))
            averaged = {n: v.lerp(now[n], 1 - decay) for n, v in averaged.items()}
        now = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(averaged)
        cosine = paired(model, x_val, y_val)
        if cosine > best:
            best, best_epoch, kept = cosine, epoch, dict(averaged)
        model.load_state_dict(now)
        epoch += 1
    model.load_state_dict(kept)
    return model.eval()


@torch.inference_mode()
def paired(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return paired_metrics(model(x), y)["cosine"]


# ── judging ──────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def judge(
    vectors: Tensor, world: World, among: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """Figures of vectors (n, c) that stand for the frames of a world; with `among` (n,) of the frames and
    the sentences that it admits, found among all frames."""
    unit, clip = F.normalize(vectors, dim=-1), F.normalize(world.clip, dim=-1)
    chosen = np.ones(len(unit), bool) if among is None else among
    asked = (world.right & chosen).sum(1) > 0.5 * world.right.sum(1)
    ranked = (world.asked[torch.from_numpy(asked)] @ unit.T).argsort(1, descending=True).numpy()
    right = np.take_along_axis(world.right[asked], ranked, 1)
    found = right.cumsum(1) / np.arange(1, right.shape[1] + 1)
    precision = (found * right).sum(1) / right.sum(1)
    rows = torch.from_numpy(chosen)
    few = slice(None, None, 6)  # neighbours are too much alike to be told apart
    pairs = paired_metrics(unit[rows], clip[rows])["cosine"]
    return {
        "cosine": pairs,
        "recall@1": paired_metrics(unit[rows][few], clip[rows][few])["recall@1"],
        "hit": float(right[:, 0].mean()),
        "AP": float(precision.mean()),
    }


FIGURES = ("cosine", "recall@1", "hit", "AP")


def spread(found: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """(mean, standard deviation) of each figure."""
    return {
        name: [round(float(how([f[name] for f in found])), 4) for how in (np.mean, np.std)]
        for name in found[0]
    }


def table_of(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    for line in lines:
        table.add_row(*line)
    return table


def shown(value: list[float]) -> str:
    return f"{value[0]:.3f} ± {value[1]:.3f}"


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def changed(**values: Any) -> Recipe:
    return Recipe(config=replace(CONFIG, **values))


ABLATIONS = {
    "kept": Recipe(),
    "the article's temperature 0.07": changed(temperature=0.07),
    "temperature 0.5": changed(temperature=0.5),
    "temperature learned": Recipe(learned_temperature=True),
    "no InfoNCE": changed(info_nce_weight=0.0),
    "negatives of other videos": Recipe(negatives="others"),
    "soft targets": Recipe(negatives="soft"),
    "text anchors, general": Recipe(text=0.5),
    "text anchors, own": Recipe(text=0.5, bank="own"),
    "linear head": Recipe(head="linear"),
    "residual head": Recipe(head="residual"),
    "averaged weights (EMA)": Recipe(ema=0.95),
    "CLIP smoothed in time": Recipe(smooth=1),
    "DINO smoothed in time": Recipe(smooth=1, of_clip=False),
    "noise on the input": Recipe(noise=0.5),
    "mixup": Recipe(mix=0.4),
}


def ablation(worlds: list[World], banks: dict[str, Tensor], seeds: int, out: Console) -> Any:
    found: dict[str, Any] = {"CLIP itself": {w.name: spread([judge(w.clip, w)]) for w in worlds}}
    for name, recipe in ABLATIONS.items():
        if recipe.bank not in banks:
            continue
        began, found[name] = time.perf_counter(), {}
        for held in worlds:
            rest = [world for world in worlds if world is not held]
            x, y = (torch.cat([getattr(w, part) for w in rest]) for part in ("dino", "clip"))
            video = np.concatenate([world.video for world in rest])
            dino = held.dino
            if recipe.smooth and not recipe.of_clip:
                x, dino = (
                    smoothed(x, video, recipe.smooth),
                    smoothed(dino, held.video, recipe.smooth),
                )
            figures = []
            for seed in range(seeds):
                model = fit(recipe, x, y, video, seed, banks[recipe.bank])
                with torch.inference_mode():
                    figures.append(judge(model(dino), held))
            found[name][held.name] = spread(figures)
        out.print(f"{name}: {time.perf_counter() - began:.0f} s", highlight=False)
    heads = [
        "training",
        "cosine",
        "recall@1",
        *(f"{f}, {w.name}" for w in worlds for f in ("hit", "AP")),
    ]
    lines = [
        [
            name,
            *(f"{np.mean([by[w.name][f][0] for w in worlds]):.3f}" for f in ("cosine", "recall@1")),
            *(shown(by[w.name][f]) for w in worlds for f in ("hit", "AP")),
        ]
        for name, by in found.items()
    ]
    _wide().print(table_of("Held out: a whole corpus", heads, lines))
    return found


def content(worlds: list[World], banks: dict[str, Tensor], seeds: int, out: Console) -> Any:
    """Each kind of content in turn is kept from the training. A quarter of the videos is kept from all
    trainings, and judges them."""
    whole = World(
        "all",
        *(torch.cat([getattr(w, part) for w in worlds]) for part in ("dino", "clip")),
        np.concatenate([world.video for world in worlds]),
        [text for world in worlds for text in world.sentences],
        torch.cat([world.asked for world in worlds]),
        _diagonal([world.right for world in worlds]),
    )
    kinds = _kinds(whole.dino)
    recipe, bank = Recipe(), banks["general"]
    names = np.unique(whole.video)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        judges = np.isin(whole.video, np.random.default_rng(100 + seed).permutation(names)[::4])
        learn = ~judges
        knew = _fit_on(recipe, whole, learn, seed, bank)
        tests = [
            ("like what it knew", None),
            *((f"kind {kind}", kind) for kind in range(kinds.max() + 1)),
        ]
        for name, kind in tests:
            there = kinds == kind if kind is not None else np.ones(len(kinds), bool)
            first = _fit_on(recipe, whole, learn & ~there, seed, bank) if kind is not None else knew
            old, new = judges & ~there, judges & there
            began = time.perf_counter()
            tuned = _fit_on(replace(recipe, config=TUNING), whole, learn, seed, bank, first)
            tuning_s = time.perf_counter() - began
            said = {"share": float(there.mean()), "tuning_s": tuning_s}
            body = first.body
            with torch.inference_mode():
                rows = torch.from_numpy(new)
                squares = ((whole.dino[rows] - body.mean) / body.std).square().mean()
                said["distance"] = float(squares.sqrt())
            for when, model in (("unseen", first), ("seen", knew), ("tuned", tuned)):
                with torch.inference_mode():
                    vectors = model(whole.dino)
                for part, among in (("new", new), ("old", old)):
                    if among.any():
                        figures = judge(vectors, whole, among)
                        said |= {f"{part} {f}, {when}": figures[f] for f in ("cosine", "AP")}
            reference = said.get("old cosine, unseen", said["new cosine, unseen"])
            said["ratio"] = (1 - said["new cosine, unseen"]) / (1 - reference)
            found.setdefault(name, []).append(said)
        out.print(f"content, seed {seed}: done", highlight=False)
    result = {name: spread(values) for name, values in found.items()}
    columns = (
        "share", "distance", "ratio", "new cosine, unseen", "new cosine, tuned", "new cosine, seen",
        "new AP, unseen", "new AP, tuned", "new AP, seen", "old cosine, unseen", "old cosine, tuned",
        "tuning_s",
    )  # fmt: skip
    lines = [[n, *(shown(by[c]) if c in by else "" for c in columns)] for n, by in result.items()]
    _wide().print(table_of("Held out: a kind of content", ["content", *columns], lines))
    return result


def _diagonal(parts: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """A sentence of one corpus has no answer in the others."""
    out = np.zeros(np.sum([part.shape for part in parts], axis=0), bool)
    row = column = 0
    for part in parts:
        out[row : row + len(part), column : column + part.shape[1]] = part
        row, column = row + len(part), column + part.shape[1]
    return out


def _kinds(dino: Tensor) -> NDArray[np.int64]:
    """Which of `KINDS_OF_CONTENT` clusters each frame belongs to."""
    import faiss

    unit = F.normalize(dino - dino.mean(0), dim=-1).numpy()
    means = faiss.Kmeans(unit.shape[1], KINDS_OF_CONTENT, seed=1, spherical=True, nredo=3)
    means.train(unit)
    return means.index.search(unit, 1)[1][:, 0]


def _fit_on(
    recipe: Recipe,
    world: World,
    chosen: NDArray[np.bool_],
    seed: int,
    bank: Tensor,
    start: Head | None = None,
) -> Head:
    rows = torch.from_numpy(chosen)
    return fit(recipe, world.dino[rows], world.clip[rows], world.video[chosen], seed, bank, start)


def prompts(worlds: list[World], encoder: ClipEncoder, banks: dict[str, Tensor], seeds: int) -> Any:
    found: dict[str, Any] = {}
    for held in worlds:
        rest = [world for world in worlds if world is not held]
        x, y = (torch.cat([getattr(w, part) for w in rest]) for part in ("dino", "clip"))
        video = np.concatenate([world.video for world in rest])
        recipe = Recipe()
        models = [fit(recipe, x, y, video, seed, banks[recipe.bank]) for seed in range(seeds)]
        for name, templates in (
            ("as it is", TEMPLATES[:1]),
            ("mean of three", TEMPLATES[:3]),
            ("mean of five", TEMPLATES),
        ):
            said = [
                encoder.encode_text([template.format(text) for text in held.sentences])
                for template in templates
            ]
            asked = F.normalize(torch.from_numpy(np.mean(said, axis=0)), dim=-1)
            world = replace(held, asked=asked)
            with torch.inference_mode():
                projected = [judge(model(held.dino), world) for model in models]
            found.setdefault(name, {})[held.name] = {
                "projected": spread(projected),
                "clip": spread([judge(held.clip, world)]),
            }
    heads = [
        "sentence",
        *(
            f"{f}, {s}, {w.name}"
            for w in worlds
            for s in ("projected", "clip")
            for f in ("hit", "AP")
        ),
    ]
    lines = [
        [
            name,
            *(
                shown(by[w.name][s][f])
                for w in worlds
                for s in ("projected", "clip")
                for f in ("hit", "AP")
            ),
        ]
        for name, by in found.items()
    ]
    _wide().print(table_of("Sentences within templates", heads, lines))
    return found


def _wide() -> Console:
    """A file has room for all columns, whatever the terminal's width."""
    return Console(width=None if sys.stdout.isatty() else 240)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "corpora", nargs="+", help="ingested, with a truth.jsonl each; two at least"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), help="of the ablation")
    parser.add_argument("--bank", type=Path, help="sentences about such footage, one a line")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = Console(stderr=True)
    encoder = ClipEncoder.recorded(Corpus(args.corpora[0]).config.clip)
    worlds = [load(url, encoder) for url in args.corpora]
    if len(worlds) < 2:
        parser.error("one corpus is held out while the others train: give two at least")
    lines = [line.strip() for line in Path(SENTENCES).read_text(encoding="utf-8").splitlines()]
    general = torch.from_numpy(encoder.encode_text([line for line in lines if line]))
    banks = {"general": general}
    if args.bank:
        own = [line for line in args.bank.read_text(encoding="utf-8").splitlines() if line]
        banks["own"] = torch.from_numpy(encoder.encode_text(own))
    if args.only:
        for name in [name for name in ABLATIONS if name not in args.only]:
            del ABLATIONS[name]
    found: dict[str, Any] = {"recipes": {name: asdict(r) for name, r in ABLATIONS.items()}}
    if "ablation" in args.parts:
        found["ablation"] = ablation(worlds, banks, args.seeds, out)
    if "content" in args.parts:
        found["content"] = content(worlds, banks, args.seeds, out)
    if "prompts" in args.parts:
        found["prompts"] = prompts(worlds, encoder, banks, args.seeds)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
