"""The wire format of server-sent events, by the examples of the HTML standard (section 9.2.6)."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from bitwright.event_stream import EventParser, ServerSentEvent


def parse(text: str) -> list[ServerSentEvent]:
    return read([text.encode()])


def read(chunks: Iterable[bytes]) -> list[ServerSentEvent]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_data_over_several_lines() -> None:
    assert parse("data: YHOO\ndata: +2\ndata: 10\n\n") == [ServerSentEvent("", "message", "YHOO\n+2\n10")]


def test_comments_ids_and_fields_without_a_value() -> None:
    stream = ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"
    assert parse(stream) == [
        ServerSentEvent("1", "message", "first event"),
        ServerSentEvent("", "message", "second event"),
        ServerSentEvent("", "message", " third event"),
    ]


def test_an_event_that_the_end_cuts_off_is_dropped() -> None:
    assert parse("id: 1\ndata: whole\n\nid: 2\ndata: cut off\n") == [ServerSentEvent("1", "message", "whole")]


def test_an_event_without_data_is_none_and_does_not_name_the_next() -> None:
    assert parse("event: ping\n\ndata: x\n\n") == [ServerSentEvent("", "message", "x")]


def test_lines_end_as_the_standard_says_and_nowhere_else() -> None:
    assert parse("data: a\r\ndata: b\rdata: c\u2028d\u2029e\x85f\x0bg\x0ch\x1ci\n\n") == [
        ServerSentEvent("", "message", "a\nb\nc\u2028d\u2029e\x85f\x0bg\x0ch\x1ci")
    ]


LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)


@given(
    st.lists(st.tuples(st.integers(1, 999), LINE.filter(bool)), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(1, 7),
)
def test_what_is_written_is_read_wherever_it_is_cut(events: list[tuple[int, str]], end: str, size: int) -> None:
    lines = [line for number, data in events for line in (f"id: {number}", "event: e", f"data: {data}", "")]
    sent = ("".join(line + end for line in lines) + ": the next comment\n").encode()
    found = read(sent[at : at + size] for at in range(0, len(sent), size))
    assert [(int(e.id), e.data) for e in found] == events
