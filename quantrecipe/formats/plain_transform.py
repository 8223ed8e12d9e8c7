"""The transform of a block in torch, step by step: for every format, device and smoothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.clip_search import choose_scales
from quantrecipe.formats.error import RowErrors, row_errors
from quantrecipe.formats.kernels import PlainSteps, decode_block


class PlainTransform(PlainSteps):
    """``BlockTransform`` in torch, step by step."""

    def __call__(
        self, source: SourceBlock, target: TargetBlock, importance: Tensor | None = None
    ) -> RowErrors:
        weight = self.decode(source)
        fmt, spec, workspace = self.format, self.target, self._scratch.steps
        given = spec.scales_together
        if not given:
            scales, zeros = choose_scales(
                weight, fmt, spec, importance, codes=target.codes, workspace=workspace
            )
            target.scales.copy_(scales)
            if zeros is not None and target.zeros is not None:
                target.zeros.copy_(zeros)
        fmt.encode(
            weight,
            target.encoding,
            spec,
            target.codes,
            zero_point=target.zeros,
            workspace=workspace,
            checked=given,
        )
        # What has just been encoded are numbers: nothing waits for the device to say so.
        return row_errors(
            weight,
            target.codes,
            target.scales,
            fmt,
            spec,
            workspace,
            zero_point=target.zeros,
            checked=False,
        )

    def absmax(self, source: SourceBlock) -> Tensor:
        return self.format.measure(self.decode(source), self.target)

    def column_absmax(self, source: SourceBlock, out: Tensor) -> None:
        weight = decode_block(
            self.source, replace(source, factors=None), None, self._scratch.values
        )
        torch.maximum(out, weight.amax(0), out=out)
        torch.maximum(out, weight.amin(0).neg_(), out=out)
