"""What a kernel is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from quantrecipe.loaders.kernels.call import LinearCall


@runtime_checkable
class Kernel(Protocol):
    """Computes a quantized linear.

    Found by entry point (group ``quantrecipe.kernels``), chosen by name; one instance, made without
    arguments, serves every call of a process, from any thread. It must launch on the current stream
    and must not wait for the device.
    """

    @property
    def name(self) -> str:
        """What it is chosen by."""

    def refuses(self, call: LinearCall) -> str | None:
        """Why it cannot compute ``call``, or ``None``. The answer depends on ``call`` alone."""

    def linear(
        self,
        call: LinearCall,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        smoothing: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """The product, ``[rows, out]`` in the dtype of ``x``, contiguous.

        Args:
            call: what it did not refuse.
            x: ``[rows, in]``; rows may be strided, and there is at least one.
            weight: codes, ``[out, in]``, contiguous.
            weight_scale: the canonical grid, ``call.grid``, in ``call.scale_dtype``.
            smoothing: float32 ``[in]``; activations are divided by it, and rotated in blocks of
                ``call.rotation`` after that (``quantrecipe.formats.rotation``).
            bias: ``[out]``, of any floating dtype.
        """
