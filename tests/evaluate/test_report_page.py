"""The page of a report: whole, true to what it was made of, and nobody's script."""

from __future__ import annotations

import html.parser
import re
import struct
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.evaluate.reporting import Materials, Report, build, gather
from quantrecipe.evaluate.reporting.judged import read_judged
from quantrecipe.evaluate.reporting.markup import VOID, clean
from quantrecipe.evaluate.reporting.modules import network
from quantrecipe.evaluate.reporting.ranked import read_ranked
from quantrecipe.evaluate.reporting.sizes import amounts, output_bytes
from quantrecipe.schema.evaluated import VERDICTS
from quantrecipe.schema.problems import InvalidInput
from tests.evaluate.reporting_materials import (
    BRANCHES,
    comparison,
    evaluation,
    ideogram4_lock,
    lock_with,
    out_of_bounds,
    ranking,
    write_json,
    write_lock,
    write_statistics,
)
from tests.evaluate.reporting_materials import (
    VERDICTS as INTERVALS,
)

XHTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"
ALL = ("network", "depth", "ranking", "inputs", "evaluation", "sizes", "speeds", "provenance")


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """All there can be, but for images, of a whole Ideogram 4."""
    folder = tmp_path_factory.mktemp("materials")
    lock = ideogram4_lock()
    names = {
        part: [module.name for module in lock.modules if module.part == part] for part in BRANCHES
    }
    rows = [{"name": name, "seconds": seconds} for name, seconds in (("bf16", 4.2), ("int8", 2.7))]
    return gather(
        write_lock(folder / "out", lock),
        rank=write_json(folder / "rank.json", ranking(lock)),
        evaluations=[write_json(folder / "evaluation.json", evaluation())],
        statistics=[
            write_statistics(folder / "five.safetensors", names),
            write_statistics(folder / "one.safetensors", names, bins=1),
        ],
        benchmarks=write_json(folder / "bench.json", rows),
    )


@pytest.fixture(scope="module")
def report(materials: Materials) -> Report:
    return build(materials, "1.2.3")


@cache
def tree(report: Report) -> ElementTree.Element:
    first, _, rest = report.html.partition("\n")
    assert first == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def texts(root: ElementTree.Element) -> str:
    return " ".join("".join(root.itertext()).split())


def section(root: ElementTree.Element, name: str) -> ElementTree.Element:
    (found,) = (each for each in root.iter(f"{XHTML}section") if each.get("id") == name)
    return found


