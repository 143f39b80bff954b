"""Every shell and Python block of the documents runs against a live service, or says why it does not."""

from collections import Counter
from pathlib import Path

import pytest

from tests.documentation import ROOT
from tests.documents.blocks import Block, blocks_of, documents, read_blocks
from tests.documents.conftest import Reader
from tests.documents.sessions import BlockFailed, Interpreter, as_typed

BLOCKS = [block for document in documents() for block in blocks_of(document)]
RUNNING = [block for block in BLOCKS if block.runs]

NOT_RUN = {
    "deployment": 1,
    "docker": 1,
    "fragment": 20,
    "gpu": 1,
    "llama.cpp": 1,
    "make": 8,
    "measurement": 38,
    "vllm": 2,
}
"""Number of blocks of each kind that no test runs. Another one is a decision: it is counted here."""


def marked(block: Block) -> pytest.param:  # type: ignore[valid-type]
    marks = [pytest.mark.slow] if block.slow else []
    return pytest.param(block, id=block.name, marks=marks)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", [marked(block) for block in RUNNING])
def test_a_block_does_what_it_says(reader: Reader, block: Block) -> None:
    reader.session(block.document).reach(block)


def test_blocks_that_do_not_run_say_why_and_are_counted() -> None:
    left_out = [block for block in BLOCKS if block.kind is not None]
    assert Counter(block.kind for block in left_out) == NOT_RUN
    for block in left_out:
        assert block.why is not None
        assert len(block.why.split()) >= 3, block.name
    assert all(len(block.slow.split()) >= 3 for block in BLOCKS if block.slow), "why is it slow?"
    code = [block for block in BLOCKS if block.is_code]
    assert len([block for block in RUNNING if block.is_code]) >= 20
    assert all(block.runs or block.kind for block in code)


def test_the_quickstart_has_the_readmes_commands() -> None:
    """The README's own block is slow; its commands but the last are those of a page that always runs."""
    quickstart = {line for block in blocks_of(ROOT / "docs/quickstart.md") for line in block.text.splitlines()}
    (block,) = [block for block in blocks_of(ROOT / "README.md") if block.slow]
    commands = block.text.splitlines()
    plain = {line.partition("    #")[0] for line in quickstart}
    assert set(commands[:-1]) <= plain
    assert len(commands) == 5


def test_code_has_a_language() -> None:
    """A block without one would never run."""
    starts = ("$ ", "curl ", "bitwright ", "make ", "pip ", "python ", "import ", "from ")
    hidden = [block.name for block in BLOCKS if not block.is_code and block.text.lstrip().startswith(starts)]
    assert hidden == []


def test_blocks_are_read_with_their_marks() -> None:
    text = (
        "a\n\n<!-- not run: gpu: it needs two -->\n```sh\none\n```\n\n```sh\ntwo\n\n```\n"
        "<!-- slow: takes quite long -->\n```python\nthree\n```\n~~~\nfour\n~~~\n"
    )
    found = list(read_blocks(Path("x.md"), text))
    assert [(b.language, b.text, b.kind, b.why, b.slow) for b in found] == [
        ("sh", "one\n", "gpu", "it needs two", None),
        ("sh", "two\n\n", None, None, None),
        ("python", "three\n", None, None, "takes quite long"),
        ("", "four\n", None, None, None),
    ]
    assert [b.line for b in found] == [4, 8, 13, 16]
    assert as_typed("$ one\nits answer\n$ two\n") == "one\ntwo\n"
    assert as_typed("bitwright serve --model-root x &\ntrue\n") == ":\ntrue\n"
    with pytest.raises(ValueError, match="not closed"):
        list(read_blocks(Path("x.md"), "```sh\none\n"))


@pytest.mark.parametrize(
    "text", ["false", "true; false | cat", 'echo "$NOBODY_SET_THIS"', "no-such-command", "exit 3", "if"]
)
def test_a_block_that_fails_is_seen(tmp_path: Path, text: str) -> None:
    line = "source '{step}' < /dev/null; echo $? > '{status}.new'; mv '{status}.new' '{status}'"
    shell = Interpreter(["bash", "-euo", "pipefail"], line, tmp_path, {"PATH": "/usr/bin:/bin"}, tmp_path / "log")
    try:
        assert shell.run("X=1; echo said").strip() == "said"
        assert shell.run('echo "$X"').strip() == "1", "what a block sets is there in the next"
        with pytest.raises(BlockFailed):
            shell.run(text)
    finally:
        shell.close()
