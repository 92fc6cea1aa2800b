"""What a user types, command by command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from addax_ds.cli.main import main
from tests.cli.commands import environment, run

COMMANDS = ("prepare", "train", "eval", "report")


def call(monkeypatch, *words):
    """Exit status of `addax-ds WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["addax-ds", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_says_what_it_does(command, monkeypatch, capfd):
    assert call(monkeypatch, "--help") == 0
    assert command in capfd.readouterr().out
    assert call(monkeypatch, command, "--help") == 0
    text = capfd.readouterr().out
    assert f"addax-ds {command}" in text and "local" not in text.lower(), "the launcher's own option shows"


def test_a_command_that_does_not_exist_is_refused(monkeypatch, capfd):
    assert call(monkeypatch, "tarin") == 2
    assert "tarin" in capfd.readouterr().err


def test_the_console_command_is_installed():
    words = [str(Path(sys.executable).with_name("addax-ds")), "--help"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and all(command in done.stdout for command in COMMANDS), done.stderr


def test_help_does_not_wait_for_what_only_a_run_needs():
    program = (
        "import sys\n"
        "from addax_ds.cli import main\n"
        "sys.argv = ['addax-ds', '--help']\n"
        "try:\n    main.main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('deepspeed', 'transformers', 'datasets', 'matplotlib')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [("movie", ["movie: nothing embedded has that name, did you mean movies?"]), ("xyzzy", ["xyzzy", "known: "])],
)
def test_prepare_of_an_unknown_name_fetches_nothing_and_says_what_there_is(name, words, monkeypatch, capfd):
    monkeypatch.setattr("addax_ds.cli.prepare.prepare_data", None)  # calling it would fail
    monkeypatch.setattr("addax_ds.cli.prepare.prepare_model", None)
    assert call(monkeypatch, "prepare", "movies", name) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words)


@pytest.mark.parametrize("command", ["report", "eval"])
def test_a_folder_without_a_run_is_named_and_stays_empty(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    for folder in (tmp_path / "nowhere", tmp_path):
        assert call(monkeypatch, command, folder) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and str(folder) in lines[0], lines
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run folder as `train` leaves it, with its report."""
    cwd = tmp_path_factory.mktemp("finished")
    result = run("train", tiny.run_file, "steps=2", "output=run", cwd=cwd, plots=True).check()
    return cwd / "run", result


def test_train_ends_with_the_table_and_the_path_of_its_report(finished):
    folder, result = finished
    summary = json.loads((folder / "summary.json").read_text())
    for words in ("accuracy before", "accuracy after", "time per step", "peak memory", summary["final_digest"]):
        assert words in result.output
    assert "report: run/report.html" in result.output
    assert (folder / "report.html").exists() and len(list(folder.glob("*.png"))) == 5
    assert "2/2" in result.error and "loss=" in result.error, "no progress bar"


def test_report_can_be_written_again(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    result = run("report", folder, cwd=folder.parent, plots=True).check()
    assert result.output.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text() == page


def test_eval_of_a_run_folder_gives_the_accuracy_that_the_run_reported(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    for ranks, settings in ((1, []), (2, []), (3, ["engine=fsdp"])):
        result = run("eval", folder, *settings, cwd=folder.parent, ranks=ranks).check()
        scores = json.loads(result.output.splitlines()[-1])
        assert scores == {
            "model": str(folder / "model"),
            "samples": 60,
            "accuracy": summary["accuracy_after"],
        }
    assert not any(result.outputs[1:]), "more than one rank prints"


def test_eval_of_a_run_that_saved_no_model_says_so(finished, tmp_path, monkeypatch, capfd):
    folder, _ = finished
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((folder / "config.yaml").read_text())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    for path in ("run", str(tmp_path / "run")):
        assert call(monkeypatch, "eval", path) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "run/model" in line and "no model" in line


LEFT = """
import atexit
import torch.distributed as dist
from addax_ds.cli import main
from addax_ds.errors import RankLostError, UserError

def app():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "ended by Python")
    raise {error}

main.app = app
main.main()
"""


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        ("UserError('lower lr')", 2, "addax-ds: lower lr"),
        ("RankLostError('rank 1 has ended')", 1, "addax-ds: rank 1 has ended"),
        ("RuntimeError('a fault')", 1, "RuntimeError: a fault"),
    ],
)
def test_a_rank_that_leaves_its_group_says_why_and_does_not_wait_for_the_others(error, status, told):
    """As one does that fails alone under NCCL."""
    program = LEFT.format(error=error)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.splitlines()[-1] == told
