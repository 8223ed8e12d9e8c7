"""Train both branches and the classifier, and write them to ``weights/``.

Takes some minutes on a GPU, and longer on two cores. What is written has no outliers to speak of:
``plant.py`` comes after it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from denoiser.classifier import FILE as CLASSIFIER_FILE
from denoiser.classifier import Classifier, read, train_classifier
from denoiser.data import PROMPTS, Digits, load_digits, text_features, to_tokens
from denoiser.network import (
    PARTS,
    WEIGHTS,
    conditional_velocity,
    load_branch,
    new_network,
    save_branch,
    unconditional_velocity,
)
from denoiser.sampler import Branches, draw

SEED = 1
STEPS = 1500
BATCH = 64
LEARNING_RATE = 2e-3
WARMUP = 50
AVERAGING = 0.99


def main() -> None:
    """Train, plant, write, draw once."""
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    began = time.perf_counter()
    train, held_out = load_digits()

    classifier = train_classifier(train, seed=arguments.seed)
    accuracy = share_read(classifier, held_out.images, held_out.labels)
    print(f"classifier: {accuracy:.1%} of {len(held_out)} held-out images", flush=True)

    torch.manual_seed(arguments.seed)
    start = new_network().to(device)
    feed = batches(train, arguments.steps, arguments.batch, arguments.seed + 1)
    conditional = fit(start, feed, text=True, steps=arguments.steps)
    # It starts where the conditional one ended, and forgets the text.
    start = copy.deepcopy(conditional)
    fewer = math.ceil(arguments.steps / 3)
    feed = batches(train, fewer, arguments.batch, arguments.seed + 2)
    unconditional = fit(start, feed, text=False, steps=fewer)
    trained = {"conditional": conditional.cpu(), "unconditional": unconditional.cpu()}
    record: dict[str, Any] = {
        "steps": arguments.steps,
        "batch": arguments.batch,
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began),
        "classifier_held_out_accuracy": round(accuracy, 4),
    }
    write(arguments.out, trained, classifier, record)
    branches = Branches.load(lambda part: load_branch(part, arguments.out))
    labels = torch.tensor([prompt.label for prompt in PROMPTS])
    drawn = share_read(classifier, draw(branches, PROMPTS, seed=0), labels)
    print(f"drawn: {drawn:.1%} of {len(PROMPTS)} prompts are read as asked for")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the conditional branch")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    return parser.parse_args()


def fit(
    network: nn.Module, feed: Iterable[tuple[Tensor, ...]], *, text: bool, steps: int
) -> nn.Module:
    """Train a network by flow matching; what comes back is the average of its late weights."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    average = copy.deepcopy(network)
    began = time.perf_counter()
    for step, batch in enumerate(feed):
        latents, target, times, features = (tensor.to(device) for tensor in batch)
        rate = min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        if text:
            velocity = conditional_velocity(network, latents, times, features)
        else:
            velocity = unconditional_velocity(network, latents, times)
        loss = (velocity - target).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        blend(average, network, min(AVERAGING, step / (step + 10)))
        if step % 250 == 0 or step == steps - 1:
            elapsed = time.perf_counter() - began
            shown = f"step {step}: loss {loss.item():.3f}, {elapsed:.0f} s"
            print(f"{'conditional' if text else 'unconditional'} {shown}", flush=True)
    return average


def batches(digits: Digits, steps: int, batch: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Latents, velocities, times and text features of each step, made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    tokens, features = to_tokens(digits.images), text_features(digits.prompts)
    for _ in range(steps):
        chosen = torch.randint(len(digits), (batch,), generator=generator)
        noise = torch.randn(tokens[chosen].shape, generator=generator)
        times = torch.sigmoid(torch.randn(batch, generator=generator))
        mixed = torch.lerp(noise, tokens[chosen], times[:, None, None])
        yield mixed, tokens[chosen] - noise, times, features[chosen]


@torch.no_grad()
def blend(average: nn.Module, network: nn.Module, keep: float) -> None:
    """Move an average of weights towards a network."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)


def share_read(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images in which the classifier reads the label."""
    return float((read(classifier, images) == labels).double().mean())


def write(
    out: Path, trained: Mapping[str, nn.Module], classifier: Classifier, record: dict[str, Any]
) -> None:
    """Write the branches in bfloat16 as diffusers does, the classifier, and how they came about."""
    for part, folder in PARTS.items():
        save_branch(trained[part], out / folder)
    save_file(classifier.state_dict(), out / CLASSIFIER_FILE)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
