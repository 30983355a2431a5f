"""Sums over blocks say the same as keeping every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oracles import oracle_gradients
from rightbatch.engine.gradients import GradientBlocks, block_limit, flat_gradient

TOLERANCE = 1e-12


def random_gradients(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(count)]


def blocks_of(gradients, most_blocks):
    blocks = GradientBlocks(most_blocks)
    assert all(blocks.add(gradient) for gradient in gradients)
    return blocks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(count=st.integers(1, 70), most_blocks=st.sampled_from([2, 4, 6, 8, 64]), seed=st.integers(0, 100))
def test_block_sums_equal_those_of_all_gradients_kept(count, most_blocks, seed):
    gradients = random_gradients(count, seed)
    blocks = blocks_of(gradients, most_blocks)
    assert blocks.micro_batch_count == count
    assert blocks.counts() == oracle_gradients.counts(gradients, most_blocks)
    assert blocks.sq_norm_sums() == pytest.approx(oracle_gradients.sq_norm_sums(gradients, most_blocks), rel=TOLERANCE)
    for row, expected in zip(blocks.gram(), oracle_gradients.gram(gradients, most_blocks), strict=True):
        assert row == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_weights_multiply_the_sums_and_enter_square_norms_once():
    blocks = GradientBlocks(2)
    for weight, value in ((1.0, 1.0), (0.5, 4.0), (2.0, 3.0)):
        blocks.add(torch.full((1,), value), weight=weight)

    assert blocks.counts() == (2, 1)
    assert blocks.sq_norm_sums() == (1 + 0.5 * 16, 2 * 9)
    assert blocks.gram() == ((9.0, 18.0), (18.0, 36.0))


@pytest.mark.parametrize(
    ("count", "counts"), [(4, (1,) * 4), (5, (2, 2, 1)), (7, (2, 2, 2, 1)), (8, (2,) * 4), (9, (4, 4, 1)), (11, (4, 4, 3))]
)
def test_full_blocks_are_merged_in_pairs_and_the_last_may_be_uneven(count, counts):
    assert blocks_of(random_gradients(count), 4).counts() == counts


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("before", [0, 3, 5])
def test_a_gradient_that_is_not_finite_is_refused_and_leaves_nothing(bad, before):
    gradients = random_gradients(before)
    blocks = blocks_of(gradients, 4)
    kept = (blocks.counts(), blocks.sq_norm_sums(), blocks.gram())
    assert not blocks.add(torch.tensor([1.0, bad, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert (blocks.counts(), blocks.sq_norm_sums(), blocks.gram()) == kept


def test_a_gradient_changed_after_it_was_added_changes_nothing():
    gradient = torch.ones(3)
    blocks = blocks_of([gradient], 2)
    gradient.mul_(100)
    assert blocks.gram() == ((3.0,),)


def test_norms_of_single_precision_gradients_are_summed_in_double():
    gradient = torch.full((2**16,), 1e-4)
    blocks = blocks_of([gradient], 2)
    assert blocks.sq_norm_sums()[0] == pytest.approx(float((gradient.double() ** 2).sum()), rel=1e-10)


@pytest.mark.parametrize("most_blocks", [0, 1, 3, -2])
def test_an_odd_number_of_blocks_is_refused(most_blocks):
    with pytest.raises(ValueError, match=f"even and at least 2; got {most_blocks}"):
        GradientBlocks(most_blocks)


@pytest.mark.parametrize(
    ("parameter_bytes", "budget", "limit"), [(1, 2**30, 64), (2**24, 2**30, 64), (2**26, 2**30, 16), (2**40, 2**30, 8)]
)
def test_the_number_of_blocks_fits_the_budget(parameter_bytes, budget, limit):
    assert block_limit(parameter_bytes, budget) == limit


def test_a_parameter_without_gradient_counts_as_zero():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    (2 * used).sum().backward()
    assert flat_gradient((unused, used)).tolist() == [0, 0, 0, 2, 2]


def test_a_sparse_gradient_is_made_dense():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    assert flat_gradient(tuple(embedding.parameters())).tolist() == [0, 0, 2, 2, 0, 0, 0, 0]


def test_a_complex_gradient_is_flattened_to_its_real_parts():
    used, unused = (nn.Parameter(torch.zeros(2, dtype=torch.complex64)) for _ in range(2))
    used.grad = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert flat_gradient((used, unused)).tolist() == [1, -2, 3, 4, 0, 0, 0, 0]
