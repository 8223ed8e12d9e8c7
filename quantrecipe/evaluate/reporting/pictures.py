"""Images side by side by file name, scaled down and put into the page. Needs Pillow.

Files are anybody's: only a few formats are decoded, and only of a size that a person could look at.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantrecipe.schema.name_groups import natural
from quantrecipe.schema.problems import InvalidInput, Problem, QuantrecipeError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
MOST_PIXELS: Final = 1 << 26
_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_LOSSLESS_PIXELS: Final = 64 * 64
_SMALLEST: Final = 64


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, as the page holds it.

    Attributes:
        mime: its media type.
        data: its bytes.
        width, height: in pixels, scaled down.
        original: width and height of the file.
    """

    mime: str
    data: bytes
    width: int
    height: int
    original: tuple[int, int]

    @property
    def url(self) -> str:
        """It, as an address that holds it whole."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True, slots=True)
class Gallery:
    """Images side by side.

    Attributes:
        variants: the names of the folders, in the order given.
        rows: file name, and its image of every variant.
        common: how many names all folders have.
        longest: the longest side that images were scaled down to, in pixels.
    """

    variants: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Picture, ...]], ...]
    common: int
    longest: int


def check_pictures() -> None:
    """Whether images can be read; to be asked before any work.

    Raises:
        QuantrecipeError: Pillow is not there.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise QuantrecipeError(
            "images need Pillow\n  pip install 'quantrecipe[plot]', or leave --images out."
        ) from None


def gallery(folders: Mapping[str, Path], *, most: int, longest: int, most_bytes: int) -> Gallery:
    """Images that all folders have, evenly chosen from all names.

    Where they do not fit into ``most_bytes``, they are made smaller, down to 64 pixels, and then
    fewer.

    Args:
        folders: by what is shown in them.
        most: rows at most.
        longest: the longest side, in pixels.
        most_bytes: of all of them together, as the page holds them.

    Raises:
        InvalidInput: a folder is none, they have no name in common, or a file is no image.
        QuantrecipeError: Pillow is not there.
    """
    check_pictures()
    files = {variant: _files(folder) for variant, folder in folders.items()}
    common = sorted(set.intersection(*(set(found) for found in files.values())), key=natural)
    if not common:
        raise InvalidInput(
            Problem(
                "no-common-images",
                f"no file name is in all of {', '.join(map(str, folders.values()))}",
                f"Images are shown side by side by name; they end in {', '.join(SUFFIXES)}.",
            )
        )
    names = _spread(common, most)
    while True:
        rows = tuple(
            (name, tuple(_picture(files[variant][name], longest) for variant in folders))
            for name in names
        )
        taken = sum(len(picture.url) for _, row in rows for picture in row)
        if taken <= most_bytes or not rows:
            return Gallery(tuple(folders), rows, len(common), longest)
        if longest > _SMALLEST:
            longest = max(_SMALLEST, longest * 3 // 4)
        else:
            names = names[: len(names) * 3 // 4]


def _files(folder: Path) -> dict[str, Path]:
    try:
        return {
            path.name: path
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in SUFFIXES and path.is_file()
        }
    except OSError as error:
        message = f"the folder cannot be read: {error.strerror or error}"
        raise InvalidInput(
            Problem("unreadable", message, "Check the path.", file=str(folder))
        ) from None


def _spread(names: Sequence[str], most: int) -> Sequence[str]:
    if len(names) <= most:
        return names
    return [names[round(at * (len(names) - 1) / max(1, most - 1))] for at in range(most)]


def _picture(path: Path, longest: int) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are refused here
            with Image.open(path, formats=_FORMATS) as opened:
                original = opened.size
                if original[0] * original[1] > MOST_PIXELS:
                    raise _refused(path, f"{original[0]} x {original[1]} pixels are too many")
                return _encoded(_shrunk(opened, longest), original)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise _refused(path, f"this is no whole image ({', '.join(_FORMATS)})") from None


def _refused(path: Path, message: str) -> InvalidInput:
    return InvalidInput(Problem("bad-image", message, "Leave it out.", file=str(path)))


def _shrunk(image: Image, longest: int) -> Image:
    from PIL import Image as Images

    see_through = "A" in image.getbands() or "transparency" in image.info
    plain = image.convert("RGBA" if see_through else "RGB")
    if plain.mode == "RGBA":
        white = Images.new("RGBA", plain.size, "white")
        plain = Images.alpha_composite(white, plain).convert("RGB")
    if max(plain.size) > longest:
        plain.thumbnail((longest, longest), Images.Resampling.LANCZOS)
    return plain


def _encoded(image: Image, original: tuple[int, int]) -> Picture:
    """Small ones without loss; of others whichever is smaller, as PNG or as JPEG."""
    found = [("image/png", _bytes(image, "PNG", optimize=True))]
    if image.size[0] * image.size[1] > _LOSSLESS_PIXELS:
        found.append(("image/jpeg", _bytes(image, "JPEG", quality=88)))
    mime, data = min(found, key=lambda each: len(each[1]))
    return Picture(mime, data, *image.size, original)


def _bytes(image: Image, kind: str, **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()
