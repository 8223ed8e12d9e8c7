"""The quantized linear layer as a module: names, dtypes, copies, gradients, compilers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from quantrecipe.formats import dequantize, quantize
from quantrecipe.loaders import QuantizedLinear
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    DynamicActivation,
    Float8Block,
    Float8Channel,
    Float8Tensor,
    Hadamard,
    Int8Channel,
    Int8Group,
    Int8Tensor,
)

TOKEN = DynamicActivation(format="int8", granularity="token", dynamic=True)
CHANNEL = Int8Channel(format="int8", granularity="channel")
FORMATS: list[AnyScaledWeight] = [
    CHANNEL,
    Int8Tensor(format="int8", granularity="tensor"),
    Int8Group(format="int8", granularity="group", group_size=8),
    Int8Channel(format="int8", granularity="channel", scale_dtype="bfloat16"),
    Float8Channel(format="float8_e4m3fn", granularity="channel"),
    Float8Tensor(format="float8_e5m2", granularity="tensor"),
    Float8Block(format="float8_e4m3fn", granularity="block", block_size=(5, 7)),
]
NAMES = {"weight": "wq", "weight_scale": "ws", "smoothing": "smooth"}


def filled(module: QuantizedLinear, seed: int = 0) -> QuantizedLinear:
    """``module`` with a random weight, and random factors and bias where it has them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    stored = quantize(random(module.out_features, module.in_features), module.weight_format)
    assert stored.scale is not None
    assert module.weight_scale is not None
    with torch.no_grad():
        module.weight.copy_(stored.codes)
        module.weight_scale.copy_(stored.scale.view(module.weight_scale.shape))
        if module.smoothing is not None:
            module.smoothing.copy_(random(module.in_features).abs() + 0.5)
        if module.bias is not None:
            module.bias.copy_(random(module.out_features))
    return module


def w8a8(**options: object) -> QuantizedLinear:
    return filled(QuantizedLinear(24, 17, CHANNEL, TOKEN, smoothing=True, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", FORMATS, ids=repr)
def test_weight_only_is_a_linear_with_the_weight_it_stands_for(weight: AnyScaledWeight) -> None:
    module = filled(QuantizedLinear(24, 17, weight))
    x = torch.randn(3, 5, 24)
    assert module.weight_scale is not None
    plain = dequantize(
        module.weight.detach(),
        module.weight_scale.detach().view(weight.scale_grid(17, 24)),
        weight,
    )
    assert torch.equal(module.dequantize(), plain)
    assert module.bias is not None
    expected = x.double() @ plain.double().T + module.bias
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_state_dict_has_the_names_of_the_layout() -> None:
    module = w8a8(names=NAMES, shapes={"weight_scale": (17,)})
    state = module.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "wq": (17, 24),
        "ws": (17,),
        "smooth": (24,),
        "bias": (17,),
    }
    other = QuantizedLinear(
        24, 17, CHANNEL, TOKEN, smoothing=True, names=NAMES, shapes={"weight_scale": (17,)}
    )
    other.load_state_dict(state)
    x = torch.randn(4, 24)
    assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"wq".*Unexpected key.*"extra"'):
        other.load_state_dict(
            {"extra": state["wq"]} | {k: v for k, v in state.items() if k != "wq"}
        )


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
@pytest.mark.parametrize("weight", FORMATS, ids=repr)
def test_a_cast_reaches_the_bias_alone(weight: AnyScaledWeight, cast: object) -> None:
    module = filled(QuantizedLinear(24, 17, weight, smoothing=True))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    cast(module)  # type: ignore[operator]
    after = module.state_dict()
    assert after["bias"].dtype != torch.float32
    for name in ("weight", "weight_scale", "smoothing"):
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))


def test_it_moves_to_the_meta_device_and_from_there_to_empty_memory() -> None:
    module = w8a8().to("meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    emptied = module.to_empty(device="cpu")
    assert [tensor.dtype for tensor in emptied.state_dict().values()] == [
        torch.int8,
        torch.float32,
        torch.float32,
        torch.float32,
    ]


def test_copies_and_pickles_compute_the_same() -> None:
    module = w8a8(names=NAMES)
    x = torch.randn(4, 24)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert list(other.state_dict()) == list(module.state_dict())
        assert other.weight.data_ptr() != module.weight.data_ptr()


def test_it_says_what_it_is() -> None:
    assert repr(w8a8()) == (
        "QuantizedLinear(in_features=24, out_features=17, bias=True, weight=int8 by channel, "
        "activation=int8 by token, smoothing, kernel=auto)"
    )
    assert isinstance(w8a8(), nn.Linear)


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("weight", FORMATS, ids=repr)
def test_gradients_reach_the_input_and_the_bias(weight: AnyScaledWeight, smoothing: bool) -> None:
    module = filled(QuantizedLinear(24, 17, weight, smoothing=smoothing))
    assert module.bias is not None
    module.bias.requires_grad_(True)
    x = torch.randn(3, 5, 24, requires_grad=True)
    upstream = torch.randn(3, 5, 17)
    module(x).backward(upstream)
    expected = upstream @ module.dequantize()
    if module.smoothing is not None:
        expected = expected / module.smoothing
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(module.bias.grad, upstream.flatten(0, 1).sum(0))
    assert module.weight.grad is None


def test_gradients_pass_the_rounding_of_activations() -> None:
    module = w8a8()
    x = torch.randn(6, 24, requires_grad=True)
    module(x).sum().backward()
    assert module.smoothing is not None
    expected = module.dequantize().sum(0) / module.smoothing
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.expand(6, 24))


@pytest.mark.parametrize("weight", FORMATS, ids=repr)
@pytest.mark.parametrize("activation", [None, TOKEN], ids=["weight-only", "w8a8"])
def test_the_operator_is_well_behaved(
    weight: AnyScaledWeight, activation: DynamicActivation | None
) -> None:
    module = filled(QuantizedLinear(24, 17, weight, activation, smoothing=True))
    x = torch.randn(4, 24, requires_grad=True)
    group = list(weight.group_shape(17, 24))
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if module.weight.dtype == torch.int8:  # the check of the schema cannot compare float8
        checks.append("test_schema")
    torch.library.opcheck(
        torch.ops.quantrecipe.linear.default,
        (
            x,
            module.weight,
            module.weight_scale,
            module.smoothing,
            module.bias,
            4 if activation else 0,
            group,
            "int8:token" if activation else "",
            "auto",
        ),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.quantrecipe.dequantize.default,
        (module.weight, module.weight_scale, group, torch.bfloat16),
        test_utils=checks,
    )


def test_it_compiles_without_a_graph_break_and_exports() -> None:
    rotation = Hadamard(kind="hadamard", size=4)
    rotated = QuantizedLinear(8, 4, CHANNEL, TOKEN, smoothing=True, rotation=rotation)
    model = nn.Sequential(
        w8a8(), nn.GELU(), filled(QuantizedLinear(17, 8, CHANNEL, TOKEN)), filled(rotated)
    )
    x = torch.randn(2, 3, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))


def test_autocast_decides_the_dtype() -> None:
    module = w8a8()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(4, 24)).dtype == torch.bfloat16
    assert module(torch.randn(4, 24)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (1, 1, 1, 24)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    module = w8a8()
    assert module(torch.randn(shape)).shape == (*shape[:-1], 17)


@pytest.mark.parametrize("bad", [torch.randn(3, 23), torch.zeros(3, 24, dtype=torch.int32)])
def test_what_cannot_be_multiplied_is_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="24 input features"):
        w8a8()(bad)
