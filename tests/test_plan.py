"""The plan of an ingest, against what PyAV counts, what the corpus writes, and arithmetic by hand."""

import json
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vsearch import laws
from vsearch.cli import app
from vsearch.config import PRESETS, CorpusConfig, Encoder, EncoderNames, UserError
from vsearch.corpus import Corpus
from vsearch.plan import Machines, Plan, Prices, Stratum, estimate, plan
from vsearch.schema import SpanRecord, frames_schema
from vsearch.sources import Listed

L4S = Machines(gpus=2, gpu_type="l4", cores=8)


def make_clip(path: Path, codec: str, width: int, height: int, fps: int, frames: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            picture = rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8)
            picture = picture.repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


CLIPS = [
    ("a.mp4", "libx264", 160, 96, 10, 30),
    ("deep/b.mkv", "libx264", 320, 160, 25, 100),
    ("deep/c.avi", "mpeg4", 160, 80, 20, 50),
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for name, *clip in CLIPS:
        make_clip(folder / name, *clip)
    (folder / "broken.mp4").write_bytes(b"no video at all" * 100)
    (folder / "notes.txt").write_text("no video either")
    return folder


def counted(folder: Path) -> list[dict[str, Any]]:
    """What PyAV tells of each video when all of it is decoded."""
    found = []
    for path in sorted(folder.rglob("*.[ma][pkv][4vi]")):
        if path.name != "broken.mp4":
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                frames = sum(1 for _ in container.decode(stream))
                fps = float(stream.average_rate)
                size = stream.width * stream.height / 1e6
                codec = stream.codec_context.name
            found.append({"frames": frames, "s": frames / fps, "mp": size, "codec": codec})
    return found


def exact(made: Plan, name: str) -> float:
    figure = made.total(name)
    assert figure.low == pytest.approx(figure.value) == figure.high
    return figure.value


def test_all_figures_of_a_few_clips_are_what_counting_them_gives(archive: Path) -> None:
    clips = counted(archive)
    assert len(clips) == len(CLIPS)
    prices = Prices(gpu_hour=3.0, core_hour=0.5, gb_month=0.02)
    made = plan([str(archive)], L4S, prices=prices)
    files = [p for p in archive.rglob("*.*") if p.suffix != ".txt" and p.is_file()]
    assert (made.files, made.sampled, made.failed, made.unknown) == (4, 4, 1, 0)
    assert exact(made, "read_bytes") == sum(path.stat().st_size for path in files)
    assert exact(made, "hours") == pytest.approx(sum(clip["s"] for clip in clips) / 3600)
    frames = sum(clip["frames"] for clip in clips)
    assert exact(made, "frames") == pytest.approx(frames)
    # Spans are whole seconds long, of 20 s and about 512 frames at most: one for each of these.
    assert exact(made, "spans") == len(clips)
    decode_s = sum(
        clip["frames"]
        * (
            clip["mp"] * (laws.DECODE_S_PER_MP[clip["codec"]].value + laws.KEEP_S_PER_MP.value)
            + laws.KEEP_S_PER_FRAME.value
        )
        for clip in clips
    )
    assert exact(made, "decode_core_h") == pytest.approx(decode_s / 3600)
    gflop = sum(laws.ENCODERS[name].gflop for name in (PRESETS["base"].dino, PRESETS["base"].clip))
    embed_s = frames * gflop / (121e3 * laws.GPU_UTILISATION.value)
    assert exact(made, "gpu_h") == pytest.approx(embed_s / 3600)
    wall_h = max(decode_s / 8, embed_s / 2) / 3600
    assert made.bottleneck == ("decoding" if decode_s / 8 > embed_s / 2 else "embedding")
    assert exact(made, "days") == pytest.approx(wall_h / 24)
    assert exact(made, "cores_per_gpu") == pytest.approx(decode_s / embed_s)
    assert exact(made, "cost") == pytest.approx(wall_h * (2 * 3.0 + 8 * 0.5))
    stored = frames * 2 * (768 + 512) * laws.FRAME_BYTES_PER_VECTOR_BYTE.value
    assert exact(made, "frames_bytes") == pytest.approx(stored)
    rows = frames / laws.FRAMES_PER_ROW.value
    assert exact(made, "rows") == pytest.approx(rows)
    index = rows * (2 * 512 + 12)  # so few rows are not coded
    assert exact(made, "index_bytes") == pytest.approx(index)
    assert exact(made, "cost_month") == pytest.approx((stored + index) / 1e9 * 0.02)


def test_fewer_frames_a_second_are_fewer_frames_to_embed_but_not_to_decode(archive: Path) -> None:
    every, few = plan([str(archive)], L4S), plan([str(archive)], L4S, fps=2)
    seconds = sum(clip["s"] for clip in counted(archive))
    assert exact(few, "frames") == pytest.approx(2 * seconds)
    for name in ("gpu_h", "frames_bytes", "rows"):
        share = few.total("frames").value / every.total("frames").value
        assert exact(few, name) == pytest.approx(every.total(name).value * share)
    saved_h = every.total("decode_core_h").value - few.total("decode_core_h").value
    assert 0 < saved_h < every.total("decode_core_h").value
    assert few.total("read_bytes") == every.total("read_bytes")


def test_pairs_save_the_clip_model_and_its_vectors(archive: Path) -> None:
    every, tenth = plan([str(archive)], L4S), plan([str(archive)], L4S, pairs=0.1)
    dino, clip = (laws.ENCODERS[n].gflop for n in (PRESETS["base"].dino, PRESETS["base"].clip))
    gpu_h = every.total("gpu_h").value * (dino + 0.1 * clip) / (dino + clip)
    assert exact(tenth, "gpu_h") == pytest.approx(gpu_h)
    stored = every.total("frames_bytes").value * (768 + 51.2) / (768 + 512)
    assert exact(tenth, "frames_bytes") == pytest.approx(stored)


def test_without_gpus_the_same_cores_decode_and_embed(archive: Path) -> None:
    made = plan([str(archive)], Machines(cores=4))
    hours = made.total("decode_core_h").value + made.total("embed_core_h").value
    assert exact(made, "days") == pytest.approx(hours / 4 / 24)
    assert made.bottleneck == "embedding" and made.total("embed_core_h").basis == "measured"
    with pytest.raises(KeyError):
        made.total("cost")


@pytest.mark.parametrize(
    ("machines", "bottleneck"),
    [(Machines(1, "h100", 1), "decoding"), (Machines(1, "a10g", 10_000), "embedding")],
)
def test_the_bottleneck_is_what_is_short(
    archive: Path, machines: Machines, bottleneck: str
) -> None:
    made = plan([str(archive)], machines)
    assert made.bottleneck == bottleneck
    assert (
        made.total("gpu_h").basis == "derived" and made.total("decode_core_h").basis == "measured"
    )
    assert made.total("days").basis == ("derived" if bottleneck == "embedding" else "measured")


# ── the sample ───────────────────────────────────────────────────────────────────────────────────


def row_of(entry: Listed, seconds: float) -> dict[str, Any]:
    return {
        "status": "ok", "duration_s": seconds, "fps": 25.0, "width": 1920, "height": 1080,
        "codec": "h264", "expected_spans": math.ceil(seconds / 20),
    }  # fmt: skip


def sparse(folder: Path, sizes: list[int]) -> None:
    """Files that hold nothing and claim to be so large."""
    for number, size in enumerate(sizes):
        with (folder / f"{number:04d}.mp4").open("wb") as file:
            file.truncate(size)


def test_a_sample_of_a_large_archive_finds_its_hours(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    sizes = np.exp(rng.normal(17, 1.5, 2000)).astype(int) + 1
    seconds = sizes / rng.uniform(3e5, 9e5, len(sizes))
    sparse(tmp_path, sizes.tolist())
    asked: list[str] = []

    def look(entry: Listed) -> dict[str, Any]:
        asked.append(entry.uri)
        return row_of(entry, seconds[int(Path(entry.uri).stem)])

    made = plan([str(tmp_path)], sample=100, look=look)
    assert made.files == 2000 and made.sampled == len(asked) == len(set(asked)) < 130
    hours = made.total("hours")
    assert hours.low < seconds.sum() / 3600 < hours.high
    assert (hours.high - hours.low) / hours.value < 0.3
    assert made.total("read_bytes").value == sizes.sum()
    again = plan([str(tmp_path)], sample=100, look=look)
    assert again == made  # the same listing, the same sample


@pytest.mark.parametrize("noise", [0.2, 0.8])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(noise: float) -> None:
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(300):
        strata, truth = [], 0.0
        for scale in (1e6, 1e8):
            sizes = rng.uniform(scale, 4 * scale, 400)
            seconds = sizes / 5e5 * rng.uniform(1 - noise, 1 + noise, len(sizes))
            truth += float(seconds.sum()) / 3600
            picked = rng.choice(len(sizes), 30, replace=False)
            looks = [(int(sizes[i]), {"duration_s": seconds[i]}) for i in picked]
            strata.append(Stratum(len(sizes), int(sizes.sum()), [], looks))
        found = estimate(strata, lambda row: row["duration_s"] / 3600)
        held += found.low <= truth <= found.high
    assert 0.90 <= held / 300 <= 0.99


sizes = st.lists(st.integers(1, 10**10), min_size=2, max_size=20)


@settings(max_examples=100)
@given(sizes, st.floats(1e-9, 1e3), st.integers(2, 20))
def test_what_is_as_the_bytes_are_is_exact_from_any_sample(
    found: list[int], ratio: float, seen: int
) -> None:
    looks = [(size, {"y": ratio * size}) for size in found[:seen]]
    total = estimate([Stratum(len(found), sum(found), [], looks)], lambda row: row["y"])
    assert total.value == pytest.approx(ratio * sum(found))
    assert total.high - total.low <= 1e-6 * total.value


@settings(max_examples=100)
@given(sizes, st.data())
def test_a_stratum_that_was_seen_whole_is_exact(found: list[int], data: st.DataObject) -> None:
    values = [data.draw(st.floats(0, 1e6)) for _ in found]
    rows = [{"y": value} if value else None for value in values]
    whole = Stratum(len(found), sum(found), [], list(zip(found, rows, strict=True)))
    total = estimate([whole], lambda row: row["y"])
    assert total.value == total.low == total.high == pytest.approx(sum(values))


def test_one_look_into_many_files_is_no_certainty() -> None:
    one = estimate([Stratum(1000, 1000, [], [(1, {"y": 2.0})])], lambda row: row["y"])
    assert one.value == 2000 and one.low < 1000 and one.high > 3000


def test_a_sample_that_does_not_tell_its_length_is_told(tmp_path: Path) -> None:
    sparse(tmp_path, [1000] * 10)

    def look(entry: Listed) -> dict[str, Any]:
        number = int(Path(entry.uri).stem)
        return row_of(entry, 36.0) | ({"duration_s": None} if number < 4 else {})

    made = plan([str(tmp_path)], look=look)
    assert made.unknown == 4 and made.total("hours").value == pytest.approx(0.1)
    with pytest.raises(UserError, match="None of the files"):
        plan([str(tmp_path)], look=lambda entry: {"status": "unreadable"})


# ── the laws ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name", ["facebook/dinov2-base", "facebook/dinov3-vitb16-pretrain-lvd1689m"]
)
def test_flops_of_dino_are_those_that_torch_counts(name: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel, Dinov2Config, DINOv3ViTConfig

    if "dinov2" in name:
        config = Dinov2Config(image_size=224, patch_size=14)
    else:
        config = DINOv3ViTConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_register_tokens=4
        )
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    assert laws.ENCODERS[name].gflop == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)


