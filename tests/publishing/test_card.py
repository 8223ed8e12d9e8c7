"""The model card: true to what it is made of, what the Hub reads, and nobody's markup."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.cli.evaluate import compare
from quantrecipe.evaluate.evaluations import read_evaluation
from quantrecipe.evaluate.reporting.fields import Source
from quantrecipe.evaluate.reporting.markup import clean
from quantrecipe.evaluate.reporting.timed import Row, Timed
from quantrecipe.publishing.card import model_card
from quantrecipe.publishing.card.markdown import code, link, shell, text
from quantrecipe.publishing.card.metadata import metadata
from quantrecipe.publishing.facts import Facts, License, Result
from quantrecipe.schema.lock import Lock, LockedModule
from quantrecipe.schema.patterns import Patterns
from tests.evaluate.reporting_materials import ideogram4_lock, lock_with
from tests.evaluate.scores.making import compared, one_seed, scores
from tests.publishing.card_facts import (
    BASE,
    USAGE,
    converted,
    facts_of,
    protected_recipe,
    scored,
    smoothed_recipe,
)

markdown_it = pytest.importorskip("markdown_it")
RENDERER = markdown_it.MarkdownIt("commonmark").enable("table")
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NASTY = st.lists(
    st.sampled_from(
        [
            *("|", "`", "``", "\n", "\\", "<script>", "](", "[a](http://b.example)", "<!--", "-->"),
            *("&lt;", "*", "_", "#", "- ", "1. ", "---", "~~~", "![x](y)", "https://c.example"),
            *("www.d.example", "e@f.example", "\x1b[0m", "\u202e", "</details>", "a", " ", "$$"),
        ]
    ),
    min_size=1,
    max_size=8,
).map("".join)
CASES = ("protected", "smoothed", "ideogram4")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Facts]:
    """Two small ones that were converted and judged, and a whole Ideogram 4 from its headers."""
    found = {}
    for name, layout, fields in (
        ("protected", "int8-scaled", protected_recipe()),
        ("smoothed", "quantrecipe", smoothed_recipe()),
    ):
        folder = tmp_path_factory.mktemp(name)
        lock = converted(folder, layout, **fields)
        results = (scored(folder / "out", lock),)
        found[name] = facts_of(lock, folder / "out", results=results)
    found["ideogram4"] = facts_of(ideogram4_lock(), Path("out"), timed=None, repo="me/ideogram")
    return found


def section(card: str, title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return str(found)


def rows(block: str) -> list[list[str]]:
    """The cells of all rows of tables, heads and rules left out, as they are shown."""
    found: list[list[str]] = []
    tokens = RENDERER.parse(block)
    for before, token in pairwise(tokens):
        if token.type == "tr_open":
            found.append([])
        elif before.type in ("th_open", "td_open"):
            found[-1].append(shown(token))
        elif token.type == "thead_close":
            found.pop()
    return found


def shown(inline: Any) -> str:
    return "".join(each.content for each in inline.children if each.type in ("text", "code_inline"))


def entries(data: Any) -> dict[str, Any]:
    found: dict[str, Any] = data.to_dict()
    return found


def number(cell: str) -> int:
    return int(cell.replace(",", "") or 0)


@pytest.mark.parametrize("case", CASES)
def test_the_hub_reads_the_front_matter(cases: Mapping[str, Facts], case: str) -> None:
    facts = cases[case]
    card = ModelCard(model_card(facts))
    said = entries(card.data)
    assert said == metadata(facts)
    assert entries(ModelCardData(**said)) == said
    assert said["base_model"] == ["owner/base"]
    assert said["base_model_relation"] == "quantized"
    assert said["language"] == ["en", "no"]
    assert said["license_name"] == "some-terms"
    assert said["extra_gated_prompt"] == "Be kind: yes\n---\n"
    assert said.get("library_name") == ("diffusers" if case == "smoothed" else None)
    more = ["nf4", "smoothquant", "hadamard"] if case == "smoothed" else []
    wanted = ["diffusers", "art", "quantized", "int8", "w8a8", *more, "quantrecipe"]
    assert said["tags"] == wanted


@pytest.mark.parametrize("case", CASES)
def test_numbers_add_up(cases: Mapping[str, Facts], case: str) -> None:
    facts = cases[case]
    lock = facts.lock
    *listed, total = rows(section(model_card(facts), "What is quantized"))
    tensors = [tensor for _, tensor in lock.tensors()]
    assert sum(number(row[1]) for row in listed) == number(total[1]) == len(lock.modules)
    assert sum(number(row[2]) for row in listed) == number(total[2])
    assert number(total[2]) == (
        sum(prod(module.shape) for module in lock.modules)
        + sum(prod(tensor.shape) for tensor in tensors if tensor.role in ("bias", "other"))
    )
    assert sum(number(row[-1]) for row in listed) == number(total[-1])
    assert number(total[-1]) == sum(tensor.bytes for tensor in tensors)
    schemes = Counter(module.scheme for module in lock.modules if module.scheme)
    assert {row[0]: number(row[1]) for row in listed if row[0] in schemes} == schemes


@pytest.mark.parametrize("case", CASES)
def test_every_module_that_is_kept_is_matched_once(cases: Mapping[str, Facts], case: str) -> None:
    facts = cases[case]
    modules = facts.lock.modules
    listed = rows(section(model_card(facts), "Protected and passed through"))
    taken: Counter[tuple[str, str]] = Counter()
    for patterns, parts, stored, count, *reason in listed:
        alone = [Patterns.compile([pattern]) for pattern in split(patterns)]
        matched = [
            (module, each)
            for module in modules
            for each in alone
            if module.part in parts.split(", ") and each.matches(module.name) is not None
        ]
        assert len(matched) == number(count)
        for module, _ in matched:
            taken[module.part, module.name] += 1
            assert module.disposition == ("protected" if reason else "passthrough")
            assert reason in ([], [clean(module.reason)])
            assert stored == module.weight.format
    kept = [module for module in modules if module.disposition != "quantized"]
    assert taken == Counter((module.part, module.name) for module in kept)


def split(patterns: str) -> list[str]:
    """Patterns between commas that are not in braces."""
    return re.findall(r"(?:\{[^}]*\}|[^,{])+", patterns.replace(", ", ","))


@pytest.mark.parametrize("case", CASES)
def test_files_and_digests_are_those_of_the_lock(cases: Mapping[str, Facts], case: str) -> None:
    facts = cases[case]
    lock, card = facts.lock, model_card(facts)
    listed = rows(section(card, "Sizes and files"))
    wanted = [(file.path, file.bytes, file.sha256) for file in (*lock.outputs, *lock.sidecars)]
    assert [(path, number(size), digest) for path, size, digest in listed] == wanted
    origin = section(card, "Provenance")
    for word in (lock.recipe_sha256, lock.sha256, BASE.commit, lock.tool.version):
        assert word is not None
        assert word in origin
    for file in lock.source:
        assert (file.sha256 or file.header_sha256) in origin
    assert f"convert --recipe recipe.json hf://owner/base@{BASE.commit}/small --out again" in origin


def test_errors_are_those_of_the_lock(cases: Mapping[str, Facts]) -> None:
    lock = cases["ideogram4"].lock
    listed = rows(section(model_card(cases["ideogram4"]), "Error of the weights"))
    measured = {
        f"{module.part}: {module.name}": module.error.sqnr_db
        for module in lock.modules
        if module.error is not None and module.error.sqnr_db is not None
    }
    assert sum(number(row[1]) for row in listed) == len(measured)
    for _, _, lowest, median, highest, worst in listed:
        assert float(lowest) <= float(median) <= float(highest)
        assert f"{measured[worst]:.1f}" == lowest
    assert float(listed[0][2]) == round(min(measured.values()), 1)


def test_layouts_are_said_in_terms_of_modules(cases: Mapping[str, Facts]) -> None:
    listed = rows(section(model_card(cases["smoothed"]), "Layout"))
    found = {(row[0], row[1]): tuple(row[2:5]) for row in listed}
    assert found["int8 per channel", "weight_scale"] == (
        *("{module}.weight_scale", "float32", "[out, 1]"),
    )
    assert found["int8 per channel", "smoothing"] == ("{module}.smoothing", "float32", "[in]")
    assert found["nf4 in blocks of 64", "weight"][1:] == ("uint8", "[out, in / 2]")
    plain = rows(section(model_card(cases["ideogram4"]), "Layout"))
    assert {row[2] for row in plain if row[1] == "weight"} == {
        *("{part}.{module}.weight", "{part}.{module}.wq"),
    }


def test_the_same_facts_make_the_same_card(cases: Mapping[str, Facts]) -> None:
    for facts in cases.values():
        card = model_card(facts)
        assert card == model_card(facts)
        assert str(facts.folder.parent) not in card or facts.folder == Path("out")


# Results


@pytest.mark.parametrize("case", ["protected", "smoothed"])
def test_the_command_computes_the_same(
    cases: Mapping[str, Facts], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = cases[case]
    (command,) = re.findall(r"^quantrecipe evaluate compare (.*)$", model_card(facts), re.MULTILINE)
    monkeypatch.chdir(facts.folder)
    result = CliRunner().invoke(compare, shlex.split(command), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    again, _ = read_evaluation(Path("evaluation-again.json"))
    assert again == facts.results[0].evaluated


def test_results_are_those_of_the_evaluation(cases: Mapping[str, Facts]) -> None:
    (result,) = cases["protected"].results
    shown = section(model_card(cases["protected"]), "Results")
    verdicts = [row for row in rows(shown) if len(row) == 11]
    assert [row[1] for row in verdicts] == ["int8", "int8", "rival", "rival"]
    found = {(each.metric, each.variant): each for each in result.evaluated.comparisons}
    for metric, variant, *_, p, _, verdict, prompts, seeds in verdicts:
        each = found.pop((metric.partition(",")[0], variant))
        assert (verdict, prompts, seeds) == (each.verdict, "40", "1")
        assert each.difference_test is not None
        assert p in ("< 0.0001", f"{each.difference_test.p_holm:.2g}")
    assert not found
    assert "An interval that holds zero is no equivalence" in shown
    assert "`psnr` ±0.5" in shown
    assert "declared in `recipe.json`" in shown


def test_what_cannot_be_computed_again_is_not_promised(cases: Mapping[str, Facts]) -> None:
    facts = cases["protected"]
    (result,) = facts.results
    hidden = replace(result, scores=(None, *result.scores[1:]))
    card = model_card(replace(facts, results=(hidden,)))
    assert "evaluate compare" not in card
    assert all(file.sha256 in card for file in result.evaluated.inputs)
    other = cases["smoothed"].lock
    card = model_card(replace(facts, lock=other))
    assert "evaluate compare" not in card
    assert facts.lock.recipe_sha256 in card


def test_what_is_not_known_is_left_out(cases: Mapping[str, Facts]) -> None:
    bare = Facts(
        lock_with(["a", "b"]),
        Path("out"),
        None,
        License("mit"),
        replace(USAGE, needed=None),
        loader=False,
    )
    card = model_card(bare)
    for word in ("base_model", "gated", "Results", "Speed", "download_deps", "hf://", "loader"):
        assert word not in card
    assert "convert --recipe recipe.json SOURCE --out again" in card
    assert metadata(bare) == {"license": "mit", "tags": ["quantized", "int8", "quantrecipe"]}


# Texts


@pytest.mark.parametrize(
    "word",
    ["no", "1e3", "0o17", "null", "~", "2026-01-01", "1_000", "on", "0x1F", "", " ", "=", "1:30"],
)
def test_words_that_yaml_takes_for_something_else_stay_words(word: str) -> None:
    facts = Facts(lock_with(["a"]), Path("out"), BASE, License("other", word, word), USAGE)
    front = model_card(facts).split("---\n")[1]
    assert yaml.safe_load(front)["license_name"] == word
    assert re.search(rf"""license_name: (["']){re.escape(word)}\1\n""", front)


@settings(max_examples=60, deadline=None)
@given(st.one_of(ANY_TEXT, NASTY), st.one_of(ANY_TEXT, NASTY))
def test_any_text_stays_itself_in_the_front_matter(first: str, second: str) -> None:
    base = replace(
        BASE, tags=(first, second), gate={"extra_gated_prompt": [first, {second: second}]}
    )
    facts = Facts(LOCK, Path("out"), base, License("other", first, second), USAGE)
    card = ModelCard(model_card(facts))
    assert entries(card.data) == metadata(facts)


CONTEXTS = (
    "{}\n",
    "* {}\n",
    "# {}\n",
    "| a | b |\n| --- | --- |\n| {} | c |\n",
    "so: **{}**, yes\n",
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(ANY_TEXT, NASTY), st.sampled_from(CONTEXTS), st.sampled_from([text, code]))
def test_any_text_is_shown_as_itself(words: str, context: str, write: Any) -> None:
    written = write(words)
    tokens = RENDERER.parse(context.format(written))
    plain = RENDERER.parse(context.format("word"))
    if written:
        assert [token.type for token in tokens] == [token.type for token in plain]
    inline = [token for token in tokens if token.type == "inline"]
    everything = "".join(map(shown, inline))
    assert clean(words) in everything
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "code_inline", "strong_open", "strong_close"}
    assert "|" not in written
    assert not re.search(r"[\x00-\x1f\u202e]", written)
    outside = re.sub(r"(`+).*?(?<!`)\1(?!`)", "", written)
    assert not re.search(r"<|@|://|www\.", outside)


