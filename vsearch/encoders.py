"""The two encoders: DINO through transformers, CLIP through open_clip, by name or from a folder.

Frames come in as uint8 (n, height, width, 3) RGB; each model's official preprocessing runs on the
model's device: the processor that transformers loads for DINO, the transforms that open_clip builds
for CLIP. Images are encoded in bfloat16 where the device computes in it, sentences on a CPU in float32.
"""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable
from copy import copy
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.transformer import TextTransformer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging as transformers_logging

from vsearch.config import Encoder, EncoderNames, UserError, local_folder
from vsearch.packed import packed
from vsearch.placement import CPU_BATCH, gpu_batch

Pixels = NDArray[np.uint8]

COMPILE_AFTER = {"cuda": 200_000}
"""So many frames a GPU embeds before its models are compiled: about as long as compiling takes, so that a
small archive does not wait for it, and none takes twice as long as with the better choice."""


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def image_dtype(device: str) -> torch.dtype:
    """In which images are encoded: bfloat16 where the device itself computes in it, else float32."""
    kind = device.partition(":")[0]
    has_bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if kind == "cuda"
        else kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    )
    return torch.bfloat16 if has_bf16 else torch.float32


def _default_batch(device: str) -> int:
    if not device.startswith("cuda"):
        return CPU_BATCH
    return gpu_batch(torch.cuda.get_device_properties(device).total_memory)


