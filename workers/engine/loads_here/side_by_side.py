"""Texts that the original and a checkpoint write after the same words, token by token the most likely one.

The original is read once, by the child that reads checkpoints, in transformers; where that does not work there is
nothing beside which a checkpoint's text could stand, and the job goes on without.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from bitwright.report import WrittenText
from workers.engine.loads_here.checks import Probe
from workers.engine.loads_here.reading import Reading
from workers.engine.text.sequences import load_tokenizer

LONGEST = 2000
"""Characters of a text: a token of a stranger's tokenizer may be long."""

Words = Callable[[tuple[int, ...]], WrittenText | None]
"""The text of the tokens that a checkpoint wrote, beside the original's."""


def side_by_side(reading: Reading, source: Path, probe: Probe, tokens: int) -> Words:
    """The original's text, ready for those of its checkpoints.

    source   folder of the original, with its tokenizer
    """
    text = probe.text
    written = () if text is None else reading.written_by(source, probe, tokens)

    def words(ids: tuple[int, ...]) -> WrittenText | None:
        if text is None or len(written) != tokens or len(ids) != tokens:
            return None
        with suppress(Exception):  # a stranger's tokenizer may refuse what a model writes
            tokenizer = load_tokenizer(source)
            original, result = (str(tokenizer.decode(list(each)))[:LONGEST] for each in (written, ids))
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(written, ids, strict=True)))
            return WrittenText(prompt=text, original=original, result=result, tokens=tokens, same=same)
        return None

    return words
