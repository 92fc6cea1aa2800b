import pytest
import torch

from addax_ds.core import cpu, plain
from addax_ds.core.kernels import noise
from addax_ds.core.noise import noise as defined_noise
from addax_ds.core.plain import Perturbation, Step

DTYPES = [torch.float32, torch.bfloat16]
DISTRIBUTIONS = ["normal", "rademacher"]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weights(n, dtype, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def a_step(**changes):
    values = {
        "seed": 11,
        "lr": 1e-2,
        "weight_decay": 0.1,
        "gradient_weight": 0.7,
        "coefficients": (0.3, -0.2),
        "distribution": "normal",
        "stochastic": True,
    }
    return Step(**{**values, **changes})


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 5000), (2047, 2049), (2**33 + 5, 2**33 + 100_000)])
def test_cpu_noise_is_the_defined_one_bit_for_bit(threads, distribution, start, stop):
    drawn = noise(7, "w", start, stop, query=3, distribution=distribution)
    assert torch.equal(drawn, defined_noise(7, "w", start, stop, query=3, distribution=distribution))


def perturbed(kernels, weight, point, start=0):
    """W + scale z and W - scale z."""
    plus, minus = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    kernels.perturb(weight, start, plus, minus, "w", point)
    return plus, minus


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (401, 257)])
@pytest.mark.parametrize("start", [0, 2047, 2**33 + 5])
def test_cpu_perturbation_is_the_plain_one_bit_for_bit(threads, dtype, distribution, shape, start):
    weight, point = weights(torch.Size(shape).numel(), dtype).view(shape), Perturbation(5, 2, 1, 1e-3, distribution)
    untouched = weight.clone()
    pair = perturbed(cpu, weight, point, start)
    for ours, theirs in zip(pair, perturbed(plain, weight, point, start), strict=True):
        assert torch.equal(ours, theirs)
    for side in (0, 1):  # one without the other
        alone = [None, None]
        alone[side] = torch.empty_like(weight)
        cpu.perturb(weight, start, *alone, "w", point)
        assert torch.equal(alone[side], pair[side])
    assert torch.equal(weight, untouched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("backend", [plain, cpu])
def test_a_side_alone_may_be_the_weight_itself(threads, backend, dtype, distribution):
    weight, point = weights(100_000, dtype), Perturbation(5, 2, 1, 1e-3, distribution)
    for side, expected in enumerate(perturbed(plain, weight, point, 3)):
        moved = weight.clone()
        backend.perturb(moved, 3, *((moved, None) if side == 0 else (None, moved)), "w", point)
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(50, 7), (9, 3, 5), (6, 4097), (11,)])
def test_perturbed_rows_are_those_of_the_whole(dtype, distribution, shape):
    weight, rows = weights(torch.Size(shape).numel(), dtype).view(shape), torch.tensor([5, 0, 3, 3])
    for kernels in (cpu, plain):
        point = Perturbation(5, 2, 1, 1e-3, distribution)
        moved = kernels.perturb_rows(weight, rows, "w", point)
        none = kernels.perturb_rows(weight, rows[:0], "w", point)
        for side, whole in enumerate(perturbed(kernels, weight, point)):
            assert torch.equal(moved[side], whole[rows])
            assert none[side].shape == (0, *shape[1:])


