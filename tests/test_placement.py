"""What runs where: properties of the plans for any cluster, also for what is left of it."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsearch.config import UserError
from vsearch.placement import (
    FRAME_BYTES,
    GIB,
    GPU_RESERVED_BYTES,
    IngestPlan,
    Limits,
    Node,
    anywhere,
    gpu_batch,
    index_words,
    ingest_words,
    plan_index,
    plan_ingest,
    prefer,
    train_words,
)

HEAD = Node("head", memory=2 * GIB)
MACHINES = st.builds(
    Node,
    st.uuids().map(str),
    cpus=st.integers(0, 96),
    gpus=st.sampled_from([0, 0, 0, 1, 2, 8]),
    memory=st.integers(GIB // 2, 512 * GIB),
    role=st.sampled_from([None, None, "decode", "embed", "index"]),
)
CLUSTERS = st.lists(MACHINES, max_size=6)
LIMITS = st.builds(
    Limits,
    gpus=st.none() | st.integers(0, 20),
    decoders=st.none() | st.integers(1, 200),
    batch=st.none() | st.integers(1, 512),
)


def placed(nodes: Sequence[Node], plan: IngestPlan) -> tuple[int, list[int]]:
    """How many encoders of the pool find room on nodes, and the cores that these have left."""
    count, cores = 0, []
    for node in nodes:
        room = plan.most_encoders - count
        if plan.encoder_gpus:
            room = min(room, node.gpus)
        if plan.encoder_cpus:
            room = min(room, node.cpus // plan.encoder_cpus)
        if plan.encoder_memory:
            room = min(room, node.memory // plan.encoder_memory)
        count += room if node.works else 0
        cores.append(node.cpus - plan.encoder_cpus * (room if node.works else 0))
    return count, cores


@given(CLUSTERS, LIMITS)
def test_all_encoders_find_room_and_decoding_gets_the_other_cores(
    nodes: list[Node], limits: Limits
) -> None:
    plan = plan_ingest(nodes, limits)
    assert 1 <= plan.encoders <= plan.most_encoders
    count, cores = placed(nodes, plan)
    if plan.encoder_gpus:
        alive = sum(node.gpus for node in nodes)
        assert plan.most_encoders == (alive if limits.gpus is None else limits.gpus)
        assert count == min(alive, plan.most_encoders)
    elif any(node.works for node in nodes):
        assert count >= plan.encoders
    assert 1 <= plan.decoders <= max(1, sum(cores))
    assert plan.decoders == min(max(1, sum(cores)), limits.decoders or 1 << 30)


@given(CLUSTERS, LIMITS, st.randoms())
def test_whatever_nodes_are_left_a_core_is_left_for_decoding(
    nodes: list[Node], limits: Limits, random: object
) -> None:
    plan = plan_ingest(nodes, limits)
    left = [node for node in nodes if random.random() < 0.5]  # type: ignore[attr-defined]
    _, cores = placed(left, plan)
    assert all(core > 0 for core, node in zip(cores, left, strict=True) if node.cpus)


@given(CLUSTERS)
def test_without_gpus_or_with_none_allowed_it_embeds_on_cores(nodes: list[Node]) -> None:
    plan = plan_ingest(nodes, Limits(gpus=0))
    assert (plan.encoder_gpus, plan.encoder_cpus) == (0, 0)
    without = [Node(n.id, n.cpus, 0, n.memory, n.role) for n in nodes if n.cpus or not n.gpus]
    if without == nodes:
        assert plan_ingest(nodes, Limits()) == plan


def test_gpus_that_are_yet_to_come_make_it_a_plan_for_gpus() -> None:
    workers = [HEAD, Node("a", cpus=16, memory=32 * GIB)]
    plan = plan_ingest(workers, Limits(gpus=4))
    assert (plan.encoder_gpus, plan.encoder_cpus, plan.encoders, plan.most_encoders) == (1, 1, 1, 4)
    assert plan.decoders == 16
    assert "0 GPUs for embedding (up to 4)" in ingest_words(workers, plan, None)
    assert "--gpus" in ingest_words(workers, plan_ingest(workers, Limits()), None)


def test_where_nothing_is_up_yet_an_encoder_asks_for_what_it_needs() -> None:
    for limits in (Limits(), Limits(gpus=2)):
        plan = plan_ingest([HEAD], limits)
        assert (plan.decoders, plan.encoders, plan.encoder_memory) == (1, 1, 3 * GIB)
    assert plan_index([HEAD]).memory == GIB


@given(MACHINES.filter(lambda node: node.cpus and not node.gpus))
def test_on_one_machine_each_core_gets_an_encoder_or_a_thread_of_one(node: Node) -> None:
    plan = plan_ingest([node], Limits())
    assert plan.most_encoders == max(1, min(node.cpus, node.memory // (3 * GIB)))
    assert plan.most_encoders * plan.encoder_threads <= node.cpus
    assert node.cpus < plan.most_encoders * (plan.encoder_threads + 1)
    assert plan.encoder_memory == min(3 * GIB, node.memory // 2)
    assert plan.decoders == node.cpus


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_a_batch_is_a_power_of_two_that_fits(memory: int, other: int) -> None:
    batch = gpu_batch(memory)
    assert batch.bit_count() == 1 and 1 <= batch <= 256
    assert batch == 1 or GPU_RESERVED_BYTES + batch * FRAME_BYTES <= memory
    assert (gpu_batch(other) - batch) * (other - memory) >= 0
    assert gpu_batch(80 * GIB) == 256


@given(CLUSTERS.filter(lambda nodes: any(node.cpus for node in nodes)))
def test_any_node_that_is_left_can_do_the_tasks_of_the_index(nodes: list[Node]) -> None:
    plan = plan_index(nodes)
    for node in nodes:
        if node.cpus:
            assert node.cpus >= plan.cpus >= 1 and node.memory >= plan.memory
    own = [node for node in nodes if node.role == "index" and node.cpus]
    assert plan.most_memory <= max(node.memory for node in nodes)
    if own:  # those are asked for what they have, not for what others have
        assert plan.gpus == sum(node.gpus for node in own)
        assert plan.most_memory == max(node.memory for node in own)
    assert plan_index(nodes, gpus=0).gpus == 0


def test_work_prefers_its_role_and_stays_away_from_a_head_without_cores() -> None:
    worker = Node("a", cpus=2)
    assert anywhere([worker]) == {"label_selector": {}}
    assert prefer("decode", [worker]) == {
        "label_selector": {"vsearch/role": "decode"},
        "fallback_strategy": [{"label_selector": {}}],
    }
    away = {"ray.io/node-id": "!in(head)"}
    assert prefer("index", [HEAD, worker]) == {
        "label_selector": {"vsearch/role": "index", **away},
        "fallback_strategy": [{"label_selector": away}],
    }


def test_what_a_stage_runs_on_is_one_line() -> None:
    nodes = [
        HEAD,
        Node("a", cpus=24, memory=64 * GIB, role="decode"),
        Node("b", cpus=24, memory=64 * GIB, role="index"),
        Node("c", cpus=4, gpus=2, memory=64 * GIB, role="embed"),
    ]
    known = [81559 << 20] * 2  # as nvidia-smi counts an H100
    plan = plan_ingest(nodes, Limits())
    assert ingest_words(nodes, plan, None, known) == (
        "3 nodes: 50 cores for decoding, 2 GPUs (80 GB) for embedding, batch 256"
    )
    assert ingest_words(nodes, plan, 32, [24 * GIB, 8 * GIB]).endswith(
        "2 GPUs (8/24 GB) for embedding, batch 32"
    )
    one = plan_ingest(nodes, Limits(gpus=1, decoders=10))
    assert ingest_words(nodes, one, None) == ("3 nodes: 10 cores for decoding, 1 GPU for embedding")
    alone = [Node("a", cpus=2, memory=16 * GIB)]
    assert ingest_words(alone, plan_ingest(alone, Limits()), None) == (
        "1 node: 2 cores for decoding, up to 2 encoders on the same cores, batch 128"
    )
    assert train_words(nodes, 2, 1, on_gpus=True) == "3 nodes: 2 workers with a GPU each"
    assert train_words(alone, 1, 2, on_gpus=False) == "1 node: 1 worker with 2 cores"
    assert index_words(nodes, plan_index(nodes)) == (
        "3 nodes: 24 cores of 1 index node for the index"
    )
    assert index_words(alone, plan_index(alone)) == "1 node: 2 cores for the index"


@pytest.mark.parametrize("limit", [{"gpus": -1}, {"decoders": 0}, {"batch": 0}])
def test_a_limit_that_makes_no_sense_is_refused(limit: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(limit))} must be at least"):
        Limits(**limit)
