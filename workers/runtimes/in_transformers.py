"""A checkpoint in transformers, and an adapter in peft: loaded by their stock calls, as the model card says.

A folder with the one-file loader is loaded by that, since stock calls do not; a folder with a GGUF file by
`gguf_file`. Tensors that are missing and would be filled at random are a problem, which transformers only warns of.
"""

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from workers.runtimes.order import ReadAnswer, ReadOrder

LOADER = "load_bitwright.py"
NAMES_SHOWN = 3


def read(order: ReadOrder) -> ReadAnswer:
    """The answer to an order; whatever transformers or peft raises goes through."""
    runtime = order.runtime
    folder = Path(order.base or order.folder)
    problem = "" if order.text is None else tokenizer_problem(folder, order.text, order.ids)
    if problem:
        return ReadAnswer(version=version(runtime), problem=problem)
    model, lacking = load(folder, unpacked=order.base is not None)
    if lacking:
        return ReadAnswer(version=version(runtime), problem=lacking)
    if order.base is not None:
        from peft import PeftModel  # noqa: PLC0415

        model = PeftModel.from_pretrained(model, order.folder)
    model.eval()
    logits, written = compute(model, torch.tensor([order.ids]), order.tokens)
    logits.numpy().tofile(order.logits)
    return ReadAnswer(version=version(runtime), vocabulary=logits.shape[1], written=tuple(written))


def tokenizer_problem(folder: Path, text: str, ids: tuple[int, ...]) -> str:
    """The fault of a folder's tokenizer, which must turn the text into these ids; empty: there is none."""
    gguf = _gguf(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **({} if gguf is None else {"gguf_file": gguf}))
    made = tokenizer(text)["input_ids"]
    if list(made) != list(ids):
        return f"the checkpoint's tokenizer makes {made[:8]} of a text that is {list(ids[:8])}"
    return ""


def load(folder: Path, *, unpacked: bool = False) -> tuple[PreTrainedModel, str]:
    """The model as stock calls load it, in the dtype of its files; and what it lacks, in words.

    unpacked   whether packed linears become ordinary ones, which an adapter is added to
    """
    gguf = _gguf(folder)
    given: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    if (folder / LOADER).is_file():
        # The same file as the checkpoint's own, which is a program and is not run from there.
        from workers.formats.load_bitwright import load as load_dequantized  # noqa: PLC0415

        model, info = load_dequantized(folder, output_loading_info=True), {}
        if isinstance(model, tuple):
            model, info = model
    else:
        model, info = _model_class(folder, given).from_pretrained(
            folder, dtype="auto", output_loading_info=True, **given
        )
        if unpacked and "quantization_config" in vars(model.config):
            # Not while loading: transformers then reads every linear by the first group's scheme.
            model.hf_quantizer.compressor.decompress_model(model)
    lacking = sorted(info.get("missing_keys", ()))
    misfits = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys", ()))
    if lacking:
        return model, f"{len(lacking)} tensors are missing: {', '.join(lacking[:NAMES_SHOWN])}"
    if misfits:
        return model, f"{len(misfits)} tensors have other shapes than the model: {', '.join(misfits[:NAMES_SHOWN])}"
    return model, ""


@torch.no_grad()
def compute(model: PreTrainedModel, ids: Tensor, tokens: int) -> tuple[Tensor, list[int]]:
    """Logits after each of `ids` (1, length), fp32 (length, vocabulary), and the tokens written after them.

    Where a checkpoint rounds activations, tokens are written with them rounded; logits are those of its weights alone,
    in which a misreading shows: four bits of activations would hide it.
    """
    written = list[int]()
    mask = torch.ones_like(ids)
    if tokens:
        kept = {"pad_token_id": 0, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        written = model.generate(input_ids=ids, attention_mask=mask, **kept)[0, ids.shape[1] :].tolist()
    else:
        model(input_ids=ids, use_cache=False)
    if "quantization_config" in vars(model.config):
        with suppress(ImportError):
            from compressed_tensors.quantization import disable_quantization  # noqa: PLC0415

            model.apply(disable_quantization)
    # No cache: a model of one layer that keeps no keys has none that counts tokens.
    return model(input_ids=ids, use_cache=False).logits[0].float().contiguous(), written


def _model_class(folder: Path, given: dict[str, Any]) -> Any:
    """The class that the configuration names, else the one of causal language models."""
    config = AutoConfig.from_pretrained(folder, **given)
    named: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
    return named if is_model and isinstance(config, named.config_class) else AutoModelForCausalLM


def _gguf(folder: Path) -> str | None:
    """Name of the GGUF file of a folder that has one."""
    return next((file.name for file in sorted(folder.glob("*.gguf"))), None)
