"""`Scorer`: from texts to one person's rewards. After training, the only object that most callers need."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palate.adaptation import Profile, check_profiles, no_pairs
from palate.data.pairs import Prompt, Text
from palate.encoders import Encoder
from palate.errors import DataError, MismatchError
from palate.models.base import RewardModel


class Scorer:
    """An encoder and the model that was fitted on its features.

    Raises:
        DataError: the model is not fitted.
        MismatchError: the model was fitted on another encoder's features.
    """

    def __init__(self, encoder: Encoder, model: RewardModel):
        if not model.is_fitted:
            raise DataError(f"this {type(model).__name__} is not fitted; call palate.fit(data, model) and use what it returns")
        if model.encoder is not None and encoder.fingerprint != model.encoder:
            raise MismatchError(
                f"encoder {encoder.spec!r} has fingerprint {encoder.fingerprint[:12]}, the model was fitted on "
                f"{model.encoder[:12]}; use the encoder that was saved with the model, or fit again"
            )
        self.encoder, self.model = encoder, model

    def __repr__(self) -> str:
        return f"Scorer({self.encoder.spec!r}, {self.model!r})"

    @torch.no_grad()
    def score(self, prompt: Prompt, responses: Sequence[str], profile: Profile | None = None) -> Tensor:
        """(n,) rewards of `responses` for the user of `profile`, or for the crowd where it is None.

        Natural log-odds up to a constant: the difference of two of them is the margin with which one is preferred to the other.
        They are not comparable between users. The responses may be texts that nobody has judged.

        Raises:
            DataError: no responses, or something that is not a text.
            MismatchError: a profile that belongs to another model.
        Cost: one encoding of the responses; after it, n K multiplications.
        """
        features, place = self._features(prompt, responses)
        return self.model.score(features, self._weights(profile, features))[place]

    @torch.no_grad()
    def score_with_std(self, prompt: Prompt, responses: Sequence[str], profile: Profile | None = None) -> tuple[Tensor, Tensor]:
        """(rewards (n,), standard deviations (n,)) by what is unknown about the user: sqrt(s' C s), s a response's slopes.

        Without a profile, C is the population's: how much people differ about the response. The errors of two responses are
        correlated, so the difference of two rewards is surer than the two deviations together suggest.

        Raises:
            DataError: as `score`, and for a method that has no uncertainty (a flat prior on the simplex, for example) or is not
                linear in its weights (PAL, VPL).
            MismatchError: as `score`.
        """
        features, place = self._features(prompt, responses)
        reward = self.model.score(features, self._weights(profile, features))[place]
        _, slopes = self.model.design(features)
        covariance = self.model.crowd_covariance if profile is None else profile.covariance
        if covariance is None:
            if not slopes.shape[1]:
                return reward, torch.zeros_like(reward)  # nothing about the user is unknown to a model without weights
            raise DataError(f"{type(self.model).__name__} has no uncertainty of its weights; use score, or a method with a prior")
        variance = torch.einsum("ni,ij,nj->n", slopes, covariance.to(slopes), slopes)
        return reward, variance.clamp(min=0).sqrt()[place]

    @torch.no_grad()
    def preference(self, prompt: Prompt, first: str, second: str, profile: Profile | None = None) -> float:
        """The probability that the user of `profile` prefers `first` to `second`; without a profile, that somebody unknown does.

        sigma(a m / sqrt(1 + pi v / 8)), m and v the mean and variance of the margin and a the model's `calibration`
        (`RewardModel.stated`): what is not known of the user brings it towards 1/2. Where the method has no uncertainty, v is 0.

        Raises:
            DataError, MismatchError: as `score`.
        Cost: one encoding of the two; after it, K^2 multiplications.
        """
        features, place = self._features(prompt, [first, second])
        reward = self.model.score(features, self._weights(profile, features))[place]
        margin, variance = reward[0] - reward[1], torch.zeros_like(reward[0])
        if profile is None:
            profile = no_pairs(self.model, ("",))[""]
        if profile.covariance is not None and self.model.linear and len(profile.mean):
            slopes = self.model.design(features)[1][place]
            away = slopes[0] - slopes[1]
            variance = (away @ profile.covariance.to(away) @ away).clamp(min=0)
        return float(torch.sigmoid(self.model.stated(margin, variance)))

    def rank(
        self,
        prompt: Prompt,
        responses: Sequence[str],
        profile: Profile | None = None,
        top_k: int | None = None,
        return_documents: bool = True,
    ) -> list[dict[str, Any]]:
        """The responses, best first: `{"corpus_id": place in responses, "score": reward, "text": response}`.

        The shape of `sentence_transformers.CrossEncoder.rank`. Equal rewards keep the order in which they came.

        Args:
            top_k: at most so many; None is all.
            return_documents: False leaves `text` out.

        Raises:
            DataError: as `score`, or `top_k` below 1.
            MismatchError: as `score`.
        """
        if top_k is not None and top_k < 1:
            raise DataError(f"top_k is {top_k}; expected 1 or more, or None for all")
        rewards = self.score(prompt, responses, profile)
        order = torch.argsort(rewards, descending=True, stable=True).tolist()[:top_k]
        values = rewards.tolist()
        return [{"corpus_id": i, "score": values[i]} | ({"text": responses[i]} if return_documents else {}) for i in order]

    def _features(self, prompt: Prompt, responses: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of the distinct responses, so that equal ones are equal to the last bit, and which of these each one is."""
        if isinstance(responses, str):
            raise DataError(f"responses is one text, {responses[:40]!r}; expected a list of texts")
        wrong = [i for i, response in enumerate(responses) if not isinstance(response, str)]
        if wrong:
            raise DataError(f"response {wrong[0]} is a {type(responses[wrong[0]]).__name__}; expected texts only")
        if not len(responses):
            raise DataError("0 responses to score; expected at least one")
        if not isinstance(prompt, str | tuple):
            raise DataError(f"the prompt is a {type(prompt).__name__}; expected a text, or a tuple of palate.Message turns")
        asked = [Text(prompt, "")] if self.model.reads_prompts else []
        distinct = {response: number for number, response in enumerate(dict.fromkeys(responses))}
        table = self.encoder.encode([Text(prompt, response) for response in distinct] + asked)
        self.model.check(table)
        features = self.model.features(table)
        place = torch.tensor([distinct[response] for response in responses], device=features.device)
        return self.model.under(features[:-1], features[-1:].expand(len(distinct), -1)) if asked else features, place

    def _weights(self, profile: Profile | None, features: Tensor) -> Tensor:
        if profile is None:
            return self.model.crowd_weights.to(features)
        check_profiles(self.model, profile)
        return profile.mean.to(features)
