"""Chains of layouts and names: what is lossless stays so however often it is carried over."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from quantrecipe.evaluate import verify
from quantrecipe.loaders import load_state_dict
from quantrecipe.schema.foreign_configs import mixed_bitsandbytes
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.registry import layout_names
from tests.converter.making import raw
from tests.converter.transcoding import FORMATS, held_by, made, over, tensor_bytes

LAYOUTS = layout_names()
STARTS = [name for name in LAYOUTS if name != "plain" and not name.startswith("gguf")]
# Rows of these can be cut anywhere, whatever layout they are in.
CUT = ("int8_channel", "e4m3_channel", "plain")
PIECES = ("q", "k")


class Chain(RuleBasedStateMachine):
    """A checkpoint that goes from layout to layout, under two sets of names."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.steps = 0
        self.widened = False

    @initialize(layout=st.sampled_from(STARTS), data=st.data())
    def start(self, layout: str, data: st.DataObject) -> None:
        held = held_by(layout, FORMATS)
        most = min(4, len(held))
        names = data.draw(
            st.lists(st.sampled_from(held), min_size=1, max_size=most, unique=True), "formats"
        )
        if mixed_bitsandbytes(_kinds(names)) is not None and layout == "bitsandbytes":
            names = [name for name in names if name != "llm_int8"]
        self.first = self.layout = layout
        self.here = self.origin = made(layout, self.folder / "start", sorted(names))
        self.split = False
        self.intact = {*names, "plain"}
        """Modules that are stored in all that they were stored in at first, bit for bit."""
        cut = [name for name in CUT if name in self.intact]
        for kind, pairs in (("split", False), ("merged", True)):
            entries = [
                {
                    "from": [f"layers.*.{name}_{piece}" for piece in PIECES]
                    if pairs
                    else f"layers.*.{name}",
                    "into": f"layers.*.{name}"
                    if pairs
                    else [f"layers.*.{name}_{piece}" for piece in PIECES],
                }
                for name in cut
            ]
            document: dict[str, Any] = {
                "kind": "names", "version": 1, "name": kind, "names": entries
            }  # fmt: skip
            (self.folder / f"{kind}.json").write_text(json.dumps(document))
        self.numbers = self.load()

    def load(self) -> dict[str, Tensor]:
        """What a reader gets, under the names of the start."""
        found = {
            name.removeprefix("model."): tensor
            for name, tensor in load_state_dict(self.here, names="target").items()
        }
        for name in [each for each in found if f"_{PIECES[0]}." in each]:
            whole = name.replace(f"_{PIECES[0]}.", ".")
            found[whole] = torch.cat(
                [found.pop(whole.replace(".weight", f"_{p}.weight").replace(".bias", f"_{p}.bias"))
                 for p in PIECES]
            )  # fmt: skip
        return found

    @rule(layout=st.sampled_from(LAYOUTS), rename=st.booleans())
    def go(self, layout: str, rename: bool) -> None:
        self.step(layout, rename)

    @precondition(lambda self: self.layout != self.first)
    @rule()
    def go_home(self) -> None:
        self.step(self.first, self.split)

    def step(self, layout: str, rename: bool) -> None:
        self.steps += 1
        out = self.folder / str(self.steps)
        asked: dict[str, Any] = {"requantize": True}
        if rename:
            kind = "merged" if self.split else "split"
            asked["names"] = str(self.folder / f"{kind}.json")
            self.split = not self.split
        if layout.startswith("gguf"):
            # Vectors are float32 there, and stay so afterwards.
            asked["architecture"], self.widened = "small", True
        try:
            planned = over(self.here, layout, out, **asked)
        except InvalidInput as refused:
            # One part is of one of these there, and the other could not be told.
            if (
                layout != "bitsandbytes"
                or "says one of the two" not in str(refused)
                or out.exists()
            ):
                raise
            self.split ^= rename
            return
        found = verify(out, against=self.here)
        assert not found.problems
        self.here, self.layout = out, layout
        self.compare(planned)

    def compare(self, planned: Plan) -> None:
        before, self.numbers = self.numbers, self.load()
        assert before.keys() == self.numbers.keys()
        for module in planned.modules:
            name = module.name.removesuffix("_q").removesuffix("_k")
            weight = f"{name}.weight"
            if module.transfer == "lossless":
                assert raw(before[weight]) == raw(self.numbers[weight]), weight
            elif module.transfer == "inverted":
                assert torch.allclose(before[weight], self.numbers[weight], rtol=2.0**-21, atol=0)
            same = module.transfer == "lossless" and module.source.weight == module.weight
            same &= module.source.rotation == module.rotation
            one_scale = self.source_granularity(module.source.tensors) == "tensor"
            if not same or one_scale:
                self.intact.discard(name.rpartition(".")[2])

    def source_granularity(self, tensors: Any) -> str:
        """Whether the one scale of a weight became one for each of its rows."""
        scale = tensors.get("weight_scale")
        return "tensor" if scale is not None and scale.times > 1 else ""

    @invariant()
    def at_home_everything_has_the_bytes_that_it_had(self) -> None:
        if not self.steps or self.layout != self.first or self.split:
            return
        before, after = tensor_bytes(self.origin), tensor_bytes(self.here)
        for tensor, found in before.items():
            if self.widened and tensor.endswith((".bias", "norm.weight")):
                continue
            owner = tensor.removeprefix("model.").removeprefix("layers.0.").partition(".")[0]
            if owner in self.intact or owner == "norm":
                assert after[tensor] == found, tensor

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


def _kinds(names: list[str]) -> set[str]:
    return {"nf4" if name.startswith("nf4") else name for name in names}


TestChain = Chain.TestCase
TestChain.settings = settings(max_examples=6, stateful_step_count=5)