@pytest.mark.parametrize(
    ("target", "linked"),
    [
        ("https://a.example/b(c)?d=e&f=g", True),
        ("LICENSE.md", True),
        ("javascript:alert(1)", False),
        ("data:text/html,x", False),
        ("//evil.example", False),
        ("https://a.example/x)](y", True),
        ("https://a.example/\nb", False),
        ("", False),
    ],
)
def test_links_go_where_links_may_go(target: str, linked: bool) -> None:
    (_, inline, _) = RENDERER.parse(f"see {link('here', target)} now")
    hrefs = [child.attrs["href"] for child in inline.children if child.type == "link_open"]
    assert len(hrefs) == linked
    assert all(href.startswith(("https://a.example/", "LICENSE.md")) for href in hrefs)
    assert shown(inline).startswith("see here")
    assert shown(inline).endswith(" now")


@settings(max_examples=50, deadline=None)
@given(st.one_of(ANY_TEXT, NASTY))
def test_arguments_are_one_line_and_one_argument(words: str) -> None:
    written = shell(words)
    assert written.isprintable()
    if words.isprintable():
        assert shlex.split(written) == [words]


def test_shells_read_what_does_not_print() -> None:
    words = "a\n\x1b'b\\ \u2028ü$(x)"
    command = f"printf %s {shell(words)}"
    environment = {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True, env=environment)
    assert done.stdout.decode() == words


