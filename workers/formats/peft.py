"""The `peft` format: the low-rank corrections of all linears as one LoRA adapter, which stock peft loads.

    adapter_config.json             targets, rank and alpha; by patterns where linears differ
    adapter_model.safetensors       base_model.model.<name>.lora_A.weight (rank, in), .lora_B.weight (out, rank)

peft computes y = x W^T + (alpha / rank) * (x A^T) B^T, where W is the dequantized base: the weights of the `merged` or
`compressed-tensors` checkpoint of the same job, or of `native` without its corrections. A and B are stored as the
method returns them, with alpha's factor taken out (`LowRank.of_product`), so that the correction acts at full strength
for every alpha and rank, and training goes on from exactly this point.

The configuration names the model that was quantized, where that is on the Hub, since the Hub and peft look an adapter's
base up by its id. The original weights are not the base that was measured: the card says which checkpoint is.
"""

import json
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from re import escape
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from app.domain.formats import ExportFormat
from bitwright.errors import FormatCannotHold, InternalError
from bitwright.report import Report
from workers.contracts.kv_cache import KVScales
from workers.formats.cards.identity import Identity
from workers.formats.cards.loading import BASE, FOLDER, WITH_ADAPTER, Loading
from workers.formats.cards.model_card import describe
from workers.formats.cards.vllm import vllm_rows
from workers.formats.format import Format, Opening
from workers.formats.shards import write_json
from workers.formats.source_files import LICENCES, copy_files
from workers.formats.stored_linear import StoredLinear, StoredLowRank, StoredPart
from workers.numerics.quantized import LinearResult, LowRank

ABOUT_ADAPTER = """\
With `is_trainable=True` training goes on from the point that was measured. The adapter belongs to the quantized base,
not to the original model, on which it would load without an error and be wrong."""

ABOUT_NAMED_BASE = """\
`base_model_name_or_path` in `adapter_config.json` names `{model}`, the model that was quantized, because the Hub and
peft look an adapter's base up by that. What takes it from there without asking, such as `AutoPeftModelForCausalLM`,
loads the original weights, which is not what was measured."""

SERVE_ADAPTER = """\
vLLM serves both as its model `adapter`, {known}:

```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={adapter}
```"""

ABOUT_SWAPPING = """\
The strength (alpha / rank) differs between linears of this adapter. Load it by itself, with `PeftModel.from_pretrained`
or `load_adapter`: peft's `hotswap_adapter` does not read the patterns that say so, and gives every linear one strength
without an error."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM 0.32 and 0.33 take as `--max-lora-rank`."""

LORA_PATTERNS = "0.32.0"
"""The first vLLM that reads `rank_pattern` and `alpha_pattern` of an adapter; before, it scales all linears alike."""


def compress(name: str, low_rank: LowRank) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, a module name."""
    prefix = f"base_model.model.{name}"
    return {f"{prefix}.lora_A.weight": low_rank.a, f"{prefix}.lora_B.weight": low_rank.b}


def decompress(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    """The exact inverse of `compress`, with the fields that `config` wrote."""
    a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    return LowRank(a, b, config["alpha_pattern"].get(escape(name), config["lora_alpha"]))


def config(adapted: Mapping[str, StoredLowRank], others: Collection[str]) -> dict[str, object]:
    """The content of adapter_config.json.

    adapted   each linear with a correction, by module name
    others    module names of the model's other linears
    """
    usual = Counter(adapted.values()).most_common(1)[0][0]
    # peft matches patterns as regular expressions at the end of a module's name.
    differing = {escape(name): low_rank for name, low_rank in adapted.items() if low_rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": targets(adapted, others),
        "r": usual.rank,
        "lora_alpha": usual.alpha,
        "rank_pattern": {name: low_rank.rank for name, low_rank in differing.items()},
        "alpha_pattern": {name: low_rank.alpha for name, low_rank in differing.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def targets(adapted: Collection[str], others: Collection[str]) -> list[str]:
    """Last names, as people and runtimes expect, where they name exactly the adapted linears; else full names."""
    last = {name.rpartition(".")[2] for name in adapted}
    unambiguous = last.isdisjoint(name.rpartition(".")[2] for name in others)
    return sorted(last if unambiguous else adapted)


def loading(about: Loading) -> list[str]:
    """The card's section "Load"."""
    if about.base is None:
        raise InternalError("an adapter's card needs the base of the job")
    base = about.base(about.schemes)
    named = [ABOUT_NAMED_BASE.format(model=about.model_id)] if about.model_id else []
    factors = [one.low_rank for one in about.linears.values() if one.low_rank is not None]
    known, rank = _served_with(factors)
    serve = SERVE_ADAPTER.format(base=BASE, adapter=FOLDER, rank=rank, known=known)
    return [
        f"{base.where}\n\n{WITH_ADAPTER.format(load=base.load, adapter=FOLDER)}",
        ABOUT_ADAPTER,
        *([ABOUT_SWAPPING] if len({one.alpha / one.rank for one in factors}) > 1 else []),
        *named,
        *([serve] if base.served and rank is not None else []),
    ]


