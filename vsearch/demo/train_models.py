"""Trains the two small models that understand the tiny world, and writes them in the formats of the
real ones: an open_clip folder and a transformers folder.

    python -m vsearch.demo.train_models --out vsearch/demo/models

Some scenes are easy, most are hard. CLIP learns from captioned frames. DINO never sees a word: two frames
of one scene must agree (NT-Xent, Chen et al. 2020, arXiv:2002.05709). Of both, linear heads must name what
the generator drew: of each cell of the frame the kind and colour that cover it, of the whole the kinds,
colours, setting, number and light; the heads are thrown away. Pairs for which `held_out` is true are never
drawn in training.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTImageProcessor

from vsearch.demo.hard import mirrored, opposite
from vsearch.demo.scenes import COLOURS, KINDS, SETTINGS, View
from vsearch.demo.sentences import (
    HELD_OUT_TEMPLATES,
    Mention,
    alterations,
    full_mention,
    random_mention,
    relations_of,
    sentence,
)
from vsearch.demo.training_pictures import SEEN, Pictures, draw_pictures

PX = 96
"""What both models see, in pixels a side."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HARD_SHARE = 0.65
"""Of the scenes that are drawn for training."""
MOST = 6
"""So many objects and more are one class of number."""
CLASSES = {
    "kind": len(KINDS),
    "colour": len(COLOURS),
    "setting": len(SETTINGS),
    "count": MOST + 1,
    "light": 1,
}
UNKNOWN = -100
"""The class of a cell of which nothing is asked."""
NOTHING_WEIGHT = 0.2
"""What a cell counts that nothing covers, as most do."""
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": PX, "layers": [1, 2, 3, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 3},
}
DINO_CONFIG: dict[str, Any] = {
    "hidden_sizes": [32, 64, 192, 256],
    "depths": [1, 2, 4, 1],
    "image_size": PX,
    "layer_scale_init_value": 1.0,
}


