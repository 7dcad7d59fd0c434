"""What a base reward rewards, in words: correlations with statistics of style, above a threshold that noise does not pass.

A base reward is a direction that was learned, not one that somebody named. Over the responses that people judged, each base's
reward is compared with every statistic of the `style` encoder, within the prompt, so that topics do not count. A name is given
where a correlation is large, surely not zero, and above what the best of all statistics reaches by chance. The crowd's reward
and one person's departure from it are described in the same words.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import OrthogonalMatchingPursuit
from sklearn.model_selection import GroupKFold, cross_val_predict

from palate.adaptation import Profile, check_profiles
from palate.data.pairs import PairSet
from palate.encoders import Encoder
from palate.encoders.offline import Style
from palate.errors import DataError
from palate.models.base import RewardModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PERMUTATIONS, RESAMPLES, LEVEL = 400, 400, 0.95
FEW = 4  # most axes in a label, and behind the explained share
LEAST = 0.2  # smallest correlation worth a word: 4 % of the variance
FEWEST = 20  # responses beyond one for each prompt: below it a correlation says nothing
CLUSTERS = 20  # prompts that are enough to resample them whole
TWINS = 0.999  # of two axes that correlate more one is left out; within a prompt, length is also length against the prompt
NO_NAME = "no style axis explains it"
NO_DIFFERENCE = "nothing: it rewards all responses alike"

COUNTED = "paragraphs commas parentheses quotations questions exclamations headings emoji capitals contractions examples reasons"
WORDS: dict[str, tuple[str, str]] = {
    **{name: (f"more {name}", f"fewer {name}") for name in COUNTED.split()},
    "length": ("longer", "shorter"),
    "word length": ("longer words", "shorter words"),
    "sentence length": ("longer sentences", "shorter sentences"),
    "reading ease": ("easier to read", "harder to read"),
    "varied vocabulary": ("more varied words", "fewer different words"),
    "colons and semicolons": ("more colons", "fewer colons"),
    "ends with a question": ("ends with a question", "does not end with a question"),
    "list items": ("more lists", "fewer lists"),
    "bold and italics": ("more bold and italics", "less bold and italics"),
    "code": ("more code", "less code"),
    "digits": ("more numbers", "fewer numbers"),
    "other scripts": ("more of other scripts", "less of other scripts"),
    "repeats the prompt": ("closer to the prompt's words", "further from the prompt's words"),
    "longer than the prompt": ("longer against the prompt", "shorter against the prompt"),
    "politeness": ("politer", "less polite"),
    "formal words": ("more formal", "less formal"),
    "casual words": ("more casual", "less casual"),
    "hedging": ("more hedged", "less hedged"),
    "certainty": ("more certain", "less certain"),
    "getting to the point": ("more to the point", "less to the point"),
    "long way round": ("more roundabout", "less roundabout"),
    "warmth": ("warmer", "cooler"),
    "enthusiasm": ("more enthusiastic", "less enthusiastic"),
    "humour": ("more humorous", "less humorous"),
    "negation": ("more negations", "fewer negations"),
    "says I": ("says I more", "says I less"),
    "says you": ("says you more", "says you less"),
    "says we": ("says we more", "says we less"),
}


class Axis(NamedTuple):
    """How one statistic of style goes with a reward, over responses to the same prompt.

    Attributes:
        name: of the statistic, as in the `style` encoder.
        correlation: in [-1, 1]; low, high: its 95 % bootstrap interval over prompts, and over what is unknown of a person.
        certain: whether it may name the reward: at least .2, its interval on one side of 0, and above what chance reaches.
    """

    name: str
    correlation: float
    low: float
    high: float
    certain: bool


@dataclass(frozen=True)
class Name:
    """What one direction rewards.

    Attributes:
        what: which direction: "the crowd", "base 1", or a user id.
        label: in words, the stronger first, what is rewarded before what is punished: "longer, more formal; less hedged".
        axes: every statistic that varies and says more than an earlier one, the strongest correlation first.
        explained: share of the reward's variance within prompts that four statistics predict for other prompts, in [0, 1].
        explained_by: those of the certain statistics that predict it best together; the label is made of them.
        variance_share: M_kk mean_j s_jk^2 of base k as a share of the sum over bases, where M is the prior's second moment about
            the crowd's weights and s a pair's slopes: how much of what sets people apart from the crowd is along it. None
            where the model has no prior, and for what is no base.
        highest, lowest: rows of the pairs (distinct texts) with the largest margin along it for the chosen and for the rejected.
    """

    what: str
    label: str
    axes: tuple[Axis, ...]
    explained: float
    explained_by: tuple[str, ...]
    variance_share: float | None
    highest: tuple[int, ...]
    lowest: tuple[int, ...]


@dataclass(frozen=True)
class Naming:
    """Names of several directions over the same responses.

    Attributes:
        names: `name_bases`: the crowd, then every base. `name_profile`: the person.
        threshold: what the largest correlation of any statistic with any direction passes by chance once in twenty times.
        n_texts, n_prompts: distinct responses that were compared, and their prompts.
        coordinates: what the directions are: the same model can be written in others.
    """

    names: tuple[Name, ...]
    threshold: float
    n_texts: int
    n_prompts: int
    coordinates: str

    def markdown(self, quote: PairSet | None = None) -> str:
        """A table of the names. Given the pairs that were named, it also quotes users' texts: the pairs told apart most."""
        lines = ["| direction | rewards | share explained | share of how people differ | strongest correlations |"]
        lines.append("|---|---|---:|---:|---|")
        for name in self.names:
            share = "" if name.variance_share is None else f"{name.variance_share:.0%}"
            strongest = "; ".join(f"{a.name} {a.correlation:+.2f} [{a.low:+.2f}, {a.high:+.2f}]" for a in name.axes[:3])
            lines.append(f"| {_cell(name.what)} | {name.label} | {name.explained:.0%} | {share} | {strongest} |")
        lines += [
            "",
            f"Correlations within the prompt over {self.n_texts} responses to {self.n_prompts} prompts, with 95 % intervals. "
            f"Chance reaches {self.threshold:.2f} once in twenty times. {self.coordinates}",
        ]
        if quote is not None:
            for name in self.names:
                lines += ["", f"**{_cell(name.what)}**: {name.label}", ""]
                for row in (*name.highest, *name.lowest):
                    chosen, rejected = (quote.texts[side[row]].response for side in (quote.chosen, quote.rejected))
                    over = (chosen, rejected) if row in name.highest else (rejected, chosen)
                    lines.append(f"- pair {row}: rewards “{_cell(over[0])}” over “{_cell(over[1])}”")
        return "\n".join(lines)


