"""CLIP's text towers at full size, with random weights; their image towers, which no test here uses,
are small."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel

from vsearch.config import DEMO_MODELS
from vsearch.encoders import ClipEncoder

SMALL_IMAGE_TOWER = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1, "head_width": 32}
LONG = "a dog and a cat and " * 40
SENTENCES = [
    "a red car on the beach",
    "",
    "Zwei Hände, 20 °C!",
    "a typed <end_of_text> ends nothing that is said after it",
    LONG,
    "a dog",
]


def shipped(folder: Path) -> str:
    return str(DEMO_MODELS / "clip")


def saved(folder: Path, model_cfg: dict[str, Any]) -> str:
    """A folder with a model of random weights."""
    config = {"model_cfg": model_cfg, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(2)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for name, weights in model.named_parameters():
        if "embedding" in name and weights.ndim == 2:  # else words hardly matter beside their place
            nn.init.normal_(weights, std=0.1)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)


def architecture(name: str, custom: bool | None = None, **text: Any) -> Any:
    """Makes the folder of a model of open_clip, with changes to its text tower."""

    def make(folder: Path) -> str:
        known = open_clip.get_model_config(name)
        tower = {k: v for k, v in known["text_cfg"].items() if "tokenizer" not in k}
        pooling = {k: v for k, v in known["vision_cfg"].items() if k.startswith(("att", "out"))}
        towers = {"vision_cfg": SMALL_IMAGE_TOWER | pooling, "text_cfg": tower | text}
        given = {} if custom is None else {"custom_text": custom}
        return saved(folder, known | towers | given)

    return make


def of_transformers(folder: Path) -> str:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=49408, intermediate_size=64, pad_token_id=0, **sizes)
    RobertaModel(config).save_pretrained(folder / "tower")
    text = {"hf_model_name": str(folder / "tower"), "hf_proj_type": "linear"}
    text |= {"hf_pooler_type": "mean_pooler", "context_length": 77}
    return saved(folder, {"embed_dim": 64, "vision_cfg": SMALL_IMAGE_TOWER, "text_cfg": text})


SMALL = {"width": 64, "heads": 2, "layers": 2}
EOS = {"pool_type": "eos", "eos_id": 49407}
MODELS = {
    "demo": (shipped, True),
    "ViT-B-16": (architecture("ViT-B-16"), True),
    "ViT-B-32-quickgelu as CustomTextCLIP": (architecture("ViT-B-32-quickgelu", True), True),
    "SigLIP": (architecture("ViT-B-16-SigLIP", vocab_size=49408), False),
    "small MobileCLIP": (architecture("MobileCLIP-B", **SMALL), True),
    "small, eos": (architecture("ViT-B-32", **SMALL, **EOS), True),
    "small, eos, CustomTextCLIP": (architecture("ViT-B-32", True, **SMALL, **EOS), True),
    "small, bias": (architecture("ViT-B-32", True, **SMALL, proj_bias=True), True),
    "small, last": (architecture("ViT-B-32", **SMALL, pool_type="last"), False),
    "small, not causal": (architecture("ViT-B-32", True, **SMALL, no_causal_mask=True), False),
    "small CoCa": (architecture("coca_ViT-B-32", **SMALL), False),
    "of transformers": (of_transformers, False),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(encoder, open_clip's own model, its tokenizer, whether it can be cut short)."""
    make, cut = MODELS[request.param]
    source = make(tmp_path_factory.mktemp("model"))
    official, _ = open_clip.create_model_from_pretrained(f"local-dir:{source}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{source}")
    return ClipEncoder(source, "cpu"), official.eval(), tokenizer, cut


@torch.no_grad()
def test_vectors_are_those_of_open_clip_alone_and_together(made: Any) -> None:
    encoder, official, tokenizer, _ = made
    expected = official.encode_text(tokenizer(SENTENCES), normalize=True).numpy()
    together = encoder.encode_text(SENTENCES)
    alone = np.concatenate([encoder.encode_text([sentence]) for sentence in SENTENCES])
    for ours in (together, alone):
        assert ours.dtype == np.float32 and ours.shape == expected.shape
        assert np.abs(ours - expected).max() <= 1e-5
        assert (ours * expected).sum(1).min() >= 0.99999
    assert np.abs(expected[0] - expected[1:]).max(1).min() > 1e-3


@torch.no_grad()
def test_no_more_is_computed_than_the_longest_sentence_needs(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, _, tokenizer, cut = made
    context = tokenizer([""]).shape[1]
    lengths: list[int] = []
    norm = torch.nn.functional.layer_norm

    def watched(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        lengths.append(x.shape[1] if x.ndim == 3 else 0)
        return norm(x, *rest, **named)

    monkeypatch.setattr("torch.nn.functional.layer_norm", watched)
    for sentences, needed in ((["a dog"], 4), (["a dog", "a red car"], 5), ([LONG], context)):
        lengths.clear()
        encoder.encode_text(sentences)
        assert (max(lengths) == needed) if cut else (max(lengths) >= context)


@torch.no_grad()
def test_threads_do_not_disturb_each_other(made: Any) -> None:
    encoder, official, tokenizer, _ = made
    expected = official.encode_text(tokenizer(SENTENCES), normalize=True).numpy()
    before = {name: tuple(value.shape) for name, value in encoder._model.state_dict().items()}
    places = [n % len(SENTENCES) for n in range(24)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: encoder.encode_text([SENTENCES[n]])[0], places))
    assert np.abs(np.stack(found) - expected[places]).max() <= 1e-5
    assert {n: tuple(value.shape) for n, value in encoder._model.state_dict().items()} == before
