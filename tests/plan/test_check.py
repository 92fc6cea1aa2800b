"""A plan held against a rehearsal with all layers, and against what the method says."""

import contextlib
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from addax_ds.config import RunConfig, build
from addax_ds.errors import UserError
from addax_ds.plan import check
from addax_ds.plan.batches import LAST_TOKEN
from addax_ds.plan.choose import Batch
from addax_ds.plan.cluster import Cluster, gpu_of
from addax_ds.plan.evaluated import Evaluated
from addax_ds.plan.methods import Steps
from addax_ds.plan.rehearsals import Rehearsals
from addax_ds.plan.rehearse import Rehearsal
from addax_ds.plan.shardings import settings_of
from addax_ds.shapes import count_of

SHAPE = LlamaConfig(
    vocab_size=80_000,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=12,
    num_attention_heads=4,
    tie_word_embeddings=False,
)
GPUS = Cluster(1, 2, gpu_of("h100"))
RUN = build(RunConfig, {"engine": "fsdp", "dtype": "bfloat16"}, "test")


def steps_of(shape, rehearsals, sharding, folder):
    settings = settings_of(sharding, GPUS, shape, RUN.dtype, folder)
    evaluated = Evaluated.words(64, samples=10)
    return Steps(shape, RUN, rehearsals, GPUS, settings, Batch(1, 1), 64, LAST_TOKEN, evaluated)


def model_sizes(shape, folder):
    """Received under ZeRO-3: planned, and rehearsed."""
    with Rehearsals(shape, with_deepspeed=True) as rehearsals:
        steps = steps_of(shape, rehearsals, "zero3", folder)
        rows = {row["figure"]: row for row in check.rows(steps, 32)}
    return rows["model sizes received"]["planned"], rows["model sizes received"]["rehearsed"]


def test_zero_3_receives_three_sizes_of_a_model_of_which_it_keeps_little(tmp_path):
    planned, rehearsed = model_sizes(SHAPE, tmp_path)
    assert planned == 3 and rehearsed == pytest.approx(3, rel=0.03) and rehearsed < 3


def test_tied_weights_are_gathered_at_both_places(tmp_path):
    tied = SHAPE.__class__(**{**SHAPE.to_dict(), "tie_word_embeddings": True})
    planned, rehearsed = model_sizes(tied, tmp_path)
    assert planned == pytest.approx(rehearsed, rel=0.01) and rehearsed > 3.5


@pytest.mark.parametrize(
    ("peak", "sizes", "told"),
    [
        (1.04, 3, None),
        (1.06, 3, "peak, GiB: planned 1, rehearsed 1.06"),
        (1, 3.2, "model sizes received: planned 3, rehearsed 3.2"),
    ],
)
def test_figures_that_are_apart_are_told_before_they_are_refused(tmp_path, peak, sizes, told):
    """peak, sizes: of the rehearsal with all layers, in GiB and in model sizes, where the plan has 1 and 3."""

    def begin(*_, all_layers, **__):
        begun = Future()
        held, moved = (peak, sizes) if all_layers else (1, 3)
        received = {"all_gather": moved * count_of(SHAPE) * 2 / 2}  # the other half is this rank's own
        begun.set_result(Rehearsal({"forward": {"weights": held * 2**30}}, {}, received, 0.0))
        return begun

    shown = []
    with pytest.raises(UserError, match=told) if told else contextlib.nullcontext():
        for row in check.rows(steps_of(SHAPE, SimpleNamespace(begin=begin), "fsdp", tmp_path), 32):
            shown.append(row["figure"])
    assert "peak, GiB" in shown and "model sizes received" in shown
