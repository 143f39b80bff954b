"""Turns of the assistant in a conversation: the parts of the template's text that are learned.

A template that has `{% generation %}` says it itself. Of any other, a turn is what its loops write while they are at
the assistant's message, from where the generation prompt ends to the end of the turn: what the template writes after
the last message belongs to that, and where it writes nothing at the end of a turn, the token that begins the next does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from app.domain.inputs.messages import Message
from app.domain.inputs.rows import Conversation
from bitwright.errors import InvalidDataset
from workers.engine.text.conversations import ChatTemplate, Written
from workers.engine.text.marked_template import KEY, Marks, Piece, marked, pieces

Span = tuple[int, int]
"""First character, and the one after the last."""

FIRST_WORDS = ("<think>", "<thinking>", "[THINK]", "<|START_THINKING|>", "<|channel>thought")
"""Openings of a model's thoughts. A generation prompt may say them for the model, and still they are learned."""
ASKING = Conversation((Message("user", {"role": "user", "content": "?"}),))
"""A conversation before a first answer, to see how its template asks for one."""
WAY_OUT = (
    'set finetune.loss_on to "all" with no weights in the row, or put {% generation %} into the chat template '
    "around what the assistant writes"
)


@dataclass(frozen=True)
class _Marked:
    """A conversation's text with whose parts they are."""

    talk: Conversation
    written: Written
    pieces: Sequence[Piece]

    @property
    def tags(self) -> bool:
        return any(piece.generated for piece in self.pieces)


