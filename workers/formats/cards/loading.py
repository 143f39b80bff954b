"""Pieces of a model card's section "Load" that formats share; each format's own file composes the section."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from app.domain.format_rules import base_alone
from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from workers.formats.stored_linear import StoredLinear

FOLDER, BASE, ADAPTER = "path/to/this/folder", "path/to/the/base", "path/to/the/adapter"
SOURCE = "path/to/the/original/model"

LOAD_PLAIN = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

PLAIN = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")"""

FROM_TENSORS = """\
config = AutoConfig.from_pretrained(folder)
with torch.device("meta"):
    model_class = type(AutoModelForCausalLM.from_config(config))
model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=config.dtype)"""
"""Of `weights`, every tensor of the model by name: for a checkpoint that no stock loader reads."""

LOAD_VLLM = """\
vLLM{known}:

```sh
vllm serve {folder}
```"""

LORA = """\
To train a LoRA on it with peft, {how}:

```python
from peft import LoraConfig, get_peft_model
{load}
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
```"""

WITH_ADAPTER = """\
```python
from peft import PeftModel
{load}
model = PeftModel.from_pretrained(model, "{adapter}")
```"""

ABOUT_BASE = """\
**This is the quantized base alone.** The low-rank factors that belong to it are the `peft` checkpoint of the same job.
What the job made, and what was measured of it, is both together:"""

ABOUT_BASE_APART = """\
**This is the quantized base alone.** The {adapter} that was trained beside it is the folder `adapter` of the same job,
with a loader of its own: stock peft has no such adapters. What the job made, and what was measured of it, is both
together:"""

WITH_ADAPTER_FILE = """\
```python
import sys

sys.path.insert(0, "{adapter}")          # load_adapter.py is the file in that folder
from load_adapter import attach
{load}
attach(model, "{adapter}")
```"""

BY_ITSELF = """\
By itself, which is not what was measured:"""


@dataclass(frozen=True)
class AdapterBase:
    """The checkpoint of a job beside which its adapter is loaded.

    where    sentence that says which checkpoint it is: "The base is the `merged` checkpoint of the same job:"
    load     lines that make `model`, with plain linears, of the checkpoint at `BASE`
    served   whether vLLM loads it
    """

    where: str
    load: str
    served: bool = False


@dataclass(frozen=True)
class Loading:
    """The facts from which a format makes its section "Load".

    linears   every quantized linear by module name
    formats   all of the job's
    apart     name of the adapter that was measured with it and lies in the job's adapter file alone; None: none does
    model_id  id of the model that was quantized, if it is on the Hub
    embeddings  module name of the embeddings, if they are among the quantized linears
    base      schemes by module name -> the base of the job's adapter
    outputs   out_features of the linears, by the same names, as far as the checkpoint's tensors say
    """

    linears: Mapping[str, StoredLinear]
    formats: Collection[ExportFormat] = ()
    apart: str | None = None
    model_id: str | None = None
    base: Callable[[Mapping[str, Scheme]], AdapterBase] | None = None
    embeddings: str | None = None
    outputs: Mapping[str, int] = field(default_factory=dict)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The schemes of the linears by module name."""
        return {name: linear.scheme for name, linear in self.linears.items()}


Lines = Callable[[Loading], list[str]]
"""The paragraphs of the section."""


def python_block(*code: str) -> str:
    """A paragraph of Python."""
    return "\n".join(["```python", *code, "```"])


def model_lines(about: Loading, lines: list[str], how: str, load: str) -> list[str]:
    """The section of a checkpoint that stock runtimes load: by itself, or with the adapter that belongs to it.

    lines   paragraphs that load the checkpoint by itself, one per runtime
    how     the end of "To train a LoRA on it with peft, ...", as "it needs nothing else"
    load    code that makes `model`, with plain linears, of the checkpoint at `FOLDER`
    """
    if base_alone(about.formats):
        return [f"{ABOUT_BASE}\n\n{WITH_ADAPTER.format(load=load, adapter=ADAPTER)}", BY_ITSELF, *lines]
    if about.apart is not None:
        return [with_adapter_file(about.apart, load), BY_ITSELF, *lines]
    return [*lines, LORA.format(how=how, load=load)]


def with_adapter_file(adapter: str, load: str) -> str:
    """The paragraph that puts the job's adapter file beside the base that `load` returns."""
    lines = WITH_ADAPTER_FILE.format(load=load, adapter=ADAPTER)
    return f"{ABOUT_BASE_APART.format(adapter=adapter)}\n\n{lines}"
