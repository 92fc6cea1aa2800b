"""Checkpoints cross engines and world sizes, are visible only when whole, and never load damage."""

import errno
import json
import os
import shutil
from pathlib import Path
from threading import Event

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

from addax_ds.errors import UserError
from addax_ds.training import checkpoint
from addax_ds.training.checkpoint import Checkpoints, Manifest, UnusableError, complete
from tests.engines.setups import TWO_BY_TWO, batch_for, build_model, running
from tests.world import World

RUN = {"seed": 3, "lr": [1e-3, 0.1]}
CELLS = [
    pytest.param(size, engine, id=f"{engine}-{size}")
    for engine in ("replicated", "zero1", "fsdp", "fsdp-offload", "hsdp", "zero3", "zero3-evicting", "zero3-hpz")
    for size in ((4,) if engine in TWO_BY_TWO else (3,))
]


def other_weights(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = build_model("llama-tied", dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2)
    return model


def save_then_step(engine: str, folder: Path, dtype: torch.dtype = torch.float32, step: int = 7) -> str:
    """Digest of what is saved; the weights move as soon as `save` returns."""
    with running(engine, build_model("llama-tied", dtype)) as run:
        saved = Checkpoints(folder, run.engine, keep=2)
        digest = run.digest()
        saved.save(step, RUN)
        run.train_step(batch_for("llama", 3, 12), batch_for("llama", 3, 6))
        saved.wait()
        assert run.digest() != digest
    return digest


def load(engine: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[str, Manifest]:
    with running(engine, other_weights(dtype)) as run:
        manifest, complaints = Checkpoints(folder, run.engine, keep=2).load_newest()
        assert not complaints and manifest is not None
        digest = run.digest()
        run.train_step(batch_for("llama", 3, 12), batch_for("llama", 3, 6))  # old gathered copies would fail here
        return digest, manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "engine"), CELLS, indirect=["world"])
def test_what_an_engine_saves_one_process_loads_and_the_other_way_round(world: World, engine, dtype, tmp_path):
    expected = save_then_step("replicated", tmp_path / "one", dtype)
    assert {digest for digest, _ in world.run(load, engine=engine, folder=tmp_path / "one", dtype=dtype)} == {expected}
    assert set(world.run(save_then_step, engine=engine, folder=tmp_path / "many", dtype=dtype)) == {expected}
    digest, manifest = load("replicated", tmp_path / "many", dtype)
    assert digest == expected
    assert manifest.run == RUN and manifest.step == 7


def step_then_write(engine: str, folder: Path) -> tuple[str, str]:
    """Digests of what is saved and of what a step makes of it, before a byte of the first is written."""
    with running(engine, build_model("llama-tied")) as run:
        saved, stepped = Checkpoints(folder, run.engine, keep=2), Event()
        write = saved._write
        saved._write = lambda *args: stepped.wait() and write(*args)
        before = run.digest()
        saved.save(7, RUN)
        run.train_step(batch_for("llama", 3, 12), batch_for("llama", 3, 6))
        stepped.set()
        saved.wait()
        return before, run.digest()


@pytest.mark.parametrize("world", [3], indirect=True)
@pytest.mark.parametrize("engine", ["replicated", "fsdp"])
def test_a_step_taken_before_anything_is_written_changes_nothing_of_what_is_saved(world: World, engine, tmp_path):
    ((before, after),) = set(world.run(step_then_write, engine=engine, folder=tmp_path))
    assert load("replicated", tmp_path)[0] == before != after


def test_zero3_on_four_ranks_to_fsdp_on_three_to_one_process(tmp_path):
    four, three = World(4), World(3)
    try:
        (expected,) = set(four.run(save_then_step, engine="zero3-evicting", folder=tmp_path / "four"))
        four.close()
        # Three ranks load it, and save it on.
        (between,) = set(three.run(load_and_save, engine="fsdp", source=tmp_path / "four", folder=tmp_path / "three"))
    finally:
        four.close()
        three.close()
    assert between == expected
    assert load("replicated", tmp_path / "three")[0] == expected


def load_and_save(engine: str, source: Path, folder: Path) -> str:
    with running(engine, other_weights()) as run:
        Checkpoints(source, run.engine, keep=2).load_newest()
        saved = Checkpoints(folder, run.engine, keep=2)
        saved.save(8, {})
        saved.wait()
        return run.digest()


