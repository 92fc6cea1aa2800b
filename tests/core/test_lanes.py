"""Guests: forwards on threads of their own that share what is gathered and leave nothing behind."""

import contextlib
import copy
import signal
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from addax_ds.core import lanes as lanes_module
from addax_ds.core import moved as moved_module
from addax_ds.core import rows as rows_module
from addax_ds.core.guest import Job, raise_first
from addax_ds.core.lanes import Lanes
from addax_ds.core.moved import Moved
from addax_ds.core.noise import noise
from addax_ds.core.plain import Perturbation
from addax_ds.core.rows import Rows
from addax_ds.core.skeleton import strip
from addax_ds.errors import UserError

EPS = 0.1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class OneUnitAtATime:
    """Weights of which one top-level unit is gathered at a time, by `gather`."""

    def __init__(self, model: nn.Module, frozen: tuple[str, ...] = ()) -> None:
        self.model, self.frozen = model, frozen
        self.gathered: str | None = None
        self.gathers: list[str] = []
        self.prefetched: str | None = None
        self.prefetches: list[str] = []

    def unit(self, path: str) -> str:
        return ".".join(path.split(".")[:2]) if path.startswith("blocks") else path

    def trainable(self, name: str) -> bool:
        return name not in self.frozen

    def is_gathered(self, path: str) -> bool:
        return self.gathered == self.unit(path)

    def weight(self, path: str, local: str) -> torch.Tensor:
        assert self.is_gathered(path), f"{path} is read while {self.gathered} is gathered"
        return getattr(self.model.get_submodule(path), local)

    @contextlib.contextmanager
    def gather(self, path: str):
        self.gathered = self.unit(path)
        self.gathers.append(self.gathered)
        self.prefetched = None
        yield
        self.gathered = None

    def agree(self, path: str, failed: bool) -> tuple[str, bool]:
        return path, failed

    def prefetch(self, path: str) -> None:
        self.prefetched = self.unit(path)
        self.prefetches.append(self.prefetched)

    def drop_prefetched(self) -> None:
        self.prefetched = None


class Whole(OneUnitAtATime):
    """The whole model is one unit."""

    def unit(self, path: str) -> str:
        return ""


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def weights(model) -> OneUnitAtATime:
    return OneUnitAtATime(model)


@pytest.fixture
def lanes(model, weights):
    lanes = Lanes(model, strip(model), weights)
    yield lanes
    lanes.close()


X = torch.linspace(-1, 1, 24).view(4, 6)


def points(queries: int = 1, repeats: int = 1) -> list[Perturbation]:
    return [Perturbation(3, q, sign, EPS) for q in range(queries) for _ in range(repeats) for sign in (1, -1)]


def moved(model: nn.Module, point: Perturbation) -> torch.Tensor:
    """The forward at theta + sign eps z, computed the plain way."""
    weights = {
        name: p + point.sign * EPS * noise(point.seed, name, 0, p.numel(), query=point.query).view_as(p)
        for name, p in model.named_parameters()
    }
    with torch.no_grad():
        return torch.func.functional_call(model, weights, (X,))


def test_guests_see_their_own_point_and_weights_stay(model, lanes):
    before = {name: p.clone() for name, p in model.named_parameters()}
    jobs = [Job(lambda m: m(X), point) for point in points(queries=2)] + [Job(lambda m: m(X))]
    lanes.start(jobs)
    lanes.drive()
    for job in jobs[:-1]:
        # The same float32 operations on the same weights; only their place in memory differs.
        torch.testing.assert_close(job.result, moved(model, job.perturbation), rtol=1e-6, atol=1e-6)
        assert not job.result.requires_grad
    assert torch.equal(jobs[-1].result, model(X))
    assert len({tuple(job.result.flatten().tolist()) for job in jobs}) == 5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_frozen_weights_are_not_moved(model):
    frozen = tuple(name for name, _ in model.named_parameters())
    lanes = Lanes(model, strip(model), OneUnitAtATime(model, frozen))
    jobs = [Job(lambda m: m(X), point) for point in points()]
    lanes.start(jobs)
    lanes.drive()
    assert all(torch.equal(job.result, model(X)) for job in jobs)
    lanes.close()


