"""The real architectures at full size, with random weights in their true formats, from a clip to an
answer. What they answer means nothing; that they load, embed, train, index and answer does."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

import vsearch
from vsearch.build_index import build_index
from vsearch.config import EncoderNames, TrainConfig
from vsearch.corpus import Corpus, vector_matrix
from vsearch.encoders import Encoders
from vsearch.ingest import ingest
from vsearch.train import train
from vsearch.video import decode, probe

pytestmark = pytest.mark.long


def save_random_models(folder: Path) -> EncoderNames:
    """DINOv3 ViT-B/16 as a transformers folder, CLIP ViT-B/16 as an open_clip checkpoint."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = DINOv3ViTConfig(num_hidden_layers=12, num_register_tokens=4, **sizes)
    DINOv3ViTModel(config).save_pretrained(folder / "dino")
    DINOv3ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder / "dino")
    torch.save(open_clip.create_model("ViT-B-16").state_dict(), folder / "clip.pt")
    return EncoderNames(str(folder / "dino"), f"ViT-B-16:{folder / 'clip.pt'}")


def test_real_architectures_go_from_a_clip_to_an_answer(shared_videos, tmp_path):
    clip = shared_videos / "media__bbb_176x144_128kbps_15fps_h263.3gp"
    names = save_random_models(tmp_path)
    url = str(tmp_path / "corpus")
    summary = ingest(url, [str(clip)], names, fps=5)
    assert summary.frames == 5

    corpus = Corpus(url)
    table = next(corpus.frames(corpus.files("frames")[0], ["dino", "clip"]))
    with clip.open("rb") as file:
        kept = [span.pixels for span in decode(file, probe(file), 224, corpus.config.sampling)]
    dino, image = Encoders(names, "cpu").embed(np.concatenate(kept))
    for stored, expected in ((table["dino"], dino), (table["clip"], image)):
        a, b = vector_matrix(stored).astype(np.float32), expected.astype(np.float32)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert a.shape[1] in (768, 512) and cosine.min() > 0.999

    assert train(url, TrainConfig(max_epochs=2)).new
    assert build_index(url).rows == 5
    results = vsearch.open(url).search("a rabbit under a tree", limit=1)
    assert Path(results[0].video).name == clip.name
    assert 0 <= results[0].start_s < results[0].end_s <= 1.01
