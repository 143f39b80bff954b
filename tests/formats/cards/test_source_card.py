"""The source's own card: what of it a result inherits, and that nothing else of a stranger's text gets through."""

import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from app.domain.formats import ExportFormat
from bitwright.report import ModelReport
from tests.formats.examples import REPORT, Source, random_result, scheme, tiny_llama
from workers.formats.cards.source_card import MAX_BYTES, SourceCard, read_source_card
from workers.formats.registry import open_writer

NOTHING = SourceCard()


def written(folder: Path, text: str | bytes) -> SourceCard:
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_source_card(folder)


@pytest.mark.parametrize(
    ("matter", "expected"),
    [
        ("license: apache-2.0", SourceCard(license=("apache-2.0",))),
        ("license: [mit, apache-2.0]", SourceCard(license=("mit", "apache-2.0"))),
        ("language: no", SourceCard(language=("no",))),
        ("language:\n- no\n- zh-Hant\n- multilingual", SourceCard(language=("no", "zh-Hant", "multilingual"))),
        ("language:\n\t- en", SourceCard(language=("en",))),
        ("pipeline_tag: image-text-to-text", SourceCard(pipeline_tag="image-text-to-text")),
        (
            "license: other\nlicense_name: llama3.1\nlicense_link: https://example.org/a",
            SourceCard(license=("other",), license_name="llama3.1", license_link="https://example.org/a"),
        ),
        ("license_link: ./LICENSE.txt", SourceCard(license_link="LICENSE.txt")),
        ("version: 2024-01-01\nlicense: mit", SourceCard(license=("mit",))),
    ],
)
def test_known_fields_are_read_as_text(tmp_path: Path, matter: str, expected: SourceCard) -> None:
    assert written(tmp_path, f"---\n{matter}\n---\n# Title\n") == expected
    assert written(tmp_path, f"\ufeff---\n{matter}\n---\n# Title\n".replace("\n", "\r\n")) == expected


@pytest.mark.parametrize(
    "matter",
    [
        "license: {a: b}",
        'license: "a\\nb"',
        "license: '# heading'",
        "license: '" + "x" * 200 + "'",
        "language: [[en]]",
        "language: '<script>'",
        "license_link: ../../etc/passwd",
        "license_link: /etc/passwd",
        "license_link: javascript:alert(1)",
        "license_link: 'https://a b'",
        "pipeline_tag: Text Generation",
        "license: !!python/object/apply:os.system ['echo > x']",
        "license: [" + "[" * 5000,
        "- a list",
        "a: b: c",
        "license: \x00",
        "base_model: org/other\ndatasets: [org/data]\nlibrary_name: x\ntags: [t]",
    ],
)
def test_what_the_hub_would_not_take_is_left_out(tmp_path: Path, matter: str) -> None:
    assert written(tmp_path, f"---\n{matter}\n---\n") == NOTHING


def test_no_card_none_with_front_matter_and_one_too_long_say_nothing(tmp_path: Path) -> None:
    assert read_source_card(tmp_path) == NOTHING
    assert written(tmp_path, "# no front matter\n---\nlicense: mit\n---\n") == NOTHING
    assert written(tmp_path, "---\nlicense: mit\n") == NOTHING
    assert written(tmp_path, b"\xff\xfe\x00---\nlicense: mit\n---\n") == NOTHING
    assert written(tmp_path, "---\n" + "a: 1\n" * MAX_BYTES + "license: mit\n---\n") == NOTHING
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert read_source_card(tmp_path) == NOTHING


def test_references_that_would_unfold_without_end_cost_nothing(tmp_path: Path) -> None:
    laughs = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))
    start = time.process_time()
    card = written(tmp_path, f"---\na0: &a0 [x]\n{laughs}\nlicense: mit\nlanguage: *a39\n---\n")
    assert card == SourceCard(license=("mit",))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("kind", "licence", "link"),
    [
        ("hub", "LICENSE", "LICENSE"),
        ("hub", "terms.md", "https://huggingface.co/org/tiny/blob/main/terms.md"),
        ("local", "terms.md", None),
        ("local", "https://example.org/terms", "https://example.org/terms"),
    ],
)
def test_a_link_to_the_licence_leads_somewhere(tmp_path: Path, kind: str, licence: str, link: str | None) -> None:
    source = tiny_llama(tmp_path / "source")
    written(source.folder, f"---\nlicense: other\nlicense_name: own\nlicense_link: {licence}\n---\n")
    model = ModelReport.model_validate(REPORT.model.model_dump() | {"kind": kind})
    data = ModelCard.load(_described(source, tmp_path / "out", model)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "own", link)
    assert data.base_model == ("org/tiny" if kind == "hub" else None)


def _described(source: Source, folder: Path, model: ModelReport) -> Path:
    writer = open_writer(folder, ExportFormat.MERGED, source)
    writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), scheme(4, 32, True)))
    writer.finish()
    writer.describe(REPORT.model_copy(update={"model": model}))
    return folder / "README.md"
