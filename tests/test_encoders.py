import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
)

from vsearch.config import PRESETS, Encoder, EncoderNames, UserError
from vsearch.demo.scenes import FRAME_PX, SceneRenderer, sample_scene
from vsearch.encoders import (
    COMPILE_AFTER,
    ClipEncoder,
    DinoEncoder,
    Encoders,
    image_dtype,
    weights_digest,
)

ARCHITECTURE = "ViT-B-16"
SENTENCES = ["a red car on the beach", "Zwei Hände, 20 °C!", ""]
SIZES = [(224, 398), (360, 300)]


def frames(height: int, width: int) -> NDArray[np.uint8]:
    """Two detailed pictures, uint8 (2, height, width, 3)."""
    rng = np.random.default_rng(4)
    pictures = []
    for setting in ("city", "beach"):
        drawn = SceneRenderer(sample_scene(rng, setting=setting)).frame(0.5)
        assert drawn.shape == (FRAME_PX, FRAME_PX, 3)
        pictures.append(np.asarray(Image.fromarray(drawn).resize((width, height))))
    return np.stack(pictures)


def assert_same_embedding(ours: Tensor, official: Tensor) -> None:
    """Nearly parallel, and much closer to each other than the two pictures are."""
    cosine = torch.nn.functional.cosine_similarity(ours, official)
    assert cosine.min() >= 0.999
    apart = (official[0] - official[1]).norm()
    assert (ours - official).norm(dim=1).max() < 0.1 * apart


