"""Three processes of one program: each measures its share, and all of them end with the whole.

    python processes.py FOLDER

Run by ``test_distributed.py``. They are forked, so that torch is imported once.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantrecipe.cli.calibrate import calibrate
from quantrecipe.converter.calibration import Calibration, Measurements, observe
from quantrecipe.schema.folds import fold_digest
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.recipe import Fold
from quantrecipe.schema.statistics import ProvenFold

PROCESSES, ROWS, WIDTH = 3, 22, 5
EDGES = (0.0, 0.5, 1.0)


class Pair(nn.Module):
    """Two linears that share an input in some forwards, and one that few processes call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.rare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: float) -> None:
        self.a(x)
        self.b(x)
        self.c(x if timestep < 0.9 else x.clone())
        if timestep > 0.9:
            self.rare(x)


def rows() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(-2, 3, (ROWS, WIDTH)).float() / 8


def measure(share: range) -> Measurements:
    """Rows one by one, each with a timestep of its own; some in bfloat16."""
    torch.manual_seed(0)
    model = Pair()
    with observe(model, timesteps=EDGES, reservoir=6) as stats:
        for index in share:
            x = rows()[index : index + 1]
            model(x.bfloat16().float() if index % 3 else x, index / (ROWS - 1))
            stats.prompt(f"row {index}")
    edge = Fold(modules=("c",), into="a")
    # The first process, as one alone, saw the largest error.
    stats.folds = (
        ProvenFold(
            part="model",
            fold=edge,
            fold_sha256=fold_digest(edge),
            sites=1,
            relative_error=0.5 ** (8 + share.start),
        ),
    )
    return stats


def run_share(calibration: Calibration) -> None:
    """What ``calibrate --run`` calls."""
    torch.manual_seed(0)
    model = Pair()
    with calibration.observe(model):
        for index in range(int(os.environ["RANK"]), ROWS, PROCESSES):
            model(rows()[index : index + 1], index / (ROWS - 1))


def work(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    as_library(rank, folder)
    # As torchrun tells its processes.
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), **meeting}
    arguments = ["--run", "processes:run_share", "--out", str(folder / "command.safetensors")]
    recipe = str(folder / "recipe.json")
    calibrate.main([*arguments, "--recipe", recipe], standalone_mode=False)
    sys.stdout.flush()


def as_library(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    stats = measure(range(rank, ROWS, PROCESSES))
    stats.all_reduce()
    stats.save(folder / f"{rank}.safetensors")
    torch.manual_seed(0)
    with observe(Pair(), modules=["a"] if rank == 2 else ["b"]) as other:
        pass
    try:
        other.all_reduce()
    except InvalidInput as error:
        (folder / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(PROCESSES):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(rank, folder, port)
                code = 0
            except BaseException:  # noqa: BLE001 - it must not go on as its parent
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
