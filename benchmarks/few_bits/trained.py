"""A small Llama in bf16 that was never quantized, trained on rows of text: findings on SmolLM2 are held against it.

    python -m benchmarks.few_bits.trained FOLDER --text tuning/*.jsonl --steps 2000
    python -m benchmarks.end_to_end FOLDER --length 256 --judged-length 256 ...

SmolLM2's weights come from a 4-bit file here. This is the model of `benchmarks.gguf`, whose rows groups of 64 divide;
it knows sequences of 256 tokens, no longer ones.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.few_bits.texts import mixed
from benchmarks.gguf.trained import write_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=4096)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"steps": given.steps, "blocks": given.blocks, "batch": given.batch, "vocabulary": given.vocabulary}
    loss = write_trained(given.folder, "\n\n".join(mixed(given.text)), device=device, seed=0, **sizes)
    print(f"loss of the last steps {loss:.3f} nats a token")


if __name__ == "__main__":
    main()
