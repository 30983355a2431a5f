"""The comparison of loaders gives each as many samples, and its goals say what was compared."""

import torch

import rightbatch as rb
from loader_overhead import goals_of, measure, rows_of


def workload():
    samples = [(torch.randn(3), index % 2) for index in range(16)]
    return rb.Workload(model=lambda: torch.nn.Linear(3, 2), train=samples, loss=torch.nn.functional.cross_entropy)


def test_every_loader_gives_the_same_number_of_samples_in_a_block():
    given = []
    row = measure(workload(), 4, 0, use=lambda batch: given.append(len(batch[1])), samples_of_block=8, rounds=3)
    loaders = len(row["ratios"]) + 1
    assert given == [4] * (2 * loaders * 4)  # two batches a block, a block to warm up and three rounds
    assert {"BatchLoader", "DataLoader again"} <= row["ratios"].keys()
    assert all(low <= row["ratios"][name] <= high for name, (low, high) in row["intervals_95"].items())


def test_goals_are_those_of_training_steps(monkeypatch):
    monkeypatch.setattr("loader_overhead.WORKERS", (0,))
    monkeypatch.setattr("loader_overhead.SAMPLES_OF_BLOCK", {"training steps": 32, "bare": 32})
    rows = rows_of("linear", workload(), 2, say=lambda _: None)
    rows[0]["ratios"]["BatchLoader"] = 1.03
    goals = goals_of(rows)
    assert len(rows) == 4
    assert [(goal["value"], goal["holds"]) for goal in goals[:1]] == [(1.03, False)]
    assert [goal["name"].split(":")[0] for goal in goals] == ["linear, batch 32, 0 workers", "linear, batch 256, 0 workers"]
