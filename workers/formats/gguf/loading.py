"""The section "Load" of a GGUF file's card, by the way transformers reads the file."""

from collections.abc import Mapping

from app.domain.format_rules import base_alone
from workers.formats.cards.loading import (
    ABOUT_BASE,
    ADAPTER,
    BASE,
    BY_ITSELF,
    FOLDER,
    SOURCE,
    WITH_ADAPTER,
    Loading,
    with_adapter_file,
)
from workers.formats.gguf.read_back import Reading
from workers.formats.native import NATIVE_BASE
from workers.formats.stored_linear import StoredLinear

LOAD_LLAMA_CPP = """\
llama.cpp, and what is built on it:

```sh
llama-cli -m {folder}/model.gguf
```"""

LOAD_GGUF = """\
transformers makes an ordinary floating-point model of it (and needs `pip install gguf`), in float32 unless a dtype is
given:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

model = AutoModelForCausalLM.from_pretrained(
    "{folder}", gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype="{dtype}"
)
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
```"""

ABOUT_GGUF_IN_TRANSFORMERS = """\
Not with transformers: 5.23 makes another model of this file, without an error. Of the original {what}. Ask for the
format `merged` to load it there."""

ABOUT_GGUF_UNTRIED = """\
transformers 5.23 is not known to make the same model of this file: ask for the format `merged` to load it there."""

ABOUT_GGUF_TOWER = """\
The file is the language model alone. llama.cpp sees images through a second file, the mmproj, which its own converter
makes of the original model: `python convert_hf_to_gguf.py --mmproj` and the model's folder."""

ABOUT_GGUF_TOKENIZER = """\
transformers 5.23 would make another tokenizer of this file: take the original model's, as the lines do."""

ABOUT_IMPORTANCE = """\
`model.imatrix` beside it is the importance matrix of the calibration text, of the original model. llama.cpp's quantizer
reads it with `llama-quantize --imatrix model.imatrix`, to make other types of the original as a GGUF file."""

NO_IMPORTANCE = """\
There is no importance matrix beside it (`model.imatrix`): {why}."""

ABOUT_GGUF_BASE = """\
llama.cpp's `convert_lora_to_gguf.py` converts the `peft` checkpoint, which `llama-cli --lora` then adds."""

ABOUT_GGUF_APART = """\
llama.cpp has no adapters of this kind."""


def loading(
    about: Loading, reading: Reading | None = None, *, tower: bool = False, importance: str | None = None
) -> list[str]:
    """The card's section "Load".

    reading   the model that transformers loads; the same one if not given
    tower     whether the original has a vision tower, which is not in the file
    importance  paragraph on the importance matrix; none if not given
    """
    more = [] if importance is None else [importance]
    lines = [LOAD_LLAMA_CPP.format(folder=FOLDER), *([ABOUT_GGUF_TOWER] if tower else [])]
    return [*_with_adapter(about), *lines, *_in_transformers(about.linears, reading or Reading()), *more]


def _in_transformers(linears: Mapping[str, StoredLinear], reading: Reading) -> list[str]:
    """The lines for transformers, if it loads the model that the file holds."""
    if reading.untried:
        return [ABOUT_GGUF_UNTRIED]
    if reading.other_model:
        return [ABOUT_GGUF_IN_TRANSFORMERS.format(what="; ".join(reading.other_model))]
    dtype = min({linear.dtype for linear in linears.values()}, default="float32")
    tokenizer = f'"{SOURCE}"' if reading.other_tokens else f'"{FOLDER}", gguf_file="model.gguf"'
    lines = LOAD_GGUF.format(folder=FOLDER, dtype=dtype, tokenizer=tokenizer)
    return [lines, *([ABOUT_GGUF_TOKENIZER] if reading.other_tokens else [])]


def _with_adapter(about: Loading) -> list[str]:
    """Paragraphs on the adapter of a file that holds the base alone; none if it holds all."""
    load = NATIVE_BASE.format(folder=BASE)
    if base_alone(about.formats):
        lines = WITH_ADAPTER.format(load=load, adapter=ADAPTER)
        return [f"{ABOUT_BASE}\n\n{lines}", ABOUT_GGUF_BASE, BY_ITSELF]
    if about.apart is not None:
        return [with_adapter_file(about.apart, load), ABOUT_GGUF_APART, BY_ITSELF]
    return []