def to_input(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 (n, h, w, 3) → normalised float32 (n, 3, h, w)."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    return _normalise(x)


def augmented(pixels: NDArray[np.uint8], shift_px: int) -> tuple[Tensor, Tensor]:
    """As `to_input`, with random brightness, shifts and mirroring; also tells which frames
    were mirrored, bool (n,)."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    mirrored = torch.rand(len(x)) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    x = x * (0.85 + 0.3 * torch.rand(len(x), 1, 1, 1))
    shift = [int(s) for s in torch.randint(-shift_px, shift_px + 1, (2,))]
    return _normalise(x.roll(shift, dims=(2, 3)).clamp(0, 1)), mirrored


def _normalise(x: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def _false_colours(frames: list[Tensor], chosen: Tensor) -> list[Tensor]:
    """Swaps the colour channels of the `chosen` scenes at random or makes them grey, in each list
    of frames (n, 3, h, w) alike.
    """
    frames = [x.clone() for x in frames]
    for i in torch.nonzero(chosen).flatten().tolist():
        grey, order = bool(torch.rand(()) < 0.3), torch.randperm(3)
        for x in frames:
            x[i] = x[i].mean(0, keepdim=True) if grey else x[i][order]
    return frames


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    lr = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.08)


class Heads(nn.Module):
    """Linear heads that name what the generator drew, from maps of the second and third stage (stride 8
    and 16) and from the vector of the whole frame."""

    def __init__(self, second: int, third: int, width: int) -> None:
        super().__init__()
        self.whole = nn.ModuleDict({name: nn.Linear(width, n) for name, n in CLASSES.items()})
        self.cells = nn.ModuleDict(
            {
                f"{name}{stage}": nn.Sequential(
                    nn.GroupNorm(1, channels), nn.Conv2d(channels, CLASSES[name] + 1, 1)
                )
                for stage, channels in ((2, second), (3, third))
                for name in ("kind", "colour")
            }
        )

    def losses(
        self, maps: dict[int, Tensor], whole: Tensor, asked: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Of `maps` {2: (n, c, CELLS, CELLS), 3: (n, c, CELLS / 2, CELLS / 2)} and `whole` (n, width), to
        be compared with what `_asked` gives."""
        found = {}
        for name, head in self.whole.items():
            one_of_many = name in ("setting", "count")
            loss = F.cross_entropy if one_of_many else F.binary_cross_entropy_with_logits
            truth = asked[name]
            known = (truth >= 0).all(1)
            found[name] = loss(head(whole).float()[known], truth[known])
        for name, head in self.cells.items():
            stage, logits = int(name[-1]), head(maps[int(name[-1])]).float()
            nothing = logits.shape[1] - 1
            truth = asked[f"{name[:-1]} cells"]
            truth = truth if stage == 2 else _halved(truth, nothing)
            weight = torch.ones(nothing + 1)
            weight[nothing] = NOTHING_WEIGHT
            found[name] = F.cross_entropy(logits, truth, weight, ignore_index=UNKNOWN)
        return found


def _halved(cells: Tensor, nothing: int) -> Tensor:
    """Cells of twice the size: the class that is in one of the four; UNKNOWN where two are, or where one
    of them is not known."""
    four = torch.stack([cells[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    lowest = four.amin(0)  # UNKNOWN is below all classes, `nothing` above
    highest = four.masked_fill(four == nothing, UNKNOWN).amax(0)
    return lowest.masked_fill((highest != UNKNOWN) & (lowest != highest), UNKNOWN)


def _labels(views: list[View]) -> dict[str, Tensor]:
    """What each view shows: of `kind` and `colour` all that are there, of `setting` and `count` the one
    that is right, as 0 and 1 (views, classes)."""
    kinds, colours, settings = list(KINDS), list(COLOURS), list(SETTINGS)
    labels = {name: torch.zeros(len(views), size) for name, size in CLASSES.items()}
    for row, view in enumerate(views):
        for group in view.groups:
            labels["kind"][row, kinds.index(group.kind)] = 1
            labels["colour"][row, colours.index(group.colour)] = 1
        if view.setting:
            labels["setting"][row, settings.index(view.setting)] = 1
        labels["count"][row, min(sum(group.count for group in view.groups), MOST)] = 1
        labels["light"][row] = float(view.dark)
    return labels


def _asked(
    pictures: Pictures,
    labels: dict[str, Tensor],
    rows: NDArray[np.int64],
    frame: Any,
    flipped: Tensor,
) -> dict[str, Tensor]:
    """What is asked of the frames (0 or 1) of those scenes, some of which are mirrored."""
    asked = {name: values[rows] for name, values in labels.items()}
    for name, cells in (("kind", pictures.kinds), ("colour", pictures.colours)):
        chosen = torch.from_numpy(cells[rows, frame]).long()
        asked[f"{name} cells"] = torch.where(flipped[:, None, None], chosen.flip(2), chosen)
    return asked


def _text_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """As `encode_text` of normal length, without what is padding in all sentences: the text tower is
    causal, so that nothing after a sentence's end counts. Unit vectors (n, dim)."""
    length = int(tokens.argmax(1).max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection
    return F.normalize(x, dim=-1)


def train_clip(pictures: Pictures, steps: int, batch: int, seed: int) -> nn.Module:
    """open_clip's CLIP on (frame, caption) pairs. Beside the captions of the other frames each frame has
    as negatives captions with one thing said differently: without them the pairs alone tell the frames
    apart, and neither relations nor numbers are learned. Captions that are true of a frame are taken out
    of its negatives.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = open_clip.CLIP(**CLIP_CONFIG).to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP_CONFIG["text_cfg"]["context_length"])
    width = 8 * CLIP_CONFIG["vision_cfg"]["width"]
    heads = Heads(width, 2 * width, CLIP_CONFIG["embed_dim"])
    maps: dict[int, Tensor] = {}
    for stage in (2, 3):
        layer = getattr(model.visual, f"layer{stage}")
        layer.register_forward_hook(lambda _, __, out, stage=stage: maps.update({stage: out}))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, fused=True)
    schedule = _schedule(optimizer, steps)
    labels = _labels(pictures.views)
    used = torch.zeros(CLIP_CONFIG["text_cfg"]["vocab_size"], dtype=torch.bool)
    began = time.monotonic()
    for step in range(steps):
        rows, frame = (
            rng.choice(len(pictures.views), batch, replace=False),
            rng.integers(0, 2, batch),
        )
        images, flipped = augmented(pictures.pixels[rows, frame], shift_px=4)
        views = [
            mirrored(pictures.views[i]) if flip else pictures.views[i]
            for i, flip in zip(rows, flipped.tolist(), strict=True)
        ]
        mentions = [random_mention(view, rng, SEEN) for view in views]
        mentions += [_almost(mention, rng) for mention in mentions]
        tokens = tokenizer([sentence(mention, rng) for mention in mentions])
        used[tokens.flatten()] = True
        true = np.array([[mention.matches(view) for mention in mentions] for view in views])
        also_true = torch.from_numpy(true & ~np.eye(batch, 2 * batch, dtype=bool))
        with _autocast():
            whole = model.encode_image(images)
            texts = _text_features(model, tokens)
            losses = heads.losses(maps, whole, _asked(pictures, labels, rows, frame, flipped))
        logits = model.logit_scale.exp() * F.normalize(whole.float(), dim=-1) @ texts.float().T
        logits = logits.masked_fill(also_true, -1e4)
        target = torch.arange(batch)
        losses["words"] = F.cross_entropy(logits, target)
        losses["pictures"] = F.cross_entropy(logits[:, :batch].T, target)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        _tell("clip", step, steps, losses, began)
    with torch.no_grad():
        # Rows of words never read in training hold only their random start: zero says 'unknown'.
        model.token_embedding.weight[~used] = 0
    return model.eval()


def _autocast() -> torch.autocast:
    """bfloat16 where the processor has it."""
    known = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(known.get("avx512_bf16")))


def _tell(name: str, step: int, steps: int, losses: dict[str, Tensor], began: float) -> None:
    if step % 100 == 0 or step == steps - 1:
        parts = "  ".join(f"{part} {value.item():.2f}" for part, value in losses.items())
        print(f"{name} {step:5d}  {parts}  {time.monotonic() - began:.0f} s", flush=True)


def _almost(mention: Mention, rng: np.random.Generator) -> Mention:
    """The mention with one thing said differently, in words that training may use. The action stays: a
    frame does not tell which way something goes."""
    allowed = [
        altered
        for altered in alterations(mention, rng)
        if altered.action == mention.action
        and all(
            said is None or not (said.colour and said.kind) or (said.colour, said.kind) in SEEN
            for said in (altered, altered.other)
        )
    ]
    return allowed[int(rng.integers(len(allowed)))] if allowed else mention


def _nt_xent(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    z = F.normalize(torch.cat([a, b]).float(), dim=-1)
    logits = (z @ z.T / temperature).fill_diagonal_(-1e4)
    n = len(a)
    target = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return F.cross_entropy(logits, target)


def train_dino(pictures: Pictures, steps: int, batch: int, seed: int) -> nn.Module:
    """A DINOv3 ConvNeXt on pairs of frames of `batch // 2` scenes a step; no text is involved."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = DINOv3ConvNextModel(DINOv3ConvNextConfig(**DINO_CONFIG))
    for layer in model.modules():
        # The class' own start (deviation 0.02) is made for long training: at this size and length
        # its residual branches stay silent for a thousand steps.
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    model = model.to(memory_format=torch.channels_last).train()
    _, second, third, width = DINO_CONFIG["hidden_sizes"]
    heads = Heads(second, third, width)
    mapper = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 64))
    parameters = [*model.parameters(), *heads.parameters(), *mapper.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05, fused=True)
    schedule = _schedule(optimizer, steps)
    labels = _labels(pictures.views)
    began = time.monotonic()
    for step in range(steps):
        rows = rng.choice(len(pictures.views), batch // 2, replace=False)
        # A third of the scenes get false colours, so that shape is learned for itself and is still
        # known when it comes in a colour it never came in; their colour is not asked for.
        false = torch.rand(len(rows)) < 1 / 3
        frames, flipped = zip(
            *(augmented(pictures.pixels[rows, j], shift_px=2) for j in (0, 1)), strict=True
        )
        x = torch.cat(_false_colours(list(frames), false))
        both = [_asked(pictures, labels, rows, j, flipped[j]) for j in (0, 1)]
        asked = {name: torch.cat([part[name] for part in both]) for name in both[0]}
        asked["colour"][false.repeat(2)] = UNKNOWN
        recoloured = false.repeat(2)[:, None, None] & (asked["colour cells"] < len(COLOURS))
        asked["colour cells"] = asked["colour cells"].masked_fill(recoloured, UNKNOWN)
        with _autocast():
            out = model(pixel_values=x, output_hidden_states=True)
            whole, stages = out.last_hidden_state[:, 0], out.hidden_states
            losses = heads.losses({stage: stages[stage] for stage in (2, 3)}, whole, asked)
            losses["agreement"] = 0.2 * _nt_xent(*mapper(whole).chunk(2))
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        _tell("dino", step, steps, losses, began)
    return model.eval()


@torch.inference_mode()
def clip_figures(model: nn.Module, seen: Pictures, unseen: Pictures, seed: int) -> dict[str, float]:
    """How often the right one of all colour–kind pairs, or settings, gets the highest similarity, in
    easy scenes."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP_CONFIG["text_cfg"]["context_length"])
    pairs = [(c, k) for c in COLOURS for k in KINDS]
    rng = np.random.default_rng(seed)

    def text(mentions: list[Mention]) -> Tensor:
        words = [sentence(m, rng, HELD_OUT_TEMPLATES, paraphrase=False) for m in mentions]
        return model.encode_text(tokenizer(words), normalize=True)

    pair_text = text([Mention(c, k) for c, k in pairs])
    setting_text = text([Mention(setting=s) for s in SETTINGS])
    figures = {}
    for name, pictures in (("seen", seen), ("unseen", unseen)):
        rows = [i for i, view in enumerate(pictures.views) if view.groups]
        shown = [pictures.views[i].groups[0] for i in rows]
        z = model.encode_image(to_input(pictures.pixels[rows, 0]), normalize=True)
        truth = torch.tensor([pairs.index((group.colour, group.kind)) for group in shown])
        figures[f"pair accuracy, {name} pairs"] = (
            ((z @ pair_text.T).argmax(1) == truth).float().mean()
        )
        full = text([full_mention(pictures.views[i]) for i in rows])
        best = (z @ full.T).argmax(0)
        right = [
            full_mention(pictures.views[rows[b]]) == full_mention(pictures.views[rows[i]])
            for i, b in enumerate(best.tolist())
        ]
        figures[f"text to frame R@1 of {len(rows)}, {name} pairs"] = sum(right) / len(right)
        if name == "seen":
            truth = _labels([pictures.views[i] for i in rows])["setting"].argmax(1)
            guess = (z @ setting_text.T).argmax(1)
            figures["setting accuracy"] = (guess == truth).float().mean()
    return {name: round(float(value), 3) for name, value in figures.items()}


@torch.inference_mode()
def hard_clip_figures(model: nn.Module, hard: Pictures) -> dict[str, float]:
    """Of hard scenes: how often a pair that is there gets the highest similarity of all pairs, and how
    often the true sentence beats the one with the opposite relation, another number, or 'without' for
    'with'.
    """
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP_CONFIG["text_cfg"]["context_length"])
    rng = np.random.default_rng(0)

    def text(mentions: list[Mention]) -> Tensor:
        words = [sentence(m, rng, HELD_OUT_TEMPLATES, paraphrase=False) for m in mentions]
        return model.encode_text(tokenizer(words), normalize=True)

    rows = [i for i, view in enumerate(hard.views) if view.groups]
    z = model.encode_image(to_input(hard.pixels[rows, 0]), normalize=True)
    pairs = [(c, k) for c in COLOURS for k in KINDS]
    best = (z @ text([Mention(c, k) for c, k in pairs]).T).argmax(1)
    right = [
        any(pairs[b] == (group.colour, group.kind) for group in hard.views[i].groups)
        for i, b in zip(rows, best.tolist(), strict=True)
    ]
    figures = {"pair accuracy, hard scenes": float(np.mean(right))}
    contrasts: dict[str, list[tuple[int, Mention, Mention]]] = {}
    for place, i in enumerate(rows):
        one, *others = hard.views[i].groups
        said = Mention(one.colour, one.kind)
        if others:
            said = replace(said, other=Mention(others[0].colour, others[0].kind))
            true = relations_of(one, others[0])[0]
            pairs_of_words = (("relation", true, opposite(true)), ("presence", "with", "without"))
            for name, yes, no in pairs_of_words:
                told = replace(said, relation=yes), replace(said, relation=no)
                contrasts.setdefault(name, []).append((place, *told))
        else:
            counted = replace(said, count=one.count), replace(said, count=one.count % 5 + 1)
            contrasts.setdefault("number", []).append((place, *counted))
    for name, triples in contrasts.items():
        places, true_said, false_said = zip(*triples, strict=True)
        better = text(list(true_said)) - text(list(false_said))
        ahead = (z[list(places)] * better).sum(1) > 0
        figures[f"true {name} preferred, hard scenes"] = float(ahead.float().mean())
    return {name: round(value, 3) for name, value in figures.items()}


@torch.inference_mode()
def dino_figures(
    model: nn.Module, probe: Pictures, seen: Pictures, unseen: Pictures, hard: Pictures
) -> dict[str, float]:
    """Accuracy of ridge-regression probes on frozen features, fitted on `probe`: how often the
    likeliest class is one that is there.
    """

    def features(pictures: Pictures) -> Tensor:
        parts = [
            model(pixel_values=to_input(chunk)).last_hidden_state[:, 0]
            for chunk in np.array_split(pictures.pixels[:, 0], max(1, len(pictures.pixels) // 256))
        ]
        x = torch.cat(parts)
        return torch.cat([x, torch.ones(len(x), 1)], dim=1)

    x = features(probe)
    gram = x.T @ x + 1e-1 * torch.eye(x.shape[1])
    weights = {
        name: torch.linalg.solve(gram, x.T @ truth)
        for name, truth in _labels(probe.views).items()
        if CLASSES[name] > 1
    }
    figures = {}
    for split, pictures in (("seen pairs", seen), ("unseen pairs", unseen), ("hard scenes", hard)):
        held, labels = features(pictures), _labels(pictures.views)
        for name, w in weights.items():
            asked = labels[name].sum(1) > 0
            chosen = labels[name].gather(1, (held @ w).argmax(1, keepdim=True))[asked]
            figures[f"{name} by linear probe, {split}"] = round(
                float((chosen > 0).float().mean()), 3
            )
    return figures


def save_clip(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {
        name: t.half().contiguous() if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }
    save_file(state, folder / "open_clip_model.safetensors")


def save_dino(model: nn.Module, folder: Path) -> None:
    deepcopy(model).half().save_pretrained(folder)
    size = {"height": PX, "width": PX}
    DINOv3ViTImageProcessor(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)


@dataclass(frozen=True)
class Drawn:
    """What is drawn for a training, and for the figures of what comes out."""

    training: Pictures
    seen: Pictures
    unseen: Pictures
    hard: Pictures


def draw(seed: int, scenes: int) -> Drawn:
    return Drawn(
        draw_pictures(seed, scenes, PX, hard_share=HARD_SHARE),
        draw_pictures(10_000_000 + seed, 500, PX, hard_share=0),
        draw_pictures(20_000_000 + seed, 500, PX, unseen=True, hard_share=0),
        draw_pictures(30_000_000 + seed, 1000, PX, hard_share=1),
    )


_held: list[Drawn] = []
"""What a training process was started with: pictures are inherited, not sent."""


def _train(name: str, out: Path, steps: int, batch: int, seed: int) -> dict[str, float]:
    """Trains and writes one of the models; its figures."""
    began, [drawn] = time.monotonic(), _held
    if name == "clip":
        model = train_clip(drawn.training, steps, batch, seed)
        save_clip(model, out / name)
        figures = clip_figures(model, drawn.seen, drawn.unseen, seed)
        figures |= hard_clip_figures(model, drawn.hard)
    else:
        model = train_dino(drawn.training, steps, batch, seed)
        save_dino(model, out / name)
        figures = dino_figures(model, drawn.training[:4000], drawn.seen, drawn.unseen, drawn.hard)
    return figures | {"training minutes": round((time.monotonic() - began) / 60, 1)}


def _start(drawn: Drawn, threads: int) -> None:
    _held.append(drawn)
    torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--only", choices=["clip", "dino"])
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--clip-steps", type=int, default=2500)
    parser.add_argument("--dino-steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began, drawn = time.monotonic(), draw(args.seed, args.scenes)
    print(f"{args.scenes} scenes drawn in {time.monotonic() - began:.0f} s", flush=True)
    steps = {"clip": args.clip_steps, "dino": args.dino_steps}
    names = [args.only] if args.only else list(steps)
    threads = max(1, len(os.sched_getaffinity(0)) // len(names))
    figures_file = args.out / "figures.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    # Side by side, as half of the threads do more than half of the work.
    with ProcessPoolExecutor(
        len(names), get_context("fork"), initializer=_start, initargs=(drawn, threads)
    ) as pool:
        running = {
            name: pool.submit(_train, name, args.out, steps[name], args.batch, args.seed)
            for name in names
        }
        for name, done in running.items():
            figures[name] = done.result()
            figures_file.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
