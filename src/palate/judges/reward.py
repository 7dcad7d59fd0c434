"""`PlusReward`: the summary-conditioned reward of PLUS on a frozen encoder, r = v . e(summary + prompt, response).

PLUS (arXiv 2507.13579) fine-tunes a language model with a linear head on seen users' choices, the user's summary at the head of
the prompt. On a frozen encoder only the head is left to fit, by ridge Bradley-Terry. A head that is linear in e hears of the
summary only as far as the encoder itself lets it change what tells two responses apart: an encoder that reads the response alone
gives everybody the same reward. So beside the published form there is one in which the summary turns the reward:

    r = (v + V a(s)) . e(summary + prompt, response)

with a(s) the first few principal components of the embedded summaries, (k,), of unit variance over the seen users, and V (D, k).
Both are one linear head on e (x) [1, a(s)]. A user without a summary has a = 0, that of the mean summary, and a prompt as it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from palate import likelihood
from palate.adaptation import margins
from palate.data.embeddings import Dense, Embeddings
from palate.data.pairs import Choice, EmbeddedPairs, Message, PairSet, Prompt, Text
from palate.encoders.base import Encoder
from palate.encoders.offline import Items
from palate.errors import DataError, MismatchError, ModelFileError
from palate.judges.base import Brief, Question, Verdict
from palate.judges.memory import Writer
from palate.models import files
from palate.models.base import RewardModel, load_model
from palate.models.factored import BradleyTerry
from palate.training import fit

INTERACTIONS = (0, 4)
FILE = "plus.safetensors"
HEAD = "This is what I like, by what I chose before: {summary}\nKeep it in mind in what follows.\n\n"


class PlusReward:
    """A fitted reward on summaries: `PlusReward.fit(pairs, encoder, briefs)`. It is a `Judge` whose p_first is a probability.

    Args:
        encoder: whose features it reads.
        model: the head, on (1 + k) D features.
        mean: (D,) of the seen users' embedded summaries.
        directions: (D, k): a(s) = (e(s) - mean) . directions.
        writer: writes the summaries of `study`; may be set at any time.

    Raises:
        MismatchError: an encoder other than the one it was fitted on, or parts that do not fit together.
    """

    probabilistic = True

    def __init__(self, encoder: Encoder, model: RewardModel, mean: Tensor, directions: Tensor, *, writer: Writer | None = None):
        wide = directions.shape[1] + 1
        if model.n_features != wide * len(mean) or len(directions) != len(mean):
            raise MismatchError(
                f"a head on {model.n_features} features and {wide - 1} interactions with {len(mean)}; expected {wide * len(mean)}"
            )
        if model.encoder is not None and model.encoder != encoder.fingerprint:
            raise MismatchError(
                f"encoder {encoder.spec!r} has fingerprint {encoder.fingerprint[:12]}, the reward was fitted on "
                f"{model.encoder[:12]}; use that encoder, or fit again"
            )
        self.encoder, self.model, self.mean, self.directions, self.writer = encoder, model, mean, directions, writer

    def __repr__(self) -> str:
        return f"PlusReward({self.encoder.spec!r}, {self.interactions} interactions)"

    @property
    def interactions(self) -> int:
        return self.directions.shape[1]

    @classmethod
    def fit(
        cls,
        pairs: PairSet,
        encoder: Encoder,
        briefs: Mapping[str, Brief],
        *,
        interactions: int | Sequence[int] = INTERACTIONS,
        ridge: float | None = None,
        seed: int = 0,
    ) -> Self:
        """Learn the head from seen users' choices under their summaries.

        Args:
            pairs: choices of the seen users.
            encoder: any that reads texts, which `items` does not: the summary stands in the prompt, so that every response under
                a new user's summary would be an item that it has not met, and all would score alike. Features of
                `Text(summary + prompt, response)` are read, and of the summaries for interactions.
            briefs: the users' summaries. They are best written from other choices than `pairs`: a summary that has seen the
                answer is trusted more than a new user's deserves.
            interactions: k, 0 for the published form; of several the one with the lowest log loss on held-out seen users.
            ridge: the penalty; None chooses on the same users.
            seed: of who is held out.

        Raises:
            DataError: the encoder `items`, no summary at all, k below 0, or what `palate.fit` refuses.
        Cost: one encoding for each distinct (summary, text), then Bradley-Terry on (1 + k) D features for every candidate k.
        """
        reads_new_texts(encoder)
        candidates = sorted({interactions} if isinstance(interactions, int) else set(interactions))
        if not candidates or candidates[0] < 0:
            raise DataError(f"interactions is {interactions}; expected numbers of 0 or more")
        if not any(user in briefs and briefs[user].text for user in pairs.user_ids):
            raise DataError(f"none of the {len(pairs.user_ids)} users has a summary; write some with Summaries(chat).study(past)")
        embedded = encoder.embed(conditioned(pairs, briefs))
        mean, directions = _components(pairs, encoder, briefs, candidates[-1], embedded.embeddings.shape[1])
        fitted: dict[int, Self] = {}
        for k in candidates:
            part = directions[:, :k]  # fewer where the summaries have fewer directions
            data = _interacting(embedded, pairs, _loadings(pairs, encoder, briefs, mean, part))
            fitted[k] = cls(encoder, fit(data, BradleyTerry(ridge), seed=seed), mean, part)
        losses = {k: _held_out_loss(reward.model) for k, reward in fitted.items()}
        best = fitted[min(losses, key=lambda k: losses[k])]  # of equals, and where nobody is held out, the fewest
        best.model.record["selection"]["interactions"] = {str(k): loss for k, loss in losses.items() if loss < np.inf}
        return best

    @torch.no_grad()
    def margins(self, pairs: PairSet, briefs: Mapping[str, Brief]) -> Tensor:
        """(P,) reward(chosen) - reward(rejected) of every choice under its user's summary, in natural log-odds.

        Nobody is adapted: a new user is summed up in words, and that is all. Users without a brief have no summary.

        Cost: one encoding for each distinct (summary, text).
        """
        if not len(pairs):
            return self.mean.new_zeros(0)
        embedded = self.encoder.embed(conditioned(pairs, briefs))
        loadings = _loadings(pairs, self.encoder, briefs, self.mean, self.directions)
        return margins(self.model, _interacting(embedded, pairs, loadings))

    @torch.no_grad()
    def score(self, prompt: Prompt, responses: Sequence[str], brief: Brief | None = None) -> Tensor:
        """(n,) rewards of responses for the user of a brief, in natural log-odds up to a constant."""
        if isinstance(responses, str) or not len(responses):
            raise DataError(f"responses is {responses!r:.60}; expected a list of at least one text")
        headed = prompt if brief is None else with_summary(prompt, brief.text)
        table = self.encoder.encode([Text(headed, response) for response in responses])
        a = self.mean.new_zeros(self.interactions)
        if brief is not None and brief.text:
            a = (_rows(self.encoder, [brief.text])[0].to(self.mean) - self.mean) @ self.directions
        out: Tensor = self.model(Dense(_outer(_dense(table).to(a), a.expand(len(responses), -1))))
        return out

    # -- as a judge

    @property
    def failed(self) -> dict[str, str]:
        """Users of whom the writer's last `study` has no summary, and why."""
        return dict(getattr(self.writer, "failed", {}))

    def study(self, past: PairSet) -> dict[str, Brief]:
        """The writer's summaries. Raises `DataError` without a writer."""
        if self.writer is None:
            raise DataError("this PlusReward has no writer of summaries; set its `writer` to Summaries(chat), or hand it briefs")
        return self.writer.study(past)

    def judge(self, brief: Brief | None, prompt: Prompt, first: str, second: str) -> Verdict:
        """The verdict on one question; no request is sent."""
        return self.judge_all([Question(brief, prompt, first, second)])[0]

    def judge_all(self, questions: Sequence[Question]) -> list[Verdict]:
        """sigma(r(first) - r(second)) for every question. The two are scored apart, so no place can favour either."""
        briefs = {str(i): Brief("") if question.brief is None else question.brief for i, question in enumerate(questions)}
        rows = [(str(i), q.prompt, q.first, q.second) for i, q in enumerate(questions) if q.first != q.second]
        p = [0.5] * len(questions)
        if rows:
            pairs = PairSet.from_choices([Choice(*row) for row in rows])
            found = likelihood.probability(self.margins(pairs, briefs).double())
            for user, value in zip(pairs.users.tolist(), found.tolist(), strict=True):
                p[int(user)] = value
        return [Verdict(value) for value in p]

    # -- files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head as a model and the components beside it; the encoder is saved by whoever made it."""
        self.model.save_pretrained(folder)
        tensors = {"mean": self.mean, "directions": self.directions}
        files.write_tensors(Path(folder) / FILE, tensors, {"format": "palate-plus", "version": "1"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, encoder: Encoder) -> Self:
        """What `save_pretrained` wrote, for the same encoder.

        Raises:
            ModelFileError: a folder that holds something else. MismatchError: another encoder.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        model = load_model(folder)
        try:
            tensors = load_file(str(Path(folder) / FILE))
            mean, directions = tensors["mean"], tensors["directions"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelFileError(f"{folder} holds no {FILE} of a PlusReward ({error}); save the reward again") from error
        if not isinstance(model, BradleyTerry):
            raise ModelFileError(f"{folder} holds a {type(model).__name__}; expected the BradleyTerry head of a PlusReward")
        return cls(encoder, model, mean, directions)


def reads_new_texts(encoder: Encoder) -> None:
    """Refuse `items`: to it every response under a new summary, and every summary, is unknown. Raises `DataError`."""
    if isinstance(encoder, Items):
        raise DataError(
            "PLUS has the encoder 'items', to which every response under a new summary is unknown; expected one that reads "
            "texts: 'minilm', 'style', an 'hf:' or 'st:' model, or some of these joined"
        )


def with_summary(prompt: Prompt, summary: str) -> Prompt:
    """The prompt with the summary at the head of its first user turn; as it is without a summary."""
    if not summary:
        return prompt
    if isinstance(prompt, str):
        return HEAD.format(summary=summary) + prompt
    turns = list(prompt)
    place = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if place is None:
        return (Message("user", HEAD.format(summary=summary).strip()), *turns)
    turns[place] = Message("user", HEAD.format(summary=summary) + turns[place].content)
    return tuple(turns)


def conditioned(pairs: PairSet, briefs: Mapping[str, Brief]) -> PairSet:
    """The same choices, each under a prompt that begins with its user's summary. O(P)."""
    rows = []
    for row, user in enumerate(pairs.users.tolist()):
        text, rejected = pairs.texts[pairs.chosen[row]], pairs.texts[pairs.rejected[row]]
        prompt = with_summary(text.prompt, briefs[user].text) if user in briefs else text.prompt
        rows.append(
            Choice(
                user,
                prompt,
                text.response,
                rejected.response,
                bool(pairs.tie[row]),
                float(pairs.weight[row]),
                conversation_id=pairs.conversation[row],
            )
        )
    return PairSet.from_choices(rows)


def _held_out_loss(model: RewardModel) -> float:
    """The lowest log loss of held-out users over the ridges; infinite where too few users were there to hold any out."""
    return min((loss for loss in model.record["selection"]["log_loss"] if not np.isnan(loss)), default=np.inf)


def _components(pairs: PairSet, encoder: Encoder, briefs: Mapping[str, Brief], k: int, width: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) of the users' embedded summaries, and up to k principal directions (D, k) scaled to unit variance."""
    texts = [briefs[user].text for user in pairs.user_ids if user in briefs and briefs[user].text]
    if not k:
        return torch.zeros(width), torch.zeros(width, 0)
    table = _rows(encoder, texts).double()
    mean = table.mean(0)
    _, size, vectors = torch.linalg.svd(table - mean, full_matrices=False)
    scale = size / len(texts) ** 0.5  # standard deviation along each direction
    kept = int((scale[:k] > 1e-6 * (table.square().mean(0).sum().sqrt() + 1e-30)).sum())
    directions = vectors[:kept].T
    largest = directions.abs().argmax(0)
    signs = directions.gather(0, largest[None])[0].sign()  # the sign of a component is nobody's choice: fix it
    return mean.float(), (directions * signs / scale[:kept]).float()


def _loadings(pairs: PairSet, encoder: Encoder, briefs: Mapping[str, Brief], mean: Tensor, directions: Tensor) -> Tensor:
    """a(s) of every user, (U, k); 0 where there is no summary."""
    out = mean.new_zeros(len(pairs.user_ids), directions.shape[1])
    known = [i for i, user in enumerate(pairs.user_ids) if user in briefs and briefs[user].text]
    if known and directions.shape[1]:
        table = _rows(encoder, [briefs[pairs.user_ids[i]].text for i in known])
        out[known] = (table.to(mean) - mean) @ directions
    return out


def _rows(encoder: Encoder, summaries: Sequence[str]) -> Tensor:
    """(N, D) of the summaries by themselves, each distinct one encoded once."""
    place = {text: i for i, text in enumerate(dict.fromkeys(summaries))}
    table = _dense(encoder.encode([Text("", text) for text in place]))
    return table[[place[text] for text in summaries]]


def _interacting(embedded: EmbeddedPairs, pairs: PairSet, loadings: Tensor) -> EmbeddedPairs:
    """The embedded choices with features e (x) [1, a(s)], (N, (1 + k) D). A row belongs to one summary, so to one a(s)."""
    table = embedded.embeddings
    if loadings.shape[1]:
        of_user = loadings[torch.from_numpy(pairs.user_index)]  # (P, k)
        of_text = loadings.new_zeros(len(table), loadings.shape[1])
        of_text[embedded.chosen], of_text[embedded.rejected] = of_user, of_user
        table = Dense(_outer(_dense(table), of_text))
    return EmbeddedPairs(
        table,
        embedded.chosen,
        embedded.rejected,
        embedded.users,
        tie=embedded.tie.cpu().numpy(),
        weight=embedded.weight.cpu().numpy(),
        unit=embedded.unit.cpu().numpy(),
        encoder=embedded.encoder,
    )


def _outer(table: Tensor, loadings: Tensor) -> Tensor:
    """(N, D), (N, k) -> (N, (1 + k) D): the features, then the features times each loading."""
    return torch.cat([table, *(table * loadings[:, i : i + 1].to(table) for i in range(loadings.shape[1]))], dim=1)


def _dense(table: Embeddings) -> Tensor:
    return table.rows(torch.arange(len(table), device=table.device))
