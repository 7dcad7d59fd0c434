"""What share of a card's matrix rate an encoder reaches: a Llama-3.1-8B-shaped model of random weights in bfloat16.

    python -m benchmarks.gpu_encoder --out DIR        # on a CUDA card of 24 GB or more
    python -m benchmarks.gpu_encoder --tiny           # the same script on a processor, to see that it runs

Three figures: the rate of one large bfloat16 product of matrices, measured on the card at hand and not taken from a data sheet;
tokens a second of the encoder with every text computed whole; and with prompts computed once for all their candidates. A forward
pass costs 2 floating-point operations a weight of the layers and token, and in every layer 4 n x width in the attention of the
n-th token; embeddings are looked up and cost none. Leaves `gpu_encoder.md` and prints it.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.encoders import WORDS, texts, tokenizer
from palate.data.pairs import Text
from palate.encoders.huggingface import HuggingFace

LLAMA_8B = {  # of the published config.json; only the vocabulary is our own
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = LLAMA_8B | {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2}


def model(shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A Llama of that shape, whose weights are drawn where they are used."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaModel(LlamaConfig(vocab_size=WORDS + 5, **shape)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def wait(device: str) -> None:
    """Until what was started on the card is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, after one that is not counted."""
    out = []
    for _ in range(repeats + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        out.append(time.perf_counter() - began)
    return out[1:]


def matmul_rate(n: int, device: str, dtype: torch.dtype) -> float:
    """Operations a second of (n, n) x (n, n): the best of 20 after warming up."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device, 20))


def operations(encoder: HuggingFace, asked: Sequence[Text]) -> tuple[int, float]:
    """Tokens of `asked`, and operations of running every one of them whole."""
    config = encoder.model.config
    lengths = [len(ids) for ids in encoder.tokens(asked)]
    weights = sum(p.numel() for name, p in encoder.model.named_parameters() if "embed" not in name)
    width = config.num_attention_heads * config.head_dim
    attention = sum(2 * n * (n + 1) * width for n in lengths) * config.num_hidden_layers  # scores and values, lower triangle
    return sum(lengths), 2.0 * weights * sum(lengths) + attention


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_encoder", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the processor, to try the script")
    parser.add_argument("--prompts", type=int, default=40, help="number of prompts, with 4 to 8 answers each")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--tokens-per-batch", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the result")
    given = parser.parse_args(arguments)
    if not given.tiny and not torch.cuda.is_available():
        sys.exit("there is no CUDA card here, so nothing was measured; --tiny tries the script on the processor")
    device = "cpu" if given.tiny else "cuda"
    name = platform.machine() if given.tiny else torch.cuda.get_device_name()
    n_prompts, size = (min(given.prompts, 4), 256) if given.tiny else (given.prompts, 8192)
    asked = texts(n_prompts, given.prompt_tokens, given.answer_tokens)
    made = model(TINY if given.tiny else LLAMA_8B, device, torch.bfloat16)
    words = tokenizer()
    budget = given.tokens_per_batch
    whole = HuggingFace.from_model(made, words, share_prefix=False, tokens_per_batch=budget)
    sharing = HuggingFace.from_model(made, words, tokens_per_batch=budget)
    tokens, work = operations(whole, asked)
    rate = matmul_rate(size, device, torch.bfloat16)
    lines = [
        "# Encoder on a card" if not given.tiny else "# Encoder on a card: a trial on the processor, no result",
        "",
        f"{name}, torch {torch.__version__}; {sum(p.numel() for p in made.parameters()) / 1e9:.2f} billion weights in bfloat16; "
        f"{n_prompts} prompts, {len(asked)} texts, {tokens} tokens; at most {budget} tokens a batch. "
        f"A product of {size} x {size} matrices runs at {rate / 1e12:.3g} Tflop/s.",
        "",
        "| way | seconds (median of all runs) | tokens/s | Tflop/s | share of the matrix rate |",
        "|---|---|---:|---:|---:|",
    ]
    for label, encoder in (("every text whole", whole), ("prompts computed once", sharing)):
        runs = seconds(lambda chosen=encoder: chosen.encode(asked), device, given.repeats)
        median = statistics.median(runs)
        share = f"{work / median / 1e12:.3g} | {work / median / rate:.0%}"
        if encoder is sharing:  # it does less work for the same tokens, so that a share would flatter it
            share = f"- | - ({sharing.not_shared or 'fewer operations'})"
        lines.append(f"| {label} | {median:.2f} ({', '.join(f'{run:.2f}' for run in runs)}) | {tokens / median:.0f} | {share} |")
    text = "\n".join(lines) + "\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu_encoder.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
