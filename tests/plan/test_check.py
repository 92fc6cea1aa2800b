"""A plan held against a rehearsal with all layers, and against what the method says."""

import pytest
from transformers import LlamaConfig

from addax_ds.config import RunConfig, build
from addax_ds.plan import check
from addax_ds.plan.batches import LAST_TOKEN
from addax_ds.plan.choose import Batch
from addax_ds.plan.cluster import Cluster, gpu_of
from addax_ds.plan.evaluated import Evaluated
from addax_ds.plan.methods import Steps
from addax_ds.plan.rehearsals import Rehearsals
from addax_ds.plan.shardings import settings_of

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


def model_sizes(shape, folder):
    """Received under ZeRO-3: planned, and rehearsed."""
    sharding = settings_of("zero3", GPUS, shape, RUN.dtype, folder)
    with Rehearsals(shape, with_deepspeed=True) as rehearsals:
        steps = Steps(
            shape, RUN, rehearsals, GPUS, sharding, Batch(1, 1), 64, LAST_TOKEN, Evaluated.words(64, samples=10)
        )
        rows = {row["figure"]: row for row in check.rows(steps, 32)}
    return rows["model sizes received"]["planned"], rows["model sizes received"]["rehearsed"]


def test_zero_3_receives_three_sizes_of_a_model_of_which_it_keeps_little(tmp_path):
    planned, rehearsed = model_sizes(SHAPE, tmp_path)
    assert planned == 3 and rehearsed == pytest.approx(3, rel=0.03) and rehearsed < 3


def test_tied_weights_are_gathered_at_both_places(tmp_path):
    tied = SHAPE.__class__(**{**SHAPE.to_dict(), "tie_word_embeddings": True})
    planned, rehearsed = model_sizes(tied, tmp_path)
    assert planned == pytest.approx(rehearsed, rel=0.01) and rehearsed > 3.5
