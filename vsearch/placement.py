"""What runs where, and how much at once: arithmetic on what the nodes of a cluster have, without Ray.

A node may carry the label `vsearch/role` with the value decode, embed or index. Work goes to nodes of
its role first; where they are busy, gone, or there are none, any node that has the resources will do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vsearch.config import UserError

Role = Literal["decode", "embed", "index"]

ROLE = "vsearch/role"
NODE_ID = "ray.io/node-id"
"""The label that Ray gives to every node."""

GIB = 1 << 30
EMBEDDER_MEMORY_BYTES = 3 * GIB
"""What Ray reserves for an embedding actor: two base-size models in fp32 and their activations."""

INDEX_MEMORY_BYTES = 1 * GIB
"""What it reserves for a task of the index, whose large arrays are memory-mapped files."""

CPU_BATCH = 128
LARGEST_BATCH = 256
GPU_RESERVED_BYTES = 4 * GIB
FRAME_BYTES = 32 << 20
"""GPU memory that models and CUDA, and each frame of a batch, may take: an estimate for ViT-B to ViT-H
at 224 pixels. Where it is too low the encoders halve their batch."""


@dataclass(frozen=True)
class Node:
    """A node that is alive, with all that Ray gives out on it; sizes in bytes."""

    id: str
    cpus: int = 0
    gpus: int = 0
    memory: int = 0
    role: str | None = None

    @property
    def works(self) -> bool:
        """Whether tasks belong here: not on a head that was given neither cores nor GPUs."""
        return self.cpus + self.gpus > 0


@dataclass(frozen=True)
class Limits:
    """How much an ingest may take, where that is not to follow from what the cluster has. `gpus`: so many,
    also such as an autoscaler has yet to start; 0 embeds on cores. `decoders`: so many tasks decode at
    once, at most. `batch`: frames that an encoder takes at once.
    """

    gpus: int | None = None
    decoders: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("gpus", 0), ("decoders", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, not {value}.")


def prefer(role: Role, nodes: Sequence[Node]) -> dict[str, Any]:
    """Options of a Ray task, actor or dataset that belongs on nodes of a role."""
    elsewhere = anywhere(nodes)["label_selector"]
    return {
        "label_selector": {ROLE: role} | elsewhere,
        "fallback_strategy": [{"label_selector": elsewhere}],
    }


def anywhere(nodes: Sequence[Node]) -> dict[str, Any]:
    """Options that keep also what asks for no core away from nodes that are not to work."""
    idle = [node.id for node in nodes if not node.works]
    return {"label_selector": {NODE_ID: f"!in({','.join(idle)})"} if idle else {}}


def gpu_batch(memory: int) -> int:
    """How many frames an encoder takes at once on a GPU of so many bytes: a power of two."""
    fit = max(1, (memory - GPU_RESERVED_BYTES) // FRAME_BYTES)
    return min(LARGEST_BATCH, 1 << (fit.bit_length() - 1))


@dataclass(frozen=True)
class IngestPlan:
    """How an ingest is spread. `decoders` tasks of one core can run at once on the nodes that are alive.
    The pool of encoders begins with `encoders` and keeps between one and `most_encoders`;
    each takes `encoder_gpus` (0 or 1), `encoder_cpus` (0 or 1) and `encoder_memory` bytes, and computes
    in `encoder_threads` where it has no GPU.
    """

    decoders: int
    encoders: int
    most_encoders: int
    encoder_gpus: int
    encoder_cpus: int
    encoder_memory: int
    encoder_threads: int


def plan_ingest(nodes: Sequence[Node], limits: Limits) -> IngestPlan:
    """The plan for the nodes that are alive."""
    alive = sum(node.gpus for node in nodes)
    most = alive if limits.gpus is None else limits.gpus
    plan = _encoders_on_gpus(nodes, alive, most) if most else _encoders_on_cores(nodes)
    cores = sum(node.cpus for node in nodes)
    free = max(1, cores - plan.encoder_cpus * min(plan.encoders, alive))
    return replace(plan, decoders=min(free, limits.decoders or free))


def _encoders_on_gpus(nodes: Sequence[Node], alive: int, most: int) -> IngestPlan:
    with_gpus = [node for node in nodes if node.gpus]
    # A core of its own for each, so that decoding does not starve it; but never so many that they could
    # take all cores, and wait for a decoding that gets none.
    roomy = all(node.cpus >= 2 * node.gpus for node in with_gpus)
    fit = (node.memory // (2 * node.gpus) for node in with_gpus)
    return IngestPlan(
        decoders=1,
        encoders=max(1, min(alive, most)),
        most_encoders=most,
        encoder_gpus=1,
        encoder_cpus=int(roomy),
        encoder_memory=min([EMBEDDER_MEMORY_BYTES, *fit]),
        encoder_threads=1,
    )


def _encoders_on_cores(nodes: Sequence[Node]) -> IngestPlan:
    # One a core, where memory allows: with small models several keep the cores busier than the threads of
    # one, which wait for each other. The second half is started when there is a backlog. What waits does
    # not decode, so decoding and embedding share the cores as they need them.
    most = max(1, sum(min(node.cpus, node.memory // EMBEDDER_MEMORY_BYTES) for node in nodes))
    sizes = [node.memory for node in nodes if node.works] or [2 * EMBEDDER_MEMORY_BYTES]
    return IngestPlan(
        decoders=1,
        encoders=max(1, most // 2),
        most_encoders=most,
        encoder_gpus=0,
        # No core is set aside: on what is left when a node goes away, they could take them all.
        encoder_cpus=0,
        encoder_memory=min(EMBEDDER_MEMORY_BYTES, max(sizes) // 2),
        encoder_threads=max(1, sum(node.cpus for node in nodes) // most),
    )


@dataclass(frozen=True)
class IndexPlan:
    """How the build of an index is spread: its tasks use `gpus` GPUs, one each, or none; a task gets
    `memory` bytes. The one that fits the quantizer gets `cpus` cores and up to `most_memory` bytes.
    """

    gpus: int
    cpus: int
    memory: int
    most_memory: int


def plan_index(nodes: Sequence[Node], gpus: int | None = None) -> IndexPlan:
    """The plan for the nodes that are alive: those for the index, where there are some. `gpus` is as in
    `Limits`. Each node that works has the cores and memory that a task asks for, so that whichever are
    left can do them; only fitting the quantizer may need a large one.
    """
    working = [node for node in nodes if node.works and node.cpus]
    own = [node for node in working if node.role == "index"] or working
    return IndexPlan(
        gpus=sum(node.gpus for node in own) if gpus is None else gpus,
        cpus=max(1, min((node.cpus for node in working), default=1)),
        memory=min([INDEX_MEMORY_BYTES, *(node.memory // 2 for node in working)]),
        most_memory=max((node.memory for node in own), default=INDEX_MEMORY_BYTES),
    )


# ── in words ─────────────────────────────────────────────────────────────────────────────────────


def ingest_words(
    nodes: Sequence[Node], plan: IngestPlan, batch: int | None, gpu_memories: Sequence[int] = ()
) -> str:
    """What an ingest runs on; `batch` is what the user asked for, `gpu_memories` the sizes of the GPUs in
    bytes, as far as they are known.
    """
    decoding = f"{_count(nodes)}: {_number(plan.decoders, 'core')} for decoding"
    alive = sum(node.gpus for node in nodes)
    if not plan.encoder_gpus:
        encoding = f"up to {_number(plan.most_encoders, 'encoder')} on the same cores"
        if len(nodes) > 1 and not alive:
            encoding += " (no GPU is up: --gpus N if the cluster can start some)"
        return f"{decoding}, {encoding}, batch {batch or CPU_BATCH}"
    sizes = sorted({round(size / GIB) for size in gpu_memories})
    batches = [batch] if batch else sorted({gpu_batch(size) for size in gpu_memories})
    line = f"{decoding}, {_number(min(alive, plan.most_encoders), 'GPU')}"
    line += f" ({_either(sizes)} GB)" if sizes else ""
    line += " for embedding"
    line += f" (up to {plan.most_encoders})" if plan.most_encoders > alive else ""
    return line + (f", batch {_either(batches)}" if batches else "")


def train_words(nodes: Sequence[Node], workers: int, cpus: int, on_gpus: bool) -> str:
    """What a training runs on."""
    each = "a GPU" if on_gpus else _number(cpus, "core")
    return f"{_count(nodes)}: {_number(workers, 'worker')} with {each}" + (
        " each" if workers > 1 else ""
    )


def index_words(nodes: Sequence[Node], plan: IndexPlan) -> str:
    """What the build of an index runs on."""
    own = [node for node in nodes if node.role == "index"]
    cores = sum(node.cpus for node in own or nodes)
    where = f" of {_number(len(own), 'index node')}" if own else ""
    gpus = f", {_number(plan.gpus, 'GPU')}" if plan.gpus else ""
    return f"{_count(nodes)}: {_number(cores, 'core')}{where}{gpus} for the index"


def _count(nodes: Sequence[Node]) -> str:
    return _number(sum(node.works for node in nodes), "node")


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _either(values: Sequence[int]) -> str:
    return "/".join(map(str, values))
