"""The scalar head of a reward model: found by what it does, and believed only after it has given the model's own logits.

A head that is picked by its place or its shape can be another layer: the last linear layer of a model that was loaded without its
head is an MLP's down-projection, whose columns have the same length as the head, so nothing fails and every reward is wrong.
Here the model is run, and the head is the linear map that reads the final hidden state and writes the logits. Then
W e + b is compared with the logits on real texts, with the features that the encoder gives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from palate.data.pairs import Message, Text
from palate.encoders.base import BatchedEncoder, Encoder
from palate.encoders.joined import JoinedEncoder
from palate.errors import DataError, MismatchError

Reads = Literal["last token", "first token", "mean of the tokens"]

# How far W e + b may be from a logit, as a share of the largest one: some roundings in the precision that the model computes in.
# Another head is off by about the logits themselves.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CLEAR = 4.0  # by so many times what is allowed must the logits of the texts differ: else a wrong head could pass
N_PROBES = 6

TEXTS = (
    Text("What is the capital of France?", "Paris."),
    Text("What is the capital of France?", "I don't know, and I don't care."),
    Text("How do I boil an egg?", "Put it into boiling water for eight minutes, then into cold water, and peel it."),
    Text("How do I boil an egg?", "An egg is laid by a hen.\n\n- It has a shell.\n- It has a yolk."),
    Text("Write a haiku about rain.", "Rain on the tin roof,\na drummer without a band\nlearning one long song."),
    Text("Can you recommend a book for a long journey?", "Sure! What do you like to read?"),
    Text("Can you recommend a book for a long journey?", "The Odyssey: it is about one, and it lasts."),
    Text("Is it safe to mix bleach and vinegar?", "No. Together they give off chlorine gas, which can kill. Open a window."),
    Text("Is it safe to mix bleach and vinegar?", "Yes, the mixture cleans twice as well."),
    Text("Explain recursion to a child.", "You open a box, and in it is a smaller box, and so on, until one is too small."),
    Text("def add(a, b):", "    return a + b"),
    Text(
        (Message("user", "Hello!"), Message("assistant", "Hello. What can I do?"), Message("user", "Tell me a joke.")),
        "Two fish are in a tank. One says to the other: do you know how to drive this thing?",
    ),
)


class Head(NamedTuple):
    """The linear map from a final hidden state e (D,) to the logits: weight e + bias.

    Attributes:
        weight: (H, D) float32, one row a logit. bias: (H,) float32, zeros where the model has none.
        name: of the module in the model, such as "score".
        reads: which hidden state it is applied to.
        outputs: (H,) what the model's configuration calls the logits.
        dtype: the precision in which the model computes, which sets how far rounding may go (`TOLERANCE`).
    """

    weight: Tensor
    bias: Tensor
    name: str
    reads: Reads
    outputs: tuple[str, ...]
    dtype: torch.dtype

    def apply(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, H) logits, in float64."""
        return hidden.double() @ self.weight.T.to(hidden.device).double() + self.bias.to(hidden.device).double()


class Check(NamedTuple):
    """How well W e + b gave the model's own logits; of several, the figures of the one that came closest to what is allowed."""

    n_texts: int
    error: float  # largest |W e + b - logit|
    allowed: float
    spread: float  # between the largest and the smallest logit


def find_head(model: Any) -> Head:
    """The linear head of a loaded transformers model, found by running it on a few random sequences of tokens.

    It is the linear layer that is called after the final hidden state is known, whose output is the logits and whose input is
    that hidden state at the last or the first token, or its mean over the tokens. So `score` of a Llama, Qwen or GPT-2 sequence
    classifier is found, under whatever name; a layer inside the blocks never is.

    Raises:
        DataError: there is no such layer, and why: no logits (a model without its head), logits of a vocabulary (a language
            model), a head that is not linear in the final hidden state (dense, tanh, out), logits changed after the head.
        MismatchError: the layer's weights do not give its own output (a quantised layer, or one with an adapter).
    Cost: `N_PROBES` forward passes of some ten tokens.
    """
    kind = type(model).__name__
    passes = [_pass(model, ids) for ids in _probes(model)]
    called = [name for name in passes[0].linear if all(name in one.linear for one in passes)]
    writing = [name for name in called if all(_row(one, name) is not None for one in passes)]
    for name in writing:
        reads = {_reads(one, name) for one in passes}
        if len(reads) == 1 and (place := reads.pop()) is not None:
            layer = model.get_submodule(name)
            weight = layer.weight.detach().float().cpu()
            bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().cpu()
            dtype = passes[0].dtype
            labels = getattr(model.config, "id2label", None) or {}
            head = Head(weight, bias, name, place, tuple(str(labels.get(i, i)) for i in range(len(weight))), dtype)
            read = torch.stack([_candidates(one.hidden)[place] for one in passes])
            _agreeing(head, read, torch.stack([one.logits for one in passes]))  # random tokens need not differ in their logits
            return head
    if writing:
        raise DataError(
            f"the logits of this {kind} come from {writing[0]!r}, which does not read the final hidden state but something made "
            "of it (a dense layer and a tanh, for example): the reward is not linear in the features, and no v has reward v . e; "
            "use the model's scores as features instead"
        )
    raise DataError(
        f"no linear layer of this {kind} writes its logits (called after the final hidden state: {', '.join(called) or 'none'}); "
        "expected one, as `score` of a sequence classifier. Logits that are scaled or bent afterwards have no linear head; an "
        "adapter on the head is merged into it first"
    )


