"""Trains the two small models that understand the tiny world, and writes them in the formats of the
real ones: an open_clip folder and a transformers folder.

    python -m vsearch.demo.train_models --out vsearch/demo/models

Half of the scenes are easy and half are hard. CLIP learns from captioned frames. DINO never sees a word:
two frames of one scene must agree (NT-Xent, Chen et al. 2020, arXiv:2002.05709) and linear heads must
name kinds, colours, setting and number of what the generator drew; the heads are thrown away. Pairs for
which `held_out` is true are never drawn in training.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
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

CLIP_PX, DINO_PX = 64, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST = 6
"""So many objects and more are one class of number."""
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": CLIP_PX, "layers": [1, 1, 2, 1], "width": 24, "patch_size": None},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 80, "heads": 4, "layers": 3},
}
DINO_CONFIG: dict[str, Any] = {
    "hidden_sizes": [48, 96, 192, 256],
    "depths": [2, 3, 3, 1],
    "image_size": DINO_PX,
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = _schedule(optimizer, steps)
    used = torch.zeros(CLIP_CONFIG["text_cfg"]["vocab_size"], dtype=torch.bool)
    began = time.monotonic()
    for step in range(steps):
        rows = rng.choice(len(pictures.views), batch, replace=False)
        images, flipped = augmented(pictures.pixels[rows, rng.integers(0, 2, batch)], shift_px=4)
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
        with torch.autocast("cpu", torch.bfloat16):
            image_features, text_features, scale = model(images, tokens)
        logits = scale.float() * image_features.float() @ text_features.float().T
        logits = logits.masked_fill(also_true, -1e4)
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :batch].T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 100 == 0 or step == steps - 1:
            print(
                f"clip {step:5d} loss {loss.item():.3f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        # Rows of words never read in training hold only their random start: zero says 'unknown'.
        model.token_embedding.weight[~used] = 0
    return model.eval()


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


def _labels(views: list[View]) -> dict[str, Tensor]:
    """What each view shows, as chances of classes (views, classes): of several kinds or colours each is
    as right; rows of zeros ask for none."""
    labels = {
        "kind": _shares([[group.kind for group in view.groups] for view in views], KINDS),
        "colour": _shares([[group.colour for group in view.groups] for view in views], COLOURS),
        "setting": _shares([[view.setting] for view in views], SETTINGS),
    }
    numbers = [min(sum(group.count for group in view.groups), MOST) for view in views]
    return labels | {"count": F.one_hot(torch.tensor(numbers), MOST + 1).float()}


def _shares(named: Sequence[Sequence[str | None]], names: Iterable[str]) -> Tensor:
    rows = [[float(name in among) for name in names] for among in named]
    shares = torch.tensor(rows)
    return shares / shares.sum(1, keepdim=True).clamp(min=1)


def _nt_xent(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    z = F.normalize(torch.cat([a, b]).float(), dim=-1)
    logits = (z @ z.T / temperature).fill_diagonal_(-1e4)
    n = len(a)
    target = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return F.cross_entropy(logits, target)


def train_dino(pictures: Pictures, steps: int, batch: int, seed: int) -> nn.Module:
    """A DINOv3 ConvNeXt on pairs of frames of `batch // 2` scenes a step; no text is involved.

    What is asked of it: of the whole frame kinds, colours, setting and number, by linear heads on the
    CLS token; of each cell which kind and colour covers it, by linear heads on the second and third
    stage; and that two frames of a scene are nearer to each other than to other scenes.
    """
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
    sizes = {
        "kind": len(KINDS),
        "colour": len(COLOURS),
        "setting": len(SETTINGS),
        "count": MOST + 1,
    }
    heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
    cell_classes = {"kind": len(KINDS) + 1, "colour": len(COLOURS) + 1}  # the last: not covered
    for stage, channels in ((2, second), (3, third)):
        for name, size in cell_classes.items():
            heads[f"{name}{stage}"] = nn.Sequential(
                nn.GroupNorm(1, channels), nn.Conv2d(channels, size, 1)
            )
    mapper = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 64))
    parameters = [*model.parameters(), *heads.parameters(), *mapper.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
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
        asked = {name: rows_of[rows].repeat(2, 1) for name, rows_of in labels.items()}
        asked["colour"][false.repeat(2)] = 0
        cells = {
            "kind": _flipped(pictures.kinds[rows], torch.cat(flipped)),
            "colour": _flipped(pictures.colours[rows], torch.cat(flipped)),
        }
        recoloured = false.repeat(2)[:, None, None] & (cells["colour"] < len(COLOURS))
        cells["colour"] = cells["colour"].masked_fill(recoloured, -100)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(pixel_values=x, output_hidden_states=True)
            mapped = mapper(out.last_hidden_state[:, 0])
            losses = {
                name: F.cross_entropy(heads[name](out.last_hidden_state[:, 0]).float(), asked[name])
                for name in sizes
            }
            for stage in (2, 3):
                for name, size in cell_classes.items():
                    truth = cells[name] if stage == 2 else _halved(cells[name], size - 1)
                    losses[f"{name}{stage}"] = F.cross_entropy(
                        heads[f"{name}{stage}"](out.hidden_states[stage]).float(),
                        truth,
                        ignore_index=-100,
                    )
        losses["agreement"] = 0.2 * _nt_xent(*mapped.chunk(2))
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            parts = "  ".join(f"{name} {value.item():.2f}" for name, value in losses.items())
            print(f"dino {step:5d}  {parts}  {time.monotonic() - began:.0f} s", flush=True)
    return model.eval()


def _flipped(cells: NDArray[np.int64], flipped: Tensor) -> Tensor:
    """The cells of all first frames and then of all second ones (frames, CELLS, CELLS), those of
    mirrored frames mirrored as well."""
    both = torch.from_numpy(np.concatenate([cells[:, 0], cells[:, 1]]))
    return torch.where(flipped[:, None, None], both.flip(2), both)


def _halved(cells: Tensor, nothing: int) -> Tensor:
    """Cells of twice the size: those that one class covers on the diagonal, `nothing` elsewhere."""
    corner = cells[:, ::2, ::2]
    return torch.where(corner == cells[:, 1::2, 1::2], corner, nothing)


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
        name: torch.linalg.solve(gram, x.T @ truth) for name, truth in _labels(probe.views).items()
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
    size = {"height": DINO_PX, "width": DINO_PX}
    DINOv3ViTImageProcessor(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--only", choices=["clip", "dino"])
    parser.add_argument("--scenes", type=int, default=16_000)
    parser.add_argument("--clip-steps", type=int, default=2600)
    parser.add_argument("--dino-steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figures_file = args.out / "figures.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    for name, side_px in (("clip", CLIP_PX), ("dino", DINO_PX)):
        if args.only not in (None, name):
            continue
        began = time.monotonic()
        pictures = draw_pictures(args.seed, args.scenes, side_px)
        seen = draw_pictures(10_000_000 + args.seed, 500, side_px, hard_share=0)
        unseen = draw_pictures(20_000_000 + args.seed, 500, side_px, unseen=True, hard_share=0)
        hard = draw_pictures(30_000_000 + args.seed, 1000, side_px, hard_share=1)
        print(f"{args.scenes} scenes drawn in {time.monotonic() - began:.0f} s", flush=True)
        if name == "clip":
            model = train_clip(pictures, args.clip_steps, args.batch, args.seed)
            save_clip(model, args.out / name)
            figures[name] = clip_figures(model, seen, unseen, args.seed)
            figures[name] |= hard_clip_figures(model, hard)
        else:
            model = train_dino(pictures, args.dino_steps, args.batch, args.seed)
            save_dino(model, args.out / name)
            figures[name] = dino_figures(model, pictures[:4000], seen, unseen, hard)
        figures[name]["training minutes"] = round((time.monotonic() - began) / 60, 1)
        figures_file.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