def test_one_gather_of_a_unit_serves_all_guests(lanes, weights):
    lanes.start([Job(lambda m: m(X), point) for point in points(queries=3, repeats=2)])
    lanes.drive()
    assert weights.gathers == ["blocks.0", "blocks.1", "blocks.2", "head"]


def test_the_next_unit_is_on_its_way_while_guests_take_one(lanes, weights):
    for alike in (True, False, True):
        lanes.start([Job(lambda m: m(X), point) for point in points()])
        lanes.drive(alike)
    units = ["blocks.0", "blocks.1", "blocks.2", "head"]
    assert weights.gathers == units * 3
    assert weights.prefetches == units[1:], "only the third drive knows the order"


def test_a_named_drive_gathers_the_same_whatever_its_guests_ask_for(lanes, weights):
    units = ["blocks.0", "blocks.1", "blocks.2", "head"]

    def drive(*runs):
        weights.gathers.clear()
        lanes.run(jobs := [Job(run) for run in runs], alike="test")
        assert weights.prefetched is None and weights.gathers == units
        raise_first(jobs)

    drive(lambda m: m(X))
    drive(lambda m: m.blocks[0](X))  # the first unit and no more
    drive(lambda m: m.head(m.blocks[0](X)))
    drive()  # a rank that has no guest
    with pytest.raises(
        RuntimeError, match=r"blocks\.0\.inner is needed by zeroth-order forwards at a place where no step"
    ):
        drive(lambda m: m.blocks[0](m.blocks[2](X)))
    drive(lambda m: m(X))
    lanes.forget()
    units = ["blocks.2", "blocks.0"]
    drive(lambda m: m.blocks[0](m.blocks[2](X)))
    drive(lambda m: m.blocks[0](m.blocks[2](X)))


def test_noise_is_drawn_once_per_module_and_direction(model, lanes, monkeypatch):
    drawn = []

    def counting(weight, start, plus, minus, name, point):
        drawn.append((name, point.query))
        perturb(weight, start, plus, minus, name, point)

    perturb = lanes_module.perturb
    monkeypatch.setattr(lanes_module, "perturb", counting)
    lanes.start([Job(lambda m: m(X), point) for point in points(queries=2, repeats=3)])
    lanes.drive()
    assert sorted(drawn) == sorted((name, query) for name, _ in model.named_parameters() for query in range(2))


