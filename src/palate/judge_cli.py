"""`palate judge`: a judge that reads text, held to the same users and choices as `palate compare` holds models to.

DIR/results.jsonl     rows per user, as `palate compare` writes them (and results.facts.json)
DIR/verdicts.jsonl    every verdict with what the judge wrote in both orders
DIR/briefs.jsonl      what it was shown of every user; to be edited and given back with --briefs
DIR/answers           every answer of the server, so that the same command goes on where it was stopped
"""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from palate import cache_cli, split_cli, terminal
from palate.errors import DataError
from palate.plus_cli import Unfitted

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.data.splits import By, Split
    from palate.judges.base import Brief, Judge
    from palate.judges.client import Chat
    from palate.judges.judging import Judged
    from palate.judges.ledger import Prices
    from palate.judges.memory import Memory

METHODS = ("in-context", "reasoning", "synthesize-me", "plus")
REMEMBERS = ("in-context", "reasoning")
USUAL_MEMORY = "recent:5"
USUAL_ENCODER = "minilm"
ANSWERS: tuple[Literal["scores", "percent"], ...] = ("scores", "percent")

Rows = Annotated[
    Path,
    typer.Argument(metavar="ROWS", help="Choices, as `palate compare` takes them.", show_default=False),
]


class Asked(NamedTuple):
    """What the options say about the judge."""

    method: str
    memory: str | None
    answer: str
    samples: int
    temperature: float
    answer_tokens: int | None
    candidates: int | None
    summaries: int
    interactions: int | None
    encoder: str | None
    seed: int

    @property
    def encodes(self) -> bool:
        """Whether texts are embedded: summaries and responses for plus, prompts for the most similar choices."""
        return self.method == "plus" or (self.method in REMEMBERS and (self.memory or "").startswith("similar"))

    def check(self) -> None:
        """Refuse an option that would do nothing."""
        if self.encoder is not None and not self.encodes:
            raise DataError(f"--encoder {self.encoder}: it is for --memory similar:N and --method plus; leave it out")
        unused = {
            f"--memory {self.memory}": self.memory is not None and self.method not in REMEMBERS,
            f"--samples {self.samples}": self.samples != 1 and self.method not in REMEMBERS,
            f"--answer {self.answer}": self.answer != ANSWERS[0] and self.method != "reasoning",
            f"--temperature {self.temperature:g}": self.temperature != 0 and self.method == "plus",
            f"--answer-tokens {self.answer_tokens}": self.answer_tokens is not None and self.method == "plus",
            f"--candidates {self.candidates}": self.candidates is not None and self.method != "synthesize-me",
            f"--summaries {self.summaries}": self.summaries != 1 and self.method != "plus",
            f"--interactions {self.interactions}": self.interactions is not None and self.method != "plus",
        }
        given = [option for option, wrong in unused.items() if wrong]
        if given:
            raise DataError(f"{', '.join(given)}: {self.method} keeps its own, or has none; leave it out")


