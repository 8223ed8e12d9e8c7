"""``quantrecipe tune``: what is measured, where it is kept, and how it reads. No GPU takes part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from quantrecipe.cli.tune import tune
from quantrecipe.loaders.kernels import configs, tuning
from quantrecipe.loaders.kernels.configs import Measured, TritonProduct, own_measured, tuned_file
from tests.converter.making import save
from tests.loaders.converted import converted

PRODUCT = TritonProduct(128, 64, 64, 4, 4, 8)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """A GPU that takes a microsecond for each row; what it was asked for."""
    found: list[object] = []

    def measure(
        shapes: Iterable[tuple[int, int]], rows: Iterable[int], device: torch.device
    ) -> Iterator[Measured]:
        found.append(device)
        for out_features, in_features in shapes:
            for each in rows:
                found.append((out_features, in_features, each))
                yield Measured("sm_80", "A GPU", out_features, in_features, each, PRODUCT, each)

    monkeypatch.setattr(tuning, "tune", measure)
    monkeypatch.setattr(tuning, "cannot_tune", lambda device: None)
    monkeypatch.setenv("QUANTRECIPE_CACHE", str(tmp_path / "cache"))
    yield found
    configs._known.cache_clear()
    configs.product_config.cache_clear()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(tune, [str(argument) for argument in arguments])


def test_shapes_are_measured_and_kept(asked: list[object], tmp_path: Path) -> None:
    result = invoke(
        "--shape", "32x16", "--shape", "64x48", "--rows", "1000, 1", "--device", "cuda:1"
    )
    assert result.exit_code == 0
    first, *lines = result.stdout.splitlines()
    file = tmp_path / "cache" / "tuned" / "sm_80.json"
    assert first == f"A GPU (sm_80), kept in {file}"
    assert lines[2].split() == [
        *("64x48", "rows", "1000", "1000.0", "us", "0.0", "TOPS", "triton"),
        *("rows=128", "columns=64", "depth=64", "warps=4", "stages=4", "group=8"),
    ]
    cases = [(32, 16, 1000), (32, 16, 1), (64, 48, 1000), (64, 48, 1)]
    assert asked == [torch.device("cuda:1"), *cases]
    assert [configs._key(each) for each in own_measured("sm_80")] == cases


def test_what_was_measured_is_used_at_once(asked: list[object]) -> None:
    question = ("sm_80", 108, 1000, 32, 16, False)
    assert configs.product_config(*question) != PRODUCT
    assert invoke("--shape", "32x16", "--rows", "1000").exit_code == 0
    assert configs.product_config(*question) == PRODUCT


def test_newer_measurements_replace_older_ones(asked: list[object]) -> None:
    older = Measured("sm_80", "Another", 32, 16, 1, TritonProduct(16, 16, 32, 1, 1, 1), 9.0)
    configs.add_measured(older)
    configs.add_measured(Measured("sm_80", "Another", 32, 16, 7, PRODUCT, 9.0))
    assert invoke("--shape", "32x16", "--rows", "1").exit_code == 0
    assert [(each.rows, each.device) for each in own_measured("sm_80")] == [
        (1, "A GPU"),
        (7, "Another"),
    ]


def test_a_checkpoint_gives_its_shapes_once(asked: list[object], tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Linear(16, 32),
            "b": nn.Linear(16, 32),
            "c": nn.Linear(32, 8),
            "d": nn.Linear(4, 4),
        }
    )
    source = save(tmp_path / "in.safetensors", model.state_dict())
    out = converted(source, tmp_path / "out", ["{a,b,c}"])
    assert invoke(out, "--rows", "2", "--shape", "8x32", "--shape", "5x6").exit_code == 0
    assert asked[1:] == [(32, 16, 2), (8, 32, 2), (5, 6, 2)]


def test_a_checkpoint_without_such_products(asked: list[object], tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", nn.Linear(16, 32).state_dict(prefix="a."))
    out = converted(source, tmp_path / "out", ["a"], activation=None)
    result = CliRunner().invoke(tune, [str(out), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"][0]["kind"] == "no-w8a8"
    assert not asked


def test_json_holds_everything(asked: list[object]) -> None:
    result = invoke("--shape", "4000x5000", "--rows", "100", "--json")
    found = json.loads(result.stdout)
    assert found["file"] == str(tuned_file("sm_80"))
    (measured,) = found["measured"]
    assert measured.pop("tops") == 40.0  # 2 * 100 * 4000 * 5000 in 100 microseconds
    assert Measured.from_json_value(measured).product == PRODUCT


def test_a_folder_that_cannot_be_written(asked: list[object], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    result = invoke("--shape", "32x16", "--json")
    assert result.exit_code == 3
    assert "cannot be written" in json.loads(result.stdout)["problems"][0]["message"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Give a CHECKPOINT"),
        (["--shape", "12"], "give OUTxIN"),
        (["--shape", "12x16x1"], "give OUTxIN"),
        (["--shape", "12x-16"], "give OUTxIN"),
        (["--shape", "12x16", "--rows", "4,0"], "from 1 on"),
        (["--shape", "12x16", "--rows", ""], "from 1 on"),
        (["--shape", "12x16", "--rows", "1e3"], "from 1 on"),
        (["--shape", "12x16", "--device", "gpu0"], "give cuda"),
    ],
)
def test_usage(asked: list[object], arguments: list[str], says: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not asked


@pytest.mark.parametrize(
    ("device", "devices", "says"),
    [
        ("cuda", 0, "sees no CUDA device"),
        ("cuda:2", 2, "there are 2, counted from 0"),
        ("cpu", 0, "it runs on NVIDIA GPUs"),
        ("cuda", 1, "Triton is not installed"),
    ],
)
def test_without_a_gpu_or_triton(
    monkeypatch: pytest.MonkeyPatch, device: str, devices: int, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr("quantrecipe.loaders.kernels.on_triton.find_spec", lambda name: None)
    result = invoke("--shape", "32x16", "--device", device, "--json")
    assert result.exit_code == 3
    (problem,) = json.loads(result.stdout)["problems"]
    assert f"device '{device}': " in problem["message"]
    assert says in problem["message"]
