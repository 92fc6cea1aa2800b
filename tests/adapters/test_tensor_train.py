"""A tensor-train layer is the linear layer whose matrix its cores describe."""

import itertools
import math

import pytest
import torch

from addax_ds import UserError
from addax_ds.adapters import TensorTrainLinear, balanced_factors

SHAPES = [
    # inputs, outputs, rank, modes of either side
    (24, 10, 3, None, None),
    (15, 7, 2, None, None),
    (1, 3, 2, None, None),
    (97, 64, 4, None, None),
    (4096, 64, 5, (16, 16, 16), (4, 4, 4)),
    (64, 4096, 5, (4, 4, 4), (16, 16, 16)),
    (1024, 64, 5, (8, 8, 16), (8, 8)),
    (12, 6, 1, (3, 4), (6,)),
]


@pytest.mark.parametrize(
    ("inputs", "outputs", "rank", "in_modes", "out_modes", "groups"),
    [(*shape, groups) for shape in SHAPES for groups in (2, 3, 4) if shape[0] != 12 or groups < 4],
)
def test_both_contractions_multiply_by_the_matrix(inputs, outputs, rank, in_modes, out_modes, groups):
    torch.manual_seed(0)
    layer = TensorTrainLinear(inputs, outputs, rank, in_modes, out_modes, groups=groups).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, inputs, dtype=torch.float64)
    expected = x @ layer.matrix() + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.sequential(x), expected, rtol=1e-12, atol=1e-12)


def test_an_element_is_the_product_of_its_slices():
    torch.manual_seed(0)
    layer = TensorTrainLinear(12, 10, 3, (4, 3), (2, 5)).double()
    matrix = layer.matrix()
    for i in itertools.product(range(4), range(3)):
        for j in itertools.product(range(2), range(5)):
            product = torch.eye(1, dtype=torch.float64)
            for core, index in zip(layer.cores, (*i, *j), strict=True):
                product = product @ core[:, index]
            assert matrix[3 * i[0] + i[1], 5 * j[0] + j[1]].item() == pytest.approx(product.item(), rel=1e-12)


def test_against_tensorly():
    tensorly = pytest.importorskip("tensorly", reason="a check against another library: pip install tensorly")
    from tensorly.tt_tensor import tt_to_tensor

    tensorly.set_backend("numpy")
    layer = TensorTrainLinear(24, 36, 4, (2, 3, 4), (6, 6)).double()
    whole = tt_to_tensor([core.detach().numpy() for core in layer.cores])
    torch.testing.assert_close(layer.matrix().detach(), torch.from_numpy(whole).reshape(24, 36))


def test_gradients_are_those_of_the_matrix():
    torch.manual_seed(0)
    layer = TensorTrainLinear(12, 10, 3).double()
    inputs = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (inputs, *layer.parameters()))


def test_the_matrix_is_never_built():
    """Neither forwards nor backwards does an operation return as many numbers as W has."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.numel = max(self.numel, *sizes, 0)
            return result

    layer = TensorTrainLinear(4096, 4096, 5, (16, 16, 16), (16, 16, 16))
    x = torch.randn(3, 4096, requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    # Chains: 5 x 4096; what passes between them: 3 rows.
    assert 0 < largest.numel <= 5 * 5 * 4096 < 4096 * 4096
    with Largest() as of_the_matrix:
        layer.matrix()
    assert of_the_matrix.numel == 4096 * 4096


def test_it_computes_in_its_own_type_and_answers_in_that_of_x():
    torch.manual_seed(0)
    layer = TensorTrainLinear(24, 16, 3)
    x = torch.randn(5, 24).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


def test_new_cores_have_the_variance_of_a_linear_layer():
    torch.manual_seed(0)
    variances = [TensorTrainLinear(576, 64, 5).matrix().var() * 576 for _ in range(50)]
    assert torch.stack(variances).mean().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("number", "count", "factors"),
    [
        (4096, 3, (16, 16, 16)),
        (64, 3, (4, 4, 4)),
        (1024, 3, (16, 8, 8)),
        (576, 3, (9, 8, 8)),
        (97, 3, (97, 1, 1)),
        (1, 2, (1, 1)),
        (5120, 4, (10, 8, 8, 8)),
    ],
)
def test_factors_are_balanced(number, count, factors):
    assert balanced_factors(number, count) == factors


def test_factors_multiply_to_the_number_and_none_could_be_smaller():
    for number in range(1, 400):
        factors = balanced_factors(number, 3)
        assert math.prod(factors) == number and list(factors) == sorted(factors, reverse=True)
        divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
        every = [(a, b, number // (a * b)) for a in divisors for b in divisors if number % (a * b) == 0]
        assert max(factors) == min(max(split) for split in every)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "tensor-train rank is 0: set it to 1 or more"),
        (
            {"in_modes": (5, 5)},
            r"modes \[5, 5\] multiply to 25, and the layer has 24 inputs: give factors of 24, for .*",
        ),
        ({"out_modes": ()}, r"modes \[\] .* has 10 outputs"),
        ({"in_modes": (-4, -6)}, "has 24 inputs"),
        ({"groups": 1}, "groups is 1: set it to 2, 3 or 4"),
        ({"groups": 4, "in_modes": (24,), "out_modes": (2, 5)}, "4 groups are more than 3 cores allow"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        TensorTrainLinear(24, 10, **{"rank": 2, **settings})
