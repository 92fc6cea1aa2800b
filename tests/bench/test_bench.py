"""The benchmarks on tiny models: what they count is exact, what they time only has to be there."""

import json

import pytest
import torch

from addax_ds.bench.contraction import LLAMA_2_7B, bench_contraction
from addax_ds.bench.directions import bench_directions
from addax_ds.bench.engines import on_engine
from addax_ds.bench.memory import METHODS, bench_memory
from addax_ds.bench.noise import bench_noise
from addax_ds.bench.ranks import on_ranks
from addax_ds.bench.scale import KINDS as SCALE_KINDS
from addax_ds.bench.scale import bench_scale
from addax_ds.bench.step import Floor, bench_step
from addax_ds.bench.wire import KINDS, bench_wire
from addax_ds.cli.bench import bench
from addax_ds.config import RunConfig, load_run
from addax_ds.data.partition import partition
from addax_ds.engines.choose import choose_engine
from addax_ds.errors import UserError
from addax_ds.loss import choice_loss
from addax_ds.optimizer import Addax
from addax_ds.training.models import accepted, load_model
from addax_ds.training.run import prepare_inputs, step_batches, step_samples
from tests.bench.cases import answer, fail_on_the_second


def test_noise_names_every_operation_and_its_peers(tmp_path, capsys):
    result = bench_noise(elements=1 << 16, repeats=2)
    names = [row["operation"] for row in result.rows]
    assert names[:3] == ["x.add_(c)", "out.copy_(x)", "x.add_(torch.randn(...), alpha=c)"]
    for distribution in ("normal", "rademacher"):
        for operation in ("perturb in place", "perturb into scratch", "fused update"):
            assert f"{operation}, {distribution}" in names
    assert result.rows[0]["of x.add_(c)"] == 1
    assert all(row["M elements/s"] > 0 for row in result.rows)
    result.show()
    assert "rademacher" in capsys.readouterr().out
    result.write(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == result.rows


def test_contraction_counts_the_papers_adapter_and_what_each_way_holds():
    rows = bench_contraction(tokens=64, ranks=(5,), repeats=1).rows
    found = {(row["layer"], row["contraction"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 5
    down, up = (name for name, *_ in LLAMA_2_7B)
    # 2,200 in cores and 4,160 in biases.
    assert found[down, "parallel 2"]["weights"] + found[up, "parallel 2"]["weights"] == 2200 + 4160
    assert found[down, "dense"]["weights"] == 4096 * 64 + 64
    # Chains of W's sides, x times one of them, and the output twice, of which the bias is added to one.
    chains = 4 * 5 * (4096 + 16 * 16 + 64 + 4 * 4)
    assert 4 * 64 * 5 < 1e6 * found[down, "parallel 2"]["MB"] <= chains + 4 * 64 * (5 + 64 + 64)
    # Core by core, x is first as long as [tokens, 256, rank].
    assert 1e6 * found[down, "sequential"]["MB"] > 4 * 64 * 256 * 5
    assert all(row["ms"] > 0 and row["MB with backward"] > 0 for row in rows)


def test_more_directions_spread_less_as_theory_says(tiny):
    config = load_run(str(tiny.run_file), ["method=mezo", "k0=4", "zo_micro_batch=4"])
    shared, twice, own = bench_directions(draws=200, micro_batches=(1,), config=config).rows
    assert (shared["of a step"], twice["of a step"], own["of a step"]) == (1, 2, 4)
    assert (shared["forwards of a sample"], twice["forwards of a sample"], own["forwards of a sample"]) == (2, 4, 2)
    # Each normal direction spreads by (d + 1) times the square of the gradient that it measures. The whole batch's
    # and the samples' own differ by more than the three standard errors allowed here.
    whole, each = squared_gradients(config)
    elements = sum(p.numel() for p in load_model(config.model, config).parameters())
    for row, expected in ((shared, whole), (twice, whole / 2), (own, each)):
        assert row["variance"] == pytest.approx((elements + 1) * expected, abs=3 * row["±"])
    assert 3 * own["±"] < (elements + 1) * (whole - each), "it could not be told from one direction for all"


def squared_gradients(config: RunConfig) -> tuple[float, float]:
    """Of the mean loss of the first batch; and of its samples, each with its part of the mean, together."""
    prepared = prepare_inputs(config)
    pools = partition([example.length for example in prepared.train], config.lt)
    samples = step_samples(config, pools, 0)
    model = load_model(config.model, config)
    parts = []
    for size in (config.k0, 1):
        config = RunConfig(**{**vars(config), "zo_micro_batch": size})
        batches, _ = step_batches(config, prepared, samples, accepted(model), torch.device("cpu"))
        total = 0.0
        for batch in batches:
            gradients = torch.autograd.grad(choice_loss(model, batch).sum() / config.k0, list(model.parameters()))
            total += sum(float(gradient.square().sum()) for gradient in gradients)
        parts.append(total)
    return parts[0], parts[1]


def test_the_command_prints_a_table_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("addax_ds.bench.noise.bench_noise", lambda: bench_noise(elements=1 << 12, repeats=1))
    bench("noise", "fsdp", 2, None, "", tmp_path / "noise.json")
    assert "noise: 4,096 elements" in capsys.readouterr().out
    assert json.loads((tmp_path / "noise.json").read_text())["name"] == "noise"


def test_wire_counts_what_the_formula_says_and_lockstep_costs_no_more_than_first_order(tiny):
    result = bench_wire(worlds=(2, 4), model=str(tiny.model))
    cells = [(e, n, k) for e in ("fsdp", "zero3") for n in (2, 4) for k in KINDS]
    assert [(row["engine"], row["ranks"], row["step"]) for row in result.rows] == cells
    for row in result.rows:
        # A tied embedding may be gathered at both ends of a forward; it is a tenth of this model.
        assert 0.99 * row["formula"] <= row["total"] <= 1.2 * row["formula"]
        if row["step"] == "lockstep":
            assert row["of first-order"] <= 1.01
        elif row["step"] != "first-order only":
            assert 1.6 <= row["of first-order"] <= 2


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_step_times_every_kind_beside_the_floor(tiny, engine):
    config = load_run(str(tiny.run_file), ["k0=4", "k1=4"])
    result = bench_step(engine, 2, rounds=1, config=config)
    kinds = {row["step"]: row for row in result.rows}
    assert list(kinds) == [
        "floor",
        "floor, weights copied",
        "addax, rademacher",
        "addax, normal",
        "lane after lane",
        "textbook",
        "textbook, z by shard",
    ]
    assert all(row["seconds"] > 0 for row in result.rows)
    textbook = kinds["textbook"]["seconds"]
    for row in result.rows:
        assert row["textbook / this"] * row["seconds"] == pytest.approx(textbook)
        noisy = row["step"].startswith("addax") or row["step"] == "lane after lane"
        assert (row["perturbing"] > 0) == (row["updating"] > 0) == noisy
        assert row["perturbing"] + row["updating"] < row["seconds"]


def test_memory_of_states_is_exact_and_every_peak_is_there(tiny):
    settings = ["k0=4", "k1=4", "train_samples=60", "eval_samples=1"]
    result = bench_memory(2, load_run(str(tiny.run_file), settings), METHODS, (True,))
    weights = {row["method"]: row["weights and states of addax's"] for row in result.rows}
    # Weights alone; with gradients and two moments (and a step count for each weight).
    assert weights["addax"] == weights["mezo"] == 1
    assert weights["adamw"] == pytest.approx(4, rel=0.01)
    # The same backbone in half the bytes, beside adapters in float32.
    assert 1 < weights["adazeta"] == pytest.approx(weights["adazeta, bfloat16"] + 0.5, rel=0.01)
    assert all(row["peak"] > row["weights and states"] for row in result.rows)


@pytest.mark.parametrize("kind", [Floor, Addax])
def test_the_floor_neither_perturbs_nor_updates(tiny, kind):
    model = load_model(str(tiny.model), RunConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = on_engine(kind, choose_engine(model), lr=0.1)
    ids = torch.randint(0, 50, (2, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    metrics = optimizer.train_step(batch, batch)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    if kind is Floor:
        assert metrics["g0"] == [0.0] and not moved
    else:
        assert metrics["g0"] != [0.0] and len(moved) == len(before)


def test_what_cannot_be_measured_is_refused_before_it_starts(tmp_path):
    for call, words in (
        (lambda: bench_step("zero-3"), "engine zero-3: give one of fsdp, zero3"),
        (lambda: bench_step("fsdp", ranks=4), "4 ranks cannot share 2 micro-batches evenly"),
        (lambda: bench_step("fsdp", ranks=1, gigabits=1), "a slowed link joins 2 ranks, not 1"),
        (lambda: bench("wire", "fsdp", 2, 1, "", None), "--link 1: give the speed in Gbit/s, above 0, for step"),
        (lambda: bench_memory(ranks=0), "0 ranks cannot share"),
        (
            lambda: bench("speed", "fsdp", 2, None, "", None),
            "bench speed: no such table: give one of noise, wire, step, memory",
        ),
        (lambda: bench("noise", "fsdp", 2, None, "", tmp_path / "nowhere" / "x.json"), "no folder"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_ranks_answer_and_a_rank_that_fails_ends_them_all():
    assert on_ranks(answer, 2, number=5) == [(0, 5), (1, 5)]
    with pytest.raises(UserError, match="rank 1: ValueError: this one is bad"):
        on_ranks(fail_on_the_second, 2)


@pytest.mark.parametrize("kind", ["floor", "textbook", "addax, rademacher", "adazeta", "adamw"])
def test_every_kind_of_step_is_taken_at_the_shape_of_a_model(tmp_path, kind):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 50, **sizes}))
    (row,) = bench_scale(str(tmp_path), kinds=(kind,)).rows
    assert kind in SCALE_KINDS and row["step"] == kind and row["fits"] == "yes"
    zeroth, first = 2 * 6 * 512, 4 * (512 if kind == "adamw" else 170)
    tokens = {"adamw": first, "adazeta": zeroth}.get(kind, zeroth + first)
    assert row["tokens/s"] * row["seconds"] == pytest.approx(tokens)


def test_a_shape_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="did you mean meta-llama/Llama-2-7b-hf"):
        bench_scale("meta-llama/Llama-2-7b")
