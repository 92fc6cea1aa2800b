"""The exported model is whole or not there, from every engine."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import addax_ds
from addax_ds.digest import weights_digest
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
