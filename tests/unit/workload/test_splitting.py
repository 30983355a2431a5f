"""A batch is cut along its samples, whatever it is nested in."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.errors import WorkloadError
from rightbatch.workload.splitting import split_batch


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Encoding(dict):
    """A mapping class of its own, as tokenizers return."""


@given(count=st.integers(1, 60), most=st.integers(1, 70))
def test_parts_are_as_few_and_as_equal_as_may_be_and_hold_each_sample_once(count, most):
    parts = split_batch(torch.arange(count), most)
    sizes = [len(part) for part in parts]
    assert torch.equal(torch.cat(parts), torch.arange(count))
    assert len(parts) == -(-count // most)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= most


def test_every_kind_of_nesting_is_cut_and_keeps_its_kind():
    x = torch.arange(4.0)
    batch = Encoding(pair=Pair(x, x.unsqueeze(1)), listed=[x, (x, x)], texts=["a", "b", "c", "d"], ids=(1, 2, 3, 4))
    first, second = split_batch(batch, 2)
    assert type(first) is Encoding
    assert type(first["pair"]) is Pair
    assert second["pair"].y.tolist() == [[2.0], [3.0]]
    assert [type(part) for part in first["listed"]] == [torch.Tensor, tuple]
    assert first["listed"][1][0].tolist() == [0.0, 1.0]
    assert second["texts"] == ["c", "d"]
    assert second["ids"] == (3, 4)


def test_what_is_not_of_the_samples_is_in_every_part():
    shared, scalar, words = torch.zeros(7), torch.tensor(2.0), ["a", "b"]
    parts = split_batch({"x": torch.zeros(4, 2), "shared": shared, "scalar": scalar, "words": words, "flag": None}, 2)
    for part in parts:
        assert part["shared"] is shared
        assert part["scalar"] is scalar
        assert part["words"] == words
        assert part["flag"] is None


def test_a_batch_that_fits_is_left_as_it_is():
    batch = (torch.zeros(4), ["a"])
    assert split_batch(batch, 4)[0] is batch


def test_parts_are_views():
    x = torch.zeros(6)
    split_batch(x, 2)[1].fill_(1.0)
    assert x.tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(("batch", "message"), [(torch.zeros(0), "at least one sample; got none"), (["a"], "must hold a tensor")])
def test_a_batch_without_samples_is_refused(batch, message):
    with pytest.raises(WorkloadError, match=message):
        split_batch(batch, 2)
