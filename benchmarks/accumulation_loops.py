"""One epoch of accumulated training by each tool, in the order of the data: its gradients at every optimizer step, and its weights.

Needs torch and the tool only, so that it runs in the peers' environment: python benchmarks/accumulation_loops.py TOOL
Prints one JSON document, {case: {"gradients": [[...], ...], "weights": [...]}}. The tool ``whole`` is the oracle: each window as one batch.
"""

import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, SequentialSampler

MICRO, ACCUMULATION, CLASSES, TOKENS, LR = 4, 3, 5, 6, 0.1
CLASS_WEIGHTS = torch.tensor([0.1, 0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """What is trained on.

    Attributes:
        samples: In the epoch; a window is 3 micro-batches of 4.
        ignores: Whether samples have between one and six tokens that count.
        class_weights: Whether classes weigh differently.
        clip_norm: Largest norm of the gradient.
    """

    samples: int
    ignores: bool = False
    class_weights: bool = False
    clip_norm: float | None = None


CASES = {
    "equal": Case(samples=24),
    "ragged tail": Case(samples=22),
    "partial last window": Case(samples=20),
    "unequal token counts": Case(samples=24, ignores=True),
    "class weights": Case(samples=24, class_weights=True),
    "clipped": Case(samples=24, clip_norm=0.05),
    "all of it": Case(samples=21, ignores=True, class_weights=True, clip_norm=0.05),
}


class Tagger(nn.Module):
    """Classifies each token; the loss is torch's mean over what counts.

    Args:
        weight: Of the classes.
    """

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scores = nn.Sequential(nn.Conv1d(7, 8, 1), nn.Tanh(), nn.Conv1d(8, CLASSES, 1)).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
        self.weight = weight

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.scores(x), labels, weight=self.weight)}


class CountingTagger(Tagger):
    """The same as models of transformers write it: a sum over the micro-batch, divided by what Trainer counted in the window."""

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any) -> dict[str, Tensor]:
        if num_items_in_batch is None:
            return super().forward(x, labels)
        return {"loss": cross_entropy(self.scores(x), labels, weight=self.weight, reduction="sum") / num_items_in_batch}


def samples_of(case: Case) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(case.samples):
        labels = torch.randint(0, CLASSES, (TOKENS,), generator=generator)
        counted = int(torch.randint(1, TOKENS + 1, (), generator=generator)) if case.ignores else TOKENS
        labels[counted:] = IGNORED
        samples.append({"x": torch.randn(7, TOKENS, generator=generator, dtype=torch.float64), "labels": labels})
    return samples


class Recorder:
    """Notes the gradient of every optimizer step."""

    def __init__(self, case: Case, *, lr: float, tagger: type[Tagger] = Tagger) -> None:
        self.model = tagger(CLASS_WEIGHTS if case.class_weights else None)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.gradients: list[list[float]] = []
        self.optimizer.register_step_post_hook(self._note)  # Lightning runs the backward pass within the step

    def _note(self, *_: object) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).tolist())

    def weights(self) -> list[float]:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()]).tolist()


def loader_of(case: Case, size: int) -> "DataLoader[Any]":
    return DataLoader(samples_of(case), batch_size=size, shuffle=False)  # type: ignore[arg-type]  # a list is a dataset


def whole(case: Case, recorder: Recorder) -> None:
    """The oracle: each window as one batch."""
    for batch in loader_of(case, MICRO * ACCUMULATION):
        recorder.optimizer.zero_grad()
        recorder.model(**batch)["loss"].backward()
        if case.clip_norm is not None:
            nn.utils.clip_grad_norm_(recorder.model.parameters(), case.clip_norm)
        recorder.optimizer.step()


def usual(case: Case, recorder: Recorder) -> None:
    """The loop of most tutorials."""
    loader = loader_of(case, MICRO)
    for index, batch in enumerate(loader):
        (recorder.model(**batch)["loss"] / ACCUMULATION).backward()
        if (index + 1) % ACCUMULATION == 0 or index + 1 == len(loader):
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_(recorder.model.parameters(), case.clip_norm)
            recorder.optimizer.step()
            recorder.optimizer.zero_grad()


def ours(case: Case, recorder: Recorder) -> None:
    """Stepper on global batches."""
    import rightbatch as rb

    plan = rb.BatchPlan(global_batch_size=MICRO * ACCUMULATION, micro_batch_size=MICRO, accumulation_steps=ACCUMULATION)
    loss = partial(cross_entropy, weight=recorder.model.weight)
    stepper = rb.Stepper(recorder.model.scores, recorder.optimizer, loss, plan, clip_norm=case.clip_norm)
    for batch in loader_of(case, MICRO * ACCUMULATION):
        stepper((batch["x"], batch["labels"]))


def lightning(case: Case, recorder: Recorder) -> None:
    """Lightning's Trainer with accumulate_grad_batches."""
    import lightning.pytorch as pl  # type: ignore[import-not-found]

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = recorder.model

        def training_step(self, batch: Any, _index: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return recorder.optimizer

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=case.clip_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader_of(case, MICRO))


def accelerate(case: Case, recorder: Recorder) -> None:
    """Accelerate's accumulate, as its guide writes it."""
    from accelerate import Accelerator  # type: ignore[import-not-found]

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
    model, optimizer, loader = accelerator.prepare(recorder.model, recorder.optimizer, loader_of(case, MICRO))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if case.clip_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), case.clip_norm)
            optimizer.step()
            optimizer.zero_grad()


def transformers(case: Case, recorder: Recorder) -> None:
    """Transformers' Trainer, with gradient_accumulation_steps."""
    from transformers import Trainer, TrainingArguments  # type: ignore[import-not-found]

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: object) -> "SequentialSampler":
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=ACCUMULATION,
            max_grad_norm=case.clip_norm or 0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        constant = torch.optim.lr_scheduler.LambdaLR(recorder.optimizer, lambda _: 1.0)
        InOrder(
            model=recorder.model, args=arguments, train_dataset=samples_of(case), optimizers=(recorder.optimizer, constant)
        ).train()  # fmt: skip


Tool = Callable[[Case, Recorder], None]
TOOLS: dict[str, tuple[Tool, type[Tagger]]] = {
    "whole": (whole, Tagger),
    "ours": (ours, Tagger),
    "usual loop": (usual, Tagger),
    "lightning": (lightning, Tagger),
    "accelerate": (accelerate, Tagger),
    "transformers": (transformers, Tagger),
    "transformers, counting": (transformers, CountingTagger),
}
PEERS = {"lightning": "lightning", "accelerate": "accelerate", "transformers": "transformers", "transformers, counting": "transformers"}
"""The package that each needs."""


def run(name: str, cases: Sequence[str] = tuple(CASES)) -> dict[str, dict[str, object]]:
    """Gradients of an epoch at rate 0, which leaves them comparable, and weights after one at a real rate."""
    tool, tagger = TOOLS[name]
    results = {}
    for case_name in cases:
        case = CASES[case_name]
        still, moving = Recorder(case, lr=0.0, tagger=tagger), Recorder(case, lr=LR, tagger=tagger)
        for recorder in (still, moving):
            tool(case, recorder)
        results[case_name] = {"gradients": still.gradients, "weights": moving.weights()}
    return results


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):  # a peer's own words
        results = run(sys.argv[1])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