def judge(
    rows: Rows,
    base_url: Annotated[
        str, typer.Option("--base-url", metavar="URL", help="Any OpenAI-compatible server, such as http://localhost:8000/v1.")
    ],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="What the server calls the model.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results; the same one goes on.")],
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(METHODS)}.")] = "in-context",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What in-context and reasoning are shown of a user: recent:5 (the last choices, the default), similar:5 (those "
            "with the most similar prompts, by --encoder), or summary (in words, written by the model).",
        ),
    ] = None,
    answer: Annotated[str, typer.Option(help="Of reasoning: scores (1 to 10 for each) or percent (a probability).")] = "scores",
    samples: Annotated[int, typer.Option(help="Answers to each order of each question; their mean counts.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="Above 0 for more than one sample.", min=0)] = 0.0,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            help="Room for an answer; by default 64 for in-context, else 1024. Models that think first need more.", min=1
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(help="Of synthesize-me: random sets of demonstrations to try, 10 as published; fewer cost less.", min=0),
    ] = None,
    summaries: Annotated[
        int,
        typer.Option(
            help="Of plus: so many of each judged user, of which the reward keeps the best on a held-out choice.", min=1
        ),
    ] = 1,
    interactions: Annotated[
        int | None,
        typer.Option(
            help="Of plus: components of the summaries that the features are multiplied with; 0 is the published form.  "
            "[0 or 4, by held-out seen users]",
            min=0,
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="SPEC",
            help=f"For similar:N one that reads prompts; for plus any but items.  [default: {USUAL_ENCODER}]",
        ),
    ] = None,
    briefs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Use these briefs, from another run, another model or an editor, instead of studying."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="What a user's two sides must not share: conversation, prompt, item or pair; by default as compare."),
    ] = None,
    max_support: split_cli.MaxSupport = None,
    max_test: split_cli.MaxTest = None,
    min_support: split_cli.MinSupport = None,
    max_calls: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many requests. One user after the other is studied and judged, so that those before are whole; "
            "but plus sums up all seen users first.",
            min=0,
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop at about so many tokens, likewise.", min=0)] = None,
    price: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="Money for a million tokens of prompts and of answers, to say the cost.")
    ] = None,
    limit_field: Annotated[
        str, typer.Option(help="What the server calls the limit of an answer: max_tokens or max_completion_tokens.")
    ] = "max_tokens",
    fields: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='Further fields of every request, such as \'{"reasoning_effort": "low"}\'.'),
    ] = None,
    key_env: Annotated[str, typer.Option(help="The environment variable that holds the key.")] = "OPENAI_API_KEY",
    workers: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds without an answer after which a request has failed.", min=0.1)] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the split, and sent with every request.", min=0)] = 0,
) -> None:
    """Let a language model say which response each unseen user would choose, and measure it.

    Every question is asked in both orders. Stopped, by a kill or a budget, the same command goes on with what is missing.
    Exit code 1: some questions were not judged, or plus was fitted without some seen users; the results are of the others.
    """
    from palate.encoders.asking import Limits
    from palate.evaluation.comparison import drawn, is_given
    from palate.evaluation.facts import Failure
    from palate.judges.base import load_briefs
    from palate.judges.client import Chat
    from palate.judges.judging import judged
    from palate.judges.ledger import Ledger

    kind = terminal.one_of(method, METHODS, "--method")
    asked = Asked(kind, memory, answer, samples, temperature, answer_tokens, candidates, summaries, interactions, encoder, seed)
    asked.check()
    if briefs is not None and summaries != 1:
        raise DataError(f"--summaries {summaries} and --briefs are given, which has the summaries already; leave one out")
    prices = _prices(price)
    known = None if briefs is None else load_briefs(briefs)
    pairs, _ = terminal.read_choices(rows)
    unit = None if by is None else terminal.one_of(by, terminal.UNITS, "--by")
    sides = split_cli.sides(pairs, unit, max_support, max_test, min_support)
    if unit is not None and kind != "plus" and is_given(pairs):
        raise DataError(f"--by {unit}: the rows have a split column, which says what is told from what; leave one out")
    parts = drawn(pairs, **sides._asdict(), seed=seed)
    if not len(parts.test_unseen):
        raise DataError(_nobody(pairs, parts))
    account = Ledger(max_calls=max_calls, max_tokens=max_tokens)
    limits: tuple[Literal["max_tokens", "max_completion_tokens"], ...] = ("max_tokens", "max_completion_tokens")
    chat = Chat(
        model,
        base_url=base_url,
        key_env=key_env,
        cache=out / "answers",
        workers=workers,
        limits=Limits(timeout=timeout, total=max(600.0, 10 * timeout)),
        ledger=account,
        limit_field=terminal.one_of(limit_field, limits, "--limit-field"),
        fields=_fields(fields),
    )
    support, test = pairs[parts.support], pairs[parts.test_unseen]
    ready = _ready(asked, chat, pairs[parts.train], unit, known)
    out.mkdir(parents=True, exist_ok=True)
    terminal.note(f"{len(test)} choices of {len(test.user_ids)} unseen users (split: {parts.by}), judged by {model} ({method})")
    questions, requests = _least(asked, ready, support, test, studied=known is None)
    terminal.note(f"{questions} questions, at least {requests} requests where none is equal to another or answered already")
    judge_, without = ready.fitted() if isinstance(ready, Unfitted) else (ready, None)
    if known is not None and (strangers := set(test.user_ids) - set(known)):
        terminal.note(f"{briefs} has no brief of {len(strangers)} of them, such as {min(strangers)!r}: judged as strangers")
    with terminal.progress("Studying and judging"):
        found = judged(
            judge_,
            support,
            test,
            briefs=known,
            seed=seed,
            method=method,
            data_set=rows.resolve().name,
            ledger=account,
        )
    if without is not None:
        failure = Failure(rows.resolve().name, method, seed, "fit", without)
        whole = replace(found.evaluation, failures=(*found.evaluation.failures, failure))
        found = found._replace(evaluation=whole)
    kept = out / "briefs.jsonl"
    if briefs is None or briefs.resolve() != kept.resolve():  # what somebody edited is theirs, also of users not judged here
        _save_briefs(found.briefs, kept)
    _save_verdicts(found, test, parts, out / "verdicts.jsonl")
    found.evaluation.save(out / "results.jsonl")
    _show(found, method)
    counts = account.as_dict()
    terminal.note(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()))
    if prices is not None:
        cost = f"{account.cost(prices, at_least=True):.4f}"
        left_out = f"{account.unmetered} of {account.calls} answers came without a count of their tokens"
        terminal.note(f"cost at least {cost}: {left_out}" if account.unmetered else f"cost {cost}")
    if found.not_judged:
        terminal.note(found.evaluation.failures[0].message)
    if found.evaluation.failures:
        raise typer.Exit(1)


