"""Features from a server: OpenAI's `/embeddings`, which many others speak too, and vLLM's `/pooling`.

A server fails in ways that look like an answer: rows in another order, a row too few, NaN, half a body, another model behind the
same name. Every answer is checked, every row is put in its place by its `index`, and what cannot be had is an error: no vector is
ever made up.
"""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate.data.pairs import Text
from palate.encoders.answers import rows_of
from palate.encoders.asking import OPENAI, EndpointError, Limits, Server
from palate.encoders.base import Batch, BatchedEncoder, State
from palate.encoders.specs import Part
from palate.errors import DataError, MismatchError

Format = Literal["chat", "prompt and response", "response"]

PROBES = (
    Text("What is the capital of France?", "Paris."),
    Text("How do I boil an egg?", "Put it into boiling water for eight minutes, then into cold water, and peel it."),
    Text("Write one line about rain.", "Rain on the tin roof, a drummer without a band."),
)
N_SKETCH = 32
WIDTH_OF_A_BUCKET = 0.2  # of projections of unit variance
SLACK = 0.05  # of a bucket, for rounding on the server


class Endpoint(BatchedEncoder):
    """What the servers share: limits, retries, checks, and the probe that tells one model from another behind the same name.

    The probe: three fixed texts are embedded when the encoder is made. Of their features, joined and scaled to unit variance, 32
    sums with fixed random signs are kept, each as the bucket of a fifth that it falls into, and so is the logarithm of the
    scale. These numbers are part of the state: another model has another fingerprint, so that neither rows of a cache nor a
    fitted model are used with it. A restored encoder asks the probe again before its first request, with room for a twentieth of
    a bucket of rounding. (Measured: turning all features to a cosine of .999 is found 99 times of 100, to .9999 85 times; noise
    of 1e-5 of a feature's size changes a fingerprint once in a thousand times, of 1e-4 once in a hundred, and costs another
    encoding then.)

    Attributes:
        server: the address, and the limits, which may be set at any time.
        served: the name that the server itself gives the model.
    """

    kind: str
    path: str
    field: str

    def __init__(self, url: str, model: str, *, text: Format, key_env: str, limits: Limits, known: State | None = None):
        self.server, self.model, self.text = Server(url, key_env, limits), model, text
        if not model:
            raise DataError("the model has no name; expected the name that the server knows it by")
        self.spec = str(Part(self.kind, model, tuple(self.options().items())))
        self._verified = known is None
        if known is None:
            self.served, self.width = "", 0
            self.probe = _sketch(self._probed())
        else:
            self.served, self.width, self.probe = str(known["served"]), int(known["width"]), [int(n) for n in known["probe"]]

    @abstractmethod
    def options(self) -> dict[str, str]:
        """What the spec says after its question mark."""

    @abstractmethod
    def body(self, texts: Sequence[Text]) -> dict[str, Any]:
        """The JSON of one request."""

    @property
    def texts_per_request(self) -> int:
        return 1 if self.text == "chat" else self.server.limits.batch

    def state(self) -> State:
        return {
            "encoder": self.kind,
            "version": 1,
            "where": {"url": self.server.url, "key_env": self.server.key_env},
            "model": self.model,
            "text": self.text,
            "served": self.served,
            "width": self.width,
            "probe": self.probe,
        }

    def plan(self, texts: Sequence[Text]) -> list[Batch]:
        """Batches of as many texts as `limits.concurrent` requests hold, and at least `limits.batch`, in their order."""
        size = max(self.server.limits.batch, self.texts_per_request * self.server.limits.concurrent)
        starts = range(0, len(texts), size)
        rows = [list(range(start, min(start + size, len(texts)))) for start in starts]
        return [Batch(part, partial(self._compute, [texts[i] for i in part], len(texts))) for part in rows]

    def _compute(self, texts: list[Text], total: int) -> Tensor:
        if not self._verified:
            self._verify()
        try:
            return torch.from_numpy(self._asked(texts))
        except EndpointError as error:
            raise EndpointError(
                f"{error} {self.encoded} of {total} texts are done; with a cache they are kept, and the next run goes on there"
            ) from None

    def _verify(self) -> None:
        now, before = _projected(self._probed()), np.asarray(self.probe)
        if len(now) != len(before) or (np.abs(now - before - 0.5) > 0.5 + SLACK).any():
            raise MismatchError(
                f"{self._named} gives other features than when this encoder was saved: another model stands "
                "behind the name, or it is served in another way; bring the old one back, or fit again"
            )
        self._verified = True

    def _probed(self) -> NDArray[np.float32]:
        rows = self._asked(list(PROBES))
        if not (rows != rows[0]).any():
            raise DataError(f"{self._named} gives three different texts the same features; expected an encoder")
        return rows

    def _asked(self, texts: list[Text]) -> NDArray[np.float32]:
        """(N, D) of `texts`, in several requests at once."""
        step = self.texts_per_request
        parts = [texts[i : i + step] for i in range(0, len(texts), step)]
        out = []
        with closing(self.server.ask(self.path, [self.body(part) for part in parts])) as answers:
            for part, answer in zip(parts, answers, strict=True):
                rows, served = rows_of(answer, len(part), self.field, self._named)
                self.width, self.served = self.width or rows.shape[1], self.served or served
                if rows.shape[1] != self.width:
                    raise DataError(f"{self._named} gave rows of {rows.shape[1]} numbers; expected {self.width}, as before")
                if served != self.served:
                    raise MismatchError(
                        f"{self._named} answered as {served!r} and before as {self.served!r}; rows of two models do not mix"
                    )
                out.append(rows)
        return np.concatenate(out)

    @property
    def _named(self) -> str:
        return f"{self.model!r} at {self.server.url}"

    def _line(self, text: Text) -> str:
        return _clean(text.response if self.text == "response" else f"{text.prompt_text}\n{text.response}")


