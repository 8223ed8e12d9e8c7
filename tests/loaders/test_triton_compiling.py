"""What Triton's compiler makes of the product, for GPUs that are not here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantrecipe.loaders.kernels.configs import (
    TritonProduct,
    product_config,
    shared_limit,
    shipped_measured,
)

triton = pytest.importorskip("triton")


def compiled(config: TritonProduct, architecture: str, even: bool, aligned: bool) -> Any:
    """The product for bfloat16 with a bias.

    ``even``: rows end where a load does; ``aligned``: rows begin at multiples of 16 bytes.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quantrecipe.loaders.kernels.triton_code import scaled_product

    constants = {
        "BY_CHANNEL": True,
        "BIAS": True,
        "EVEN_K": even,
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        "BLOCK_K": config.depth,
        "GROUP": config.group,
    }
    kinds = {"a_ptr": "*i8", "b_ptr": "*i8", "out_ptr": "*bf16", "bias_ptr": "*bf16"}
    kinds |= {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    multiples = [name for name in kinds if name.endswith("ptr") or (aligned and name in "NK")]
    names = scaled_product.arg_names
    source = ASTSource(
        fn=scaled_product,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    capability = int(architecture.removeprefix("sm_"))
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(cubin: bytes, path: Path) -> int:
    """Bytes of a thread that found no register."""
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    (stack,) = re.findall(r"STACK:(\d+)", said)
    return int(stack)


RULES = {
    (architecture, product_config(architecture, 100, rows, 1, 1, False))
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
    for rows in (1, 64, 4096)
}
SHIPPED = {
    (each.architecture, each.product)
    for each in shipped_measured()
    if isinstance(each.product, TritonProduct)
}


@pytest.mark.parametrize(
    ("even", "aligned"),
    [(True, True), (False, True), (False, False)],
    ids=["even", "ragged", "odd"],
)
@pytest.mark.parametrize(
    ("architecture", "config"),
    sorted(RULES | SHIPPED, key=str),
    ids=lambda value: value if isinstance(value, str) else repr(value)[len("TritonProduct") :],
)
def test_what_is_shipped_fits(
    architecture: str,
    config: Any,
    even: bool,
    aligned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compiled(config, architecture, even, aligned)
    assert made.metadata.shared <= config.shared(architecture) <= shared_limit(architecture)
    if aligned:  # else codes are loaded one by one, which takes an address for each
        assert not spilled(made.asm["cubin"], tmp_path / "it.cubin")