def name_bases(model: RewardModel, pairs: PairSet, encoder: Encoder, *, seed: int = 0) -> Naming:
    """What the crowd's reward and every base reward of a fitted model reward, in words of style.

    r_nk, the reward of base k for response n, is correlated with every statistic s_na of the `style` encoder, both centred over
    the responses to the same prompt; prompts with one response say nothing. Chance is the .95 quantile, over permutations of
    the rewards within prompts, of the largest correlation of any statistic with any direction (Westfall and Young 1993), so that
    a model of which nothing can be said gets a name once in twenty times, however many bases it has. Intervals resample prompts.

    Bases are defined up to a change of coordinates. They are named in those that the model keeps: for `Hierarchical` and `PReF`
    the ones in which people's departures from the crowd are uncorrelated, the widest first. The sign of a base is arbitrary
    too, except where weights cannot be negative: people whose weight is negative want the opposite of its name.

    Args:
        model: a fitted model that is linear in its weights (`RewardModel.linear`); one without bases has the crowd's name only.
        pairs: choices whose responses are compared; who made them does not matter.
        encoder: the one that the model was fitted with; it need not be `style`.
        seed: of the permutations and resamples.

    Raises:
        DataError: too few prompts with several responses; a method that is not linear in its weights (PAL, VPL).
        MismatchError: the model was fitted with another encoder.
        MissingExtraError: the `style` encoder's packages are missing.
    Cost: one encoding by each encoder (a thousand texts a second), and 800 products (texts x 40) x (texts x bases).
    """
    sample, offset, slopes = responses_of(model, pairs, encoder)
    weights = model.crowd_weights.double().cpu().numpy()
    rewards = np.column_stack([offset + slopes @ weights, slopes])
    moment = np.square(slopes[sample.chosen] - slopes[sample.rejected]).mean(0)
    prior, shares, coordinates = model.prior, [None] * rewards.shape[1], "Bases as they were fitted."
    if prior is not None and slopes.shape[1]:
        away = prior.mean - model.crowd_weights
        spread = (prior.covariance + torch.outer(away, away)).double().cpu().numpy()
        variance = np.diag(spread) * moment
        shares[1:] = (variance / variance.sum()).tolist()
        deviation = np.sqrt(np.diag(spread))
        if np.abs(spread / np.outer(deviation, deviation) - np.eye(len(deviation))).max() < 1e-2:
            coordinates = "Bases in the model's own coordinates, in which departures from the crowd are uncorrelated."
    if slopes.shape[1]:
        coordinates += " The sign of a base is arbitrary where weights may be negative."
    whats = ["the crowd", *(f"base {k + 1}" for k in range(slopes.shape[1]))]
    return _naming(sample, rewards, whats, shares, coordinates, None, seed)


