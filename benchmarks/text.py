"""How long a sentence takes on one thread: computed up to its end, and over the whole context.

Method: CLIP ViT-B/16 with random weights, whose time does not depend on them; each sentence alone, the
two ways in turn, so that other work on the machine meets both; the median of `ROUNDS`. `whole` is
open_clip's own `encode_text`, without the normalisation; both include the tokenizer.

    python benchmarks/text.py
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch

from vsearch.encoders import ClipEncoder

ROUNDS = 50
SENTENCES = {
    "one word": "beach",
    "short": "a red car on the beach",
    "long": "someone in a yellow coat walks past the bakery while it rains, and a tram comes round the "
    "corner behind her, empty but for the driver and a large brown dog",
    "longer than the context": "a dog and a cat and " * 40,
}


def took_ms(compute: Callable[[], object]) -> float:
    began = time.perf_counter()
    compute()
    return (time.perf_counter() - began) * 1000


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "clip.pt"
        torch.save(open_clip.create_model("ViT-B-16").state_dict(), weights)
        encoder = ClipEncoder(f"ViT-B-16:{weights}", "cpu")
        official, _ = open_clip.create_model_from_pretrained("ViT-B-16", str(weights))
    official.eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    for name, sentence in SENTENCES.items():
        tokens = int(tokenizer([sentence]).argmax()) + 1
        ways = {
            "to_the_end_ms": lambda text=sentence: encoder.encode_text([text]),
            "whole_ms": lambda text=sentence: official.encode_text(tokenizer([text])),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, compute in ways.items():
                times[way].append(took_ms(compute))
        medians = {way: round(statistics.median(found), 2) for way, found in times.items()}
        print(json.dumps({"sentence": name, "tokens": tokens, **medians}), flush=True)


if __name__ == "__main__":
    main()