def _served_with(factors: Collection[StoredLowRank]) -> tuple[str, int | None]:
    """Evidence that vLLM serves an adapter with these factors, and its `--max-lora-rank`; None if it does not."""
    largest = max((one.rank for one in factors), default=0)
    rank = next((allowed for allowed in LORA_RANKS if largest <= allowed), None)
    patterns = f", {LORA_PATTERNS} or newer, for ranks or strengths differ" if len(set(factors)) > 1 else ""
    return vllm_rows(ExportFormat.PEFT)[0].known() + patterns, rank


class AdapterWriter:
    """One adapter folder. Factors are held until `finish`: peft reads one file."""

    def __init__(self, folder: Path, opening: Opening) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._opening = folder, opening
        self._tensors: dict[str, Tensor] = {}
        self._linears: dict[str, StoredLinear] = {}

    def add_linear(
        self, name: str, result: LinearResult, *, module: str | None = None, part: StoredPart | None = None
    ) -> None:
        """Keep a linear's correction, if it has one; `module` is its name in the transformers model, if another."""
        del part
        module = module or name
        self._linears[module] = StoredLinear.of(result)
        if result.low_rank is not None:
            self._tensors |= {key: t.cpu().contiguous() for key, t in compress(module, result.low_rank).items()}

    def add_kv_scales(self, attention: str, scales: KVScales) -> None:
        """Does nothing: they belong to the base."""

    def add_part(self, name: str, tensor: Tensor, part: StoredPart) -> None:
        """Does nothing: it belongs to the base."""

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Does nothing: other tensors that quantization changed belong to the base."""

    def finish(self, *, ignored: Collection[str] = ()) -> None:
        """Write the adapter; `ignored` are the module names of linears that were not quantized.

        Raises:
            FormatCannotHold: no linear has a correction.
        """
        adapted = {name: linear.low_rank for name, linear in self._linears.items() if linear.low_rank is not None}
        if not adapted:
            hint = "leave peft out of formats, or take a method that makes factors, or finetune a lora"
            detail = "the result has no low-rank factors, and peft holds nothing else"
            raise FormatCannotHold(detail, field="formats", hint=hint)
        others = {*ignored, *self._linears} - adapted.keys()
        write_json(self._folder / "adapter_config.json", config(adapted, others))
        save_file(self._tensors, self._folder / "adapter_model.safetensors", metadata={"format": "pt"})
        copy_files(self._opening.source.folder, self._folder, LICENCES)

    @property
    def warnings(self) -> Mapping[str, str]:
        """No warnings: nothing is rounded here."""
        return {}

    def describe(self, report: Report) -> list[Path]:
        """Name the base, and add the report and the model card, after `finish`; all files of the folder."""
        identity, file = Identity.of(report), self._folder / "adapter_config.json"
        base = {"base_model_name_or_path": identity.model_id, "revision": identity.revision}
        if identity.model_id is not None:
            write_json(file, json.loads(file.read_bytes()) | base)
        return describe(self._folder, report, self._linears, self._opening, loading)


FORMAT = Format(AdapterWriter, loading)