class OpenAIEmbeddings(Endpoint):
    """Embeddings of a server that speaks OpenAI's `/embeddings`. Spec "openai:MODEL?url=...&dimensions=...&text=...".

    Args:
        url: up to and with "/v1"; None takes $OPENAI_BASE_URL, and OpenAI's own address where that is not set.
        model: as the server knows it.
        dimensions: D, for models that can be asked for fewer features; None for the model's own.
        text: "prompt and response" joins them with a line break, "response" leaves the prompt out.
        base64: ask for numbers as base64, a quarter of the bytes; the features are the same.
        key_env: the environment variable that holds the key; it may be unset for a server of one's own.
        limits: see `Limits`.

    Raises:
        MissingExtraError: openai or tenacity is not installed.
        EndpointError: the server refused, or did not answer within the limits.
        DataError: an answer that is not one row of finite numbers for every text, all of one width.
    """

    kind, path, field = "openai", "/embeddings", "embedding"

    def __init__(
        self,
        url: str | None,
        model: str,
        *,
        dimensions: int | None = None,
        text: Format = "prompt and response",
        base64: bool = False,
        key_env: str = "OPENAI_API_KEY",
        limits: Limits | None = None,
        known: State | None = None,
    ):
        if text not in ("prompt and response", "response"):
            raise DataError(f"text is {text!r}; expected 'prompt and response' or 'response'")
        if dimensions is not None and dimensions < 1:
            raise DataError(f"dimensions is {dimensions}; expected a positive number, or None for the model's own")
        self.dimensions, self.base64 = dimensions, base64
        url = url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        super().__init__(url, model, text=text, key_env=key_env, limits=limits or Limits(), known=known)
        if dimensions is not None and self.width != dimensions:
            raise DataError(f"{self._named} gave rows of {self.width} numbers; expected {dimensions}, as it was asked for")

    @classmethod
    def from_spec(cls, model: str, options: Mapping[str, str]) -> Self:
        """The encoder of "openai:MODEL?key=value&...". Raises `DataError` for an option that does not exist."""
        _known(options, ("url", "dimensions", "text"), "openai")
        said = options.get("dimensions")
        if said is not None and not said.isdecimal():
            raise DataError(f"dimensions is {said!r}; expected a whole number")
        text: Any = options.get("text", "prompt and response")
        return cls(options.get("url"), model, dimensions=None if said is None else int(said), text=text)

    @classmethod
    def restore(cls, state: State) -> Self:
        """The encoder whose `state()` this is. Nothing is asked yet; the probe is, before the first request."""
        same = {"text": state["text"], "key_env": state["where"]["key_env"], "dimensions": state["dimensions"]}
        return cls(state["where"]["url"], state["model"], **same, known=state)

    def options(self) -> dict[str, str]:
        out = {"url": self.server.url} if self.server.url != OPENAI else {}
        out |= {} if self.dimensions is None else {"dimensions": str(self.dimensions)}
        return out | ({"text": self.text} if self.text != "prompt and response" else {})

    def state(self) -> State:
        return super().state() | {"dimensions": self.dimensions}

    def body(self, texts: Sequence[Text]) -> dict[str, Any]:
        asked = {"model": self.model, "input": [self._line(text) for text in texts]}
        asked["encoding_format"] = "base64" if self.base64 else "float"
        return asked if self.dimensions is None else asked | {"dimensions": self.dimensions}