def _nobody(pairs: "PairSet", parts: "Split") -> str:
    if parts.by == "given":
        return "no row has the split test_unseen; expected at least one choice to tell, or no column `split`"
    n = len(pairs[parts.train].user_ids)
    enough = f"{n} of {len(pairs.user_ids)} users has choices enough for both sides (split: {parts.by})"
    return f"{enough}; at least 2 are needed, so that one is unseen: add users, or choices of those who have few"


def _prices(text: str | None) -> "Prices | None":
    from palate.judges.ledger import Ledger, Prices

    if text is None:
        return None
    try:
        prompt, completion = (float(part) for part in text.split(","))
        prices = Prices(prompt, completion)
        Ledger().cost(prices)  # refuses what is no price now, and not when the money is spent
    except ValueError as error:
        raise DataError(f"--price is {text!r}; expected two numbers from 0, such as 0.15,0.60") from error
    return prices


def _fields(text: str | None) -> dict[str, Any] | None:
    try:
        found = None if text is None else json.loads(text)
    except ValueError:
        found = text
    if not isinstance(found, dict | None):
        raise DataError(f'--fields is {text!r}; expected a JSON object, such as {{"reasoning_effort": "low"}}')
    return found


def _least(asked: Asked, ready: "Judge | Unfitted", support: "PairSet", test: "PairSet", *, studied: bool) -> tuple[int, int]:
    """(questions, requests) where every answer can be read at once, and a search of demonstrations ends with its first set."""
    from palate.judges.base import demos_of
    from palate.judges.synthesize import SynthesizeMe

    unseen = set(test.user_ids)
    known = [len(set(demos)) for user, demos in demos_of(support).items() if user in unseen and demos] if studied else []
    probabilistic = isinstance(ready, Unfitted) or ready.probabilistic
    questions = len(test) if probabilistic else int((~test.tie).sum())
    if isinstance(ready, Unfitted):
        told = sum(bool(demos) for demos in demos_of(ready.told).values())
        return questions, told + asked.summaries * len(known)
    requests = 2 * asked.samples * questions
    if isinstance(ready, SynthesizeMe):
        return questions, requests + sum(ready.calls(n).least for n in known)
    return questions, requests + (len(known) if asked.memory == "summary" else 0)


def _ready(
    asked: Asked, chat: "Chat", train: "PairSet", by: "By | None", briefs: "dict[str, Brief] | None"
) -> "Judge | Unfitted":
    """The judge; nothing is asked yet."""
    from palate.judges.choosing import InContext
    from palate.judges.reasoning import Reasoning

    if asked.method not in REMEMBERS:
        return _synthesizing(asked, chat) if asked.method == "synthesize-me" else _unfitted(asked, chat, train, by)
    memory, room = _memory(asked, chat, briefs), asked.answer_tokens
    samples, temperature, seed = asked.samples, asked.temperature, asked.seed
    if asked.method == "in-context":
        room = 64 if room is None else room
        return InContext(chat, memory=memory, samples=samples, temperature=temperature, max_tokens=room, seed=seed)
    answer, room = terminal.one_of(asked.answer, ANSWERS, "--answer"), 1024 if room is None else room
    return Reasoning(chat, memory=memory, answer=answer, samples=samples, temperature=temperature, max_tokens=room, seed=seed)