class Normed(nn.Module):
    """Blocks with a light module before two others."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 120), nn.Linear(120, 6)) for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(("backbone", "stretch"), [("trained", 1), ("trained", 2), ("frozen", 1)])
def test_guests_take_as_many_modules_as_fit_in_one_go_and_noise_is_drawn_once(monkeypatch, backbone, stretch):
    monkeypatch.setattr(lanes_module, "_STRETCH", stretch)
    torch.manual_seed(1)
    model = Normed()
    light = {name for name, p in model.named_parameters() if ".0." in name[len("blocks.0") :]}
    frozen = tuple(name for name, _ in model.named_parameters() if backbone == "frozen" and name not in light)
    entered, drawn = [], []

    def noting(lanes, point, path, owners):
        entered.append((path, point.sign, point.query))
        return fetch(lanes, point, path, owners)

    def counting(weight, start, plus, minus, name, point):
        drawn.append((name, point.query))
        perturb(weight, start, plus, minus, name, point)

    fetch, perturb = Lanes._fetch, lanes_module.perturb
    monkeypatch.setattr(Lanes, "_fetch", noting)
    monkeypatch.setattr(lanes_module, "perturb", counting)
    lanes = Lanes(model, strip(model), OneUnitAtATime(model, frozen))
    jobs = [Job(lambda m: m(X), point) for point in points(queries=1, repeats=4)]
    lanes.run(jobs)
    raise_first(jobs)
    for job in jobs:
        point = job.perturbation
        weights = {
            name: p
            if name in frozen
            else p + point.sign * EPS * noise(3, name, 0, p.numel(), query=point.query).view_as(p)
            for name, p in model.named_parameters()
        }
        with torch.no_grad():
            expected = torch.func.functional_call(model, weights, (X,))
        torch.testing.assert_close(job.result, expected, rtol=1e-5, atol=1e-6)
    moving = [name for name, _ in model.named_parameters() if name not in frozen]
    assert sorted(drawn) == sorted((name, 0) for name in moving)
    guests = [[path for path, *_ in entered[first : first + 3]] for first in range(0, len(entered), 3)]
    in_one_go = [["blocks.0.0", "blocks.0.1", "blocks.0.2"]] * 8 + [["blocks.1.0", "blocks.1.1", "blocks.1.2"]] * 8
    # 1,578 elements of a block are copied, and the largest module has 840.
    assert (guests == in_one_go) == (backbone == "frozen" or stretch == 2)
    lanes.close()


def test_only_one_stretch_of_copies_is_alive(model, lanes, monkeypatch):
    blocks: list[weakref.ref] = []
    most = 0

    def watching(weight, start, plus, minus, name, point):
        nonlocal most
        blocks.extend(weakref.ref(side.untyped_storage()) for side in (plus, minus))
        alive = {s.data_ptr(): s.nbytes() for s in (ref() for ref in blocks) if s is not None}
        most = max(most, sum(alive.values()))
        perturb(weight, start, plus, minus, name, point)

    perturb = lanes_module.perturb
    monkeypatch.setattr(lanes_module, "perturb", watching)
    lanes.start([Job(lambda m: m(X), point) for point in points(queries=2, repeats=2)])
    lanes.drive()
    # Both signs of twice the largest module that owns weights, each weight padded to 64 bytes.
    largest = sum(-(-p.numel() * 4 // 64) * 64 for p in model.blocks[0].inner.parameters())
    assert 2 * largest < most <= 2 * lanes_module._STRETCH * largest
    assert not any(ref() is not None for ref in blocks), "a copy outlived the forwards"


def test_copies_of_many_small_modules_stay_below_those_of_a_stretch(monkeypatch):
    """Adapters on a frozen backbone, all weights whole: nothing heavy comes that would have them dropped."""
    torch.manual_seed(1)
    model = Normed(blocks=200)  # 2,400 elements a direction, and the largest module has 840
    frozen = tuple(name for name, _ in model.named_parameters() if ".0." not in name[len("blocks.0") :])
    sides: list[weakref.ref] = []
    most = 0

    def watching(weight, start, plus, minus, name, point):
        nonlocal most
        sides.extend(weakref.ref(side) for side in (plus, minus))
        most = max(most, sum(side.numel() for side in (ref() for ref in sides) if side is not None))
        perturb(weight, start, plus, minus, name, point)

    perturb = lanes_module.perturb
    monkeypatch.setattr(lanes_module, "perturb", watching)
    lanes = Lanes(model, strip(model), Whole(model, frozen))
    jobs = [Job(lambda m: m(X), point) for point in points(queries=3)]
    lanes.run(jobs)
    raise_first(jobs)
    assert 2 * 840 < most <= 2 * lanes_module._STRETCH * 840
    for job in jobs:
        point = job.perturbation
        weights = {
            name: p
            if name in frozen
            else p + point.sign * EPS * noise(3, name, 0, p.numel(), query=point.query).view_as(p)
            for name, p in model.named_parameters()
        }
        with torch.no_grad():
            expected = torch.func.functional_call(model, weights, (X,))
        torch.testing.assert_close(job.result, expected, rtol=1e-5, atol=1e-6)
    lanes.close()


@dataclass
class Held:
    """An output that torch does not look into."""

    view: torch.Tensor


class Returned(nn.Module):
    """Modules that hand out their weight itself or a view of it, as position embeddings do."""

    class Holder(nn.Module):
        def __init__(self, kind: Callable) -> None:
            super().__init__()
            self.weight, self.kind = nn.Parameter(torch.randn(8, 6)), kind

        def forward(self, count: int) -> Any:
            return self.kind(view=self.weight[:count])

    def __init__(self, kind: Callable) -> None:
        super().__init__()
        self.first, self.second = self.Holder(kind), self.Holder(kind)
        self.third = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.first(4), self.second(4)
        # Read when the second module's copies are made.
        first, second = (held.view if isinstance(held, Held) else held["view"] for held in (first, second))
        return self.third(x) * first + second


@pytest.mark.parametrize("kind", [dict, Held])
def test_a_weight_that_a_module_returns_outlives_the_copies_of_the_next(kind):
    torch.manual_seed(1)
    model = Returned(kind)
    lanes = Lanes(model, strip(model), Whole(model))
    jobs = [Job(lambda m: m(X), point) for point in points(queries=2)]
    lanes.start(jobs)
    lanes.drive()
    for job in jobs:
        torch.testing.assert_close(job.result, moved(model, job.perturbation), rtol=1e-6, atol=1e-6)
    lanes.close()


class Head(nn.Module):
    """Owns a weight that it needs after a module that stands elsewhere in the model."""

    def __init__(self, other: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.other = [other] if hidden else nn.ModuleList([other])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale
        return self.other[0](x) * scale


class Shared(nn.Module):
    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = Head(self.first, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(x)))


@pytest.mark.parametrize("hidden", [False, True])
def test_the_copies_of_a_module_outlive_a_module_that_it_calls(hidden):
    torch.manual_seed(1)
    model = Shared(hidden)

    lanes = Lanes(model, strip(model), Whole(model))
    jobs = [Job(lambda m: m(X), point) for point in points(queries=2)]
    lanes.run(jobs)
    for job in jobs:
        # functional_call does not give a module that is registered twice its own weights back.
        expected = moved(copy.deepcopy(model), job.perturbation)
        torch.testing.assert_close(job.result, expected, rtol=1e-6, atol=1e-6)
    lanes.close()


@pytest.mark.parametrize("bad", [-1, 50])
def test_a_token_that_the_embedding_does_not_have_is_an_error(bad):
    model = Language(tied=True)
    lanes = Lanes(model, strip(model), OneUnitAtATime(model))
    with pytest.raises(IndexError, match=r"not among the 50 rows of embed\.weight"):
        lanes.run(jobs := [Job(lambda m: m(torch.tensor([[3, bad]])), points()[0])])
        raise_first(jobs)
    assert lanes._running == []
    lanes.close()


def test_a_gather_that_fails_leaves_no_guest_behind(model, lanes, weights):
    def fail(path: str):
        raise ConnectionError(path)

    weights.gather, gather = fail, weights.gather
    with pytest.raises(ConnectionError):
        lanes.run([Job(lambda m: m(X), point) for point in points()])
    weights.gather = gather
    jobs = [Job(lambda m: m(X), point) for point in points()]
    lanes.run(jobs)
    assert all(job.result is not None for job in jobs)


class Language(nn.Module):
    """Embedding and head, by turns tied."""

    def __init__(self, tied: bool, **embedding) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 6, **embedding)
        self.head = nn.Linear(6, 50, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class Stacked(nn.Module):
    """A large layer in a block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 50), nn.Linear(50, 6)])
        self.head = nn.Linear(6, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def test_layers_of_a_block_are_copied_for_both_signs_however_large(monkeypatch):
    monkeypatch.setattr(moved_module, "CHUNK", 100)
    monkeypatch.setattr(moved_module, "perturb", lambda *arguments: made.append(arguments[4]) or perturb(*arguments))
    perturb, made = lanes_module.perturb, []
    model = Stacked()
    lanes = Lanes(model, strip(model), OneUnitAtATime(model))
    lanes.run([Job(lambda m: m(torch.ones(2, 6)), point) for point in points()])
    assert set(made) == {"head.weight"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1 << 26, 100, 6, 1])
