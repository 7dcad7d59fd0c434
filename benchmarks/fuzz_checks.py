"""Two checks of schemathesis, told what no schema can state; `fuzz_server` has it load this file in place of its own two.

That data which fits the document is accepted, unless the service says that its meaning is the fault (code "bad_data": a consent
from tomorrow, three labels for two samples) or that it is too many bytes, which a schema of characters and items cannot say. A
refusal by the schema itself (code "invalid") of data that the document allows stays a failure, of the document, but for 5.0,
which JSON Schema calls an integer and the service does not. And that data which does not fit is refused, where 413 is a refusal
too.
"""

import json
from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

UNSTATED = ("bad_data", "too_large")
INTEGER = "Input should be a valid integer"
MEANT = "Value error, "  # how a fault begins that a validator of the service found in data of the right shape


@schemathesis.check
def valid_data_is_understood(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> bool | None:
    """`positive_data_acceptance`, but for what no schema can state."""
    problem = _problem(response)
    if response.status_code in (413, 422) and problem.get("code") in UNSTATED:
        return None
    reasons = [error["why"] for error in problem.get("errors", ())]
    if reasons and all(why == INTEGER or why.startswith(MEANT) for why in reasons):  # both of them at once are not "bad_data"
        return None
    return positive_data_acceptance(ctx, response, case)


@schemathesis.check
def invalid_data_is_refused(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> bool | None:
    """`negative_data_rejection`, for which 413 is no refusal."""
    return None if response.status_code == 413 else negative_data_rejection(ctx, response, case)


def _problem(response: schemathesis.Response) -> dict[str, Any]:
    try:
        found = json.loads(response.content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