class Balance(html.parser.HTMLParser):
    """Every element is ended, by the rules of HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def balanced(report: Report) -> Balance:
    found = Balance()
    found.feed(report.html)
    found.close()
    assert not found.open
    return found


def assert_harmless(report: Report) -> None:
    """No script, no handler, nothing that is fetched from anywhere."""
    found = balanced(report)
    assert not {"script", "iframe", "object", "embed", "form", "link", "base"} & found.seen.keys()
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value is not None
            assert value.startswith(("#", "data:image/"))
    assert "@import" not in report.html
    assert "url(" not in report.html


def test_the_page_is_whole(report: Report) -> None:
    root = tree(report)
    assert [each.get("id") for each in root.iter(f"{XHTML}section")] == list(ALL)
    assert_harmless(report)
    ids = [each.get("id") for each in root.iter() if each.get("id")]
    assert len(ids) == len(set(ids))
    for link in root.iter(f"{XHTML}a"):
        assert (link.get("href") or "")[1:] in ids


def test_pictures_say_what_they_are(report: Report) -> None:
    pictures = [each for each in tree(report).iter(f"{SVG}svg") if each.get("aria-hidden") is None]
    assert len(pictures) == sum(len(figure.drawings) for figure in report.figures)
    for each in pictures:
        assert each.get("role") == "img"
        title, description = each[0], each[1]
        assert title.tag == f"{SVG}title"
        assert title.text
        assert description.tag == f"{SVG}desc"
        assert each.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"


def test_shapes_lie_inside_of_their_drawings(report: Report) -> None:
    for figure in report.figures:
        for drawing in figure.drawings:
            assert not out_of_bounds(drawing), drawing.title


def test_every_module_is_on_the_map_once(materials: Materials, report: Report) -> None:
    wanted = Counter(f"{each.part}: {each.name}" for each in materials.lock.modules)
    assert len(wanted) == 424
    for name in ("network", "ranking"):
        groups = section(tree(report), name).iter(f"{SVG}g")
        titles = [each[0].text or "" for each in groups]
        assert Counter(title.partition(" · ")[0] for title in titles) == wanted


def test_every_module_is_in_the_table_once(materials: Materials, report: Report) -> None:
    rows = section(tree(report), "network").findall(f".//{XHTML}details//{XHTML}tbody/{XHTML}tr")
    found = [tuple("".join(cell.itertext()) for cell in row) for row in rows]
    assert len(found) == 424
    wanted = {
        (each.name, each.part): "" if each.error is None else f"{each.error.sqnr_db:.1f}"
        for each in materials.lock.modules
    }
    assert {(name, part): sqnr for name, part, _, _, _, sqnr, *_ in found} == wanted


def test_protected_modules_have_their_reason(materials: Materials, report: Report) -> None:
    reasons = {each.reason for each in materials.lock.modules if each.reason is not None}
    shown = texts(section(tree(report), "network"))
    for reason in reasons:
        assert clean(reason) in shown
    tags = [tag for tag, _, _ in network(materials.lock).reasons]
    assert tags == [f"P{number}" for number in range(1, len(reasons) + 1)]


def test_digests_are_those_of_the_files(materials: Materials, report: Report) -> None:
    shown = texts(section(tree(report), "provenance"))
    lock = materials.lock
    assert materials.ranked is not None
    assert materials.timed is not None
    for digest in (
        *(lock.recipe_sha256, lock.sha256),
        *(file.header_sha256 for file in lock.source),
        *(file.sha256 for file in (*lock.outputs, *lock.sidecars)),
        *(materials.ranked.source.sha256, materials.timed.source.sha256),
        *(each.source.sha256 for each in materials.judged),
        *(each.source.sha256 for each in materials.measured),
        *("ab" * 32, "cd" * 32, "ef" * 32),
        "quantrecipe 1.2.3",
        "ideogram-ai/ideogram-4-fp8",
    ):
        assert digest in shown


def test_what_is_missing_is_left_out() -> None:
    lock = lock_with(["layers.0.q", "layers.1.q", "proj"])
    report = build(Materials(lock), "1")
    names = [each.name for each in report.sections]
    assert names == ["network", "depth", "sizes", "provenance"]
    shown = texts(tree(report))
    for word in ("Evaluation", "not shown", "ranking", "statistics", "source repository", "images"):
        assert word not in shown
    assert_harmless(report)


def test_without_layers_or_noise_there_is_no_depth() -> None:
    lock = lock_with(["a", "b"])
    assert [each.name for each in build(Materials(lock), "1").sections][:2] == ["network", "sizes"]


def test_the_same_materials_make_the_same_bytes(materials: Materials, report: Report) -> None:
    again = build(materials, "1.2.3")
    assert again.html == report.html
    lock = ideogram4_lock()
    assert build(Materials(lock), "1").html == build(Materials(ideogram4_lock()), "1").html
    assert build(Materials(lock), "1").html != build(Materials(ideogram4_lock(seed=1)), "1").html


def test_pages_are_small(report: Report) -> None:
    assert len(report.html.encode()) < 1_000_000
    names = [f"blocks.{layer}.mixer.kind_{kind}" for layer in range(50) for kind in range(20)]
    large = build(Materials(lock_with(names)), "1")
    assert len(large.html.encode()) < 1_500_000
    assert len(large.figures[1].columns) == 20


def test_very_many_layers_are_cut_into_several_maps() -> None:
    lock = lock_with(
        [f"m.{layer}.experts.{expert}.w" for layer in range(13) for expert in range(10)]
    )
    figure = build(Materials(lock), "1").figures[0]
    titles = [column[0].title for column in figure.columns]
    where = "model: m.*.experts"
    assert titles == [f"{where}, 0.0 to 4.3", f"{where}, 4.4 to 8.7", f"{where}, 8.8 to 12.9"]
    groups = section(tree(build(Materials(lock), "1")), "network").iter(f"{SVG}g")
    assert len(list(groups)) == 130


def test_of_many_kinds_the_lowest_are_drawn() -> None:
    lock = lock_with([f"blocks.{layer}.kind_{kind}" for layer in (0, 1) for kind in range(30)])
    depth = build(Materials(lock), "1").figures[1]
    lowest: dict[str, float] = {}
    for module in lock.modules:
        assert module.error is not None
        assert module.error.sqnr_db is not None
        kind = module.name.rpartition(".")[2]
        lowest[kind] = min(lowest.get(kind, 1e9), module.error.sqnr_db)
    shown = {column[0].title for column in depth.columns}
    assert shown == set(sorted(lowest, key=lambda kind: lowest[kind])[:24])
    assert "24 of 30 kinds" in depth.caption


def test_amounts_add_up(materials: Materials) -> None:
    found = amounts(materials.lock)
    assert sum(found.values()) == output_bytes(materials.lock)
    int8 = sum(
        each.shape[0] * each.shape[1]
        for each in materials.lock.modules
        if each.disposition == "quantized"
    )
    assert found["weights, int8 per channel"] == int8


HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "]]><svg onload=alert(1)>",
    "</title></style></svg><script>",
    "&lt;b&gt; &amp; javascript:alert(1)",
    "a\x00\x1b[31m\u202eevil\u2028",
)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = [f"layers.{index}.{name.replace('.', '')}" for index in (0, 1) for name in HOSTILE]
    lock = lock_with([*names, *(name.replace(".", "") for name in HOSTILE)])
    lock = lock.model_copy(
        update={
            "modules": tuple(
                module.model_copy(
                    update={"disposition": "protected", "reason": HOSTILE[0], "error": None}
                    if index % 3 == 0
                    else {"scheme": "a", "transfer": "quantized"}
                )
                for index, module in enumerate(lock.modules)
            ),
            "recipe": lock.recipe.model_copy(update={"description": HOSTILE[1]}),
        }
    )
    ranked = ranking(lock)
    ranked["recipe"], ranked["warnings"] = HOSTILE[0], list(HOSTILE[:4])
    judged = evaluation()
    judged["inputs"][0]["name"] = HOSTILE[3]
    judged["warnings"] = list(HOSTILE[:4])
    for index, each in enumerate(judged["comparisons"]):
        each["explanation"] = HOSTILE[index % 4]
    statistics = {"model": [module.name for module in lock.modules]}
    bench = [{"name": HOSTILE[0], HOSTILE[1]: 3, "x": {HOSTILE[3]: 4}}, {"x": {HOSTILE[3]: 5}}]
    report = build(
        Materials(
            lock,
            ranked=read_ranked(write_json(tmp_path / "r.json", ranked)),
            judged=(read_judged(write_json(tmp_path / "<b>e.json", judged)),),
            measured=gather(
                write_lock(tmp_path / "out", lock_with(statistics["model"])),
                statistics=[write_statistics(tmp_path / "<i>s.safetensors", statistics)],
            ).measured,
            timed=gather(
                write_lock(tmp_path / "out", lock_with(statistics["model"])),
                benchmarks=write_json(tmp_path / "b.json", bench),
            ).timed,
        ),
        "1",
    )
    assert_harmless(report)
    shown = texts(tree(report))
    for name in HOSTILE[:5]:
        assert clean(name.replace(".", "")) in shown
    for figure in report.figures:
        for drawing in figure.drawings:
            assert not out_of_bounds(drawing), drawing.title
    assert r"a\x00\x1b[31m\u202eevil" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", report.html)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=20, deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=5, unique=True), ANY_TEXT)
def test_odd_names_make_whole_pages(names: Sequence[str], reason: str) -> None:
    lock = lock_with(names)
    first = lock.modules[0].model_copy(
        update={"disposition": "protected", "reason": reason, "error": None}
    )
    lock = lock.model_copy(update={"modules": (first, *lock.modules[1:])})
    report = build(Materials(lock), "1")
    assert_harmless(report)
    groups = section(tree(report), "network").iter(f"{SVG}g")
    assert len([each[0].text for each in groups]) == len(names)


# Evaluations


def test_verdicts_are_the_words_of_the_file(report: Report) -> None:
    found = section(tree(report), "evaluation")
    verdicts = [
        "".join(each.itertext())
        for each in found.iter(f"{XHTML}span")
        if (each.get("class") or "").startswith("verdict")
    ]
    assert verdicts == [*INTERVALS, *INTERVALS]
    drawn = Counter(each.text for each in found.iter(f"{SVG}text") if each.text in VERDICTS)
    assert drawn == dict.fromkeys(VERDICTS, 2)
    bands = [each for each in found.iter(f"{SVG}rect") if each.get("class") == "f-band"]
    assert len(bands) == 2


def test_an_interval_around_zero_is_never_called_equivalence(tmp_path: Path) -> None:
    judged = evaluation(
        comparison("psnr", "v", "not shown", -0.1, 0.1) | {"equivalence_test": None}
    )
    judged["metrics"]["psnr"].pop("margin")
    path = write_json(tmp_path / "e.json", judged)
    report = build(Materials(lock_with(["a"]), judged=(read_judged(path),)), "1")
    found = section(tree(report), "evaluation")
    drawn = texts(found.findall(f".//{XHTML}figure")[0])
    assert "equivalen" not in drawn
    assert "not shown" in drawn


_INTERVALS = {"t": [-0.1, 0.1], "bca": None, "percentile": [-0.1, 0.1]}


def _claimed(**changes: object) -> dict[str, object]:
    return comparison("psnr", "v", "equivalent within margin", -0.1, 0.1) | changes


@pytest.mark.parametrize(
    ("judged", "said"),
    [
        (evaluation(_claimed(equivalence_test=None)), "no margin was tested"),
        (
            evaluation(_claimed()) | {"metrics": {"psnr": {"higher_is_better": True}}},
            "no margin was tested",
        ),
        (evaluation(_claimed(verdict="equal")), "'equal'"),
        (evaluation(comparison("psnr", "v", "better", -2, -1)), "other way round"),
        (evaluation(comparison("lpips", "v", "worse", -2, -1)), "other way round"),
        (evaluation(_claimed(intervals=_INTERVALS | {"t": [1, -1]})), "two ends of an interval"),
        (evaluation(_claimed(intervals=_INTERVALS | {"t": [1]})), "too short"),
        (evaluation(_claimed(difference="large")), "expected a number"),
        (evaluation(_claimed(metric="unknown")), "'unknown'"),
        (evaluation() | {"version": 2}, "this is version 2"),
        (evaluation() | {"kind": "lock"}, "found a lock"),
        ([], "expected an object"),
    ],
)
def test_evaluations_that_do_not_hold_are_refused(
    tmp_path: Path, judged: object, said: str
) -> None:
    path = write_json(tmp_path / "e.json", judged)
    with pytest.raises(InvalidInput, match=said) as caught:
        read_judged(path)
    assert caught.value.problems[0].file == str(path)
    assert caught.value.problems[0].line is not None


# What else is read


def _ranking(**changes: object) -> dict[str, object]:
    return ranking(lock_with(["a", "b"])) | changes


@pytest.mark.parametrize(
    ("ranked", "said"),
    [
        (_ranking(curve={"bytes": [0], "noise": [], "protected": [0], "knee": 0}), "differ"),
        (_ranking(curve={"bytes": [0], "noise": [1], "protected": [0], "knee": 1}), "knee"),
        (_ranking(modules=[{"part": "a"}]), "'name' is missing"),
        (_ranking(modules={}), "no list"),
        ({"problems": []}, "'curve' is missing"),
        (_ranking(recipe=3), "no text"),
        (_ranking(ladder={"knee": 0, "rungs": [{"order": "<b>"}]}), "'<b>' is none of"),
    ],
)
def test_rankings_that_do_not_hold_are_refused(tmp_path: Path, ranked: object, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_ranked(write_json(tmp_path / "r.json", ranked))


def test_results_of_another_model_are_refused(tmp_path: Path) -> None:
    out = write_lock(tmp_path / "out", lock_with(["a", "b"]))
    ranked = write_json(tmp_path / "r.json", ranking(lock_with(["c", "d"])))
    with pytest.raises(InvalidInput, match="none of the modules that were ranked"):
        gather(out, rank=ranked)
    measured = write_statistics(tmp_path / "s.safetensors", {"model": ["c"]})
    with pytest.raises(InvalidInput, match="none of the modules that were measured"):
        gather(out, statistics=[measured])


def test_statistics_are_read_as_they_are(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path = write_statistics(tmp_path / "s.safetensors", {"model": ["a", "b", "c"]})
    out = write_lock(tmp_path / "out", lock_with(["a", "b", "c"]))
    (found,) = gather(out, statistics=[path]).measured
    tensors = load_file(path)
    for module in found.modules:
        maxima = tensors[f"model/{module.name}/input_absmax"]
        assert module.largest == tuple(maxima.max(1).tolist())
        assert module.median == pytest.approx(np.median(maxima, 1))
        whole = maxima.max(0).astype(np.float64)
        assert module.max_to_median == pytest.approx(whole.max() / np.median(whole), rel=1e-12)
    assert found.modules[0].name == "a"
    ratios = [module.max_to_median for module in found.modules]
    assert ratios == sorted(ratios, reverse=True)


def test_statistics_that_cannot_be_are_refused(tmp_path: Path) -> None:
    out = write_lock(tmp_path / "out", lock_with(["a"]))
    path = write_statistics(tmp_path / "s.safetensors", {"model": ["a"]})
    content = bytearray(path.read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="what no maximum can be"):
        gather(out, statistics=[path])


@pytest.mark.parametrize(
    ("bench", "said"),
    [
        ([], "no numbers"),
        ([{"name": "a", "ok": True}], "no numbers"),
        ([[1]], "no object"),
        (3, "no list"),
        ([{"x": 1}] * 201, "room for 200"),
    ],
)
def test_benchmarks_that_say_nothing_are_refused(tmp_path: Path, bench: object, said: str) -> None:
    out = write_lock(tmp_path / "out", lock_with(["a"]))
    with pytest.raises(InvalidInput, match=said):
        gather(out, benchmarks=write_json(tmp_path / "b.json", bench))


def test_benchmarks_by_name_and_nested(tmp_path: Path) -> None:
    out = write_lock(tmp_path / "out", lock_with(["a"]))
    bench = {"bf16": {"graph": 2.5, "shares": {"gemm": 0.5}}, "int8": {"graph": 1.25, "gpu": "x"}}
    timed = gather(out, benchmarks=write_json(tmp_path / "b.json", bench)).timed
    assert timed is not None
    assert [row.labels for row in timed.rows] == [(("", "bf16"),), (("", "int8"), ("gpu", "x"))]
    assert timed.rows[0].numbers == (("graph", 2.5), ("shares: gemm", 0.5))
    report = build(Materials(lock_with(["a"]), timed=timed), "1")
    assert "1.25" in texts(section(tree(report), "speeds"))
