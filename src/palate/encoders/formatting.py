"""From a prompt and a response to the tokens that a model reads: one formatter for chosen and rejected alike.

Published numbers were spoiled exactly here: a rejected side that was a list printed as text, a history with raw header tokens put
inside one user message, a start token written twice, a text whose end was cut off. Each of these is refused or counted. A text
that merely mentions a special token ("what does </s> mean?") is read as the characters that stand there.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from palate.data.pairs import Message, Prompt, Text
from palate.data.rows import is_stringified
from palate.encoders.base import State, digest
from palate.errors import DataError, MissingExtraError

Format = Literal["chat", "plain"]

DATE = "26 Jul 2024"  # given to templates that write a date (Llama's own default), or features would change every day
_HEADER = re.compile(r"<[|/]?\w[^<>\s]*>|\[/?[A-Z_]{2,}\]|#{2,} ?[A-Z]\w+:")
_TURNS = ("zebra one", "zebra two", "zebra three", "zebra four")  # contents whose surroundings are what the template writes


class Formatted(NamedTuple):
    """Token ids of every text, and which of them were too long."""

    ids: list[list[int]]
    cut: list[int]  # positions of texts of which the start of the prompt was left out
    cut_responses: list[int]  # those among them of which even the start of the response was
    spelled: list[int]  # positions of texts that hold a special token such as "</s>", read as its characters


class Formatter:
    """Prompt and response as token ids.

    "chat" applies the tokenizer's chat template to the turns of the prompt and the response as the assistant's turn, without a
    generation prompt, and adds no special token that the template did not write. A prompt of plain text is one user turn. "plain"
    writes prompt, line break and response, with the special tokens that the tokenizer adds on its own.

    A text of more than `max_tokens` loses tokens at the start of the prompt, after what the template opens with: the end of the
    response, which last-token pooling reads, is always whole.

    Args:
        tokenizer: of transformers.
        format: "chat", "plain", or None: "chat" where the tokenizer has a template.
        max_tokens: most tokens of a text, special ones included.

    Raises:
        DataError: "chat" without a template, or a template that writes the date of the day or leaves the response out.
        MissingExtraError: a template, and no jinja2 that renders it.
    """

    def __init__(self, tokenizer: Any, format: Format | None, max_tokens: int):
        if format not in (None, "chat", "plain"):
            raise DataError(f"template is {format!r}; expected 'chat', 'plain' or None")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        has_template = getattr(tokenizer, "chat_template", None) is not None
        self.format: Format = format or ("chat" if has_template else "plain")
        if self.format == "chat" and not has_template:
            raise DataError("the tokenizer has no chat template; set tokenizer.chat_template, or use template='plain'")
        template = self._template()
        if "strftime_now" in template and "date_string" not in template:
            raise DataError(
                "the chat template writes today's date, so that features would change every day; set tokenizer.chat_template to "
                "a text with a fixed date"
            )
        special = {str(token) for token in tokenizer.all_special_tokens} - {""}
        ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token}
        headers = self._headers()
        # An unknown token is what any text may turn into, so that its id says nothing of where it came from.
        plain = (special & (ends | {tokenizer.mask_token})) - headers - {tokenizer.unk_token}
        self._refused = _any_of((special - plain - {tokenizer.unk_token}) | headers)
        self._spelled = _any_of(plain)
        self._special = special - {tokenizer.unk_token}

    def __call__(self, texts: Sequence[Text]) -> Formatted:
        """Token ids of `texts`, in their order.

        Raises:
            DataError: a response that is a list printed as text, a text that holds what only the template may write, a prompt
                that the template refuses; the message says which text, and where in it.
        """
        for i, text in enumerate(texts):
            self._check(i, text)
        encoded = self._tokens(texts)
        cut, cut_responses = [], []
        for i, ids in enumerate(encoded):
            if not ids:
                raise DataError(f"text {i} has no tokens: {texts[i].response[:60]!r}; expected a text with something in it")
            if ids[:2] == [self.tokenizer.bos_token_id] * 2:
                raise DataError(
                    f"text {i} begins with {self.tokenizer.bos_token!r} twice; expected once: correct tokenizer.chat_template"
                )
            if len(ids) > self.max_tokens:
                encoded[i], lost = self._shortened(i, texts[i], ids)
                cut.append(i)
                cut_responses += [i] if lost else []
        return Formatted(encoded, cut, cut_responses, [i for i, text in enumerate(texts) if self._spells(text)])

    def state(self) -> State:
        """What determines the tokens, but for the length: JSON-able. Token ids of a few texts are part of it, so that a tokenizer
        that is read differently by another version of its library is another one."""
        probes = [Text("What is it?", "It's  a naïve\n\ttest, 12345 😄."), Text((Message("user", "Hi"),), "OK")]
        return {
            "format": self.format,
            "template": hashlib.sha256(self._template().encode()).hexdigest() if self.format == "chat" else None,
            "date": DATE if "date_string" in self._template() else None,
            "truncation": "start of the prompt",
            "probe": digest({"ids": self._tokens(probes)}),
        }

    def _template(self) -> str:
        """As it is now: the tokenizer is not ours alone."""
        if self.format == "plain":
            return ""
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:  # several templates, and none of them the default
            raise DataError(f"the tokenizer's chat template cannot be chosen ({error}); set tokenizer.chat_template") from error

    def _headers(self) -> set[str]:
        """What the template opens turns with, which a text may not hold."""
        if self.format == "plain":
            return set()
        one, two, three, four = _TURNS
        talk = Text((Message("user", one), Message("assistant", two), Message("user", three)), four)
        line = self._written(0, talk)
        if line == self._written(0, talk._replace(response=one)):
            raise DataError(
                "the chat template does not write the response, so that all candidates would have the same features; correct "
                "tokenizer.chat_template, or use template='plain'"
            )
        found = set()
        for piece in re.split("|".join(_TURNS), line)[:-1]:
            if self.tokenizer.eos_token:
                piece = piece.rsplit(self.tokenizer.eos_token, 1)[-1]  # what ends a turn opens none
            # Reasoning marks are content that templates know how to treat, not the border of a turn.
            marks = {mark for mark in _HEADER.findall(piece) if "think" not in mark}
            found |= marks - {self.tokenizer.bos_token} or marks
        return found

    def _spells(self, text: Text) -> bool:
        return any(self._spelled.search(content) for content in (*(turn.content for turn in _turns(text.prompt)), text.response))

    def _check(self, i: int, text: Text) -> None:
        if is_stringified(text.response):
            raise DataError(
                f"text {i}: the response is a list that became a text: {text.response[:80]!r}; expected one response. If "
                "the other side of the pair is a plain text, the format alone tells them apart"
            )
        for part, content in (
            *((f"{turn.role} turn {n} of the prompt", turn.content) for n, turn in enumerate(_turns(text.prompt))),
            ("response", text.response),
        ):
            found = self._refused.search(content)
            if found:
                raise DataError(
                    f"text {i}: the {part} holds {found[0]!r} at character {found.start()}, which only the template may write "
                    "(was a template applied already?); expected plain text, with a conversation as a list of turns"
                )

    def _written(self, i: int, text: Text) -> str:
        if self.format == "plain":
            line = f"{text.prompt_text}\n{text.response}"
        else:
            turns = [
                {"role": turn.role, "content": turn.content}
                for turn in (*_turns(text.prompt), Message("assistant", text.response))
            ]
            try:
                line = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False, date_string=DATE)
            except ImportError as error:
                raise MissingExtraError("a chat template needs the package jinja2; run: pip install 'palate[hf]'") from error
            except Exception as error:  # what a template raises is its own matter: jinja2's errors, or Python's
                roles = [turn["role"] for turn in turns]
                raise DataError(f"text {i}: the chat template refuses turns of {roles} ({error}); correct the prompt") from error
        return line.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate would stop the tokenizer

    def _tokens(self, texts: Sequence[Text], first: int = 0) -> list[list[int]]:
        lines = [self._written(first + i, text) for i, text in enumerate(texts)]
        encoded = self._encode(lines)
        for i, text in enumerate(texts):
            if self._spells(text):
                chat = self.format == "chat"
                encoded[i] = self._unmarked(first + i, text, encoded[i]) if chat else self._encode([lines[i]], True)[0]
        return encoded

    def _encode(self, lines: list[str], spell: bool = False) -> list[list[int]]:
        if not lines:
            return []
        # verbose=False: texts that are too long are counted here, and need no line of log each.
        encoded = self.tokenizer(lines, add_special_tokens=self.format == "plain", split_special_tokens=spell, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _unmarked(self, i: int, text: Text, ids: list[int]) -> list[int]:
        """`ids`, with the special tokens that stand in the text itself, and not in the template, as tokens of their characters.

        Which are which is known from the same text with signs of private use in their place.
        """
        line = self._written(i, text)
        unused = (chr(sign) for sign in range(0xF0000, 0xFFFFE) if chr(sign) not in line)
        turns = [*_turns(text.prompt), Message("assistant", text.response)]
        marks = {mark: next(unused) for mark in sorted({mark for turn in turns for mark in self._spelled.findall(turn.content)})}
        turns = [turn._replace(content=self._spelled.sub(lambda found: marks[found[0]], turn.content)) for turn in turns]
        behind = {sign: mark for mark, sign in marks.items()}
        order = _any_of(self._special | set(behind)).findall(self._written(i, Text(tuple(turns[:-1]), turns[-1].content)))
        known = set(self.tokenizer.convert_tokens_to_ids(sorted(self._special)))
        if self.tokenizer.convert_tokens_to_ids([behind.get(piece, piece) for piece in order]) == [k for k in ids if k in known]:
            pieces = iter(order)
            each = [(token, behind.get(next(pieces)) if token in known else None) for token in ids]
            return [k for token, mark in each for k in (self._encode([mark], True)[0] if mark else [token])]
        raise DataError(
            f"text {i} holds {min(marks)!r}, which this tokenizer and its template do not let through as plain characters; "
            "expected a text without it"
        )

    def _shortened(self, i: int, text: Text, ids: list[int]) -> tuple[list[int], bool]:
        """`ids` with the tokens after the opening left out, and whether some of the response is among them."""
        (with_reply,) = self._tokens([text._replace(response=_other(text.response))], i)
        opening = before_response = shared(ids, with_reply)
        if _turns(text.prompt):
            first, *rest = _turns(text.prompt)
            changed = first._replace(content=_other(first.content))
            swapped: Prompt = changed.content if isinstance(text.prompt, str) else (changed, *rest)
            opening = shared(ids, self._tokens([text._replace(prompt=swapped)], i)[0])
        kept = self.max_tokens - opening
        if kept < 1:
            raise DataError(f"max_tokens is {self.max_tokens}, but the template opens with {opening} tokens; expected more")
        return ids[:opening] + ids[len(ids) - kept :], kept < len(ids) - before_response


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with alike."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _other(content: str) -> str:
    return "1" if content.lstrip().startswith("0") else "0"


def _any_of(marks: set[Any]) -> re.Pattern[str]:
    """Finds any of `marks`, the longest where several begin at one place; without marks, nothing."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=lambda mark: (-len(mark), mark)))) or r"(?!)")


def _turns(prompt: Prompt) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt
