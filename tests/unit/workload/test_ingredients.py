"""A workload that cannot work is refused when it is made, with the rule, what was got, and what to do."""

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rightbatch.errors import WorkloadError
from rightbatch.workload.ingredients import Workload, map_tensors, sample_count, tensors_of

SAMPLES = [(torch.zeros(3), 0), (torch.ones(3), 1)]
Pair = namedtuple("Pair", "left right")


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def made(**changes):
    return Workload(**({"model": lambda: nn.Linear(3, 2), "train": SAMPLES, "loss": cross_entropy, "optimizer": sgd} | changes))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


class BatchEncoding(UserDict):
    """Like a tokenizer's output: a mapping that is no dict, made from one."""


class Strict(UserDict):
    """A mapping whose constructor takes no mapping."""

    def __init__(self):
        super().__init__()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": nn.Linear(3, 2)},
        {"optimizer": None},
        {"loss": None, "step": lambda model, batch: model(batch)},
        {"train": TensorDataset(torch.zeros(4, 3), torch.zeros(4))},
        {"valid": SAMPLES, "metric": lambda output, target: 0.5, "collate_fn": list},
        {"lr_batch_size": 1, "num_workers": 0, "clip_norm": 1e-9},
        {"precision": "bf16", "channels_last": True, "compile": True, "couples_samples": True, "name": "x"},
    ],
)
def test_a_sound_workload_is_accepted(changes):
    workload = made(**changes)
    assert all(getattr(workload, field) is value for field, value in changes.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, r"model must be a torch\.nn\.Module or a function that builds one; got int"),
        ({"loss": None}, r"needs a loss or a step; got neither; give loss=torch\.nn\.functional\.cross_entropy"),
        ({"step": lambda model, batch: None}, "takes either loss or step; got both; drop loss"),
        ({"loss": 0.5}, r"loss must be callable; got float; see help\(rightbatch\.Workload\)"),
        ({"loss": None, "step": "step"}, r"step must be callable; got str; see help"),
        (
            {"loss": nn.CrossEntropyLoss},
            r"loss must be a function or a module; got the class CrossEntropyLoss; .* loss=CrossEntropyLoss\(\)",
        ),
        ({"optimizer": "sgd"}, "optimizer must be callable; got str"),
        (
            {"optimizer": sgd(nn.Linear(1, 1).parameters())},
            r"optimizer must be a function .*; got an SGD; give optimizer=lambda params: .*SGD",
        ),
        ({"collate_fn": 1}, "collate_fn must be callable; got int"),
        ({"metric": 0.9}, "metric must be callable; got float"),
        ({"train": []}, "train must hold at least one sample; got an empty list; check its path and its filters"),
        ({"valid": []}, "valid must hold at least one sample; got an empty list"),
        ({"train": None}, "train must be a map-style dataset with __len__ and __getitem__; got NoneType; for a stream, give a list"),
        ({"train": Stream()}, "train must be a map-style dataset with __len__ and __getitem__; got Stream; for a stream"),
        ({"train": iter(SAMPLES)}, "train must be a map-style dataset .*; got list_iterator"),
        ({"valid": 7}, "valid must be a map-style dataset .*; got int"),
        ({"train": DataLoader(SAMPLES)}, r"train must be a dataset; got a DataLoader; give its \.dataset"),
        ({"train": {"a": 1}}, r"train must be indexed by 0, 1, 2, \.\.\.; got a mapping \(dict\); give a list of its values"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16, fp64; got 'int8'"),
        ({"lr_batch_size": 0}, "lr_batch_size must be a positive integer; got 0; give the size the rate was tuned at"),
        ({"lr_batch_size": 12.5}, r"lr_batch_size must be a positive integer; got 12\.5"),
        ({"lr_batch_size": True}, "lr_batch_size must be a positive integer; got True"),
        ({"lr_batch_size": 32, "optimizer": None}, "lr_batch_size=32 says where a rate was tuned, so it needs the optimizer .*; got none"),
        ({"num_workers": -1}, "num_workers must be 0 or more; got -1"),
        ({"num_workers": 1.5}, r"num_workers must be 0 or more; got 1\.5"),
        ({"num_workers": False}, "num_workers must be 0 or more; got False"),
        ({"clip_norm": 0}, "clip_norm must be positive; got 0; give None not to clip"),
        ({"clip_norm": float("nan")}, "clip_norm must be positive; got nan"),
        ({"clip_norm": "1"}, "clip_norm must be positive; got '1'"),
    ],
)
def test_an_ingredient_that_cannot_work_is_refused_with_what_to_do(changes, message):
    with pytest.raises(WorkloadError, match=message):
        made(**changes)


