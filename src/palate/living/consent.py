"""Consent as a record: who agreed to what, in which words, and when. Feedback of a person without one is refused.

The record holds no more than is needed to show later that the person was asked. Withdrawing is a record too, with
`granted=False`: it stops feedback from then on and undoes nothing; what is kept already goes by deletion.
"""

import time
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import DataError

PERSONALISE = "personalise"  # the purpose that the server asks for; the store asks only whether the last record grants one
LATEST = 4_102_444_800.0  # 2100-01-01, in unix seconds: a time in milliseconds is later

Seconds = Annotated[float, Field(ge=0, le=LATEST, allow_inf_nan=False, description="unix seconds (not milliseconds)")]
Label = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._:/@+-]*$")]


class ConsentError(DataError):
    """Feedback of somebody who has not agreed to it, has withdrawn, or has agreed to something else."""


class Consent(BaseModel):
    """One answer of one person to one question about their data."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [{"purpose": PERSONALISE, "text_version": "2026-01", "granted": True, "at": 1767225600.0}],
        },
    )

    purpose: Label = Field(description="what the data may be used for")
    text_version: Label = Field(description="which version of the text the person was shown")
    granted: bool = Field(description="false: withdrawn, or refused")
    at: Seconds = Field(description="when the person answered, in unix seconds")


def require_consent(
    consent: Consent | None, *, purpose: str = PERSONALISE, text_version: str | None = None, now: float | None = None
) -> Consent:
    """The record itself, where it allows feedback for `purpose`.

    Args:
        consent: the latest record of the person, None where there is none.
        purpose: what the feedback is for.
        text_version: the only version of the text that counts; None takes any.
        now: unix seconds, the clock's by default; a record from more than a day ahead of it is not believed.

    Raises `ConsentError` with what is missing and what to do.
    """
    if consent is None:
        raise ConsentError(f"no consent is recorded for this person; record their consent to {purpose!r} before their feedback")
    if not consent.granted:
        raise ConsentError(f"this person's consent was refused or withdrawn at {consent.at:.0f}; their feedback is not taken")
    if consent.purpose != purpose:
        raise ConsentError(f"the consent is for {consent.purpose!r}; expected one for {purpose!r}: ask this person again")
    if text_version is not None and consent.text_version != text_version:
        raise ConsentError(
            f"the consent is to version {consent.text_version!r} of the text; expected {text_version!r}: ask this person again"
        )
    now = time.time() if now is None else now
    if consent.at > now + 86_400:
        raise ConsentError(f"the consent is dated {consent.at:.0f}, {consent.at - now:.0f} s ahead of now; expected a past time")
    return consent
