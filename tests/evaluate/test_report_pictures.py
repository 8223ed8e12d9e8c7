"""Images of reports: small, few and harmless; and figures as PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from quantrecipe.evaluate.reporting import Materials, build, write
from quantrecipe.evaluate.reporting.pictures import MOST_PIXELS, Gallery, gallery
from quantrecipe.evaluate.reporting.raster import png
from quantrecipe.schema.problems import InvalidInput
from tests.evaluate.reporting_materials import ideogram4_lock, lock_with

Image = pytest.importorskip("PIL.Image")


def save(path: Path, width: int, height: int, seed: int = 0, mode: str = "RGB") -> Path:
    rng = np.random.default_rng(seed)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for variant in ("a", "b"):
        for index in range(12):
            save(tmp_path / variant / f"{index}.png", 200, 100, index)
    save(tmp_path / "a" / "alone.png", 10, 10)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    return {"a": tmp_path / "a", "b": tmp_path / "b"}


def of(folders: dict[str, Path], most: int = 4, longest: int = 80, room: int = 1 << 20) -> Gallery:
    return gallery(folders, most=most, longest=longest, most_bytes=room)


def test_images_are_paired_by_name_and_spread(folders: dict[str, Path]) -> None:
    found = of(folders)
    assert found.variants == ("a", "b")
    assert found.common == 12
    assert [name for name, _ in found.rows] == ["0.png", "4.png", "7.png", "11.png"]
    for _, pictures in found.rows:
        assert [(each.width, each.height) for each in pictures] == [(80, 40)] * 2
        assert pictures[0].original == (200, 100)
        with Image.open(io.BytesIO(pictures[0].data)) as image:
            assert image.size == (80, 40)
    assert of(folders) == found


@pytest.mark.parametrize("room", [100_000, 20_000, 3_000, 10])
def test_images_keep_to_their_room(folders: dict[str, Path], room: int) -> None:
    found = of(folders, most=8, longest=320, room=room)
    assert sum(len(each.url) for _, row in found.rows for each in row) <= room
    report = build(Materials(lock_with(["a"]), gallery=found), "1")
    assert len(report.html) < 100_000 + room
    assert f"{len(found.rows)} of 12 files" in report.html
    assert ("scaled down" in report.html) == bool(found.rows and found.longest < 200)


def test_small_images_are_kept_to_the_pixel(tmp_path: Path) -> None:
    path = save(tmp_path / "a" / "digit.png", 8, 8, mode="L")
    found = of({"a": tmp_path / "a"})
    picture = found.rows[0][1][0]
    assert picture.mime == "image/png"
    assert "scaled down" not in build(Materials(lock_with(["a"]), gallery=found), "1").html
    with Image.open(io.BytesIO(picture.data)) as image, Image.open(path) as original:
        assert np.array_equal(np.asarray(image.convert("L")), np.asarray(original))


def test_transparency_is_on_white(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a" / "x.png")
    picture = of({"a": tmp_path / "a"}).rows[0][1][0]
    with Image.open(io.BytesIO(picture.data)) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "x.png"
    path.write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    with pytest.raises(InvalidInput, match="no whole image"):
        of({"a": tmp_path / "a"})
    whole = save(tmp_path / "b.png", 50, 50).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match="no whole image"):
        of({"a": tmp_path / "a"})


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "a" / "x.png")
    with pytest.raises(InvalidInput, match="too many"):
        of({"a": tmp_path / "a"})


def test_folders_without_a_common_name_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.png", 4, 4)
    save(tmp_path / "b" / "y.png", 4, 4)
    with pytest.raises(InvalidInput, match="no file name is in all of"):
        of({"a": tmp_path / "a", "b": tmp_path / "b"})
    with pytest.raises(InvalidInput, match="cannot be read"):
        of({"a": tmp_path / "missing"})


def test_names_of_images_stay_text(tmp_path: Path) -> None:
    name = "'><script>alert(1)<.png"
    save(tmp_path / "a" / name, 4, 4)
    found = of({"<b>": tmp_path / "a"})
    html = build(Materials(lock_with(["a"]), gallery=found), "1").html
    root = ElementTree.fromstring(html.partition("\n")[2])
    (image,) = root.iter("{http://www.w3.org/1999/xhtml}img")
    assert image.get("alt") == f"{name}, <b>"
    assert "<script" not in html


def test_every_figure_is_a_png_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = build(Materials(ideogram4_lock()), "1")
    written = write(report, tmp_path / "r.html", pictures=tmp_path / "png")
    assert [path.name for path in written] == ["r.html", "network.png", "depth.png", "sizes.png"]
    for path in written[1:]:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
            colours = image.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert len(colours) > 20
    sizes = report.figures[-1]
    assert png(sizes) == written[-1].read_bytes()


def test_formulas_in_names_are_not_typeset() -> None:
    pytest.importorskip("matplotlib")
    names = [f"layers.{index}.$\\frac{{x}}" for index in (0, 1)]
    assert png(build(Materials(lock_with(names)), "1").figures[0])
