"""L_T, batches, seconds and files of a plan, from memory and counts that are made up."""

import dataclasses
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from addax_ds.config import RunConfig, build, load_run
from addax_ds.data.partition import partition
from addax_ds.data.tasks import Example
from addax_ds.errors import UserError
from addax_ds.plan import ready
from addax_ds.plan.batches import LAST_TOKEN
from addax_ds.plan.choose import Batch, TooLargeError, choose
from addax_ds.plan.cluster import GPUS, RESERVED, Cluster, bytes_of, flops_of, gpu_of, speed_of
from addax_ds.plan.evaluated import Evaluated
from addax_ds.plan.memory import Curve
from addax_ds.plan.methods import Steps, curves, eval_micro_batch, rows
from addax_ds.plan.padding import padding_of
from addax_ds.plan.parts import PARTS
from addax_ds.plan.rehearsals import RehearsalLostError
from addax_ds.plan.rehearse import Rehearsal
from addax_ds.plan.seconds import CARRIED, COMPUTED, DRAWN, UPDATED, estimate
from addax_ds.shapes import shape_of, sizes_of

GIB = 2**30
EXAMPLE = Example((0,), (0,), ((0,), (1,)), answer=0, references=(), contrasted=True)
RUN = build(RunConfig, {"engine": "fsdp"}, "test")
LENGTHS = [*range(10, 1010, 10)]  # 100 samples


def rehearsed(**moments):
    """A step whose moments hold so many bytes."""
    future = Future()
    future.set_result(Rehearsal({name: {"weights": size} for name, size in moments.items()}, {}, {}, 0.0))
    return future


def growing(batch, between=3 * GIB):
    """Memory in which every first-order token takes 1 MiB, and a mask grows with the square."""

    def takes(length):
        forward = batch.fo_micro_batch * (2**20 * length + 100 * length**2)
        return rehearsed(forward=8 * GIB + forward, between=8 * GIB + between)

    return Curve(takes, 10, 1000)


def cluster(gib, nodes=2):
    return Cluster(nodes, 2, gpu_of("h100", memory=f"{gib}GiB"))


def steps_of(shape, begin, nodes):
    """Steps whose rehearsals `begin` makes up."""
    evaluated = Evaluated((EXAMPLE,), samples=100, new_tokens=0)
    where = {"engine": "fsdp", "ds_config": None, "replicas": 1, "offload": False}
    return Steps(shape, RUN, SimpleNamespace(begin=begin), nodes, where, Batch(), 64, LAST_TOKEN, evaluated)


def test_an_evaluation_that_does_not_fit_takes_fewer_sequences_at_once():
    def begin(config, *layout, evaluated, targets):
        return rehearsed(evaluation=GIB * config.eval_micro_batch)

    for gib, wanted in ((8 + 2, 8), (7.5 + 2, 4), (1 + 2, 1), (0.5 + 2, None)):
        assert eval_micro_batch(steps_of(None, begin, cluster(gib)), 32) == wanted