def name_profile(model: RewardModel, pairs: PairSet, encoder: Encoder, profile: Profile, *, seed: int = 0) -> Naming:
    """What one person rewards beyond the crowd: the direction V (mean - crowd's weights), in the words of `name_bases`.

    The intervals hold what is unknown of the person too: each resample draws the weights from N(mean, covariance), so that
    somebody of whom little is known gets few words. Arguments, errors and cost otherwise as `name_bases`.

    Raises:
        MismatchError: the profile belongs to another model.
    """
    check_profiles(model, profile)
    sample, _, slopes = responses_of(model, pairs, encoder)
    away = (profile.mean - model.crowd_weights.to(profile.mean)).double().cpu().numpy()
    draw: Callable[[np.random.Generator], Floats] | None = None
    if profile.covariance is not None and len(away):
        size, turn = np.linalg.eigh(profile.covariance.double().cpu().numpy())
        root = turn * np.sqrt(size.clip(min=0))

        def draw(rng: np.random.Generator) -> Floats:
            return np.asarray(slopes @ (away + root @ rng.standard_normal(len(away))))[:, None]

    coordinates = f"What {_cell(profile.user_id)} wants beyond the crowd, from {profile.n_pairs} choices."
    return _naming(sample, (slopes @ away)[:, None], [profile.user_id], [None], coordinates, draw, seed)


class Responses(NamedTuple):
    """The distinct responses in use, and which of them have a rival for the same prompt."""

    texts: Ints  # (N',) rows of the responses in use that are compared, sorted by prompt
    prompt: Ints  # (N',) number of the prompt, from 0
    style: Floats  # (N', A) centred by prompt, unit length
    axes: tuple[str, ...]
    chosen: Ints  # (P,) rows of the responses in use
    rejected: Ints

    def centred(self, values: Floats) -> Floats:
        """(N, J) of the responses in use -> (N', J) less the mean over the prompt's responses."""
        values = values[self.texts]
        counts = np.bincount(self.prompt)
        means = np.add.reduceat(values, np.cumsum(counts) - counts, axis=0) / counts[:, None]
        return np.asarray(values - means[self.prompt])