def test_rows_and_chunks_of_large_weights_are_made_where_they_are_read(monkeypatch, tied, chunk):
    monkeypatch.setattr(moved_module, "CHUNK", chunk)
    torch.manual_seed(1)
    model, ids = Language(tied, padding_idx=3), torch.tensor([[3, 7, 7], [49, 0, 3]])
    copied: list[int] = []
    places: set[int] = set()  # where the rows of heads are made

    def watching(weight, start, plus, minus, *arguments):
        copied.append(weight.numel())
        if weight.dim() == 2:
            places.update(side.data_ptr() for side in (plus, minus) if side is not None)
        perturb(weight, start, plus, minus, *arguments)

    perturb = moved_module.perturb
    for module in (lanes_module, moved_module):
        monkeypatch.setattr(module, "perturb", watching)
    lanes = Lanes(model, strip(model), OneUnitAtATime(model))
    jobs = [Job(lambda m: m(ids), point) for point in points(queries=2)]
    lanes.start(jobs)
    lanes.drive()
    for job in jobs:
        with torch.no_grad():
            weights = {
                name: p
                + job.perturbation.sign * EPS * noise(3, name, 0, p.numel(), query=job.perturbation.query).view_as(p)
                for name, p in model.named_parameters()
            }
            expected = torch.func.functional_call(model, weights, (ids,))
        torch.testing.assert_close(job.result, expected, rtol=1e-6, atol=1e-6)
    head = 50 * 6
    bias = 0 if tied else 50
    assert max(copied) == (head if chunk >= head else max(chunk // 6 * 6, 6, bias)), "a weight was copied whole"
    assert len(places) <= len(jobs), "chunks of a product were made in memory of their own"
    # Rows that are looked up are made apart, so a whole embedding is never copied.
    assert sum(size == head for size in copied) == (2 if chunk >= head else 0)
    lanes.close()


def test_a_row_that_is_looked_up_is_drawn_once_for_all_guests_of_a_direction(monkeypatch):
    drawn = []

    def counting(weight, rows, name, point):
        drawn.extend((name, point.query, row) for row in rows.tolist())
        return perturb_rows(weight, rows, name, point)

    perturb_rows = rows_module.perturb_rows
    monkeypatch.setattr(rows_module, "perturb_rows", counting)
    model = Language(tied=True)
    lanes = Lanes(model, strip(model), OneUnitAtATime(model))
    batches = [torch.tensor([[3, 7, 7], [49, 0, 3]]), torch.tensor([[7, 8]])]
    jobs = [Job(lambda m, ids=ids: m(ids), point) for ids in batches for point in points(queries=2)]
    lanes.run(jobs)
    raise_first(jobs)
    assert sorted(drawn) == [("embed.weight", query, row) for query in range(2) for row in (0, 3, 7, 8, 49)]
    lanes.run([Job(lambda m: m(batches[1]), point) for point in points()])
    assert len(drawn) == 12, "rows of an earlier step were used again"
    lanes.close()


def test_a_large_weight_gives_its_whole_copy_to_any_other_use():
    torch.manual_seed(1)
    weight, point = torch.randn(10, 4), Perturbation(3, 1, -1, EPS)
    whole = weight - EPS * noise(3, "w", 0, 40, query=1).view(10, 4)
    moved = Moved(weight, "w", point, Rows(weight, "w", point))
    assert (moved.shape, moved.dtype, moved.device, moved.numel(), moved.dim()) == (
        (10, 4),
        torch.float32,
        weight.device,
        40,
        2,
    )
    torch.testing.assert_close(moved + 1, whole + 1)
    torch.testing.assert_close(torch.ones(10) @ moved, whole.sum(0))
    torch.testing.assert_close(moved[[2, 5]], whole[[2, 5]])
    torch.testing.assert_close(moved.T.contiguous(), whole.T)
    torch.testing.assert_close(nn.functional.linear(torch.ones(2, 4), weight=moved), torch.ones(2, 4) @ whole.T)
    by_name = nn.functional.embedding(input=torch.tensor([2], dtype=torch.int32), weight=moved)
    torch.testing.assert_close(by_name, whole[[2]])
    for ids, unknown in (([3, -1], -1), ([3, 10], 10)):
        with pytest.raises(IndexError, match=f"token id {unknown} of a batch is not among the 10 rows of w"):
            nn.functional.embedding(torch.tensor(ids), moved)
    torch.testing.assert_close(torch.embedding(moved, torch.tensor([2])), whole[[2]])
    assert type(moved * 2) is torch.Tensor
    with torch.no_grad():
        itself = Moved(weight, "w", Perturbation(), None)
        assert torch.equal(itself + 0, weight)
        assert torch.equal(nn.functional.embedding(torch.tensor([2]), itself), weight[[2]])


def test_a_large_weight_that_a_module_returns_is_returned_whole():
    class Bare(nn.Embedding):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"weight": self.weight}

    model = nn.ModuleDict({"bare": Bare(5, 6)})
    lanes = Lanes(model, strip(model), OneUnitAtATime(model))
    job = Job(lambda m: m["bare"](X)["weight"], points()[0])
    lanes.run([job])
    assert type(job.result) is torch.Tensor
    expected = model["bare"].weight + EPS * noise(3, "bare.weight", 0, 30).view(5, 6)
    torch.testing.assert_close(job.result, expected.detach())
    lanes.close()


def test_the_same_guests_run_beside_a_host(model, lanes, weights):
    """Units are gathered by somebody else, and `advance` is called each time."""
    jobs = [Job(lambda m: m(X), point) for point in points()]
    lanes.start(jobs)
    order = ["blocks.0", "blocks.1", "blocks.2", "head"]
    for unit in order:
        assert all(job.result is None for job in jobs)
        weights.gathered = unit
        lanes.advance()
    assert weights.gathers == []
    assert all(job.result is not None for job in jobs)


class BrokenError(Exception):
    pass


def fail(m):
    m.blocks[0](X)
    raise BrokenError


def fail_at_once(m):
    raise BrokenError


def test_an_error_in_a_guest_stops_no_other_and_the_next_run_works(lanes):
    for _ in range(3):
        jobs = [Job(lambda m: m(X), point) for point in points()]
        lanes.run([*jobs, broken := Job(fail, points()[0])])
        assert isinstance(broken.error, BrokenError)
        assert all(job.result is not None for job in jobs)
        with pytest.raises(BrokenError):
            raise_first([*jobs, broken])
        jobs = [Job(lambda m: m(X), point) for point in points()]
        lanes.run(jobs)
        raise_first(jobs)
        assert all(job.result is not None for job in jobs)
    assert lanes._running == []


def test_a_rank_whose_guests_have_all_failed_gathers_on_for_the_others(lanes, weights):
    units = ["blocks.0", "blocks.1", "blocks.2", "head"]
    # What the others gather is not known yet: each gather is agreed on, as another rank's votes say here.
    votes = iter([*(f"blocks.{number}.inner" for number in range(3)), "head", ""])
    weights.agree = lambda path, failed: (next(votes), failed)
    lanes.run([job := Job(fail)], alike="test")
    assert isinstance(job.error, BrokenError) and weights.gathers == units
    del weights.agree
    lanes.run([Job(lambda m: m(X))], alike="test")
    lanes.run([Job(lambda m: m.head(X))])
    for failing in (fail, fail_at_once):
        weights.gathers.clear()
        lanes.run([job := Job(failing), Job(failing)], alike="test")
        assert isinstance(job.error, BrokenError)
        assert weights.gathers == units


def test_a_weight_read_outside_its_module_is_an_error_not_a_wrong_number(lanes):
    with pytest.raises(UserError, match=r"head\.weight is read outside"):
        lanes.run(jobs := [Job(lambda m: m.blocks[0](X) @ m.head.weight.T)])
        raise_first(jobs)


def test_threads_are_kept_between_runs_and_ended_by_close(model):
    lanes = Lanes(model, strip(model), OneUnitAtATime(model))
    seen = set()

    def run(m):
        seen.add(threading.current_thread())
        return m(X)

    for _ in range(4):
        lanes.start([Job(run, point) for point in points()])
        lanes.drive()
    assert len(seen) == 2 and all(thread.is_alive() and thread.daemon for thread in seen)
    lanes.close()
    for thread in seen:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in seen)


def test_guests_take_the_hosts_autocast_and_never_its_gradients(model, lanes):
    kinds = []

    def run(m):
        out = m(X)
        kinds.append((out.dtype, torch.is_grad_enabled()))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        lanes.start([Job(run, point) for point in points()])
        lanes.drive()
    lanes.start([Job(run, point) for point in points()])
    lanes.drive()
    assert kinds == [(torch.bfloat16, False)] * 2 + [(torch.float32, False)] * 2


def test_an_exception_of_a_signal_leaves_the_guests_in_order(lanes):
    """As Ctrl-C raises it while a guest is at work; the next forwards are whole."""
    expected = Job(lambda m: m(X))
    lanes.run([expected])

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            lanes.run([Job(lambda m: (time.sleep(0.5), m(X)))])
    finally:
        signal.signal(signal.SIGALRM, before)
    again = [Job(lambda m: m(X)), Job(lambda m: m(X))]
    lanes.run(again)
    for job in again:
        assert job.error is None and torch.equal(job.result, expected.result)