def test_a_workload_cannot_be_changed():
    with pytest.raises(AttributeError):
        made().precision = "fp16"


A, B, C = torch.zeros(4, 2), torch.ones(4), torch.full((4, 1), 2.0)


@pytest.mark.parametrize(
    ("batch", "tensors"),
    [
        (A, [A]),
        ((A, B), [A, B]),
        ([A, [B, (C,)]], [A, B, C]),
        ({"x": A, "more": {"y": B}}, [A, B]),
        (Pair(A, [B]), [A, B]),
        (BatchEncoding(x=A, y=B), [A, B]),
        ({"text": "words", "n": 3, "x": A, "none": None}, [A]),
        ("words", []),
    ],
    ids=["tensor", "tuple", "nested", "dict", "named tuple", "mapping class", "with other things", "no tensor"],
)
def test_tensors_are_found_and_mapped_in_any_nesting(batch, tensors):
    found = tensors_of(batch)
    assert len(found) == len(tensors)
    assert all(x is y for x, y in zip(found, tensors, strict=True))
    mapped = map_tensors(lambda tensor: tensor + 1, batch)
    assert type(mapped) is type(batch)
    assert all(torch.equal(x, y + 1) for x, y in zip(tensors_of(mapped), tensors, strict=True))


def test_what_is_no_tensor_stays_and_structure_is_kept():
    mapped = map_tensors(lambda tensor: tensor * 2, Pair({"x": B, "name": "n"}, (3, [C])))
    assert (mapped.left["name"], mapped.right[0]) == ("n", 3)
    assert torch.equal(mapped.left["x"], B * 2)
    assert isinstance(mapped.right[1], list)


def test_an_ordered_mapping_keeps_its_class_and_order():
    mapped = map_tensors(torch.neg, OrderedDict(b=A, a=B))
    assert isinstance(mapped, OrderedDict)
    assert list(mapped) == ["b", "a"]


def test_a_mapping_whose_class_takes_no_mapping_becomes_a_dict():
    strict = Strict()
    strict["x"] = B
    mapped = map_tensors(torch.neg, strict)
    assert type(mapped) is dict
    assert torch.equal(mapped["x"], -B)


def test_mapping_leaves_the_batch_as_it_was():
    batch = {"x": A, "pair": (B, C)}
    map_tensors(lambda tensor: tensor + 1, batch)
    assert batch["x"] is A
    assert batch["pair"] == (B, C)


@pytest.mark.parametrize(
    ("batch", "count"), [(A, 4), ((A, B), 4), ({"n": torch.tensor(9), "x": torch.zeros(5, 2)}, 5), (BatchEncoding(x=torch.zeros(2, 7)), 2)]
)
def test_samples_are_counted_by_the_first_tensor_with_a_dimension(batch, count):
    assert sample_count(batch) == count


@pytest.mark.parametrize(("batch", "got"), [(3, "int"), ([], "list"), ({"x": "words"}, "dict"), (torch.tensor(1.0), "Tensor")])
def test_a_batch_without_samples_is_refused(batch, got):
    with pytest.raises(WorkloadError, match=f"first dimension is the samples; got {got}; check collate_fn"):
        sample_count(batch)