class VLLMPooling(Endpoint):
    """Features of a model that vLLM serves, from `/pooling`. Spec "vllm:MODEL?url=...&task=...&text=...&activation=...".

    A reward model (`task="classify"`) gives its logits: with `activation=False`, which is the default here and not there, they
    are the raw rewards, and with several heads they are scores for `GivenBases`. An embedding model (`task="embed"`) gives its
    pooled state. One number for each token is refused: there is no one row for a text.

    Args:
        url: the server, "http://host:8000"; a "/v1" at its end is left out, where this route is not.
        model: as the server knows it.
        task: sent on where given; None leaves it to the server.
        text: "chat" sends the turns and the response as the assistant's, for the model's own chat template, one text in a
            request; "prompt and response" and "response" send plain text.
        activation: `use_activation`; None leaves it to the server.
        key_env, limits, errors: as in `OpenAIEmbeddings`.
    """

    kind, path, field = "vllm", "/pooling", "data"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        task: str | None = None,
        text: Format = "chat",
        activation: bool | None = False,
        key_env: str = "VLLM_API_KEY",
        limits: Limits | None = None,
        known: State | None = None,
    ):
        if text not in get_args(Format):
            raise DataError(f"text is {text!r}; expected one of {', '.join(get_args(Format))}")
        self.task, self.activation = task, activation
        super().__init__(
            url.rstrip("/").removesuffix("/v1"), model, text=text, key_env=key_env, limits=limits or Limits(), known=known
        )

    @classmethod
    def from_spec(cls, model: str, options: Mapping[str, str]) -> Self:
        """The encoder of "vllm:MODEL?url=...". Raises `DataError` for an option that does not exist, and without a url."""
        _known(options, ("url", "task", "text", "activation"), "vllm")
        if "url" not in options:
            raise DataError(f"'vllm:{model}' does not say where; expected 'vllm:{model}?url=http://host:8000'")
        said = options.get("activation", "false")
        if said not in ("true", "false", "server"):
            raise DataError(f"activation is {said!r}; expected true, false, or server to leave it to the server")
        text: Any = options.get("text", "chat")
        return cls(
            options["url"], model, task=options.get("task"), text=text, activation=None if said == "server" else said == "true"
        )

    @classmethod
    def restore(cls, state: State) -> Self:
        """The encoder whose `state()` this is. Nothing is asked yet; the probe is, before the first request."""
        same = {
            "text": state["text"],
            "key_env": state["where"]["key_env"],
            "task": state["task"],
            "activation": state["activation"],
        }
        return cls(state["where"]["url"], state["model"], **same, known=state)

    def options(self) -> dict[str, str]:
        out = {"url": self.server.url} | ({} if self.task is None else {"task": self.task})
        out |= {"text": self.text} if self.text != "chat" else {}
        return out | ({} if self.activation is False else {"activation": "server" if self.activation is None else "true"})

    def state(self) -> State:
        return super().state() | {"task": self.task, "activation": self.activation}

    def body(self, texts: Sequence[Text]) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self.model}
        if self.text == "chat":
            (text,) = texts
            turns = [("user", text.prompt)] if isinstance(text.prompt, str) else list(text.prompt)
            said = [{"role": role, "content": _clean(content)} for role, content in [*turns, ("assistant", text.response)]]
            asked |= {"messages": said, "add_generation_prompt": False}
        else:
            asked["input"] = [self._line(text) for text in texts]
        asked |= {} if self.task is None else {"task": self.task}
        return asked if self.activation is None else asked | {"use_activation": self.activation}


def _known(options: Mapping[str, str], allowed: tuple[str, ...], kind: str) -> None:
    wrong = sorted(options.keys() - set(allowed))
    if wrong:
        raise DataError(f"'{kind}:' has the options {', '.join(wrong)}; expected some of {', '.join(allowed)}")


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be sent


def _projected(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(33,) sums with fixed random signs of the features scaled to unit variance, and the log of the scale, in buckets."""
    flat = rows.astype(np.float64).ravel()
    size = np.sqrt(np.square(flat).mean())
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(b"palate").digest(-(-flat.size * N_SKETCH // 8)), dtype=np.uint8))
    signs = 1.0 - 2.0 * bits[: flat.size * N_SKETCH].reshape(N_SKETCH, flat.size)
    sums = signs @ (flat / size) / np.sqrt(flat.size)
    out: NDArray[np.float64] = np.append(sums, np.log(size)) / WIDTH_OF_A_BUCKET
    return out


def _sketch(rows: NDArray[np.float32]) -> list[int]:
    return [int(bucket) for bucket in np.floor(_projected(rows))]