class Turns:
    """The turns of conversations that one template writes."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._prompts: dict[tuple[str, ...], str] = {}
        special = template.tokenizer.all_special_tokens
        start, end = template.tokenizer.bos_token, template.tokenizer.eos_token
        self._ends = tuple(token for token in special if token != start or token == end)

    def learned_spans(self, talk: Conversation, written: Written) -> tuple[Span, ...]:
        """The parts of a conversation's text that are learned: the assistant's turns, but those of weight 0.

        Raises:
            InvalidDataset: a turn cannot be found, or there is nothing in it.
        """
        marking = self._marked(talk, written)
        turns = [index for index, message in enumerate(talk.messages) if message.learned]
        for index in turns:
            if not written.shape.answers[index]:
                as_written = "" if talk.messages[index].is_blank else " as the chat template writes it"
                problem = f"{talk.messages[index].path} is an empty answer{as_written}"
                raise self.template.error(talk, problem, "drop the row, or give the message weight 0")
        if not marking.tags:
            return tuple(span for index in turns for span in self._turn(marking, index))
        generated = [piece for piece in marking.pieces if piece.generated and self._counts(marking, piece)]
        spans = [(piece.first, piece.last) for piece in generated]
        if not spans:
            raise self.template.error(talk, "the chat template marks nothing as generated", WAY_OUT)
        return _joined(spans)

    def unweighted(self, talk: Conversation, written: Written) -> tuple[Span, ...]:
        """All of a conversation's text but the assistant's turns that have weight 0."""
        left = [i for i, message in enumerate(talk.messages) if message.role == "assistant" and not message.learned]
        if not left:
            return ((0, len(written.text)),)
        marking = self._marked(talk, written)
        cuts = [span for index in left for span in self._turn(marking, index)]
        edges = [0, *(edge for span in sorted(cuts) for edge in span), len(written.text)]
        return tuple((first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last)

    def _counts(self, marking: _Marked, piece: Piece) -> bool:
        """True if what a template marks as generated is learned: not if it is of a turn that is only read."""
        if all(message.learned for message in marking.talk.messages if message.role == "assistant"):
            return True
        owner = piece.owner
        if owner is None and all(other.owner is None for other in marking.pieces if other.first >= piece.first):
            owner = len(marking.talk.messages) - 1  # what is written after all turns ends the last
        if owner is None:
            raise self._lost(marking.talk, "some turn")
        return marking.talk.messages[owner].learned

    def _marked(self, talk: Conversation, written: Written) -> _Marked:
        """The text once more, with marks.

        Raises:
            InvalidDataset: the template writes another text if its messages can be told apart.
        """
        source = self.template.source(talk)
        marks = Marks.unlike(written.text + source)
        program = marked(source, marks)
        if program is not None:
            numbered = [{**message, KEY: index} for index, message in enumerate(written.messages)]
            plain, parts = pieces(self.template.render(talk, numbered, template=program), marks)
            if plain == written.text:
                return _Marked(talk, written, parts)
        raise self._lost(talk, "an assistant's turn")

    def _turn(self, marking: _Marked, index: int) -> list[Span]:
        text, last = marking.written.text, len(marking.talk.messages) - 1
        spans = list(_joined([(piece.first, piece.last) for piece in marking.pieces if piece.owner == index]))
        if not spans:
            raise self._lost(marking.talk, marking.talk.messages[index].path)
        spans[0] = (self._begin(marking, index, spans[0]), spans[0][1])
        first, end = spans[-1]
        after = text[end:]
        if index == last and all(piece.owner is None for piece in marking.pieces if piece.first >= end):
            spans[-1] = (first, len(text))
        elif not text[first:end].rstrip().endswith(self._ends) and not self._goes_on(marking, end):
            token = next((token for token in self._ends if after.startswith(token)), "")
            spans[-1] = (first, end + len(token))
        return [span for span in spans if span[0] < span[1]]

    def _goes_on(self, marking: _Marked, place: int) -> bool:
        """True if an assistant's words follow, as part of the same turn or as a turn that needed no asking."""
        owners = [piece.owner for piece in marking.pieces if piece.first >= place]
        return any(marking.talk.messages[owner].role == "assistant" for owner in owners[:1] if owner is not None)

    def _begin(self, marking: _Marked, index: int, span: Span) -> int:
        """End of the generation prompt of a turn."""
        region = marking.written.text[slice(*span)]
        prompt = self._prompt(marking, index)
        for asked in filter(None, (prompt, self._prompt(marking, 0))):
            if asked in region:
                return span[0] + region.index(asked) + len(asked)
        same = (wanted == written for wanted, written in zip(prompt, region, strict=False))
        return span[0] + sum(1 for _ in takewhile(bool, same))

    def _prompt(self, marking: _Marked, index: int) -> str:
        """The generation prompt of the turn of a message, up to what the model itself would say."""
        before = marking.written.messages[:index]
        key = (self.template.source(marking.talk), str(marking.talk.settings), *_roles(before[-1:]))
        if key not in self._prompts:
            prompt = self._asked(marking.talk, before) if before else None
            if prompt is None:
                prompt = self._asked(marking.talk, self.template.put(ASKING, marking.written.shape.form)) or ""
            cut = min((prompt.index(words) for words in FIRST_WORDS if words in prompt), default=len(prompt))
            self._prompts[key] = prompt[:cut]
        return self._prompts[key]

    def _asked(self, talk: Conversation, messages: Sequence[dict[str, object]]) -> str | None:
        """The generation prompt after messages; None if the template refuses them."""
        source = self.template.source(talk)
        try:
            plain = self.template.render(talk, messages)
            asking = self.template.render(talk, messages, asks=True)
            if asking.startswith(plain):
                return asking[len(plain) :]
            marks = Marks.unlike(asking + source)
            numbered = [{**message, KEY: index} for index, message in enumerate(messages)]
            _, parts = pieces(self.template.render(talk, numbered, asks=True, template=marked(source, marks)), marks)
        except InvalidDataset:
            return None
        owned = [piece.last for piece in parts if piece.owner is not None]
        return asking[max(owned, default=0) :]

    def _lost(self, talk: Conversation, what: str) -> Exception:
        return self.template.error(talk, f"{what} cannot be found in what the chat template writes", WAY_OUT)


def _roles(messages: Sequence[dict[str, object]]) -> list[str]:
    return [f"{message['role']}{'tool_calls' in message}" for message in messages]


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans in order, those that touch each other as one."""
    if not spans:
        return ()
    gaps = [(last, first) for (_, last), (first, _) in pairwise(spans) if last != first]
    edges = [spans[0][0], *(edge for gap in gaps for edge in gap), spans[-1][1]]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