@torch.no_grad()
def responses_of(model: RewardModel, pairs: PairSet, encoder: Encoder) -> tuple[Responses, Floats, Floats]:
    """The responses in use with their offset (N,) and slopes (N, K) under the model."""
    if not len(pairs):
        raise DataError("0 choices; expected pairs whose responses can be compared")
    used, side = np.unique(np.concatenate([pairs.chosen, pairs.rejected]), return_inverse=True)
    texts = [pairs.texts[row] for row in used.tolist()]
    table = encoder.encode(texts)
    model.check(table, encoder.fingerprint)
    design = model.design(model.features(table))
    offset, slopes = (np.asarray(part.double().cpu().numpy()) for part in design)
    numbers: dict[object, int] = {}
    prompt = np.asarray([numbers.setdefault(text.prompt, len(numbers)) for text in texts], dtype=np.int64)
    rivals = np.bincount(prompt)[prompt] > 1
    order = np.argsort(prompt, kind="stable")
    kept = order[rivals[order]]
    numbered = np.unique(prompt[kept], return_inverse=True)[1].astype(np.int64)
    free = len(kept) - (int(numbered[-1]) + 1 if len(kept) else 0)
    if free < FEWEST:
        raise DataError(
            f"{len(kept)} responses to {len(kept) - free} prompts with several: {free} comparisons; expected at least {FEWEST}: "
            "name the bases over more choices"
        )
    style, n_pairs = Style(), len(pairs)
    read = table if encoder.fingerprint == style.fingerprint else style.encode(texts)
    raw = np.asarray(read.rows(torch.from_numpy(kept)).double().cpu().numpy())
    sample = Responses(np.arange(len(kept)), numbered, raw, style.names, side[:n_pairs], side[n_pairs:])
    centred = sample.centred(raw)
    size = np.sqrt(np.square(centred).sum(0))
    varies = np.flatnonzero(size > 1e-6 * (1 + np.abs(raw).max(0)) * np.sqrt(len(raw)))
    unit = centred[:, varies] / size[varies]
    alike = np.triu(np.abs(unit.T @ unit) > TWINS, k=1).any(0)  # with an earlier one
    axes = tuple(style.names[a] for a in varies[~alike])
    return sample._replace(texts=kept, style=unit[:, ~alike], axes=axes), offset, slopes


def _naming(
    sample: Responses,
    rewards: Floats,
    whats: Sequence[str],
    shares: Sequence[float | None],
    coordinates: str,
    draw: Callable[[np.random.Generator], Floats] | None,
    seed: int,
) -> Naming:
    """Names of the columns of `rewards` (N, J); `draw` gives other values that they might have."""
    chance, resampling = np.random.default_rng(seed).spawn(2)
    centred = sample.centred(rewards)
    flat = np.square(centred).sum(0) <= 1e-11 * (1e-30 + np.square(rewards).sum(0))  # the rounding of float32
    centred[:, flat] = 0
    correlation = _correlations(sample.style, centred)
    threshold = _threshold(sample, centred, chance)
    low, high = _interval(sample, rewards[:, ~flat], draw, resampling)
    n_prompts = int(sample.prompt[-1]) + 1
    cluster = sample.prompt if n_prompts >= CLUSTERS else np.arange(len(sample.prompt))
    margins = rewards[sample.chosen] - rewards[sample.rejected]
    names, place = [], np.cumsum(~flat) - 1
    for j, what in enumerate(whats):
        if flat[j]:
            names.append(Name(what, NO_DIFFERENCE, (), 0.0, (), shares[j], (), ()))
            continue
        bounds = low[:, place[j]], high[:, place[j]]
        r = correlation[:, j]
        certain = (np.abs(r) >= max(threshold, LEAST)) & (np.sign(bounds[0]) == np.sign(r)) & (np.sign(bounds[1]) == np.sign(r))
        order = np.argsort(-np.abs(r), kind="stable")
        axes = tuple(Axis(sample.axes[a], float(r[a]), float(bounds[0][a]), float(bounds[1][a]), bool(certain[a])) for a in order)
        best = _best(sample.style, centred[:, j], np.flatnonzero(certain))
        label = worded([(sample.axes[a], r[a]) for a in best])
        explained = _explained(sample.style, centred[:, j], cluster)
        ends = _extremes(margins[:, j], sample), _extremes(-margins[:, j], sample)
        names.append(Name(what, label, axes, explained, tuple(sample.axes[a] for a in best), shares[j], *ends))
    return Naming(tuple(names), threshold, len(sample.texts), n_prompts, coordinates)