def save_or_load_partly_frozen(engine: str, folder: Path, backbone: float, load: bool) -> tuple[str, set[str]]:
    """Digest of all weights, and what of them a checkpoint holds: the last block and the norm are trained."""
    model = build_model("llama-tied")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            frozen = "layers.1" not in name and name != "model.norm.weight"
            parameter.requires_grad_(not frozen).mul_(backbone if frozen else 2 if load else 1)
    with running(engine, model) as run:
        checkpoints = Checkpoints(folder, run.engine, keep=2)
        if load:
            manifest, complaints = checkpoints.load_newest()
            assert manifest is not None and not complaints
            return run.digest(), set(manifest.parameters)
        run.train_step(batch_for("llama", 3, 12), batch_for("llama", 3, 6))
        checkpoints.save(7, RUN)
        checkpoints.wait()
        return run.digest(), set(run.engine.trainable_names)


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("engine", ["replicated", "zero1", "fsdp", "zero3-evicting"])
def test_frozen_weights_are_not_stored_and_have_to_be_the_runs(world: World, engine: str, tmp_path: Path):
    digest, held = world.run(save_or_load_partly_frozen, engine=engine, folder=tmp_path, backbone=1, load=False)[0]
    assert held and all("layers.1" in name or name == "model.norm.weight" for name in held)
    assert save_or_load_partly_frozen("replicated", tmp_path, 1, True) == (digest, held)
    with pytest.raises(UserError, match=r"weights beside those of checkpoint .* are not the run's: restore its model"):
        save_or_load_partly_frozen("replicated", tmp_path, 1.5, True)
    assert [path.name for path in complete(tmp_path)] == ["step-000007"], "a good checkpoint was set aside"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 7 and 9, the newer one of other weights."""
    save_then_step("replicated", tmp_path / "saved", step=7)
    with running("replicated", other_weights()) as run:
        newer = Checkpoints(tmp_path / "saved", run.engine, keep=2)
        newer.save(9, RUN)
        newer.wait()
    return tmp_path / "saved"


def test_the_newest_are_kept_and_latest_names_the_last(saved: Path):
    assert (saved / "latest").read_text() == "step-000009\n"
    with running("replicated", build_model("llama-tied")) as run:
        checkpoints = Checkpoints(saved, run.engine, keep=2)
        for step in (11, 1_000_000):
            checkpoints.save(step, {})
        checkpoints.wait()
    assert [path.name for path in complete(saved)] == ["step-1000000", "step-000011"]
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-000011", "step-1000000"]
    assert (saved / "latest").read_text() == "step-1000000\n"


def test_nothing_is_executed_or_pickled(saved: Path):
    for path in complete(saved):
        assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("at", ["write", "manifest", "name", "latest"])
def test_a_full_disk_leaves_the_checkpoint_before(saved: Path, monkeypatch, at):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace(source, target):
        if Path(target).name == {"name": "step-000011", "latest": "latest"}.get(at):
            full()
        return original(source, target)

    original = os.replace
    if at == "write":
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    elif at == "manifest":
        monkeypatch.setattr(checkpoint, "write_json", full)
    else:
        monkeypatch.setattr("os.replace", replace)
    with running("replicated", build_model("llama-tied")) as run:
        checkpoints = Checkpoints(saved, run.engine, keep=2)
        checkpoints.save(11, {})
        with pytest.raises(UserError, match="No space left on device: mend that and start the same command"):
            checkpoints.wait()
    monkeypatch.undo()
    with running("replicated", build_model("llama-tied")) as run:
        again = Checkpoints(saved, run.engine, keep=2)
        again.tidy()
        manifest, complaints = again.load_newest()
    assert not complaints
    # Complete under its name is complete, even where `latest` could not follow.
    assert manifest is not None and manifest.step == (11 if at == "latest" else 9)
    assert (saved / "latest").read_text() == f"step-{manifest.step:06d}\n"
    assert not [path for path in saved.iterdir() if path.suffix in (".partial", ".removed")]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with running("replicated", build_model("llama-tied")) as run, pytest.raises(UserError, match="Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints", run.engine, keep=2).tidy()


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_set_aside(saved: Path):
    shard = next((saved / "step-000009").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with running("replicated", build_model("llama-tied")) as run:
        checkpoints = Checkpoints(saved, run.engine, keep=1)
        manifest, complaints = checkpoints.load_newest()
        assert manifest is not None and manifest.step == 7
        assert len(complaints) == 1 and "bytes, not" in complaints[0]
        assert (saved / "step-000009.damaged").is_dir() and complete(saved) == [saved / "step-000007"]
        assert (saved / "latest").read_text() == "step-000007\n"
        # What the run saves from here on is the newest, and it alone is kept.
        checkpoints.save(8, {})
        checkpoints.wait()
        assert complete(saved) == [saved / "step-000008"]
        checkpoints.save(9, {})
        checkpoints.wait()
        assert checkpoints.load(saved / "step-000009").step == 9


def test_a_checkpoint_that_the_run_cannot_use_gives_way_too(saved: Path):
    def check(manifest: Manifest) -> None:
        if manifest.step == 9:
            raise UnusableError("not of this run")

    with running("replicated", build_model("llama-tied")) as run:
        manifest, complaints = Checkpoints(saved, run.engine, keep=2).load_newest(check)
    assert manifest is not None and manifest.step == 7 and complaints == ["not of this run"]


@pytest.mark.parametrize("at", ["manifest", "header", "data"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(saved: Path, monkeypatch, at):
    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    owner = {"manifest": Path, "header": HuggingFaceStorageReader, "data": HuggingFaceStorageReader}[at]
    monkeypatch.setattr(owner, {"manifest": "read_bytes", "header": "read_metadata", "data": "read_data"}[at], stale)
    with running("replicated", build_model("llama-tied")) as run:  # noqa: SIM117
        with pytest.raises(UserError, match=r"checkpoint .*step-000009 cannot be read: .*Stale file handle: mend that"):
            Checkpoints(saved, run.engine, keep=2).load_newest()
    assert [path.name for path in complete(saved)] == ["step-000009", "step-000007"]
    monkeypatch.undo()
    with running("replicated", build_model("llama-tied")) as run:
        manifest, complaints = Checkpoints(saved, run.engine, keep=2).load_newest()
    assert manifest is not None and manifest.step == 9 and not complaints


def test_without_any_that_loads_nothing_starts_over_in_silence(saved: Path):
    for path in complete(saved):
        (path / "manifest.json").write_text("{")
    with running("replicated", build_model("llama-tied")) as run:
        checkpoints = Checkpoints(saved, run.engine, keep=2)
        with pytest.raises(UserError, match="no older one can be used: mend that, or remove"):
            checkpoints.load_newest()
        shutil.rmtree(saved)
        saved.mkdir()
        assert checkpoints.load_newest() == (None, [])


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path, monkeypatch):
    model = build_model("llama-tied")
    with running("replicated", model) as run:
        with torch.no_grad():
            next(model.parameters())[0, 0] = float("nan")
        checkpoints = Checkpoints(tmp_path, run.engine, keep=2)
        assert checkpoints.save(1, {}) is None
        checkpoints.wait()
        assert complete(tmp_path) == []
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "not_finite", lambda *_: "")
            checkpoints.save(1, {})
            checkpoints.wait()
        with pytest.raises(UserError, match=r"weights of model\.embed_tokens\.weight that are not finite"):
            checkpoints.load(tmp_path / "step-000001")


def test_another_model_is_refused_by_name(saved: Path):
    with (
        running("replicated", build_model("opt")) as run,
        pytest.raises(UserError, match=r"of another model: .* missing"),
    ):
        Checkpoints(saved, run.engine, keep=2).load(saved / "step-000009")
    with (
        running("replicated", build_model("llama-tied", torch.bfloat16)) as run,
        pytest.raises(UserError, match=r"elements of float32 there and .* of bfloat16 here"),
    ):
        Checkpoints(saved, run.engine, keep=2).load(saved / "step-000009")


def fail_on_one_rank(folder: Path) -> str:
    with running("fsdp", build_model("llama-tied")) as run:
        checkpoints = Checkpoints(folder, run.engine, keep=2)
        if run.engine.rank == 1:
            checkpoint.HuggingFaceStorageWriter.write_data = _full_disk
        checkpoints.save(1, {})
        with pytest.raises(UserError) as error:
            checkpoints.wait()
    return str(error.value)


def _full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_fault_of_one_rank_is_every_ranks(tmp_path: Path):
    world = World(2)
    try:
        messages = world.run(fail_on_one_rank, folder=tmp_path)
    finally:
        world.close()
    assert len(set(messages)) == 1 and "rank 1: No space left on device" in messages[0]
    assert complete(tmp_path) == []


def test_the_manifest_says_what_is_in_the_files(saved: Path):
    manifest = json.loads((saved / "step-000009" / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["parameters"]["model.embed_tokens.weight"] == [97 * 15, "float32"]
    assert set(manifest["files"]) == {path.name for path in (saved / "step-000009").glob("*.safetensors")}
