"""Shapes by name, from files, and by what a hub has cached."""

import json

import pytest
from transformers.utils import hub

from addax_ds.errors import UserError
from addax_ds.shapes import shape_of

SIZES = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A model's id, of whose repository the hub's cache holds the config.json alone."""
    commit = "0" * 40
    repository = tmp_path / "models--someone--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(SIZES))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return "someone/a-model"


def test_an_id_of_the_hub_names_its_config(cached):
    shape = shape_of(cached)
    assert (shape.hidden_size, shape.num_hidden_layers) == (64, 3)


@pytest.mark.usefixtures("cached")
def test_an_id_that_the_hub_does_not_give_is_one_line():
    with pytest.raises(UserError, match=r"no shape is known by someone/else; known: .*, and the hub gives none"):
        shape_of("someone/else")


def test_a_misspelt_name_is_told_the_nearest():
    with pytest.raises(UserError, match="meta-llama/Llama-2-70b-hf"):
        shape_of("meta-llama/Llama-2-70b-hg")