def _memory(asked: Asked, chat: "Chat", briefs: "dict[str, Brief] | None") -> "Memory":
    from palate.judges.memory import Abstract, Raw
    from palate.judges.plus import Summaries

    written = [] if briefs is None else list(briefs.values())
    words, choices = any(brief.text for brief in written), any(brief.demos for brief in written)
    memory = asked.memory or ("summary" if words and not choices else USUAL_MEMORY)
    kind, _, number = memory.partition(":")
    if not (memory == "summary" or (kind in ("recent", "similar") and number.isdecimal())):
        raise DataError(f"--memory is {asked.memory!r}; expected recent:N, similar:N or summary")
    if briefs is not None and not (words if kind == "summary" else choices):
        what = "text" if kind == "summary" else "choices"
        raise DataError(f"--memory {memory} shows the {what} of a brief, and none of the {len(written)} in --briefs has any")
    if kind == "summary":
        return Abstract(Summaries(chat, seed=asked.seed) if briefs is None else None)
    if kind == "recent":
        return Raw(int(number))
    return Raw(int(number), by="similar", encoder=cache_cli.encoder(asked.encoder or USUAL_ENCODER))


def _synthesizing(asked: Asked, chat: "Chat") -> "Judge":
    from palate.judges.bootstrap import Search
    from palate.judges.synthesize import SynthesizeMe

    search = Search() if asked.candidates is None else Search(n_candidates=asked.candidates)
    room = 1024 if asked.answer_tokens is None else asked.answer_tokens
    return SynthesizeMe(chat, search=search, temperature=asked.temperature, max_tokens=room, seed=asked.seed)


def _unfitted(asked: Asked, chat: "Chat", train: "PairSet", by: "By | None") -> Unfitted:
    encoder = cache_cli.encoder(asked.encoder or USUAL_ENCODER)
    return Unfitted.of(chat, encoder, train, by, asked.summaries, asked.interactions, asked.seed)


def _save_briefs(briefs: "dict[str, Brief]", path: Path) -> None:
    """Write them; a file that says anything else, as after an edit, is somebody's work and is kept under another name."""
    from palate.judges.base import save_briefs

    before = next(name for n in count(1) if not (name := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists())
    if path.exists():
        path.rename(before)
    save_briefs(briefs, path)
    if not before.exists():
        return
    if set(before.read_bytes().splitlines()) <= set(path.read_bytes().splitlines()):
        before.unlink()
    else:
        terminal.note(f"{path} said something else, which is now in {before}; --briefs {before} judges by it")


def _save_verdicts(found: "Judged", test: "PairSet", parts: "Split", path: Path) -> None:
    from palate.judges.base import save_lines

    lines = []
    for row, (user, verdict) in enumerate(zip(test.users.tolist(), found.verdicts, strict=True)):
        if verdict is None:
            continue
        answers = [answer._asdict() for answer in verdict.answers]
        about = {"row": int(parts.test_unseen[row]), "user_id": user, "p_chosen": verdict.p_first, "reason": verdict.reason}
        lines.append(about | {"thought": verdict.thought, "answers": answers})
    save_lines(lines, path)


def _show(found: "Judged", method: str) -> None:
    estimate = found.evaluation.interval(method)
    place = found.place
    shares = [f"{value:.3f}" if value is not None else "\N{EN DASH}" for value in (place.first_share, place.agreement)]
    row = [method, estimate.n_users, f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}", *shares]
    unread = sum(n for outcome, n in found.outcomes.items() if outcome != "answered")
    columns = ("Judge", "Users", "Accuracy", "95 %", "For the first shown", "Orders agree", "Answers without a verdict")
    terminal.show(terminal.table("", columns, [[*row, unread]]))