def _correlations(style: Floats, centred: Floats) -> Floats:
    """(A, J) of columns with mean 0; `style` has unit length, a column of zeros correlates with nothing."""
    return np.asarray(style.T @ centred / np.sqrt(np.square(centred).sum(0)).clip(min=1e-300))


def _threshold(sample: Responses, centred: Floats, rng: np.random.Generator) -> float:
    """What the largest correlation reaches once in twenty times if rewards are dealt anew within each prompt."""
    largest = []
    for _ in range(PERMUTATIONS):
        dealt = np.lexsort((rng.random(len(centred)), sample.prompt))
        largest.append(np.abs(_correlations(sample.style, centred[dealt])).max(initial=0.0))
    return float(np.quantile(largest, LEVEL))


def _interval(
    sample: Responses, rewards: Floats, draw: Callable[[np.random.Generator], Floats] | None, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """(A, J) ends of the interval over resampled prompts; over resampled responses where there are few prompts."""
    n_prompts, fixed, found = int(sample.prompt[-1]) + 1, sample.centred(rewards), []
    whole = n_prompts >= CLUSTERS
    for _ in range(RESAMPLES):
        n = n_prompts if whole else len(sample.texts)
        times = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        weight = (times[sample.prompt] if whole else times)[:, None]
        centred = fixed if draw is None else sample.centred(draw(rng))
        size = np.sqrt((weight * np.square(sample.style)).sum(0)[:, None] * (weight * np.square(centred)).sum(0))
        found.append((weight * sample.style).T @ centred / size.clip(min=1e-300))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.asarray(found), [tail, 1 - tail], axis=0)
    return low, high


def _best(style: Floats, reward: Floats, among: Ints) -> list[int]:
    """At most `FEW` of the axes `among` that predict the reward together, the strongest first, each with its own sign."""
    if not len(among):
        return []
    with _pursuing(len(among)) as pursuit:
        fit = pursuit.fit(style[:, among], reward)
    own = style[:, among].T @ reward
    agree = fit.coef_ * own > 0  # a coefficient against the axis' own correlation corrects another axis: no word for this one
    return [int(among[a]) for a in np.argsort(-np.abs(own), kind="stable") if agree[a]]


@contextmanager
def _pursuing(n_axes: int) -> Iterator[OrthogonalMatchingPursuit]:
    """Pursuit of the best `FEW` axes. That fewer explain everything is no reason for its warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Orthogonal matching pursuit ended prematurely", category=RuntimeWarning)
        yield OrthogonalMatchingPursuit(n_nonzero_coefs=min(FEW, n_axes), fit_intercept=False)


def _explained(style: Floats, reward: Floats, cluster: Ints) -> float:
    """R^2 of the best `FEW` axes, chosen and weighed without the prompts that they predict; not below 0."""
    if not style.shape[1]:
        return 0.0
    with _pursuing(style.shape[1]) as pursuit:
        told = cross_val_predict(pursuit, style, reward, groups=cluster, cv=GroupKFold(5))
    return max(0.0, float(1 - np.square(reward - told).sum() / np.square(reward).sum()))


def worded(axes: Sequence[tuple[str, float]]) -> str:
    up, down = ([WORDS[name][side] for name, r in axes if (r < 0) == bool(side)] for side in (0, 1))
    return "; ".join(", ".join(words) for words in (up, down) if words) or NO_NAME


def _extremes(margin: Floats, sample: Responses, most: int = 3) -> tuple[int, ...]:
    """Rows of the largest positive margins, every pair of texts once."""
    _, first = np.unique(np.stack([sample.chosen, sample.rejected]), axis=1, return_index=True)
    order = first[np.lexsort((first, -margin[first]))]
    return tuple(int(row) for row in order[:most] if margin[row] > 0)


def _cell(text: str, most: int = 160) -> str:
    """One line that cannot end a cell of a table."""
    line = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return line if len(line) <= most else line[: most - 1] + "…"