def test_flops_of_clip_are_those_that_torch_counts() -> None:
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = open_clip.create_model("ViT-B-16").train().visual  # fused layers would not be counted
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    law = laws.ENCODERS["ViT-B-16:laion2b_s34b_b88k"]
    assert law.gflop == pytest.approx(counter.get_total_flops() / 1e9, rel=0.05)
    assert law.dim == model.output_dim


def test_a_frame_is_as_large_as_the_corpus_writes_it(tmp_path: Path) -> None:
    frames, dims = 4096, (768, 512)
    rng = np.random.default_rng(0)
    vectors = []
    for dim in dims:
        found = rng.standard_normal((frames, dim))
        found = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)
        vectors.append(pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), dim))
    columns = [
        pa.array(["v" * 32] * frames),
        pa.array(["s" * 16] * frames),
        pa.array([0] * frames, pa.int32()),
        pa.array(range(frames), pa.int32()),
        pa.array([n / 25 for n in range(frames)]),
        *vectors,
    ]
    corpus = Corpus(str(tmp_path))
    corpus.require(CorpusConfig(Encoder("", "", dims[0]), Encoder("", "", dims[1]), 224))
    record = SpanRecord("v" * 32, "s" * 16, 0, frames, 1.0, True)
    name = corpus.add_frames(pa.table(columns, schema=frames_schema(*dims)), [record])
    size = Path(corpus.path(name)).stat().st_size / frames
    law = 2 * sum(dims) * laws.FRAME_BYTES_PER_VECTOR_BYTE.value
    assert law == pytest.approx(size, rel=0.02)


