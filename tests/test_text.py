"""Text that is safe to print."""

import pytest

from tlcli.text import strip_control_chars

KEPT = {
    "zero-width non-joiner": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "zero-width joiner": "\u0915\u094d\u200d\u0937 \U0001f468\u200d\U0001f33e",
    "left-to-right mark": "\u05d0\u200e1",
    "private use": "\ue000",
    "not yet assigned": "\u0378",
}
REPLACED = ["\x1b", "\x07", "\n", "\x7f", "\x9b", "\udc80", "\ud83d", "\u2028", "\u2029"]
REPLACED += [*"\u202a\u202b\u202c\u202d\u202e", *"\u2066\u2067\u2068\u2069"]  # embeddings and overrides; isolates


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_characters_that_join_letters_and_those_of_other_alphabets_stay(text: str) -> None:
    assert strip_control_chars(text) == text


@pytest.mark.parametrize("character", REPLACED, ids=ascii)
def test_characters_that_move_the_cursor_or_turn_the_text_around_are_replaced(character: str) -> None:
    assert strip_control_chars(f"a{character}b") == "a\ufffdb"