# ── DINO ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv3 ViT-B/16 with random weights, in the format of its release."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = DINOv3ViTConfig(num_hidden_layers=12, num_register_tokens=4, **sizes)
    DINOv3ViTModel(config).save_pretrained(folder)
    DINOv3ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def official_dino(dino_folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(dino_folder).eval()


@pytest.fixture(scope="module")
def dino(dino_folder: Path) -> DinoEncoder:
    return DinoEncoder(str(dino_folder), "cpu", torch.float32)


def test_dino_is_recorded_with_its_width_and_weights(
    dino: DinoEncoder, dino_folder: Path, official_dino: torch.nn.Module
) -> None:
    assert dino.record.model == str(dino_folder)
    assert dino.record.dim == 768
    assert dino.record.revision == weights_digest(official_dino)
    assert dino.input_px == 224


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dino_vectors_are_those_of_the_official_pipeline(
    dino: DinoEncoder, dino_folder: Path, official_dino: torch.nn.Module, size: tuple[int, int]
) -> None:
    pixels = frames(*size)
    processor = AutoImageProcessor.from_pretrained(dino_folder)
    inputs = processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")
    with torch.no_grad():
        official = official_dino(**inputs).last_hidden_state[:, 0]
    assert_same_embedding(dino.encode_images(pixels), official)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dino_vectors_in_bfloat16_are_nearly_those(
    dino: DinoEncoder, dino_folder: Path, size: tuple[int, int]
) -> None:
    fast = DinoEncoder(str(dino_folder), "cpu", torch.bfloat16)
    assert fast.record == dino.record
    pixels = frames(*size)
    assert_same_embedding(fast.encode_images(pixels), dino.encode_images(pixels))


# ── CLIP ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SavedClip:
    """One model in both of open_clip's formats."""

    checkpoint: Path
    folder: Path

    def name(self, form: str) -> str:
        return f"{ARCHITECTURE}:{self.checkpoint}" if form == "checkpoint" else str(self.folder)


@pytest.fixture(scope="module")
def saved_clip(tmp_path_factory: pytest.TempPathFactory) -> SavedClip:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    model = open_clip.create_model(ARCHITECTURE)
    checkpoint = folder / "open_clip_pytorch_model.bin"
    torch.save(model.state_dict(), checkpoint)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    config = {
        "model_cfg": open_clip.get_model_config(ARCHITECTURE),
        "preprocess_cfg": {key: preprocess[key] for key in ("mean", "std")},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    other = tmp_path_factory.mktemp("checkpoint") / "epoch_1.pt"
    os.link(checkpoint, other)
    return SavedClip(other, folder)


@pytest.fixture(scope="module", params=["checkpoint", "folder"])
def clip_name(request: pytest.FixtureRequest, saved_clip: SavedClip) -> str:
    return saved_clip.name(request.param)


@pytest.fixture(scope="module")
def clip(clip_name: str) -> ClipEncoder:
    return ClipEncoder(clip_name, "cpu", torch.float32)


@pytest.fixture(scope="module")
def official_clip(saved_clip: SavedClip) -> tuple[torch.nn.Module, object]:
    model, preprocess = open_clip.create_model_from_pretrained(
        ARCHITECTURE, pretrained=str(saved_clip.checkpoint)
    )
    return model.eval(), preprocess


def test_clip_is_recorded_with_its_width_and_weights(
    clip: ClipEncoder, clip_name: str, official_clip: tuple[torch.nn.Module, object]
) -> None:
    assert clip.record.model == clip_name
    assert clip.record.dim == 512
    assert clip.record.revision == weights_digest(official_clip[0])
    assert clip.input_px == 224


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_clip_image_vectors_are_those_of_open_clip(
    clip: ClipEncoder, official_clip: tuple[torch.nn.Module, object], size: tuple[int, int]
) -> None:
    pixels = frames(*size)
    model, preprocess = official_clip
    with torch.no_grad():
        inputs = torch.stack([preprocess(Image.fromarray(picture)) for picture in pixels])
        official = model.encode_image(inputs, normalize=True)
    ours = clip.encode_images(pixels)
    assert torch.allclose(ours.norm(dim=1), torch.ones(2), atol=1e-5)
    assert_same_embedding(ours, official)


def test_clip_text_vectors_are_those_of_open_clip(
    clip: ClipEncoder, official_clip: tuple[torch.nn.Module, object]
) -> None:
    tokens = open_clip.get_tokenizer(ARCHITECTURE)(SENTENCES)
    with torch.no_grad():
        official = official_clip[0].encode_text(tokens, normalize=True)
    ours = clip.encode_text(SENTENCES)
    assert ours.dtype == np.float32
    assert np.allclose(ours, official.numpy(), atol=1e-5)
    assert not np.allclose(ours[0], ours[1], atol=1e-3)


@pytest.mark.parametrize("clip_name", ["folder"], indirect=True)
def test_clip_image_vectors_in_bfloat16_are_nearly_those(clip: ClipEncoder, clip_name: str) -> None:
    fast = ClipEncoder(clip_name, "cpu", torch.bfloat16)
    assert fast.record == clip.record
    pixels = frames(*SIZES[0])
    assert_same_embedding(fast.encode_images(pixels), clip.encode_images(pixels))
    assert np.array_equal(fast.encode_text(SENTENCES), clip.encode_text(SENTENCES))


# ── both ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_digest_changes_with_any_weight_or_name() -> None:
    def digest(value: float, name: str = "linear") -> str:
        model = torch.nn.Sequential()
        model.add_module(name, torch.nn.Linear(3, 2))
        torch.nn.init.constant_(model[0].weight, 0.5)
        torch.nn.init.zeros_(model[0].bias)
        model[0].weight.data[1, 2] += value
        return weights_digest(model)

    assert digest(0) == digest(0)
    assert len({digest(0), digest(1e-4), digest(0, "other")}) == 3


@pytest.mark.parametrize("clip_name", ["folder"], indirect=True)
def test_embed_gives_both_in_half_precision_for_any_number(
    dino: DinoEncoder, clip: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsearch.encoders.DinoEncoder", lambda *_: dino)
    monkeypatch.setattr("vsearch.encoders.ClipEncoder", lambda *_: clip)
    encoders = Encoders(EncoderNames("dino", "clip"), "cpu", batch=1)
    assert encoders.input_px == 224
    pixels = frames(224, 224)
    pixels.setflags(write=False)
    for vectors, encoder in zip(encoders.embed(pixels), (dino, clip), strict=True):
        alone = encoder.encode_images(pixels.copy()).numpy()
        assert vectors.dtype == np.float16
        assert vectors.shape == (2, encoder.record.dim)
        assert np.allclose(vectors, alone, atol=1e-3 * np.abs(alone).max())
    assert [v.shape for v in encoders.embed(pixels[:0])] == [(0, 768), (0, 512)]


@pytest.mark.parametrize("clip_name", ["folder"], indirect=True)
def test_a_batch_that_is_too_large_for_the_memory_is_halved(
    dino: DinoEncoder, clip: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsearch.encoders.DinoEncoder", lambda *_: dino)
    monkeypatch.setattr("vsearch.encoders.ClipEncoder", lambda *_: clip)
    encoders = Encoders(EncoderNames("dino", "clip"), "cpu", batch=8)
    pixels = np.concatenate([frames(224, 224)] * 4)[:7]
    expected = encoders.embed(pixels)
    encode, fit = clip.encode_images, 2

    def with_little_memory(pixels: Tensor) -> Tensor:
        if len(pixels) > fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(clip, "encode_images", with_little_memory)
    for found, vectors in zip(encoders.embed(pixels), expected, strict=True):
        assert np.allclose(found, vectors, atol=1e-3 * np.abs(vectors).max())
    assert encoders.batch == 2
    fit = 0
    with pytest.raises(torch.OutOfMemoryError):
        encoders.embed(pixels)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_images_are_encoded_in_bfloat16_where_the_processor_has_it(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    assert image_dtype("cpu") == (torch.bfloat16 if has_bf16 else torch.float32)


@dataclass
class Device:
    """Encodes a frame as twice its first value, three of them; notes what begins and what is waited for.
    In the batch that begins with frame `narrow_from`, and later, no more than `fit` frames fit.
    """

    fit: int = 99
    narrow_from: int = 99
    log: list[str] = field(default_factory=list)
    record: Encoder = field(default_factory=lambda: Encoder("none", "0", 3))
    input_px: int = 1

    def encode_images(self, frames: Tensor) -> "Device.Vectors":
        first = int(frames[0, 0, 0, 0])
        if first >= self.narrow_from and len(frames) > self.fit:
            self.log.append(f"no memory {first}")
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.log.append(f"begin {first}")
        return self.Vectors(self, first, 2.0 * frames[:, 0, 0])

    def compile(self, mode: str) -> None:
        self.log.append("compile")

    @dataclass
    class Vectors:
        device: "Device"
        first: int
        values: Tensor

        def half(self) -> "Device.Vectors":
            return self

        def to(self, where: str, non_blocking: bool) -> "Device.Vectors":
            assert where == "cpu" and non_blocking
            return self

        def numpy(self) -> NDArray[np.float32]:
            self.device.log.append(f"wait {self.first}")
            return self.values.numpy()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr("vsearch.encoders.DinoEncoder", lambda *_: device)
    monkeypatch.setattr("vsearch.encoders.ClipEncoder", lambda *_: device)
    return device


def numbered(count: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 1, 3))


def test_a_batch_is_waited_for_when_the_next_is_under_way(device: Device) -> None:
    encoders = Encoders(EncoderNames("dino", "clip"), "cpu", batch=2)
    encoders.embed(numbered(5), with_clip=False)
    assert device.log == ["begin 0", "begin 2", "wait 0", "begin 4", "wait 2", "wait 4"]


def test_what_is_under_way_stays_when_the_next_batch_has_no_memory(device: Device) -> None:
    device.narrow_from, device.fit = 4, 1
    encoders = Encoders(EncoderNames("dino", "clip"), "cpu", batch=4)
    dino, _ = encoders.embed(numbered(7), with_clip=False)
    tries = ["begin 0", "no memory 4", "no memory 4", "begin 4", "wait 0"]
    assert device.log == [*tries, "begin 5", "wait 4", "begin 6", "wait 5", "wait 6"]
    assert encoders.batch == 1
    assert dino[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("narrow_from", range(8))
@pytest.mark.parametrize("fit", [1, 2, 3])
def test_each_frame_gets_its_vectors_wherever_memory_ends(
    device: Device, narrow_from: int, fit: int
) -> None:
    device.narrow_from, device.fit = narrow_from, fit
    encoders = Encoders(EncoderNames("dino", "clip"), "cpu", batch=5)
    for vectors in encoders.embed(numbered(8)):
        assert vectors.tolist() == [[2 * i] * 3 for i in range(8)]


def test_models_are_compiled_once_when_that_pays(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMPILE_AFTER, "cpu", 5)
    encoders = Encoders(EncoderNames("dino", "clip"), "cpu", batch=4)
    compiled = []
    for _ in range(5):
        encoders.embed(numbered(2), with_clip=False)
        compiled.append(device.log.count("compile"))
    assert compiled == [0, 0, 2, 2, 2]


@pytest.mark.long
def test_compiled_models_take_any_number_of_frames() -> None:
    encoders = Encoders(PRESETS["demo"], "cpu")
    pixels = np.concatenate([frames(64, 80)] * 3)
    expected = encoders.embed(pixels)
    encoders.compile()
    for count in (6, 5, 2, 1):
        for found, vectors in zip(encoders.embed(pixels[:count]), expected, strict=True):
            a, b = (torch.from_numpy(v[:count]).float() for v in (found, vectors))
            assert torch.nn.functional.cosine_similarity(a, b).min() >= 0.999


# ── what cannot be loaded ────────────────────────────────────────────────────────────────────────


def refusal(load: type[DinoEncoder] | type[ClipEncoder], name: str) -> str:
    with pytest.raises(UserError) as refused:
        load(name, "cpu")
    message = str(refused.value)
    assert name in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("load", "name", "hint"),
    [
        (DinoEncoder, "facebook/dinov3-vitb16-pretrain-lvd1689m", "--dino"),
        (DinoEncoder, "nobody/no-such-model", "--dino"),
        (ClipEncoder, "ViT-B-16:laion2b_s34b_b88k", "--clip"),
        (ClipEncoder, "ViT-B-16:no_such_tag", "--clip"),
        (ClipEncoder, "No-Such-Net:laion2b_s34b_b88k", "--clip"),
        (ClipEncoder, "hf-hub:nobody/no-such-model", "--clip"),
        (ClipEncoder, "ViT-B-16", "laion2b_s34b_b88k"),
        (ClipEncoder, "/no/such/folder", "folder"),
    ],
)
def test_a_model_out_of_reach_is_one_sentence(
    load: type[DinoEncoder] | type[ClipEncoder], name: str, hint: str
) -> None:
    assert hint in refusal(load, name)


@pytest.mark.parametrize("load", [DinoEncoder, ClipEncoder])
def test_a_folder_without_a_model_is_one_sentence(
    load: type[DinoEncoder] | type[ClipEncoder], tmp_path: Path
) -> None:
    assert "cannot be loaded" in refusal(load, str(tmp_path))


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(b"no weights at all")
    assert "cannot be loaded" in refusal(ClipEncoder, f"{ARCHITECTURE}:{path}")


def test_damaged_dino_weights_are_one_sentence(tmp_path: Path) -> None:
    tiny = DINOv3ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    DINOv3ViTModel(tiny).save_pretrained(tmp_path)
    DINOv3ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refusal(DinoEncoder, str(tmp_path))


def test_a_gated_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*args: object, **kwargs: object) -> None:
        response = SimpleNamespace(headers={}, request=None)
        try:
            raise GatedRepoError("Access is restricted.", response=response)
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo.\nAsk for access.") from error

    monkeypatch.setattr("vsearch.encoders.AutoImageProcessor.from_pretrained", gated)
    message = refusal(DinoEncoder, "facebook/dinov3-vitb16-pretrain-lvd1689m")
    assert "licence" in message and "HF_TOKEN" in message