def test_a_law_says_what_it_rests_on() -> None:
    found = [value for value in vars(laws).values() if isinstance(value, laws.Law)]
    found += [*laws.DECODE_S_PER_MP.values(), *laws.GPU_TFLOPS.values()]
    assert len(found) > 20
    assert all(law.value > 0 and law.unit and law.source for law in found)
    assert {law.basis for law in found} == {"measured", "counted", "derived"}
    dearest = max(law.value for law in laws.DECODE_S_PER_MP.values())
    assert laws.DECODE_S_PER_MP[laws.OTHER_CODEC].value == dearest


# ── mistakes, and the command ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Machines(gpus=1), "--gpu-type"),
        (lambda: Machines(gpus=1, gpu_type="tpu"), "'tpu'"),
        (lambda: Machines(gpus=-1), "negative"),
        (lambda: Machines(cores=0), "at least one core"),
        (lambda: Prices(core_hour=-1.0), "negative"),
        (lambda: plan(["."], names=EncoderNames("my/dino", "my:clip")), "my/dino"),
        (lambda: plan(["/nowhere/at/all"]), "nothing at"),
    ],
)
def test_a_mistake_is_one_sentence(make: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make()


def test_the_command_says_the_same(archive: Path) -> None:
    arguments = ["plan", str(archive), "--gpus", "2", "--gpu-type", "l4", "--cores", "8"]
    arguments += ["--price-gpu-hour", "3"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    made = plan([str(archive)], L4S, prices=Prices(gpu_hour=3.0))
    found = json.loads(done.stdout)
    assert found["bottleneck"] == made.bottleneck
    assert {f["name"]: f["value"] for f in found["figures"]} == {
        f.name: f.value for f in made.figures
    }
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"}).stdout
    assert (
        "measured" in shown and "derived" in shown and f"bottleneck is {made.bottleneck}" in shown
    )
