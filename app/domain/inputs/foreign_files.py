"""Models in files that are no checkpoint of this service: what they are, by their names, and the way out of each.

What is looked for is `config.json` with `model.safetensors`, or with shards and their index; or one GGUF file. A
folder, an upload and a repository are judged alike, and nothing is opened.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from bitwright.errors import InputError, UnsafeCheckpoint, UnsupportedCheckpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of weights that run code when they are loaded."""
SAVE = "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"


@dataclass(frozen=True)
class ForeignFiles:
    """A kind of foreign files, with one of them, and what to give instead."""

    what: str
    file: str
    hint: str
    pickled: bool = False

    def refusal(self, field: str) -> InputError:
        """The error of whoever was to read a checkpoint."""
        kind = UnsafeCheckpoint if self.pickled else UnsupportedCheckpoint
        return kind(f"this is {self.what} ({self.file})", field=field, value=self.file, hint=self.hint)


ADAPTER = ForeignFiles(
    "a PEFT adapter, not a model",
    "adapter_config.json",
    "give its base model (base_model_name_or_path of that file); or merge the two and give the result: "
    "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)",
)
PIPELINE = ForeignFiles(
    "a diffusers pipeline, not a language model",
    "model_index.json",
    "give a causal language model: config.json with safetensors in one folder",
)
GGUF_SUFFIX, PROJECTOR = ".gguf", "mmproj"
SEVERAL_GGUF = (
    "give a folder or an upload with the one file that is to be read, of the most bits (BF16, F16 or Q8_0), merged by "
    "llama-gguf-split where it is in parts, and no vision tower without it; or the model that it was made from, as "
    "safetensors"
)
BY_SUFFIX = (
    ((GGUF_SUFFIX,), "a collection of GGUF files, in which none alone is the model", SEVERAL_GGUF),
    (
        (".ggml",),
        "a file of llama.cpp's older format",
        "give the model that it was made from, as safetensors",
    ),
    ((".onnx",), "an ONNX export", "give the PyTorch model that it was exported from, as safetensors"),
    ((".npz",), "a model in MLX's old format", f"give the model that it was converted from, as safetensors ({SAVE})"),
    (
        (".h5", ".msgpack", ".tflite"),
        "a TensorFlow or Flax checkpoint",
        "give the PyTorch weights of the model, as safetensors: transformers before 5 converts with from_tf=True or "
        "from_flax=True",
    ),
    ((".nemo",), "a NeMo archive", "convert it to the transformers layout first, with safetensors"),
    ((".engine", ".plan"), "a TensorRT engine", "give the model that it was built from, as safetensors"),
    ((".mlmodel", ".mlpackage"), "a Core ML model", "give the model that it was converted from, as safetensors"),
    ((".xml",), "an OpenVINO model", "give the model that it was exported from, as safetensors"),
)
"""Suffixes -> what such a file is, and the way out; the first that fits."""
CONSOLIDATED_HINT = (
    "give the repository's other files, config.json with model*.safetensors; or convert them: transformers has "
    "convert_mistral_weights_to_hf.py and convert_llama_weights_to_hf.py"
)


def foreign_files(names: Collection[str]) -> ForeignFiles | None:
    """The files that are here in place of a checkpoint; None if the weights of one are here, or nothing that is known.

    names   of all files, with `/` between folders
    """
    leaves = {PurePosixPath(name).name: name for name in sorted(names, reverse=True)}
    if SINGLE in names or INDEX in names or gguf_file(names) is not None:
        return None
    for known in (ADAPTER, PIPELINE):
        if known.file in leaves:
            return known
    consolidated = sorted(leaf for leaf in leaves if leaf.startswith("consolidated"))
    if consolidated:
        pickled = not consolidated[0].endswith((".safetensors", ".json"))
        what = "a checkpoint in its makers' own layout, without transformers' config.json and names"
        return ForeignFiles(what, consolidated[0], CONSOLIDATED_HINT, pickled)
    for suffixes, what, hint in BY_SUFFIX:
        matching = sorted(leaf for leaf in leaves if leaf.lower().endswith(suffixes))
        if matching:
            return ForeignFiles(what, matching[0], hint)
    return _weights_only(leaves)


def gguf_file(names: Collection[str]) -> str | None:
    """The GGUF file that is the model, if there is one and no other checkpoint; a vision tower's is beside it.

    names   of all files, with `/` between folders
    """
    if SINGLE in names or INDEX in names or ADAPTER.file in names or PIPELINE.file in names:
        return None
    found = [name for name in names if name.lower().endswith(GGUF_SUFFIX) and PROJECTOR not in name.lower()]
    return found[0] if len(found) == 1 and "/" not in found[0] else None


def _weights_only(leaves: Collection[str]) -> ForeignFiles | None:
    pickled = sorted(leaf for leaf in leaves if leaf.lower().endswith(PICKLED) and not leaf.endswith("args.bin"))
    other = sorted(leaf for leaf in leaves if leaf.endswith(".safetensors"))
    if SINGLE in other or INDEX in leaves:
        hint = "the checkpoint lies in a folder of its own there: give that folder's files"
        return ForeignFiles("a collection with its checkpoint in another folder", other[0], hint)
    if other:
        hint = f"name the file {SINGLE}; several need {INDEX}, which save_pretrained writes"
        return ForeignFiles(f"a folder whose safetensors are neither {SINGLE} nor listed by {INDEX}", other[0], hint)
    if pickled:
        what = "a checkpoint of pickled weights alone, which run code when they are loaded and are never opened"
        return ForeignFiles(what, pickled[0], f"save it as safetensors, where you trust it: {SAVE}", pickled=True)
    return None