def test_a_transposed_weight_is_perturbed_in_row_major_order():
    weight, point = weights(35, torch.float32).view(5, 7).t(), Perturbation(5, 0, 1, 0.5)
    plus, minus = perturbed(cpu, weight, point)
    torch.testing.assert_close(plus - weight, 0.5 * defined_noise(5, "w", 0, 35).view(7, 5), rtol=1e-5, atol=1e-6)
    above, below = cpu.perturb_rows(weight, torch.tensor([4, 1]), "w", point)
    assert torch.equal(above, plus[[4, 1]]) and torch.equal(below, minus[[4, 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize(("start", "n"), [(0, 1), (1234, 5000), (2**33 + 3, 70_000)])
def test_cpu_update_is_the_plain_one_bit_for_bit(threads, dtype, stochastic, distribution, with_gradient, start, n):
    gradient = weights(n, dtype, seed=1) if with_gradient else None
    step = a_step(distribution=distribution, stochastic=stochastic)
    ours, theirs = weights(n, dtype), weights(n, dtype)
    cpu.update(ours, start, gradient, "w", step)
    plain.update(theirs, start, gradient, "w", step)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_updated_apart_make_the_whole_updated_at_once(dtype):
    whole, gradient = weights(9001, dtype), weights(9001, torch.float32, seed=1)
    parts = whole.clone()
    cpu.update(whole, 0, gradient, "w", a_step())
    for begin, end in ((0, 0), (0, 1), (1, 4097), (4097, 9001), (9001, 9001)):
        cpu.update(parts[begin:end], begin, gradient[begin:end], "w", a_step())
    assert torch.equal(parts, whole)


def test_update_follows_the_formula_of_the_step():
    before, gradient, step = weights(4096, torch.float32), weights(4096, torch.float32, seed=1), a_step()
    after = before.clone()
    cpu.update(after, 100, gradient, "w", step)
    z = [defined_noise(step.seed, "w", 100, 4196, query=query).double() for query in range(2)]
    direction = 0.7 * gradient.double() + 0.3 * z[0] - 0.2 * z[1]
    expected = before.double() * (1 - step.lr * step.weight_decay) - step.lr * direction
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-7)


def test_stochastic_rounding_keeps_on_average_what_nearest_loses():
    start, steps, size = torch.full((1 << 16,), 0.02).to(torch.bfloat16), 100, 1e-6
    kept = {}
    for stochastic in (True, False):
        w = start.clone()
        for seed in range(steps):
            step = a_step(
                seed=seed, lr=1.0, weight_decay=0.0, gradient_weight=1.0, coefficients=(), stochastic=stochastic
            )
            cpu.update(w, 0, torch.full((len(w),), size), "w", step)
        kept[stochastic] = ((start.float() - w.float()).double().mean() / (steps * size)).item()
    # Rounding to a grid of 2**-13: the mean of 6.5 million draws is good to a few per cent.
    assert abs(kept[True] - 1) < 0.1
    assert kept[False] < 0.05


def test_stochastic_rounding_repeats_with_its_seed_and_differs_with_another():
    def rounded(seed):
        w = weights(4096, torch.bfloat16)
        cpu.update(w, 0, torch.full((4096,), 1e-3), "w", a_step(seed=seed, coefficients=()))
        return w

    assert torch.equal(rounded(1), rounded(1))
    assert not torch.equal(rounded(1), rounded(2))


@pytest.mark.parametrize("stochastic", [True, False])
def test_weights_that_are_not_finite_stay_so(stochastic):
    for kernels in (cpu, plain):
        w = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(torch.bfloat16)
        kernels.update(w, 0, torch.zeros(3), "w", a_step(coefficients=(), weight_decay=0.0, stochastic=stochastic))
        assert w[0] == torch.inf and w[1] == -torch.inf and w[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", [cpu, plain])
def test_gradient_elements_that_are_not_finite_count_as_zero(threads, kernels, dtype):
    n = 300_001
    gradient = weights(n, dtype, seed=1)
    bad = torch.rand(n, generator=torch.Generator().manual_seed(2)) < 0.01
    zeroed = gradient.masked_fill(bad, 0.0)
    values = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    gradient[bad] = values[torch.arange(int(bad.sum())) % 3]
    ours, theirs = weights(n, dtype), weights(n, dtype)
    left_out = torch.tensor(3)
    kernels.update(ours, 5, gradient, "w", a_step(), left_out)
    kernels.update(theirs, 5, zeroed, "w", a_step(), left_out)
    assert left_out == 3 + bad.sum() > 3
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_of_shards_adds_up_to_that_of_the_whole(threads, dtype):
    w = weights(200_001, dtype)
    whole = cpu.digest(w, 0)
    assert sum(cpu.digest(w[b:e], b) for b, e in ((0, 5), (5, 5), (5, 100_000), (100_000, 200_001))) % 2**64 == whole
    assert cpu.digest(w.flip(0), 0) != whole
    w[77] = torch.nextafter(w[77].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else -w[77]
    assert cpu.digest(w, 0) != whole


def test_gathered_storage_can_still_be_resized_after_a_perturbation():
    # FSDP2 frees gathered weights by resizing their storage, which Tensor.numpy() would forbid.
    weight = weights(64, torch.float32)
    perturbed(cpu, weight, Perturbation(5, 0, 1, 1e-3))
    weight.untyped_storage().resize_(0)
