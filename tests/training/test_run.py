"""A run from its file to its folder, one process, on a model that learns in seconds."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import addax_ds
from addax_ds.baselines import TorchBaseline
from addax_ds.config import QuerySchedule, RunConfig, load_run
from addax_ds.core.noise import step_seed
from addax_ds.data.batches import batch_indices
from addax_ds.data.partition import partition
from addax_ds.digest import weights_digest
from addax_ds.training.metrics import read_json, read_metrics
from addax_ds.training.run import learning_rate, prepare_inputs, queries_of
from tests.cli.commands import run
from tests.training.tiny import HELD_OUT, TRAIN

SUMMARY_KEYS = {
    *("method", "engine", "world_size", "steps", "skipped_steps", "model", "data", "accuracy_before"),
    *("accuracy_after", "seconds_per_step", "wire_bytes_per_step", "peak_memory_bytes", "seconds_total"),
    "final_digest",
}
"""What design.md promises."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: object

    @property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def steps(self):
        return read_metrics(self.folder)

    @property
    def digest(self):
        return self.summary["final_digest"]

    def exported(self):
        return AutoModelForCausalLM.from_pretrained(self.folder / "model")


@pytest.fixture(scope="module")
def fit(tiny, tmp_path_factory):
    """fit("key=value", ...) -> Run; equal settings are run once."""
    finished = {}

    def fit(*settings, file=tiny.run_file, again=False) -> Run:
        key = (file, settings)
        if again or key not in finished:
            cwd = tmp_path_factory.mktemp("run")
            run("train", file, "output=out", *settings, cwd=cwd).check()
            finished[key] = Run(cwd / "out")
        return finished[key]

    return fit


# -- the run folder -----------------------------------------------------------------------------


def test_the_run_folder_holds_what_scripts_rely_on(fit):
    done = fit()
    assert {path.name for path in done.folder.iterdir()} >= {
        *("config.yaml", "metrics.jsonl", "summary.json", "lengths.json", "model")
    }
    summary = done.summary
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["method"], summary["engine"], summary["world_size"]) == ("addax", "replicated", 1)
    assert (summary["steps"], summary["skipped_steps"]) == (3, 0)
    assert all(0 <= summary[name] <= 1 for name in ("accuracy_before", "accuracy_after"))
    assert summary["wire_bytes_per_step"] == {}, "one process has no wire"
    (peak,) = summary["peak_memory_bytes"]
    assert 2**25 < peak < 2**33
    assert [max(record["memory_bytes"] for record in done.steps)] == summary["step_memory_bytes"]
    assert 2**25 < summary["step_memory_bytes"][0] <= peak
    assert 0 < summary["seconds_per_step"] < summary["seconds_total"]
    assert len(bytes.fromhex(summary["final_digest"])) == 32
    lengths = json.loads((done.folder / "lengths.json").read_text())
    assert len(lengths["lengths"]) == TRAIN == lengths["zo"] + lengths["fo"]
    assert not list(done.folder.rglob("*.tmp*"))


def test_every_step_has_its_line_with_all_that_a_step_returns(fit):
    records = fit().steps
    assert [record["step"] for record in records] == [1, 2, 3]
    for index, record in enumerate(records):
        assert record.keys() >= {*("step", "seed", "g0", "loss_zo", "loss_fo", "lr", "skipped", "seconds", "tokens")}
        assert record["seed"] == step_seed(0, index)
        (plus,), (minus,) = record["loss_zo"]["plus"], record["loss_zo"]["minus"]
        assert record["g0"] == pytest.approx([(plus - minus) / 2e-3], rel=1e-12)
        assert record["lr"] == 0.1 and record["loss_fo"] > 0 and not record["skipped"]
        assert record["tokens"] > 0


def test_the_resolved_config_gives_the_same_run_again(fit, tiny):
    done = fit()
    text = (done.folder / "config.yaml").read_text()
    config = load_run(str(done.folder / "config.yaml"), [])
    assert isinstance(config.lt, int) and config.output == "out" and config.k0 == 5
    for name in ("python", "torch", "transformers", "addax-ds"):
        assert f"# {name} " in text
    assert yaml.safe_load(text).keys() == {field.name for field in dataclasses.fields(RunConfig)}
    again = fit(file=done.folder / "config.yaml")
    measured = ("seconds", "memory_bytes", "wire_bytes")
    for first, second in zip(done.steps, again.steps, strict=True):
        assert {k: v for k, v in first.items() if k not in measured} == {
            k: v for k, v in second.items() if k not in measured
        }
    assert again.digest == done.digest
    assert fit("seed=1").digest != done.digest


def test_without_an_output_the_run_goes_to_a_dated_folder(tiny, tmp_path):
    run("train", tiny.run_file, "steps=1", "save=false", cwd=tmp_path).check()
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "summary.json").exists() and not (folder / "model").exists()


