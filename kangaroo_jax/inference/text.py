"""Token ids to text as they come: no half characters, nothing of a stop string, in time linear in the answer."""

from collections.abc import Iterable, Sequence

from kangaroo_jax.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes that are no character, or not yet, are decoded to
_LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, so tokens at most
_MOST_WAITING = 4 * _LONGEST_CHARACTER  # tokens that may wait for a character to be whole


class Detokenizer:
    """The text of an answer. What `add` and `finish` return, joined, is the whole answer's text.

    An answer that has come to one of the stop strings is over: `stopped` is true, and its text ends before that string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """`stop`: strings that end the answer; the first to be complete counts, of two at once the longer."""
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens whose text is out: some decoders look at what stands before
        self._waiting: list[int] = []  # tokens whose text is not
        self._stops = [_Stop(text) for text in stop if text]
        self._held = ""  # the end of the text so far, which may be the beginning of a stop string
        self.stopped = False

    def follow(self, ids: Sequence[int]) -> None:
        """The answer's text goes on with that of these tokens, which is not given again. Before any is added."""
        self._context = [token for token in ids if self._tokenizer.shows(token)]

    def add(self, ids: Iterable[int]) -> str:
        """The text that is final with these tokens."""
        text = ""
        for token in ids:
            if not self.stopped and self._tokenizer.shows(token):
                self._waiting.append(token)
                text += self._until_stop(self._whole_characters())
        return text

    def finish(self) -> str:
        """The rest, where no token will follow: held back characters, and half ones as U+FFFD."""
        if self.stopped:
            return ""
        text = self._until_stop(self._text(len(self._waiting)))
        if not self.stopped:
            text += self._held
        self._waiting, self._held = [], ""
        return text

    def _whole_characters(self) -> str:
        """The text of waiting tokens that later ones cannot change; those wait no longer."""
        count, text = len(self._waiting), self._text(len(self._waiting))
        if text.endswith(_REPLACEMENT):
            if count < _MOST_WAITING:
                return ""
            count, text = self._decided(text)
        self._context, self._waiting = self._waiting[:count], self._waiting[count:]
        return text

    def _decided(self, text: str) -> tuple[int, str]:
        """How many of the tokens that wait with bytes that are no characters are decided, and their text."""
        for count in range(len(self._waiting) - _LONGEST_CHARACTER, 0, -1):
            head = self._text(count)
            if head + self._tokenizer.decode(self._waiting[count:]) == text:
                return count, head
        return len(self._waiting), text

    def _text(self, count: int) -> str:
        """What the first `count` waiting tokens add to the text before them."""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting[:count])[len(before) :]

    def _until_stop(self, text: str) -> str:
        """What of the held back text and `text` behind it is no part of a stop string; the rest is held back."""
        if not self._stops:
            return text
        for place, char in enumerate(text):
            found = [len(stop.text) for stop in self._stops if stop.feed(char)]
            if found:
                self.stopped = True
                whole = self._held + text[: place + 1]
                return whole[: len(whole) - max(found)]
        whole = self._held + text
        out = len(whole) - max(stop.matched for stop in self._stops)
        self._held = whole[out:]
        return whole[:out]


class _Stop:
    """A string that is looked for one character at a time (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0  # characters of it that end the text so far
        self._shorter = [0] * len(text)  # by characters matched, less one: of which shorter beginning they are the end
        length = 0
        for place in range(1, len(text)):
            while length and text[place] != text[length]:
                length = self._shorter[length - 1]
            length += text[place] == text[length]
            self._shorter[place] = length

    def feed(self, char: str) -> bool:
        """Whether the string is complete with this character."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.text[self.matched] == char
        return self.matched == len(self.text)
