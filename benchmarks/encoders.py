"""What batching and prefix sharing save: a decoder of random weights over prompts with several candidates each.

    python -m benchmarks.encoders --case decoder --prompts 40 --out DIR

The same texts are encoded one at a time, in batches by length, and in batches that compute a prompt once for all its candidates.
Ways are timed in turns, so that a machine that slows down slows all of them. Leaves `encoders.md` and prints it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palate.data.pairs import Text
from palate.encoders.huggingface import HuggingFace

WORDS = 1000  # of a made-up language: one token each, so that lengths in words are lengths in tokens
TEMPLATE = "{{ bos_token }}{% for turn in messages %}<|{{ turn['role'] }}|>{{ turn['content'] }}{{ eos_token }}{% endfor %}"


def tokenizer() -> Any:
    """One token a word, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": special[3:]})
    made.chat_template = TEMPLATE
    return made


def texts(n_prompts: int, prompt: int, answer: int, seed: int = 0) -> list[Text]:
    """`n_prompts` prompts of about `prompt` tokens with 4 to 8 answers of about `answer` tokens (each within a quarter)."""
    rng = np.random.default_rng(seed)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(WORDS, size=rng.integers(n - n // 4, n + n // 4 + 1)))

    return [Text(asked, words(answer)) for asked in (words(prompt) for _ in range(n_prompts)) for _ in range(rng.integers(4, 9))]


def decoder(layers: int, width: int) -> Any:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 5,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=4096,
    )
    return LlamaModel(config)


def rows(encoder: HuggingFace, asked: Sequence[Text]) -> Tensor:
    """(N, D) features."""
    return encoder.encode(asked).rows(torch.arange(len(asked)))


def timed(ways: dict[str, Callable[[], Tensor]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of every way, in turns, and what each one gave."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            found[name] = way()
            seconds[name].append(time.perf_counter() - began)
    return seconds, found


def case_decoder(given: argparse.Namespace) -> list[str]:
    """Lines of Markdown: medians, ratios and the largest difference between features."""
    asked = texts(given.prompts, given.prompt_tokens, given.answer_tokens)
    model, words = decoder(given.layers, given.width), tokenizer()
    whole = HuggingFace.from_model(model, words, share_prefix=False)
    sharing = HuggingFace.from_model(model, words)
    ways: dict[str, Callable[[], Tensor]] = {
        "one text at a time": lambda: torch.cat([rows(whole, [text]) for text in asked]),
        "batches by length": lambda: rows(whole, asked),
        "prompts computed once": lambda: rows(sharing, asked),
    }
    rows(sharing, asked[:8])  # the first pass pays for setting up
    seconds, found = timed(ways, given.repeats)
    if sharing.not_shared is not None:
        raise RuntimeError(f"prompts were not shared: {sharing.not_shared}")
    tokens = sum(map(len, sharing.tokens(asked)))
    single = found["one text at a time"]
    scale = float(single.abs().max())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        "# Encoders",
        "",
        f"Decoder of {given.layers} layers, width {given.width}, random weights, float32, {torch.get_num_threads()} threads; "
        f"{given.prompts} prompts of about {given.prompt_tokens} tokens, {len(asked)} answers of about {given.answer_tokens}, "
        f"{tokens} tokens in all; medians of {given.repeats}.",
        "",
        "| way | seconds (all runs) | texts/s | against one at a time | against batches | largest difference |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, median in medians.items():
        runs = ", ".join(f"{value:.1f}" for value in seconds[name])
        lines.append(
            f"| {name} | {median:.1f} ({runs}) | {len(asked) / median:.1f} | {medians['one text at a time'] / median:.2f}x | "
            f"{medians['batches by length'] / median:.2f}x | {float((found[name] - single).abs().max()) / scale:.1e} |"
        )
    return lines


CASES = {"decoder": case_decoder}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a case and write its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoders", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=sorted(CASES), default="decoder")
    parser.add_argument("--prompts", type=int, default=40, help="number of prompts, with 4 to 8 answers each")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the result")
    given = parser.parse_args(arguments)
    text = "\n".join(CASES[given.case](given)) + "\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "encoders.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