def check_head(head: Head, hidden: Tensor, logits: Tensor) -> Check:
    """Compare W e + b with a model's own logits; returns the figures where they agree.

    Args:
        hidden: (N, D) features of N texts.
        logits: (N, H) what the model itself gave for them.

    Raises:
        DataError: shapes that do not fit, or logits that hardly differ between the texts, with which any head would do.
        MismatchError: the head is not this model's, or the features are not what it reads; the message has the figures.
    """
    error, allowed, spread = _agreeing(head, hidden, logits)
    if bool((spread <= CLEAR * allowed).any()):
        least = int((spread - CLEAR * allowed).argmin())
        raise DataError(
            f"the {len(hidden)} texts differ by {float(spread[least]):.2g} in the model's own logit, with an error of "
            f"{float(allowed[least]):.2g} allowed; that cannot tell {head.name!r} from another head: give texts that it rates "
            "differently"
        )
    worst = int((error / allowed).argmax())
    return Check(len(hidden), float(error[worst]), float(allowed[worst]), float(spread[worst]))


def _agreeing(head: Head, hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(H,) largest error, what is allowed, and the spread of every logit. Raises as `check_head`, however little they differ."""
    if hidden.ndim != 2 or logits.shape != (len(hidden), len(head.weight)) or hidden.shape[1] != head.weight.shape[1]:
        raise DataError(
            f"a head {tuple(head.weight.shape)} was to be checked on features {tuple(hidden.shape)} and logits "
            f"{tuple(logits.shape)}; expected (H, D), (N, D) and (N, H)"
        )
    theirs = logits.detach().double().cpu()
    ours = head.apply(hidden.detach().cpu())
    if not len(theirs) or not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        raise DataError(
            f"{len(theirs)} texts to check {head.name!r} on, or features or logits not finite; expected some, all finite"
        )
    allowed = TOLERANCE.get(head.dtype, TOLERANCE[torch.bfloat16]) * theirs.abs().amax(0)  # (H,)
    spread = theirs.amax(0) - theirs.amin(0)
    error = (ours - theirs).abs().amax(0)
    worst = int((error - allowed).argmax())
    if bool((error > allowed).any()):
        raise MismatchError(
            f"{head.name!r} on these features is not what made the logits: on {len(theirs)} texts W e + b differs from them by "
            f"up to {float(error[worst]):.3g}, where {float(allowed[worst]):.2g} is allowed and the logits go from "
            f"{float(theirs[:, worst].min()):.3g} to {float(theirs[:, worst].max()):.3g}; expected the model's own head, and "
            f"features that are the final hidden state that it reads ({head.reads})"
        )
    return error, allowed, spread


def encoder_head(encoder: Encoder, texts: Sequence[Text] | None = None) -> tuple[Head, Check]:
    """The head of the model that an encoder holds, as a map from the encoder's own features, and how it was verified.

    The features are computed anew and past any cache, the logits are the model's own for the same tokens, both one text at a
    time. Of a joined encoder the head is that of the one part that has one, and 0 on the other columns.

    Args:
        texts: on which to verify; `TEXTS` by default.

    Raises:
        DataError: the encoder holds no model with a linear scalar head, and why; texts that the model rates alike.
        MismatchError: the head on the encoder's features does not give the model's logits.
    Cost: 2 forward passes a text.
    """
    if isinstance(encoder, JoinedEncoder):
        return _joined_head(encoder, texts)
    texts = list(dict.fromkeys(TEXTS if texts is None else texts))
    model, formatter = getattr(encoder, "model", None), getattr(encoder, "formatter", None)
    if model is None or formatter is None or not isinstance(encoder, BatchedEncoder):
        raise DataError(
            f"encoder {encoder.spec!r} has no scalar head, because it is no reward model; expected a sequence classifier, "
            "such as 'hf:ORG/REWARD-MODEL', without learned parts"
        )
    head = find_head(model)
    tokens = formatter(texts).ids
    pad = model.config.pad_token_id
    if pad is not None and head.reads == "last token" and all(ids[-1] == pad for ids in tokens):
        raise MismatchError(
            f"every text ends with token {pad}, which also pads: the model's own head skips it and reads the token before, and "
            "the encoder reads it; expected a checkpoint or a template in which the last token of a text does not pad"
        )
    logits = torch.stack([own_logits(model, ids) for ids in tokens])
    hidden = torch.empty(len(texts), encoder.width)
    with torch.inference_mode():
        for i, text in enumerate(texts):  # alone, as the logits: in half precision a batch moves a reward by more than the head
            (batch,) = encoder.plan([text])
            hidden[i] = batch.compute()[0].to(hidden)
    return head, check_head(head, hidden, logits)


def _joined_head(encoder: JoinedEncoder, texts: Sequence[Text] | None) -> tuple[Head, Check]:
    """The head of the one part that has one: 0 on the columns of the others, and divided by its own block's gain."""
    found: list[tuple[int, Head, Check]] = []
    reasons = []
    for i, part in enumerate(encoder.parts):
        try:
            found.append((i, *encoder_head(part, texts)))
        except DataError as error:  # a part without a head; a head that is wrong is a MismatchError, and stops here
            reasons.append(str(error))
    if len(found) != 1:
        raise DataError(
            f"{len(found)} parts of {encoder.spec!r} have a scalar head; expected one" + "".join(f"; {why}" for why in reasons)
        )
    place, head, check = found[0]
    blocks = [head.weight.new_zeros(len(head.weight), part.encode(TEXTS[:1]).shape[1]) for part in encoder.parts]
    blocks[place] = head.weight / encoder.gains[place]
    return head._replace(weight=torch.cat(blocks, dim=1)), check


# -- one forward pass, looked at from inside


class _Pass(NamedTuple):
    """What one sequence of T tokens made of a model."""

    logits: Tensor  # (H,)
    hidden: Tensor  # (T, D) final hidden states
    linear: dict[str, tuple[Tensor, Tensor]]  # what the linear layers called after them read and wrote, one row a position
    dtype: torch.dtype  # of the hidden states


def own_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """(H,) the logits that the model gives for one text of these tokens, alone and without padding.

    Raises:
        DataError: a model that gives no logits, or a vocabulary's.
    """
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([list(ids)], device=device)
    with torch.inference_mode(), _evaluating(model):
        out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    kind, logits = type(model).__name__, getattr(out, "logits", None)
    if logits is None:
        raise DataError(
            f"this {kind} has no scalar head: it gives hidden states and no logits; load the checkpoint as a sequence classifier "
            "(AutoModelForSequenceClassification)"
        )
    if logits.ndim != 2:
        raise DataError(
            f"this {kind} has no scalar head: its logits have shape {tuple(logits.shape)}, {logits.shape[-1]} of them at every "
            "token, as a language model's; expected one row a text, as a sequence classifier gives"
        )
    own: Tensor = logits[0].float().cpu()
    return own


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout inside; the model's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _probes(model: Any) -> list[list[int]]:
    """Sequences of 5 to 10 tokens drawn from the whole vocabulary, without the one that pads (classifiers look for its place)."""
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    tokens = [i for i in range(size) if i != model.config.pad_token_id]
    drawn = [torch.randint(len(tokens), (5 + i,), generator=generator).tolist() for i in range(N_PROBES)]
    return [[tokens[i] for i in row] for row in drawn]


def _pass(model: Any, ids: Sequence[int]) -> _Pass:
    """Run the model; what its linear layers do counts from the moment at which the final hidden state is known."""
    hidden: list[Tensor] = []
    linear: dict[str, tuple[Tensor, Tensor]] = {}

    def inner(module: nn.Module, given: Any, out: Any) -> None:
        final = getattr(out, "last_hidden_state", None)
        if final is not None:  # the outermost model is the last to say so, and what was called inside it is no head
            hidden[:] = [final]
            linear.clear()

    def layer(name: str, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if hidden and given:
            linear[name] = given[0].reshape(-1, given[0].shape[-1]), out.reshape(-1, out.shape[-1])

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(inner))
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(partial(layer, name)))
    try:
        logits = own_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    if not hidden:
        raise DataError(f"no part of this {type(model).__name__} gives a last_hidden_state; expected a transformers model")
    rows = {name: (given.float().cpu(), out.float().cpu()) for name, (given, out) in linear.items()}
    return _Pass(logits, hidden[0][0].float().cpu(), rows, hidden[0].dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two rows are the same numbers, but for a last bit."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().amax()))


def _row(one: _Pass, name: str) -> int | None:
    """Where the layer wrote the logits, from the end, so that the last token is -1; None where it did not."""
    out = one.linear[name][1]
    return next((i for i in range(-1, -len(out) - 1, -1) if _same(out[i], one.logits)), None)


def _candidates(hidden: Tensor) -> dict[Reads, Tensor]:
    return {"last token": hidden[-1], "first token": hidden[0], "mean of the tokens": hidden.mean(0)}


def _reads(one: _Pass, name: str) -> Reads | None:
    """Which final hidden state the layer read where it wrote the logits; None for something else."""
    row = _row(one, name)
    read = None if row is None else one.linear[name][0][row]
    return next((place for place, state in _candidates(one.hidden).items() if read is not None and _same(read, state)), None)
