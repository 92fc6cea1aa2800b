"""The exported model is whole or not there, from every engine."""

import json
import resource
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import addax_ds
from addax_ds.digest import weights_digest
from addax_ds.training import export
from tests.cli.commands import run


def write_zero3(folder: Path) -> list[str]:
    """Settings of a ZeRO-3 run, its configuration written to `folder`."""
    path = folder / "zero3.json"
    path.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0,
                "steps_per_print": 1000000,
                "zero_optimization": {"stage": 3},
            }
        )
    )
    return ["engine=deepspeed", f"ds_config={path}"]


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_weights_gathered_from_two_ranks_are_the_ones_of_the_digest(tiny, tmp_path, engine):
    settings = write_zero3(tmp_path) if engine == "zero3" else ["engine=fsdp"]
    run("train", tiny.run_file, "output=out", *settings, cwd=tmp_path, ranks=2).check()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["engine"] == engine and summary["world_size"] == 2
    assert len(summary["peak_memory_bytes"]) == 2
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert weights_digest(addax_ds.Addax(model).engine) == summary["final_digest"]
    assert not list((tmp_path / "out").glob("*.tmp"))


def in_small_files() -> None:
    """Files of about a layer."""
    export.FILE_BYTES = 30_000


@pytest.mark.parametrize("engine", ["replicated", "fsdp", "zero3"])
def test_a_model_larger_than_a_file_is_exported_in_several_with_an_index(tiny, tmp_path, engine):
    settings = write_zero3(tmp_path) if engine == "zero3" else [f"engine={engine}"]
    run("train", tiny.run_file, "output=out", *settings, cwd=tmp_path, ranks=2, before=in_small_files).check()
    folder = tmp_path / "out" / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = [key for file in files for key in load_file(folder / file)]
    assert sorted(held) == sorted(index["weight_map"]) and "lm_head.weight" not in held  # tied: once
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(folder / file).values())
    assert not list(folder.glob(".*"))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert weights_digest(addax_ds.Addax(model).engine) == summary["final_digest"]
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(tiny.model).get_vocab()


def no_large_files() -> None:
    """A disk with room for what a run writes of its steps, and none for weights."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def a_fault_of_ours() -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("of ours")

    PreTrainedModel.save_pretrained = fail


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_one_line_on_every_rank(tiny, tmp_path, ranks):
    settings = ["output=out", "timeout_minutes=5"]
    result = run("train", tiny.run_file, *settings, cwd=tmp_path, ranks=ranks, before=no_large_files, seconds=200)
    assert result.statuses == [2] * ranks
    for error in result.errors:
        assert "Traceback" not in error and "addax-ds: the run folder cannot be written" in error
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "summary.json").exists()


def test_a_disk_without_room_for_the_report_still_shows_the_results_and_how_to_draw_it(tiny, tmp_path):
    settings = ["output=out", "save=false"]
    result = run("train", tiny.run_file, *settings, cwd=tmp_path, plots=True, before=no_large_files)
    assert result.status == 2 and "Traceback" not in result.error
    assert "File too large: the run itself is complete: mend that and draw its report with" in result.error
    assert "accuracy after" in result.output
    run("report", "out", cwd=tmp_path, plots=True).check()


def test_a_fault_of_ours_on_rank_0_leaves_no_rank_waiting(tiny, tmp_path):
    settings = ["output=out", "timeout_minutes=5"]
    result = run("train", tiny.run_file, *settings, cwd=tmp_path, ranks=2, before=a_fault_of_ours, seconds=200)
    assert result.statuses == [1, 2]
    assert "KeyError: 'of ours'" in result.error and "rank 0 has failed, and says why" in result.errors[1]
