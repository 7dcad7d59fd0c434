"""The encoders that need no weights: `items` (which response it is) and `style` (how it is written).

`Items` has one feature per distinct response, for catalogues where the same answers are judged by many people. Nothing is read
from the text, so it works in any language; about an item that it has not met it knows nothing, and its row is zero.

`Style` has readable statistics that a report can put in words. Words, letters and emoji are those of Unicode (the `regex`
package), syllables those of the hyphenation dictionaries inside `pyphen`; both work offline, while textstat downloads a
dictionary on first use. Counts are logarithms and word classes rates, so that one long text does not dominate a linear model.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from palate.data.embeddings import Dense, OneHot
from palate.data.pairs import Text
from palate.encoders.base import Encoder, State
from palate.encoders.lexicon import PHRASES
from palate.errors import DataError, MissingExtraError

VERSION = 1  # raise it with any change of a feature or a word list: it is part of the fingerprint
LONGEST = 200_000  # characters of a response that are read; beyond it statistics have long settled
LONGEST_WORD = 40  # letters of a word that are hyphenated: enough for any language, and no text can make it slow
DISTINCT_WORDS = 50  # distinct words are counted among the first so many, since the share falls with the length of any text

MEANINGS: dict[str, str] = {
    "length": "log(1 + words)",
    "paragraphs": "log(1 + blocks between empty lines)",
    "word length": "mean letters per word",
    "sentence length": "log(1 + words per sentence)",
    "reading ease": "Flesch reading ease / 100, kept in [-1, 1.5]; high is easy",
    "varied vocabulary": "share of distinct words among the first 50",
    "commas": "commas per sentence, log(1 + x)",
    "colons and semicolons": "per sentence, log(1 + x)",
    "parentheses": "log(1 + opening parentheses)",
    "quotations": "log(1 + quoted passages)",
    "questions": "log(1 + question marks)",
    "ends with a question": "1 where the last sentence is a question",
    "exclamations": "log(1 + exclamation marks)",
    "list items": "log(1 + bulleted or numbered lines)",
    "headings": "log(1 + Markdown headings)",
    "bold and italics": "log(1 + emphasised passages)",
    "code": "log(1 + inline code and fenced blocks)",
    "digits": "share of words that hold a digit",
    "emoji": "log(1 + emoji)",
    "capitals": "share of letters that are upper case",
    "other scripts": "share of letters outside the Latin alphabet",
    "repeats the prompt": "share of the prompt's words of 4 letters or more that occur in the response",
    "longer than the prompt": "log((1 + words) / (1 + words of the prompt))",
    **{name: f"log(1 + occurrences per 100 words): {meaning}" for name, (meaning, _) in PHRASES.items()},
}


class Items(Encoder):
    """Index-based one-hot features, one column per (prompt, response). The first `encode` or `embed` fixes the catalogue.

    The catalogue is kept as 128-bit digests of the texts, so that a saved encoder quotes nobody.

    Args:
        catalogue: digests in the order of the columns, from `state`; None leaves the catalogue open.
    """

    spec = "items"

    def __init__(self, catalogue: Sequence[str] | None = None):
        self._column: dict[str, int] | None = None
        if catalogue is not None:
            self._column = {key: i for i, key in enumerate(catalogue)}
            if len(self._column) != len(catalogue):
                raise DataError(f"the catalogue has {len(catalogue) - len(self._column)} repeated items; expected each one once")

    def __len__(self) -> int:
        return 0 if self._column is None else len(self._column)

    def encode(self, texts: Sequence[Text]) -> OneHot:
        """(N, catalogue) one-hot table in O(N) memory; the row of an item outside the catalogue is zero.

        A prompt alone, with an empty response, is no item: it never enters the catalogue.
        """
        keys = [_key(text) for text in texts]
        if self._column is None:
            items = (key for key, text in zip(keys, texts, strict=True) if text.response)
            self._column = {key: i for i, key in enumerate(dict.fromkeys(items))}
        return OneHot(torch.tensor([self._column.get(key, -1) for key in keys], dtype=torch.int64), len(self._column))

    def unseen(self, texts: Sequence[Text]) -> int:
        """How many of `texts` are outside the catalogue (all of them while it is open)."""
        known = self._column or {}
        return sum(_key(text) not in known for text in texts)

    def state(self) -> State:
        return {"encoder": self.spec, "version": 1, "catalogue": None if self._column is None else list(self._column)}


def _key(text: Text) -> str:
    # Both lengths are implied by the first one, so no two texts can share a key by moving the border between the parts.
    prompt = text.prompt_text.encode("utf-8", "surrogatepass")
    response = text.response.encode("utf-8", "surrogatepass")
    return hashlib.sha256(len(prompt).to_bytes(8, "big") + prompt + response).hexdigest()[:32]


class _Patterns(NamedTuple):
    word: Any
    letter: Any
    latin: Any
    upper: Any
    emoji: Any
    stop: Any
    quote: Any
    item: Any
    heading: Any
    emphasis: Any
    code: Any
    blank: Any
    phrase: Any


@cache
def _patterns() -> _Patterns:
    try:
        import regex
    except ImportError as error:
        raise MissingExtraError("the style encoder needs the package regex; run: pip install 'palate[style]'") from error
    # All phrases in one alternation, a group for each class: one pass over the text in place of a pass for each list.
    groups = [f"(?P<g{i}>{phrases})" for i, (_, phrases) in enumerate(PHRASES.values())]
    return _Patterns(
        word=regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*(?:['\u2019][\p{L}]+)*"),
        letter=regex.compile(r"\p{L}"),
        latin=regex.compile(r"\p{Latin}"),
        upper=regex.compile(r"\p{Lu}"),
        emoji=regex.compile(r"\p{Extended_Pictographic}"),
        stop=regex.compile(r"(?<![.!?…。\uff01\uff1f])[.!?…。\uff01\uff1f]+(?=[\s\"'”\u2019)*\]]|$)|\n+"),
        quote=regex.compile(r"\"[^\"\n]{1,300}\"|“[^”\n]{1,300}”|«[^»\n]{1,300}»|^>.*$", regex.MULTILINE),
        item=regex.compile(r"^[ \t]*(?:[-*+•‣]|\d{1,3}[.)]|[a-zA-Z][.)])[ \t]+\S", regex.MULTILINE),
        heading=regex.compile(r"^#{1,6}[ \t]+\S|^[^\n]{1,80}\n[=-]{3,}[ \t]*$", regex.MULTILINE),
        emphasis=regex.compile(r"\*\*[^*\n]{1,300}\*\*|(?<![*\w])\*[^*\s][^*\n]{0,300}\*(?![*\w])|\b_[^_\n]{1,300}_\b"),
        code=regex.compile(r"```|(?<!`)`[^`\n]{1,300}`(?!`)"),
        blank=regex.compile(r"\n[ \t]*\n"),
        phrase=regex.compile(r"(?<!\w)(?:" + "|".join(groups) + r")(?!\w)"),
    )


@cache
def _hyphenation() -> Any:
    try:
        import pyphen
    except ImportError as error:
        raise MissingExtraError("the style encoder needs the package pyphen; run: pip install 'palate[style]'") from error
    return pyphen.Pyphen(lang="en_US")


class Style(Encoder):
    """Forty statistics of a response, `MEANINGS`, some relative to its prompt; every number is finite for every text.

    Raises:
        MissingExtraError: `regex` or `pyphen` is not installed.
    """

    spec = "style"
    names = tuple(MEANINGS)

    def __init__(self) -> None:
        _patterns()
        self._dictionary = _hyphenation()
        self._syllables: dict[str, int] = {}

    def encode(self, texts: Sequence[Text]) -> Dense:
        """(N, F) float32 table, raw: the model standardises it on its training pairs. About 1,000 texts of 150 words a second."""
        table = np.empty((len(texts), len(self.names)), dtype=np.float32)
        for i, text in enumerate(texts):
            table[i] = self._row(text)
        return Dense(torch.from_numpy(table))

    def state(self) -> State:
        return {"encoder": self.spec, "version": VERSION, "features": list(self.names)}

    def _count_syllables(self, word: str) -> int:
        found = self._syllables.get(word)
        if found is None:
            found = len(self._dictionary.positions(word[:LONGEST_WORD])) + 1
            if len(word) <= LONGEST_WORD and len(self._syllables) < 200_000:  # a cache, not a leak
                self._syllables[word] = found
        return found

    def _row(self, text: Text) -> NDArray[np.float64]:
        find = _patterns()
        response = text.response[:LONGEST]
        words = find.word.findall(response)
        lower = [word.lower() for word in words]
        prompt_words = [word.lower() for word in find.word.findall(text.prompt_text[:LONGEST])]
        sentences = [part for part in find.stop.split(response) if find.word.search(part)]
        n_words, n_sentences = max(1, len(words)), max(1, len(sentences))
        letters = len(find.letter.findall(response))
        syllables = sum(self._count_syllables(word) for word in lower)
        ease = 206.835 - 1.015 * n_words / n_sentences - 84.6 * syllables / n_words  # Flesch (1948)
        wanted = {word for word in prompt_words if len(word) >= 4}
        tail = response.rstrip(" \t\n\"'”\u2019)*_")

        def count(pattern: Any) -> float:
            return math.log1p(sum(1 for _ in pattern.finditer(response)))

        classes = [0] * len(PHRASES)
        for match in find.phrase.finditer(response.lower().replace("\u2019", "'")):
            classes[int(match.lastgroup[1:])] += 1
        row = [
            math.log1p(len(words)),
            math.log1p(len([part for part in find.blank.split(response) if part.strip()])),
            min(50.0, sum(map(len, words)) / n_words),
            math.log1p(len(words) / n_sentences),
            min(1.5, max(-1.0, ease / 100)) if words else 0.0,
            len(set(lower[:DISTINCT_WORDS])) / max(1, min(DISTINCT_WORDS, len(lower))),
            math.log1p(response.count(",") / n_sentences),
            math.log1p((response.count(":") + response.count(";")) / n_sentences),
            math.log1p(response.count("(")),
            count(find.quote),
            math.log1p(response.count("?") + response.count("\uff1f")),
            float(tail.endswith(("?", "\uff1f"))),
            math.log1p(response.count("!") + response.count("\uff01")),
            count(find.item),
            count(find.heading),
            count(find.emphasis),
            count(find.code),
            sum(any(c.isdigit() for c in word) for word in words) / n_words,
            count(find.emoji),
            len(find.upper.findall(response)) / max(1, letters),
            1 - len(find.latin.findall(response)) / letters if letters else 0.0,
            len(wanted.intersection(lower)) / max(1, len(wanted)),
            math.log1p(len(words)) - math.log1p(len(prompt_words)),
            *(math.log1p(100 * found / n_words) for found in classes),
        ]
        return np.asarray(row)
