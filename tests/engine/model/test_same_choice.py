"""Agreement with transformers on the files of a folder: the same are read, or the folder is refused by both names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.inputs.foreign_files import INDEX, SINGLE
from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from bitwright.errors import CorruptCheckpoint
from tests.engine.conftest import run_job
from tests.engine.model.random_models import LENGTH, VOCABULARY, random_model, save_random_model
from tests.engine.ships.gguf_models import LLAMA_3, save_model, save_tokenizer
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.meta_model import configuration, empty_model, model_dtype
from workers.engine.model.names import Names
from workers.engine.text.sequences import load_tokenizer

IDS = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
Change = Callable[[Path], None]


def sharded(folder: Path) -> Path:
    save_random_model(folder, "qwen3", max_shard_size="20KB")
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in (config | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def single_beside_an_index(folder: Path) -> None:
    random_model("qwen3", seed=1).save_pretrained(folder.parent / "other")
    shutil.copyfile(folder.parent / "other" / SINGLE, folder / SINGLE)


def single_beside_an_index_of_nothing(folder: Path) -> None:
    single_beside_an_index(folder)
    for file in shards(folder):
        file.unlink()


def other_values_in_a_later_file(folder: Path) -> None:
    first, *_, last = shards(folder)
    found = load_file(first)
    save_file(load_file(last) | {name: tensor * 3 for name, tensor in found.items()}, last)


def other_values_in_an_earlier_file(folder: Path) -> None:
    first, *_, last = shards(folder)
    found = load_file(last)
    save_file(load_file(first) | {name: tensor * 3 for name, tensor in found.items()}, first)


def not_listed(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].pop(next(iter(index["weight_map"]))))


def listed_in_another_file(folder: Path) -> None:
    def swap(index: dict[str, dict[str, object]]) -> None:
        names = list(index["weight_map"])
        index["weight_map"][names[0]] = index["weight_map"][names[-1]]

    edit_index(folder, swap)


def a_file_that_the_index_does_not_name(folder: Path) -> None:
    found = load_file(shards(folder)[-1])
    save_file({name: tensor * 3 for name, tensor in found.items()}, folder / "model-99999-of-00001.safetensors")


def pickled_beside(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")


def a_variant_beside(folder: Path) -> None:
    save_file({"w": torch.zeros(1)}, folder / "model.fp16.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        single_beside_an_index,
        single_beside_an_index_of_nothing,
        other_values_in_a_later_file,
        other_values_in_an_earlier_file,
        not_listed,
        listed_in_another_file,
        a_file_that_the_index_does_not_name,
        pickled_beside,
        a_variant_beside,
    ],
)
def test_the_same_tensors_as_transformers_are_read(change: Change, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    change(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    ours = empty_model(configuration(checkpoint), torch.float32, torch.device("cpu"))
    names = Names.of(ours, checkpoint, "model.layers")
    state = {name: names.read(name) for name in names.parameters}
    assert state.keys() == dict(theirs.named_parameters()).keys()
    for name, tensor in theirs.named_parameters():
        assert torch.equal(state[name], tensor), name
    found = inspect_checkpoint(FolderFiles(folder))
    assert found.weights == sum(tensor.numel() for tensor in state.values())


def an_adapter_in_it(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(folder.parent / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(folder.parent / "adapter" / name, folder / name)


def weights_of_another_name(folder: Path) -> None:
    random_model("qwen3", seed=1).save_pretrained(folder.parent / "other")
    shutil.copyfile(folder.parent / "other" / SINGLE, folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("change", "words"), [(an_adapter_in_it, "adapter_config.json"), (weights_of_another_name, "other.safetensors")]
)
def test_where_transformers_loads_something_else_both_are_named(change: Change, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_random_model(folder, "qwen3")
    plain = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    change(folder)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, plain), "nothing to refuse"
    for read in (Checkpoint.open, lambda place: inspect_checkpoint(FolderFiles(place))):
        with pytest.raises(CorruptCheckpoint, match=words) as refused:
            read(folder)
        assert SINGLE in refused.value.detail
        assert refused.value.hint


def test_a_distributed_checkpoint_beside_the_weights_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path, "qwen3")
    shutil.copyfile(tmp_path / SINGLE, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(CorruptCheckpoint, match="shard-00001-model-00001-of-00001"):
        Checkpoint.open(tmp_path)


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path, "qwen3")
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(found | {"norm.weight": found["model.norm.weight"] * 3}, tmp_path / SINGLE)
    checkpoint = Checkpoint.open(tmp_path)
    model = empty_model(configuration(checkpoint), torch.float32, torch.device("cpu"))
    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight and norm\.weight|norm\.weight and model"):
        Names.of(model, checkpoint, "model.layers")


def by_the_configuration(folder: Path) -> None:
    edit_config(folder, dtype="bfloat16")


def by_the_index(folder: Path) -> None:
    edit_config(folder, dtype=None)
    edit_index(folder, lambda index: index["metadata"].update(dtype="float16"))


def by_the_first_name_of_the_first_file(folder: Path) -> None:
    edit_config(folder, dtype=None)
    first, *_ = shards(folder)
    found = load_file(first)
    names = sorted(found)
    save_file(
        {name: tensor.to(torch.bfloat16 if name == names[0] else torch.float32) for name, tensor in found.items()},
        first,
    )


@pytest.mark.parametrize("change", [by_the_configuration, by_the_index, by_the_first_name_of_the_first_file])
def test_the_dtype_is_the_one_that_transformers_takes(change: Change, tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    change(folder)
    checkpoint = Checkpoint.open(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder).dtype
    assert expected is not torch.float32
    assert model_dtype(configuration(checkpoint), checkpoint) is expected


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_dtype_that_there_is_not_is_named_where_transformers_refuses_it(field: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    for other in ("dtype", "torch_dtype"):
        fields.pop(other, None)
    (folder / "config.json").write_text(json.dumps({**fields, field: "auto"}))
    with pytest.raises(AttributeError):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CorruptCheckpoint) as caught:
        configuration(Checkpoint.open(folder))
    assert f"{field} is 'auto', and torch has no dtype of that name" in str(caught.value)


def test_texts_are_split_as_transformers_splits_them_whatever_the_file_says(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen2")
    save_tokenizer(source, LLAMA_3)
    text = "In 1234567 years, cafe\u0301"
    expected = AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    says = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    assert expected != says, "Qwen2Tokenizer has rules of its own"
    assert load_tokenizer(source)(text)["input_ids"] == expected
    result = run_job(source, tmp_path, formats=["merged", "native"])
    for place in result.checkpoints.values():
        assert AutoTokenizer.from_pretrained(tmp_path / place)(text)["input_ids"] == expected
