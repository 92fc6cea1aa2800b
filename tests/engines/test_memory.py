"""What lanes hold in memory beside a first-order step: copies of a few modules, one guest at work, parked states."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import addax_ds
from addax_ds.core import moved
from tests.engines.setups import running
from tests.world import World

VOCABULARY, HIDDEN, INTERMEDIATE = 4001, 30, 60
SAMPLES, ZO_TOKENS, FO_TOKENS = 2, 64, 8
FLOAT = 4
LOGITS = SAMPLES * ZO_TOKENS * VOCABULARY * FLOAT
# What a guest may hold while it waits inside a block: the residual, queries, keys and values, or gate and input.
PARKED = SAMPLES * ZO_TOKENS * (4 * HIDDEN + 2 * INTERMEDIATE) * FLOAT
# What is kept of a direction while guests take the embedding: both points of the rows, and a number for each of W's.
ROWS = 2 * SAMPLES * ZO_TOKENS * HIDDEN * FLOAT + VOCABULARY * 8


class Ledger(TorchDispatchMode):
    """Bytes of all memory that operations under this mode have made and that is still held by anyone."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is torch.Tensor:
                storage = leaf.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def deep_model() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            tie_word_embeddings=False,
        )
    )


def batch(tokens: int, samples: int = SAMPLES) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def peak_of_a_step(engine: str, **hyper) -> int:
    """Peak of the forwards of the third step, in bytes; each of two ranks has a micro-batch of each kind."""
    zo, fo = batch(ZO_TOKENS, 2 * SAMPLES), batch(FO_TOKENS, 2 * SAMPLES)
    with running(engine, deep_model(), **hyper) as run:
        for _ in range(2):
            run.train_step(zo, fo)
        ledger = Ledger()

        def loss(model: nn.Module, batch: dict) -> torch.Tensor:
            with ledger:  # a guest has a thread, and so modes, of its own
                return addax_ds.token_loss(model, batch)

        run.train_step(zo, fo, loss)
        return ledger.peak


def peak_of_a_forward() -> int:
    model = deep_model().eval()
    with torch.no_grad(), Ledger() as ledger:
        addax_ds.token_loss(model, batch(ZO_TOKENS))
    return ledger.peak


def count(engine: str) -> None:
    first_order = peak_of_a_step(engine, alpha=0.0)
    guest = peak_of_a_forward()
    assert guest > LOGITS  # the measurement sees them
    copies = 2 * VOCABULARY * HIDDEN * FLOAT  # of the largest module, of which a stretch holds two
    mixed = {queries: peak_of_a_step(engine, queries=queries) for queries in (1, 4)}
    assert mixed[1] > guest
    for queries, peak in mixed.items():
        most = first_order + guest + 2 * copies + 2 * queries * PARKED
        assert peak <= most, (engine, queries, peak, first_order, guest)
    # Eight guests hold no more than two but for what they need to go on: no logits among it.
    more = 6 * PARKED + 3 * ROWS + copies
    assert mixed[4] - mixed[1] <= more < LOGITS, (engine, mixed)


@pytest.mark.parametrize("engine", ["replicated", "fsdp", "zero3-evicting"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_guests_hold_copies_of_a_few_modules_and_one_set_of_logits(world: World, engine: str):
    world.run(count, engine=engine)


@pytest.mark.parametrize("world", [2], indirect=True)
def test_the_measurement_notices_logits_that_are_kept(world: World):
    world.run(keep_logits)


def keep_logits() -> None:
    kept = []
    token_loss = addax_ds.token_loss

    def keeping(model: nn.Module, batch: dict) -> torch.Tensor:
        if not torch.is_grad_enabled():
            kept.append(model(**{key: value for key, value in batch.items() if key != "labels"}).logits)
        return token_loss(model, batch)

    addax_ds.token_loss = keeping
    try:
        with pytest.raises(AssertionError, match="replicated"):
            count("replicated")
    finally:
        addax_ds.token_loss = token_loss


def head_in_pieces(engine: str) -> None:
    def refuse(self: moved.Moved) -> torch.Tensor:
        raise AssertionError("a head was copied whole")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moved, "CHUNK", 300)
        patch.setattr(moved.Moved, "whole", refuse)
        peak_of_a_step(engine)


@pytest.mark.parametrize("engine", ["replicated", "fsdp", "zero3", "zero3-evicting"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_large_head_is_never_copied_whole(world: World, engine: str):
    world.run(head_in_pieces, engine=engine)
