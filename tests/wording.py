"""How the tests read errors, warnings and notices: by the words that matter, whatever prose stands between them."""

from __future__ import annotations


def says(text: str, *words: str) -> bool:
    """Return whether `text` has each of the words, in this order; ` ... ` within one stands for any prose."""
    at = 0
    for word in " ... ".join(words).split(" ... "):
        at = text.find(word, at)
        if at < 0:
            return False
        at += len(word)
    return True