def smallest(shard, gib, shape, planned=8):
    """What is told of GPUs at least, where a shard takes so many GiB and all else 3; and which were rehearsed on."""

    def begin(_, ranks, *__, **___):
        told.add(ranks)
        future = Future()
        step = dict.fromkeys(PARTS, 0.0) | {"weights": GIB * shard(ranks), "gathered": 3.0 * GIB}
        future.set_result(Rehearsal({"step": step}, {}, {}, 0.0))
        return future

    told: set[int] = set()
    nodes = Cluster(planned // 8, 8, gpu_of("h100", memory=f"{gib + 2}GiB"))
    return next(rows(steps_of(shape, begin, nodes), 32))["GPUs at least"], told


@pytest.mark.parametrize("planned", [8, 16])
@pytest.mark.parametrize("gib", [8, 10, 16, 20, 40, 90])
def test_the_smallest_number_of_gpus_is_found_in_few_steps(gib, planned):
    shape = shape_of("meta-llama/Llama-2-7b-hf")
    found, told = smallest(lambda ranks: 64 / ranks, gib, shape, planned)
    assert found == min(n for n in (*range(1, 9), 16, 24) if 3 + 64 / n <= gib) and len(told) <= 3


@pytest.mark.parametrize("planned", [8, 16])
@pytest.mark.parametrize("gib", range(8, 70, 3))
def test_so_it_is_where_weights_are_filled_up(gib, planned):
    """Of eight experts five GPUs hold two each, as four do; and more than eight GPUs no less than one."""

    def shard(ranks):
        return 7 * -(-8 // ranks) + 2 / ranks

    fitting = [n for n in range(1, 9) if 3 + shard(n) <= gib]
    found, told = smallest(shard, gib, shape_of("mistralai/Mixtral-8x7B-v0.1"), planned)
    assert found == (min(fitting) if fitting else None) and len(told) <= 5


def test_a_method_whose_adapters_have_no_known_place_is_left_out():
    def begin(config, *_, **__):
        future = Future()
        if config.adapter is None:
            future.set_result(Rehearsal({"step": dict.fromkeys(PARTS, 1.0)}, {}, {}, 0.0))
        else:
            future.set_exception(fault)
        return future

    fault = UserError("where adapters go is not known")
    steps = steps_of(shape_of("facebook/opt-13b"), begin, cluster(80))
    told = {row["method"]: row for row in rows(steps, 32)}
    assert {name for name, row in told.items() if "left out" in row} == {"adazeta", "lora, adamw"}
    assert told["adazeta"]["left out"] == "where adapters go is not known" and "peak" in told["adamw"]
    assert {*curves(steps, 8)} == {"mezo", "ip-sgd", "sgd", "adamw"}
    fault = RehearsalLostError("killed")
    with pytest.raises(RehearsalLostError):
        list(rows(steps, 32))


def test_memory_at_lengths_between_is_that_of_the_fullest_moment():
    curve = growing(Batch(1, 4))
    assert curve.at(100) == pytest.approx(11 * GIB)  # between forwards
    assert curve.at(1000) == pytest.approx(8 * GIB + 4 * (1000 * 2**20 + 1e8))
    assert curve.at(815) == pytest.approx(max(11 * GIB, 8 * GIB + 4 * (815 * 2**20 + 100 * 815**2)))


def test_memory_that_begins_to_grow_otherwise_is_known_on_either_side():
    def takes(length):
        return rehearsed(forward=length**2 + 500 * min(length, 120))

    curve = Curve(takes, 10, 1000, kinks=[5, 120, 2000])
    for length in (10, 60, 120, 121, 130, 500, 1000):
        assert curve.at(length) == pytest.approx(length**2 + 500 * min(length, 120))
    assert Curve(takes, 200, 200).at(200) == pytest.approx(200**2 + 500 * 120)


def test_lt_is_the_longest_length_of_the_data_whose_batch_fits():
    chosen = choose(LENGTHS, cluster(13), growing, Batch(1, 4))
    assert chosen.batch == Batch(1, 4) and chosen.lt == chosen.fits
    assert growing(chosen.batch).at(chosen.lt) <= 11 * GIB < growing(chosen.batch).at(chosen.lt + 10)
    assert (chosen.k0, chosen.k1) == (4, 16)
    assert f"L_T = {chosen.lt} tokens" in str(chosen) and "K^0 = 4, K^1 = 16" in str(chosen)


def test_fewer_samples_at_once_leave_half_of_the_data_first_order():
    room = (8 * GIB + 2 * 520 * 2**20 + 2 * 100 * 520**2 + RESERVED) / GIB
    chosen = choose(LENGTHS, cluster(room), lambda batch: growing(batch, between=0), Batch(6, 4))
    assert chosen.batch == Batch(6, 2) and chosen.lt == 520


def test_lt_leaves_a_batch_of_longer_samples():
    chosen = choose(LENGTHS, cluster(14), growing, Batch(6, 4))  # 24 samples a step
    assert sum(length > chosen.lt for length in LENGTHS) == 24
    assert chosen.fits > chosen.lt and f"would fit up to {chosen.fits}" in str(chosen)


def test_where_all_fits_nothing_is_split():
    chosen = choose(LENGTHS, cluster(80), growing, Batch(6, 4))
    assert chosen.lt == "none" and chosen.longest_first_order == 1000 and "no L_T" in str(chosen)


def test_batches_are_no_larger_than_their_pools():
    few = LENGTHS[::5]  # 20 samples
    chosen = choose(few, cluster(14), growing, Batch(6, 4))
    pools = partition(few, chosen.lt)
    assert chosen.k0 <= len(pools.zo) and chosen.k1 <= len(pools.fo) and chosen.batch == Batch(1, 4)
    with pytest.raises(UserError, match=r"3 samples are too few for 4 GPUs, .* plan fewer GPUs"):
        choose(LENGTHS[:3], cluster(80), growing, Batch(6, 4))


@pytest.mark.parametrize(("samples", "gpus"), [(1000, 128), (112, 16)])
def test_a_pool_that_is_too_small_takes_fewer_zeroth_order_samples_before_fewer_of_the_others(samples, gpus):
    lengths = range(10, 10 + samples)
    memory = Curve(lambda length: rehearsed(forward=length), lengths[0], lengths[-1])
    enough = gpu_of("h100", memory=str(RESERVED + lengths[-2]))  # for all but the longest
    chosen = choose(lengths, Cluster(1, gpus, enough), lambda _: memory, Batch(6, 4))
    assert chosen.batch == Batch(3, 4) and sum(length <= chosen.lt for length in lengths) >= samples / 2
    assert sum(length > chosen.lt for length in lengths) == 3 * gpus


def test_where_too_few_samples_fit_more_gpus_are_not_called_for():
    room = (8 * GIB + 25 * 2**20 + 100 * 25**2 + RESERVED) / GIB  # for 10 tokens and for 20
    told = "2 of 100 samples are short enough for a backward, up to 20 tokens, .* 4 GPUs: plan larger ones"
    with pytest.raises(TooLargeError, match=told):
        choose(LENGTHS, cluster(room), lambda batch: growing(batch, between=0), Batch(6, 4))


def test_where_nothing_fits_it_is_told():
    with pytest.raises(UserError, match=r"one sample of 10 tokens .* takes 13 GiB of a GPU: plan more GPUs"):
        choose(LENGTHS, cluster(12), growing, Batch(6, 4))


def test_seconds_are_those_of_the_slower_of_computing_and_receiving():
    two_nodes = Cluster(2, 8, GPUS["h100"])
    config = build(RunConfig, {"method": "mezo", "engine": "fsdp", "dtype": "bfloat16"}, "test")
    step = Rehearsal({}, {}, {"all_gather": 300e9}, 989e12)
    seconds = estimate(step, config, two_nodes, weights=140e9)
    assert seconds.computing == pytest.approx(1 / COMPUTED)
    assert seconds.receiving == pytest.approx(300e9 / (400e9 * CARRIED))
    # Both points of each weight, and the shard in its update, read once and written once at half the memory's speed.
    both, update = 2 / DRAWN["normal"], 1 / 16 / UPDATED["normal"]
    assert seconds.perturbing == pytest.approx((both + update) * 140e9 / (3.35e12 / 2))
    assert seconds.step == seconds.computing + seconds.perturbing
    slow = Cluster(2, 8, gpu_of("h100", node_link="10Gbit/s"))
    assert estimate(step, config, slow, weights=140e9).step == pytest.approx(300 / 1.25 / CARRIED)
    one_node = Cluster(1, 8, gpu_of("h100", node_link="10Gbit/s"))
    assert estimate(step, config, one_node, weights=140e9).receiving == pytest.approx(300 / 450 / CARRIED)
    full = dataclasses.replace(config, dtype="float32")
    assert estimate(step, full, two_nodes, weights=140e9).computing == pytest.approx(989 / 67 / COMPUTED)


def test_hsdp_sends_sums_alone_between_nodes():
    config = build(RunConfig, {"method": "ip-sgd", "engine": "fsdp", "replicas": 2}, "test")
    step = Rehearsal({}, {}, {"all_gather": 450e9, "all_reduce": 50e9}, 0.0)
    seconds = estimate(step, config, Cluster(2, 8, GPUS["h100"]), weights=140e9)
    assert seconds.receiving == pytest.approx((1 + 1) / CARRIED)  # a node's link is shared by its 8 GPUs
    assert seconds.perturbing == 0


def test_a_shards_own_noise_is_drawn_once():
    config = build(RunConfig, {"method": "mezo", "engine": "fsdp"}, "test")
    own = build(RunConfig, {"method": "mezo", "engine": "fsdp", "perturb": "shard"}, "test")
    step, on = Rehearsal({}, {}, {}, 0.0), Cluster(2, 8, GPUS["h100"])
    hsdp = build(RunConfig, {"method": "mezo", "engine": "fsdp", "replicas": 2, "perturb": "shard"}, "test")
    gathered, shard, half = (estimate(step, each, on, weights=140e9).perturbing for each in (config, own, hsdp))
    # For either point, and in the update, which is each shard's own.
    both, update = 2 / DRAWN["normal"], 1 / 16 / UPDATED["normal"]
    assert shard == pytest.approx(half / 2) == pytest.approx(gathered * (both / 16 + update) / (both + update))


def test_the_run_that_is_written_is_the_run_that_was_planned(tmp_path):
    settings = {"method": "addax", "lt": 120, "engine": "fsdp", "dtype": "bfloat16", "k0": 12, "zo_micro_batch": 6}
    task = {"prompt": "{text} It's", "label": "label", "labels": {"0": " bad", "1": " good"}}
    config = build(RunConfig, {**settings, "task": task, "atomic": ["*.attention"]}, "test")
    commands = ready.write(config, "L_T = 120\nand more", Cluster(3, 4, GPUS["a100"]), tmp_path)
    assert load_run(str(tmp_path / "run.yaml"), []) == config
    assert (tmp_path / "hostfile").read_text() == "node-0 slots=4\nnode-1 slots=4\nnode-2 slots=4\n"
    assert len(commands) == 3 and all(str(tmp_path / "run.yaml") in command for command in commands)
    assert "NODES=3 GPUS_PER_NODE=4" in commands[0] and "--nodes 3 --gpus-per-node 4" in commands[2]


def test_padding_is_told_by_name():
    shape = shape_of("mistralai/Mixtral-8x7B-v0.1")
    sizes = sizes_of(shape)
    assert padding_of(sizes, 8).share == 1
    padding = padding_of(sizes, 16)
    assert padding.share == pytest.approx((46.703 + 45.097) / 46.703, rel=1e-3)
    assert "experts" in padding.worst and "have 8 along dimension 0, which 16 shards do not divide" in str(padding)


@pytest.mark.parametrize(("text", "bytes"), [("80GiB", 80 * 2**30), ("1.5 GB", 1.5e9), ("12", 12), ("3MiB", 3 * 2**20)])
def test_sizes_are_read(text, bytes):
    assert bytes_of(text) == bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "8 G", "8GB/s"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="give a size such as 80GiB"):
        bytes_of(text)


@pytest.mark.parametrize(("text", "speed"), [("400Gbit/s", 50e9), ("25 GB/s", 25e9), ("100Mbit/s", 12.5e6)])
def test_speeds_are_read(text, speed):
    assert speed_of(text) == speed


def test_what_is_given_stands_in_place_of_the_datasheet():
    gpu = gpu_of("H100", flops="0.5 PFLOP/s", bandwidth="2TB/s", gpu_link=None)
    assert gpu == dataclasses.replace(GPUS["h100"], flops=5e14, float32_flops=5e14, bandwidth=2e12)
    assert flops_of("989TFLOP/s") == 989e12
    with pytest.raises(UserError, match="989: give a speed such as 989TFLOP/s"):
        gpu_of("h100", flops="989")
    with pytest.raises(UserError, match="flops is 0: it must be above 0"):
        Cluster(1, 1, gpu_of("h100", flops="0TFLOP/s"))


@pytest.mark.parametrize("text", ["400", "400GB", "fast"])
def test_other_speeds_are_refused(text):
    with pytest.raises(UserError, match="give a speed such as 400Gbit/s"):
        speed_of(text)