LOCK = lock_with(["a.0", "b.0", "c.0", "d.0"])


@cache
def judged() -> Result:
    table = {"ref": one_seed(range(9)), "int8": one_seed([4, 2, 4, 5, 1, 3, 9, 7, 1])}
    found = compared(scores(table), higher=True)
    return Result(found, "int8", "evaluation.json", "0" * 64, ("scores.jsonl",))


def named(lock: Lock, names: Sequence[str], reason: str) -> Lock:
    """The lock with modules that are called so, the first of them protected for this reason."""

    def renamed(at: int, module: LockedModule) -> LockedModule:
        tensors = {
            role: tensor.model_copy(update={"name": names[at] + tensor.name, "file": names[-1]})
            for role, tensor in module.tensors.items()
        }
        changes: dict[str, Any] = {"name": names[at], "tensors": tensors}
        if at == 0:
            changes |= {"disposition": "protected", "reason": reason, "error": None}
        return module.model_copy(update=changes)

    files = tuple(file.model_copy(update={"path": names[0]}) for file in lock.outputs)
    return lock.model_copy(
        update={
            "modules": tuple(renamed(at, module) for at, module in enumerate(lock.modules)),
            "outputs": files,
            "source": tuple(file.model_copy(update={"path": names[1]}) for file in lock.source),
            "recipe": lock.recipe.model_copy(update={"description": reason}),
        }
    )