def test_the_exported_model_is_the_trained_one_for_plain_from_pretrained(fit, tiny):
    done = fit()
    model, info = AutoModelForCausalLM.from_pretrained(done.folder / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert weights_digest(addax_ds.Addax(model).engine) == done.digest
    assert model.config.tie_word_embeddings
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = AutoTokenizer.from_pretrained(tiny.model)
    after = AutoTokenizer.from_pretrained(done.folder / "model")
    assert before("the film was great") == after("the film was great")
    assert after.pad_token_id == before.pad_token_id


def test_the_digest_tells_one_changed_bit(fit):
    model = fit().exported()
    optimizer = addax_ds.Addax(model)
    before = weights_digest(optimizer.engine)
    with torch.no_grad():
        model.model.norm.weight.view(torch.int32)[7] ^= 1
    assert weights_digest(optimizer.engine) != before


# -- the settings do what they say --------------------------------------------------------------


def test_addax_learns_an_easy_task(fit):
    done = fit("steps=60", "lr=0.3", "eval_every=30", "save=false")
    losses = [record["loss_fo"] for record in done.steps]
    assert done.summary["accuracy_before"] < 0.7
    assert done.summary["accuracy_after"] >= 0.9
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    evaluated = {record["step"]: record["accuracy"] for record in done.steps if "accuracy" in record}
    assert evaluated.keys() == {30}, "the end is scored by accuracy_after"


def test_mezo_alone_learns_too(fit):
    settings = ("alpha=1", "steps=150", "lr=0.003", "k0=32", "zo_micro_batch=32", "queries=2", "lt=none", "save=false")
    done = fit(*settings)
    losses = [sum(record["loss_zo"]["plus"]) / 2 for record in done.steps]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert all(len(record["g0"]) == 2 and record["loss_fo"] is None for record in done.steps)
    assert done.summary["method"] == "mezo"


def test_alpha_0_has_no_zeroth_order_part_and_needs_no_pool_for_it(fit):
    done = fit("alpha=0", "lt=1000")
    assert done.summary["method"] == "ip-sgd"
    assert all(record["g0"] == [] and record["loss_zo"] is None for record in done.steps)
    assert json.loads((done.folder / "lengths.json").read_text())["zo"] == 0


def test_alpha_1_needs_no_first_order_pool(fit):
    done = fit("alpha=1", "lt=1", "lr=0.001")
    assert done.summary["method"] == "mezo"
    assert json.loads((done.folder / "lengths.json").read_text())["fo"] == 0


def test_addax_wa_takes_both_batches_from_all_samples(fit):
    done = fit("lt=none")
    assert done.summary["method"] == "addax-wa"
    lengths = json.loads((done.folder / "lengths.json").read_text())
    assert (lengths["lt"], lengths["zo"], lengths["fo"]) == (None, TRAIN, TRAIN)
    assert yaml.safe_load((done.folder / "config.yaml").read_text())["lt"] == "none"
    assert done.digest != fit().digest


def test_the_schedule_reaches_the_steps(fit):
    done = fit("schedule=cosine", "warmup_steps=2", "steps=5")
    expected = [0.05, 0.1, 0.1, 0.1 * 0.5 * (1 + math.cos(math.pi / 3)), 0.1 * 0.5 * (1 + math.cos(2 * math.pi / 3))]
    assert [record["lr"] for record in done.steps] == pytest.approx(expected, rel=1e-12)
    frozen = fit("lr=0", "eval_every=1")
    assert frozen.summary["accuracy_after"] == frozen.summary["accuracy_before"]
    assert weights_digest(addax_ds.Addax(frozen.exported()).engine) == frozen.digest


def test_lr_0_leaves_every_bit_of_the_weights(fit, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    assert weights_digest(addax_ds.Addax(model).engine) == fit("lr=0", "eval_every=1").digest


def test_bfloat16_weights_are_trained_and_saved_as_such(fit):
    done = fit("dtype=bfloat16")
    weights = load_file(done.folder / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model", dtype=torch.bfloat16)
    assert weights_digest(addax_ds.Addax(model).engine) == done.digest
    assert done.digest != fit("dtype=bfloat16", "rounding=nearest").digest


def test_activation_checkpointing_changes_no_bit(fit):
    assert fit("activation_checkpointing=true").digest == fit().digest


def test_left_and_right_padding_give_the_same_run_up_to_rounding(fit):
    left, right = fit("padding=left"), fit()
    for one, other in zip(left.steps, right.steps, strict=True):
        assert one["loss_fo"] == pytest.approx(other["loss_fo"], rel=2e-3)
        assert one["loss_zo"]["plus"] == pytest.approx(other["loss_zo"]["plus"], rel=2e-3)
    assert left.steps[0]["loss_fo"] == pytest.approx(right.steps[0]["loss_fo"], rel=1e-5)
    assert left.summary["accuracy_before"] == right.summary["accuracy_before"]


def test_csv_and_jsonl_with_the_same_records_give_the_same_run(fit, tiny):
    assert fit(f"data={tiny.table}").digest == fit().digest


def test_held_out_data_of_its_own_leaves_all_records_to_training(fit, tiny):
    done = fit(f"eval_data={tiny.table}", "train_samples=null", "eval_samples=50")
    assert len(json.loads((done.folder / "lengths.json").read_text())["lengths"]) == 240


def test_settings_of_the_method_change_the_run(fit):
    digests = {fit(setting).digest for setting in ("queries=2", "distribution=rademacher", "weight_decay=0.1", "k1=3")}
    assert len(digests | {fit().digest}) == 5


def test_a_run_whose_loss_explodes_skips_and_counts(fit):
    done = fit("alpha=1", "max_loss=0.7", "lr=1", "steps=6", "save=false")
    skipped = [record["skipped"] for record in done.steps]
    assert 0 < sum(skipped) == done.summary["skipped_steps"]
    assert 0 <= done.summary["accuracy_after"] <= 1


def test_gradients_that_are_not_finite_are_left_out_and_counted(fit):
    done = fit("lr=1e30", "steps=4", "save=false")
    assert done.steps[0]["gradients_left_out"] == 0 < done.steps[-1]["gradients_left_out"]
    assert done.summary["gradients_left_out"] == sum(record["gradients_left_out"] for record in done.steps)


def spoiling() -> None:
    original = TorchBaseline.train_step

    def spoilt(optimizer, *arguments):
        metrics = original(optimizer, *arguments)
        next(iter(optimizer.engine.shards())).local[0] = math.inf
        return metrics

    TorchBaseline.train_step = spoilt


@pytest.mark.parametrize(
    ("settings", "before"),
    [(["method=mezo", "steps=4"], None), (["method=mezo", "steps=1"], None), (["method=sgd", "steps=1"], spoiling)],
)
def test_a_run_that_ends_with_weights_that_are_not_finite_says_so_and_exports_nothing(tiny, tmp_path, settings, before):
    words = ["train", tiny.run_file, "output=out", "lr=1e39" if before is None else "lr=0.1", *settings]
    for _ in range(2):  # the same command finds the same
        ended = run(*words, cwd=tmp_path, ranks=2, before=before)
        assert ended.statuses == [2, 2] and "Traceback" not in ended.error
        assert f"has weights that are not finite after step {settings[1][-1]}: lower lr" in ended.error
        assert "after: accuracy" not in ended.output
        assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("words", [["eval"], ["train", "method=adamw", "output=out"], ["train", "output=out"]])
def test_a_model_that_is_not_finite_is_neither_scored_nor_trained(tiny, tmp_path, words):
    shutil.copytree(tiny.model, tmp_path / "nan")
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(tmp_path / "nan")
    refused = run(words[0], tiny.run_file, *words[1:], f"model={tmp_path / 'nan'}", cwd=tmp_path)
    assert refused.status == 2 and "accuracy" not in refused.output
    assert f"model {tmp_path / 'nan'}: model.norm.weight has weights that are not finite" in refused.error


def test_too_many_spoilt_steps_in_a_row_end_the_run(tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", "alpha=1", "lr=1e38", "steps=40", "max_skipped=3"]
    for steps in (3, 4):  # a restart is no way round it
        ended = run(*words, cwd=tmp_path)
        assert ended.status == 2
        assert f"{steps} steps in a row, up to step {steps + 1}, had losses or gradients that are not" in ended.error
        assert len(read_metrics(tmp_path / "out")) == steps + 1


@pytest.mark.parametrize("end", [[], ["task.stop=' film'"]])
def test_completions_are_scored_by_exact_match_and_f1_and_can_be_learnt(fit, tiny, end):
    """After what ends an answer come words of any kind, which would cost every match."""
    done = fit("steps=60", "lr=0.3", "lt=none", *end, file=tiny.completion_file)
    summary = done.summary
    assert summary["metric_name"] == "f1"
    assert summary["exact_match_before"] == 0
    assert summary["f1_before"] < 0.3 < summary["f1_after"] <= 1
    assert 0.3 < summary["exact_match_after"] <= summary["f1_after"]
    again = run("eval", done.folder, cwd=done.folder.parent).check()
    scores = json.loads(again.output.splitlines()[-1])
    assert (scores["exact_match"], scores["f1"]) == (summary["exact_match_after"], summary["f1_after"])


# -- pure functions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5]),
    ],
)
def test_learning_rate_rises_over_the_warm_up_and_then_takes_its_shape(schedule, expected):
    config = RunConfig(lr=2.0, schedule=schedule, warmup_steps=4, steps=8)
    assert [learning_rate(config, step) for step in range(8)] == pytest.approx([2 * x for x in expected])


def test_queries_grow_with_the_epoch_by_a_power_law():
    pools = partition([10] * 8 + [30] * 10, 20)  # ten long samples: three steps of four are an epoch
    assert [queries_of(RunConfig(queries=3, k0=4), pools, step) for step in (0, 99)] == [3, 3]
    config = RunConfig(query_schedule=QuerySchedule(alpha=2, beta=0.5, maximum=5), k0=4)
    counts = [queries_of(config, pools, step) for step in range(36)]
    expected = [max(min(math.floor(2 * (step // 3) ** 0.5), 5), 1) for step in range(36)]
    assert counts == expected and set(counts) == {1, 2, 3, 4, 5} and counts == sorted(counts)


def test_the_papers_schedule_begins_with_one_query_and_ends_below_its_limit():
    schedule = QuerySchedule()
    assert [schedule.queries(epoch) for epoch in (0, 1, 10, 100, 10**6)] == [1, 1, 2, 6, 20]


def test_a_run_takes_the_queries_of_its_schedule(fit):
    done = fit("query_schedule.alpha=2", "query_schedule.beta=0.5", "query_schedule.maximum=3", "steps=8", "k0=40")
    assert {len(record["g0"]) for record in done.steps} == {1, 2, 3}
    assert len(done.steps[0]["g0"]) == 1


def test_learning_rate_without_warm_up_starts_at_lr_and_a_warm_up_longer_than_the_run_never_reaches_it():
    assert learning_rate(RunConfig(lr=2.0, schedule="linear", steps=4), 0) == 2.0
    config = RunConfig(lr=2.0, schedule="cosine", warmup_steps=10, steps=4)
    assert [learning_rate(config, step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"alpha": 0.5}, "addax"),
        ({"alpha": 0.5, "lt": 30}, "addax"),
        ({"alpha": 0.5, "lt": "none"}, "addax-wa"),
        ({"alpha": 1}, "mezo"),
        ({"alpha": 1, "lt": "none"}, "mezo"),
        ({"alpha": 0}, "ip-sgd"),
    ],
)
def test_a_run_carries_the_papers_name_of_its_method(settings, name):
    assert RunConfig(**settings).method_name == name


def test_samples_that_choose_settings_are_apart_from_the_others(tiny, tmp_path):
    without, having = (load_run(str(tiny.run_file), [f"dev_samples={number}"]) for number in (0, 15))
    plain, prepared = prepare_inputs(without), prepare_inputs(having)
    assert plain.train == prepared.train and plain.held_out == prepared.held_out
    assert not plain.dev and len(prepared.dev) == 15
    sets = [{(example.prompt, example.target) for example in part} for part in (prepared.train, prepared.dev)]
    assert len(sets[1] - sets[0]) > 0
    run("train", tiny.run_file, "dev_samples=15", "steps=4", "eval_every=2", "output=out", cwd=tmp_path).check()
    summary = read_json(tmp_path / "out" / "summary.json")
    measured = read_metrics(tmp_path / "out")[1]["accuracy"]
    # Of 15 samples and of as many as are held out.
    assert (measured * 15) % 1 == pytest.approx(0, abs=1e-9) and (summary["dev_accuracy"] * 15) % 1 < 1e-9
    assert (summary["accuracy_after"] * HELD_OUT) % 1 == pytest.approx(0, abs=1e-9)
    refused = run("train", tiny.run_file, "train_samples=null", "dev_samples=100000", cwd=tmp_path)
    assert refused.status == 2 and "too few for dev_samples=100000" in refused.error


def test_samples_and_batches_of_a_seed_stay_what_they_are(tiny):
    """Frozen: a resumed or repeated run must see the same samples under every later version."""
    config = load_run(str(tiny.run_file), [])
    prepared = prepare_inputs(config)
    decode = prepared.tokenizer.decode
    pools = partition([example.length for example in prepared.train], config.lt)
    frozen = {
        "held_out": [decode(example.prompt) for example in prepared.held_out[:2]],
        "zo": [batch_indices(pools.zo, 5, 0, "zo", step) for step in (0, 40)],
        "fo": [batch_indices(pools.fo, 4, 0, "fo", step) for step in (0, 40)],
    }
    assert frozen == FROZEN
    assert len(prepared.held_out) == HELD_OUT


FROZEN = {
    "held_out": ["with slow plot plot cold flat It was", "cast of flat slow and It was"],
    "zo": [[152, 95, 42, 35, 72], [102, 52, 152, 44, 20]],
    "fo": [[56, 112, 141, 51], [129, 100, 15, 156]],
}
