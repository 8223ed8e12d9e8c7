"""A small convolutional classifier, the reader of what was drawn."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from denoiser.data import SIDE, Digits
from denoiser.network import WEIGHTS

FILE = "classifier.safetensors"
BATCH = 64


class Classifier(nn.Module):
    """Images ``[N, 64]`` from -1 to 1 in, logits ``[N, 10]`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 16, 64)
        self.last = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        planes = functional.relu(self.first(images.reshape(-1, 1, SIDE, SIDE)))
        planes = functional.max_pool2d(functional.relu(self.second(planes)), 2)
        hidden = functional.relu(
            self.hidden(functional.dropout(planes.flatten(1), 0.3, self.training))
        )
        logits: Tensor = self.last(hidden)
        return logits


def train_classifier(digits: Digits, *, seed: int, epochs: int = 30) -> Classifier:
    """A classifier for those images, the same for the same seed."""
    torch.manual_seed(seed)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        order = torch.randperm(len(digits))
        for first in range(0, len(digits), BATCH):
            batch = order[first : first + BATCH]
            images = digits.images[batch] + 0.1 * torch.randn(len(batch), SIDE * SIDE)
            loss = functional.cross_entropy(classifier(images), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return classifier.train(False)


def load_classifier(weights: Path = WEIGHTS) -> Classifier:
    """The classifier that was trained beside the branches."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(weights / FILE))
    return classifier.train(False)


@torch.no_grad()
def read(classifier: Classifier, images: Tensor) -> Tensor:
    """What digit each image ``[N, 64]`` shows: int64 ``[N]``."""
    labels: Tensor = classifier(images).argmax(1)
    return labels