def filled(result: Result, words: str) -> Facts:
    """Facts in which every text that can be anybody's is this one."""
    found = result.evaluated
    said = found.model_copy(
        update={
            "warnings": (f"x{words}",),
            "comparisons": tuple(
                each.model_copy(update={"explanation": f"x{words}"}) for each in found.comparisons
            ),
            "inputs": tuple(each.model_copy(update={"name": f"x{words}"}) for each in found.inputs),
        }
    )
    timed = Timed(
        Source(f"x{words}", "0" * 64), (Row((("", f"x{words}"),), ((f"x{words}", 1.0),)),)
    )
    base = replace(BASE, repo=f"x{words}", gate={f"extra_gated_{words}": words})
    usage = replace(USAGE, summary=f"x{words}", command=f"x{words}", packages=(f"x{words}",))
    return Facts(
        named(LOCK, [f"{letter}.{words}" for letter in "abcd"], f"x{words}"),
        Path("out"),
        base,
        License(f"x{words}", f"x{words}", f"x{words}"),
        usage,
        (replace(result, evaluated=said, path=f"x{words}", scores=(f"x{words}",)),),
        timed,
        repo=f"x/{words}",
    )


def skeleton(card: str) -> Iterator[tuple[str, str]]:
    """What a card is built of, without its texts."""
    for token in RENDERER.parse(card.split("\n---\n", 1)[1]):
        if token.type == "inline":
            yield from ((child.type, "") for child in token.children if "text" not in child.type)
        else:
            yield token.type, token.content if token.type == "html_block" else ""


@settings(max_examples=25, deadline=None)
@given(NASTY)
def test_no_text_changes_what_a_card_is_built_of(words: str) -> None:
    card, plain = (model_card(filled(judged(), each)) for each in (words, "word"))
    inside = {"code_inline", "softbreak", "link_open", "link_close"}
    built, wanted = (
        [each for each in skeleton(text_of) if each[0] not in inside] for text_of in (card, plain)
    )
    assert built == wanted
    body = card.split("\n---\n", 1)[1]
    for before, line in pairwise(body.splitlines()):
        if before.startswith("| ") and line.startswith("| "):
            assert before.count("|") == line.count("|")
    links = {
        child.attrs["href"]
        for token in RENDERER.parse(body)
        for child in token.children or ()
        if child.type == "link_open"
    }
    assert all(href == BASE.page or not re.match("[a-z]+:|//", href) for href in links)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", card)