class DinoEncoder:
    """The CLS token of the last layer, float (n, dim), not normalised."""

    def __init__(
        self, name: str, device: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._device = device or default_device()
        self._dtype = dtype or image_dtype(self._device)
        source = str(local_folder(name) or name)
        try:
            self._processor = AutoImageProcessor.from_pretrained(source)
            model = AutoModel.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(_why_not_loaded("dino", name, error)) from error
        self.record = Encoder(name, weights_digest(model), _dino_dim(model))
        self.input_px = _short_side(self._processor)
        self._model = _cast(model, self._dtype).to(self._device).eval()

    @classmethod
    def recorded(cls, record: Encoder) -> "DinoEncoder":
        """The encoder of a corpus. Raises `UserError` if its weights are not those recorded."""
        return _as_recorded(cls(record.model), record)

    @torch.inference_mode()
    def encode_images(self, pixels: Pixels | Tensor) -> Tensor:
        return self.encode_prepared(self.prepare(pixels))

    @torch.inference_mode()
    def prepare(self, pixels: Pixels | Tensor) -> Tensor:
        """What the model takes, (n, 3, height, width) on its device."""
        frames = torch.as_tensor(pixels, device=self._device).permute(0, 3, 1, 2)
        inputs = self._processor(images=frames, return_tensors="pt", device=self._device)
        return inputs["pixel_values"].to(self._dtype)

    @torch.inference_mode()
    def encode_prepared(self, images: Tensor) -> Tensor:
        hidden = self._model(pixel_values=_of_any_number(images)).last_hidden_state
        return hidden[:, 0].float()

    def compile(self, mode: str = "default") -> None:
        self._model.compile(mode=mode)


class ClipEncoder:
    """CLIP's image and text towers; unit vectors, float (n, dim), in one space."""

    def __init__(
        self, name: str, device: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._device = device or default_device()
        self._dtype = dtype or image_dtype(self._device)
        self._model, preprocess, self._tokenizer = _load_clip(name)
        # The same geometry and normalisation as open_clip's transform, without its detour by PIL.
        steps = [t for t in preprocess.transforms if type(t).__name__ not in _PIL_STEPS]
        self._geometry, self._normalise = steps[:-1], steps[-1]
        size = open_clip.get_model_preprocess_cfg(self._model)["size"]
        self.input_px = min(size) if isinstance(size, (tuple, list)) else int(size)
        self.record = Encoder(name, weights_digest(self._model), _clip_dim(self._model))
        _cast(self._model.visual, self._dtype)
        self._model = self._model.to(self._device).eval()
        self._text_features = _text_features(self._model)

    @classmethod
    def recorded(cls, record: Encoder) -> "ClipEncoder":
        """The encoder of a corpus. Raises `UserError` if its weights are not those recorded."""
        return _as_recorded(cls(record.model), record)

    @torch.inference_mode()
    def encode_images(self, pixels: Pixels | Tensor) -> Tensor:
        return self.encode_prepared(self.prepare(pixels))

    @torch.inference_mode()
    def prepare(self, pixels: Pixels | Tensor) -> Tensor:
        """What the model takes, (n, 3, height, width) on its device."""
        frames = torch.as_tensor(pixels, device=self._device).permute(0, 3, 1, 2)
        for step in self._geometry:
            frames = step(frames)
        return self._normalise(frames.float() / 255).to(self._dtype)

    @torch.inference_mode()
    def encode_prepared(self, images: Tensor) -> Tensor:
        features = self._model.encode_image(_of_any_number(images))
        return nn.functional.normalize(features.float(), dim=-1)

    def compile(self, mode: str = "default") -> None:
        self._model.visual.compile(mode=mode)

    @torch.inference_mode()
    def encode_text(self, sentences: list[str]) -> NDArray[np.float32]:
        """Unit vectors, float32 (n, dim)."""
        tokens = self._tokenizer(sentences).to(self._device)
        with _mixed_precision(self._device):
            features = self._text_features(tokens)
        vectors: NDArray[np.float32] = (
            nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
        )
        return vectors


class Encoders:
    """Both image encoders on one device, as the ingest actor holds them. They take `batch` frames at once,
    by default as many as suit the device; fewer when these turn out to be too many for its memory.
    """

    def __init__(
        self,
        names: EncoderNames,
        device: str | None = None,
        batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        device = device or default_device()
        self.dino = DinoEncoder(names.dino, device, dtype)
        self.clip = ClipEncoder(names.clip, device, dtype)
        self.batch = batch or _default_batch(device)
        self.input_px = max(self.dino.input_px, self.clip.input_px)
        self.link = Link(device)
        self._before_compiling = COMPILE_AFTER.get(device.partition(":")[0], math.inf)

    def embed(
        self, pixels: Pixels, with_clip: bool = True
    ) -> tuple[NDArray[np.float16], NDArray[np.float16] | None]:
        """(dino, clip), each float16 (n, dim), of uint8 frames (n, height, width, 3); clip is None
        when it is not wanted. While the device is at work on a batch, the next is brought to it.
        """
        encoders = (self.dino, self.clip) if with_clip else (self.dino,)
        found = [np.empty((len(pixels), e.record.dim), np.float16) for e in encoders]
        start, under_way = 0, deque[tuple[slice, Vectors]]()
        while start < len(pixels):
            batch = slice(start, start + self.batch)
            try:
                frames = self.link.bring(pixels[batch])
                vectors = self.link.fetch([e.encode_images(frames) for e in encoders])
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
                torch.cuda.empty_cache()
                continue
            start = batch.stop
            under_way.append((batch, vectors))
            if len(under_way) > 1:
                _take(*under_way.popleft(), found)
        for batch, vectors in under_way:
            _take(batch, vectors, found)
        self._before_compiling -= len(pixels)
        if self._before_compiling <= 0:
            self.compile()
        return found[0], found[1] if with_clip else None

    def compile(self, mode: str = "default") -> None:
        """Has the models compiled, for any number of frames, when they are next used; where that fails
        (without a C compiler, say) they work as before.
        """
        self._before_compiling = math.inf
        torch._dynamo.config.suppress_errors = True
        self.dino.compile(mode)
        self.clip.compile(mode)


Vectors = Callable[[], list[NDArray[np.float16]]]
"""Waits for vectors that were under way."""


class Link:
    """Brings frames to a device and fetches vectors from it, without waiting for what it computes."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def bring(self, pixels: Pixels) -> Tensor:
        """Frames on the device, for its current stream."""
        # Pinned memory, which the GPU reads by itself; PyTorch keeps it until that is done.
        pinned = self._copying is not None
        staged = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=pinned)
        staged.numpy()[:] = pixels
        if self._copying is None:
            return staged
        with torch.cuda.stream(self._copying):
            frames = staged.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copying)
        frames.record_stream(computing)
        return frames

    def fetch(self, vectors: list[Tensor]) -> Vectors:
        halves = [v.half().to("cpu", non_blocking=True) for v in vectors]
        if self._copying is None:
            return lambda: [half.numpy() for half in halves]
        arrived = torch.cuda.current_stream(self._device).record_event()

        def wait() -> list[NDArray[np.float16]]:
            arrived.synchronize()
            return [half.numpy() for half in halves]

        return wait


def _take(batch: slice, vectors: Vectors, found: list[NDArray[np.float16]]) -> None:
    for whole, part in zip(found, vectors(), strict=True):
        whole[batch] = part


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With its weights in `dtype`; what it computed itself, as rotary frequencies, stays exact."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _of_any_number(images: Tensor) -> Tensor:
    """What a compiled model is called with, so that it is compiled once for batches of all lengths."""
    torch._dynamo.maybe_mark_dynamic(images, 0)
    return images


E = TypeVar("E", DinoEncoder, ClipEncoder)


def _as_recorded(encoder: E, record: Encoder) -> E:
    if encoder.record != record:
        raise UserError(
            f"The weights of {record.model} ({encoder.record.revision}) are not those that the "
            f"corpus was made with ({record.revision})."
        )
    return encoder


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 of a model's weights: its revision, wherever from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


_PIL_STEPS = {"function", "ToTensor", "MaybeToTensor"}


def _load_clip(name: str) -> tuple[Any, Any, Any]:
    folder = local_folder(name)
    architecture, _, pretrained = name.partition(":")
    try:
        if folder is not None:
            source = f"local-dir:{folder}"
            model, preprocess = open_clip.create_model_from_pretrained(source)
            return model, preprocess, open_clip.get_tokenizer(source)
        if name.startswith("hf-hub:"):
            model, preprocess = open_clip.create_model_from_pretrained(name)
            return model, preprocess, open_clip.get_tokenizer(name)
        if not pretrained:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            raise UserError(
                f"The CLIP model {name!r} names no weights: write {architecture}:PRETRAINED "
                f"(known for it: {tags}), or a folder."
            )
        model, preprocess = open_clip.create_model_from_pretrained(architecture, pretrained)
        return model, preprocess, open_clip.get_tokenizer(architecture)
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise UserError(_why_not_loaded("clip", name, error)) from error


def _why_not_loaded(role: str, name: str, error: Exception) -> str:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    reason = str(error)[:200].partition("\n")[0].rstrip(".") or type(error).__name__
    if any(type(link).__name__ == "GatedRepoError" for link in chain):
        return (
            f"The {role.upper()} model {name!r} is behind a licence: accept it on the model's page "
            f"and set HF_TOKEN, or choose an open model (--models open, or --{role} NAME)."
        )
    if local_folder(name) or Path(name.partition(":")[2]).is_file():
        return f"The {role.upper()} model in {name!r} cannot be loaded: {reason}."
    return (
        f"The {role.upper()} model {name!r} cannot be loaded ({reason}): check "
        f"its name and the network, accept its licence and set HF_TOKEN if it is gated, or name "
        f"another with --{role} (a local folder works offline)."
    )


def _short_side(processor: Any) -> int:
    size = dict(processor.size)
    return int(size.get("shortest_edge") or min(size["height"], size["width"]))


def _dino_dim(model: nn.Module) -> int:
    config: Any = model.config
    width = getattr(config, "hidden_size", None) or getattr(config, "num_features", None)
    return int(width or config.hidden_sizes[-1])


def _clip_dim(model: Any) -> int:
    return int(model.encode_text(torch.zeros(1, model.context_length, dtype=torch.long)).shape[-1])


def _text_features(model: Any) -> Callable[[Tensor], Tensor]:
    """The function from tokens (n, context) to what `model.encode_text` gives, not normalised. Where no
    token sees a later one, and a sentence's vector is that of its end, it computes no further than
    the end of the longest sentence. SigLIP, CoCa and towers of transformers need all of the context.
    """
    if type(model) is open_clip.CLIP:
        tower, pool, eos_id = model, model.text_pool_type, model.text_eos_id
        compute = open_clip.CLIP.encode_text
    elif type(model) is open_clip.CustomTextCLIP and type(model.text) is TextTransformer:
        tower, pool, eos_id = model.text, model.text.pool_type, model.text.eos_id
        compute = TextTransformer.forward
    else:
        return model.encode_text
    if not _is_causal(tower) or pool not in ("argmax", "eos"):
        return model.encode_text
    layers = cache(
        partial(packed, tower.transformer)
    )  # made for the first sentence: images need none

    def features(tokens: Tensor) -> Tensor:
        ends = (tokens == eos_id).int().argmax(-1) if pool == "eos" else tokens.argmax(-1)
        length = int(ends.max()) + 1
        # A copy that shares the weights: other threads use the tower itself meanwhile.
        short = copy(tower)
        places, mask = tower.positional_embedding[:length], tower.attn_mask[:length, :length]
        short._parameters = tower._parameters | {"positional_embedding": places}
        short._buffers = tower._buffers | {"attn_mask": mask}
        short._modules = tower._modules | {"transformer": layers()}
        return compute(short, tokens[:, :length])

    return features


def _is_causal(tower: Any) -> bool:
    mask = tower.attn_mask
    if mask is None or getattr(tower, "cls_emb", None) is not None:  # that one sees every token
        return False
    return torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))


def _mixed_precision(device: str) -> torch.autocast:
    kind = device.partition(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")


transformers_logging.disable_progress_bar()
for _chatty in ("open_clip", "huggingface_hub"):  # what matters of it is in the error we raise
    logging.getLogger(_chatty).setLevel(logging.CRITICAL)
