"""Finds the first stop string in text that arrives in pieces, and holds back exactly what might become one.

An Aho-Corasick automaton: its state after the text so far *is* the longest suffix that starts a stop string, so that
the hold-back is exact and a character costs one look-up, whatever the number and the length of the strings.

**Which match.** The one that ends first; of those that end at the same character, the longest. So the result does not
depend on how the text was cut into pushes. (vLLM takes the first of the *list* that occurs in the text after a token;
the two differ only where one token's text completes several stop strings.)

Knows nothing of tokens.
"""

from collections.abc import Sequence


class StopChecker:
    """Gives text on until a stop string is complete.

    Attributes:
        matched: the stop string found; None while there is none. After it, nothing is given on.
    """

    __slots__ = ("_fail", "_first", "_held", "_include", "_next", "_state", "_stop_at", "_waits", "matched")

    def __init__(self, stop: Sequence[str], *, include_stop_str_in_output: bool = False):
        """Builds the automaton.

        Args:
            stop: the strings, none of them empty.
            include_stop_str_in_output: whether the text ends after the stop string instead of before it. Nothing is
                held back then: all characters of a stop string belong to the text anyway.
        """
        self.matched: str | None = None
        self._include = include_stop_str_in_output
        self._held = ""
        self._state = 0
        self._build(stop)

    def push(self, delta: str, *, check: bool = True) -> str:
        """Appends text.

        Args:
            delta: the new text.
            check: False lets a stop string that ends in this text pass.

        Returns:
            The text that can be given on now.
        """
        if self.matched is not None:
            return ""
        if not self._state and self._first.isdisjoint(delta):
            return delta
        state = self._state
        for end, char in enumerate(delta, 1):
            state = self._advance(state, char)
            if check and (found := self._stop_at[state]) is not None:
                return self._end(found, delta[:end])
        self._state = state
        text = self._held + delta
        visible = len(text) if self._include else len(text) - self._waits[state]
        self._held = text[visible:]
        return text[:visible]

    def flush(self) -> str:
        """Gives on what was held back: it will not become a stop string any more."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _end(self, matched: str, delta: str) -> str:
        self.matched = matched
        text = self._held + delta
        self._held = ""
        # With the stop string kept, its first part may have been given on already, so cut nothing.
        return text if self._include else text[: len(text) - len(matched)]

    def _advance(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def _build(self, stop: Sequence[str]) -> None:
        """Trie, failure links breadth first, and for each state what ends there and how much of it must wait."""
        self._next: list[dict[str, int]] = [{}]
        self._stop_at: list[str | None] = [None]
        depth = [0]
        for string in stop:
            state = 0
            for char in string:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self._stop_at.append(None)
                    depth.append(depth[state] + 1)
                state = self._next[state][char]
            self._stop_at[state] = string
        self._fail = [0] * len(depth)
        self._waits = [0] * len(depth)
        queue = list(self._next[0].values())
        for state in queue:
            # A parent's and a failure link's entries are complete here, because both are shallower.
            suffix = self._fail[state]
            self._waits[state] = depth[state] if self._next[state] else self._waits[suffix]
            if self._stop_at[state] is None:
                self._stop_at[state] = self._stop_at[suffix]
            for char, child in self._next[state].items():
                self._fail[child] = self._advance(suffix, char)
                queue.append(child)
        self._first = frozenset(string[0] for string in stop)
