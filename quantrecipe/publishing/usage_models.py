# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""Loads the networks of this folder, quantized as they are, and runs those that read text.

    python usage.py                                   # load every part, say what it takes
    python usage.py "a text" "another text"           # a language model goes on, others compare
    python usage.py --model my_package:MyModel        # a class of yours, where none is named below

``load_part("model")`` gives a network to any program. Needs torch, safetensors and the library that
has the class; everything else lies beside this file.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent


class Model(TypedDict):
    """A network: the library and class that it is of, and the folder of its ``config.json``."""

    library: str
    class_name: str
    config: str


# The parts of the checkpoint, and the classes that libraries have for them; stored names of modules
# that those call otherwise, see safetensors_loader.load; and whether only the package quantrecipe
# can compute with what is stored.
# <networks>
PARTS: dict[str, Model | None] = {}
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = ()
NEEDS_QUANTRECIPE = False
# </networks>


def load_part(
    part: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    make: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Build a part without weights, and read each tensor once, straight to ``device``.

    Args:
        part: its name, a key of ``PARTS``.
        device: where it goes.
        dtype: of everything that is not quantized.
        make: what builds it in place of the class that ``PARTS`` names.

    Raises:
        ValueError: network and checkpoint do not fit, or no class is known.
    """
    name = "quantrecipe.loaders" if NEEDS_QUANTRECIPE else "safetensors_loader"
    loader: Any = importlib.import_module(name)
    with loader.without_weights():
        model = make() if make is not None else build(part)
    where: dict[str, Any] = {"part": part, "device": device, "dtype": dtype}
    if NEEDS_QUANTRECIPE:
        loader.load_model(model, HERE, **where)
    else:
        loader.load(model, HERE, **where, names=NAMES if make is None else ())
    return model.eval()


def build(part: str) -> nn.Module:
    """A network of the class that ``PARTS`` names, by its configuration."""
    known = PARTS[part]
    if known is None:
        raise ValueError(f"no class is known for the part {part!r}: give --model package:Class")
    library = importlib.import_module(known["library"])
    kind, folder = getattr(library, known["class_name"]), HERE / known["config"]
    model: nn.Module
    if known["library"] == "transformers":
        model = kind(library.AutoConfig.from_pretrained(folder))
    else:
        model = kind.from_config(kind.load_config(folder))
    return model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Load the networks of this folder.")
    parser.add_argument("texts", nargs="*", help="what a network that reads text is given")
    parser.add_argument("--part", help="only this one: " + ", ".join(PARTS))
    parser.add_argument("--model", help="package.module:Class, called without arguments")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of what is not quantized")
    parser.add_argument("--tokens", type=int, default=40, help="how many more of them to write")
    given = parser.parse_args()
    make = _imported(given.model) if given.model else None
    for part in [given.part] if given.part else PARTS:
        began = time.perf_counter()
        try:
            model = load_part(part, given.device, getattr(torch, given.dtype), make)
        except (ImportError, ValueError) as error:
            parser.exit(1, f"{error}\n")
        seconds = time.perf_counter() - began
        size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        kind = type(model).__name__
        print(f"{part}: {kind}, {size / 1e6:,.1f} MB on {given.device} in {seconds:.1f} s")
        if given.texts:
            read(part, model, given.texts, given.tokens)


def _imported(name: str) -> Callable[[], nn.Module]:
    module, _, attribute = name.partition(":")
    found: Callable[[], nn.Module] = getattr(importlib.import_module(module), attribute)
    return found


@torch.inference_mode()
def read(part: str, model: nn.Module, texts: list[str], tokens: int) -> None:
    """Let a language model go on with texts, or compare what an encoder makes of them."""
    known = PARTS[part]
    if known is None or known["library"] != "transformers":
        print("  (its inputs are no texts)")
        return
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(HERE / known["config"])
    device = next(iter([*model.parameters(), *model.buffers()])).device
    writer: Any = model
    if hasattr(model, "generate") and writer.can_generate():
        for text in texts:
            given = tokenizer(text, return_tensors="pt").to(device)
            written = writer.generate(**given, max_new_tokens=tokens)
            print(f"  {tokenizer.decode(written[0], skip_special_tokens=True)!r}")
        return
    vectors = torch.cat(
        [_vector(model, tokenizer(t, return_tensors="pt").to(device)) for t in texts]
    )
    for text, row in zip(texts, vectors @ vectors.t(), strict=True):
        print(f"  {' '.join(f'{value:6.3f}' for value in row.tolist())}  {text!r}")


def _vector(model: nn.Module, given: Any) -> Tensor:
    """The direction of the mean over tokens, float32 ``[1, features]``."""
    states: Tensor = model(**given)[0].float().mean(1)
    return functional.normalize(states, dim=1)


if __name__ == "__main__":
    main()
