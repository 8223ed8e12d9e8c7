"""Learned metrics, each by the package that has it; made when the first output is scored.

None of them is installed with this package, nor are their weights. Each takes one output at a time.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from quantrecipe.evaluate.metrics.images import read_image
from quantrecipe.evaluate.metrics.protocol import IMAGES, Against, needs, no_weights, unusable
from quantrecipe.evaluate.metrics.texts import normalized_edit_distance

CLIP: Final = "openai/clip-vit-base-patch16"
PICKSCORE: Final = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR: Final = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class _TextAndImage:
    """The cosine of a text's and an image's embedding, by a model of the CLIP family."""

    name: str
    weights: str
    processor: str
    higher_is_better = True
    suffixes = IMAGES
    against: Against = "prompt"

    @cached_property
    def _made(self) -> tuple[Any, Any]:
        transformers = needs("transformers", self.name, "'quantrecipe[models,evaluate]'")
        try:
            model = transformers.CLIPModel.from_pretrained(self.weights)
            processor = transformers.CLIPProcessor.from_pretrained(self.processor)
        except (OSError, ValueError) as error:
            raise no_weights(self.name, self.weights, error) from error
        return model.eval(), processor

    def logit(self, output: Path, text: str) -> tuple[float, float]:
        """The cosine, and what the model multiplies it by."""
        pixels = read_image(output, self.name).astype("uint8")
        model, processor = self._made
        torch = needs("torch", self.name, "torch")
        image = pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)
        inputs = processor(
            text=[text], images=[image], return_tensors="pt", padding=True, truncation=True
        )
        with torch.inference_mode():
            scaled = float(model(**inputs).logits_per_image[0, 0])
            scale = float(model.logit_scale.exp())
        return scaled / scale, scale


class ClipScore(_TextAndImage):
    """``100 max(cos, 0)`` of image and prompt (Hessel et al. 2021, with a weight of 100).

    The text is cut where CLIP's 77 tokens end.
    """

    name = "clip-score"
    weights = processor = CLIP

    def score(self, output: Path, against: Path | str) -> float:
        return 100 * max(0.0, self.logit(output, str(against))[0])


class PickScore(_TextAndImage):
    """The scaled cosine of PickScore v1 (Kirstain et al. 2023, equation 1)."""

    name = "pickscore"
    weights, processor = PICKSCORE, PICKSCORE_PROCESSOR

    def score(self, output: Path, against: Path | str) -> float:
        return math.prod(self.logit(output, str(against)))


class HpsV2:
    """Human Preference Score v2.1, by the package hpsv2."""

    name = "hpsv2"
    higher_is_better = True
    suffixes = IMAGES
    against: Against = "prompt"

    def score(self, output: Path, against: Path | str) -> float:
        hpsv2 = needs("hpsv2", self.name, "hpsv2")
        try:
            (found,) = hpsv2.score(str(output), str(against), hps_version="v2.1")
        except OSError as error:
            raise no_weights(self.name, "of HPS v2.1", error) from error
        return float(found)


class Lpips:
    """Learned perceptual distance by AlexNet (Zhang et al. 2018), version 0.1 of package lpips."""

    name = "lpips"
    higher_is_better = False
    suffixes = IMAGES
    against: Against = "reference"

    @cached_property
    def _made(self) -> Any:
        lpips = needs("lpips", self.name, "lpips torchvision")
        try:
            return lpips.LPIPS(net="alex", verbose=False)
        except OSError as error:
            raise no_weights(self.name, "of AlexNet", error) from error

    def score(self, output: Path, against: Path | str) -> float:
        torch = needs("torch", self.name, "torch")
        a, b = (read_image(path, self.name) for path in (output, Path(against)))
        if a.shape != b.shape:
            raise unusable(output, "misshaped-image", "the reference's image has another size")
        model = self._made
        sides = [
            torch.from_numpy(each / 127.5 - 1).float().permute(2, 0, 1)[None].expand(1, 3, -1, -1)
            for each in (a, b)
        ]
        with torch.inference_mode():
            return float(model(*sides))


class OcrEditDistance:
    """The normalized edit distance of what is read in an image to the text it should show.

    Read by the package rapidocr, lines in its order with a space between. White space counts as one
    space, and case counts.
    """

    name = "ocr-edit-distance"
    higher_is_better = False
    suffixes = IMAGES
    against: Against = "prompt"

    @cached_property
    def _made(self) -> Any:
        rapidocr = needs("rapidocr", self.name, "rapidocr onnxruntime")
        needs("onnxruntime", self.name, "rapidocr onnxruntime")
        try:
            return rapidocr.RapidOCR()
        except (OSError, ValueError) as error:
            raise no_weights(self.name, "of rapidocr", error) from error

    def score(self, output: Path, against: Path | str) -> float:
        read = self._made(str(output)).txts or ()
        return normalized_edit_distance(
            " ".join(" ".join(read).split()), " ".join(str(against).split())
        )
