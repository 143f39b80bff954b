"""Names both ways: file -> model -> file is the same in names and bytes, and a wrong turn is seen."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitwright.errors import BitwrightError, CorruptCheckpoint
from tests.engine.model.families import EXPERTS, FAMILIES, save_small_model, small_model
from workers.engine.model import conversions
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.conversions import Slice
from workers.engine.model.names import Names

FUSED = "model.layers.1.mlp.experts"
pytestmark = pytest.mark.filterwarnings("ignore")


def names_of(folder: Path) -> Names:
    """The names of a checkpoint's model, built without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return Names.of(model, Checkpoint.open(folder), layers_of(model))


def layers_of(model: PreTrainedModel) -> str:
    count = int(model.config.get_text_config().num_hidden_layers)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: str = next(name for name, module in lists.items() if len(module) == count)
    return found


def written(names: Names) -> dict[str, Tensor]:
    """Everything that the model holds, by stored name."""
    stored: dict[str, Tensor] = {}
    for parameter in names.parameters:
        if not set(names.stored_names(parameter)) <= stored.keys():
            stored |= names.write({name: names.read(name) for name in names.together(parameter)})
    return stored


def differences(names: Names, state: dict[str, Tensor], folder: Path) -> list[str]:
    """Parameters and stored tensors that are not the same, the oracle being transformers and the file itself."""
    file, back = load_file(folder / "model.safetensors"), written(names)
    wrong = [name for name in names.parameters if not torch.equal(names.read(name), state[name])]
    wrong += [name for name in state if name not in names.parameters and name not in names.tied]
    wrong += [name for name in back if name not in file or not same(back[name], file[name])]
    return wrong + [name for name in file if name not in back]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def fused_file(folder: Path, family: str) -> PreTrainedModel:
    """A checkpoint under the module's own names, experts in one tensor."""
    model = save_small_model(folder, family)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_file_to_model_to_file_is_the_same(family: str, tmp_path: Path) -> None:
    model = save_small_model(tmp_path, family)
    assert differences(names_of(tmp_path), model.state_dict(), tmp_path) == []


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "mixtral", "deepseek_v3"])
def test_a_file_with_fused_experts_stays_fused(family: str, tmp_path: Path) -> None:
    model = fused_file(tmp_path, family)
    names = names_of(tmp_path)
    assert differences(names, model.state_dict(), tmp_path) == []
    assert any(len(tensor.shape) > 2 for tensor in names.checkpoint.tensors.values())


def by_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversions, "dot_natural_key", lambda name: name)


def gate_and_up_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    values = conversions.Conversion.values

    def exchanged(self: conversions.Conversion, *arguments: object) -> dict[str, Tensor]:
        if len(self.stored) > 1:
            stored = dict(zip(self.stored, reversed(list(self.stored.values())), strict=True))
            self = conversions.Conversion(stored, self.parameters, self.converter)
        return values(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(conversions.Conversion, "values", exchanged)


@pytest.mark.parametrize("plant", [by_letters, gate_and_up_exchanged])
def test_a_planted_fault_shows(
    plant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_small_model(tmp_path, "mixtral")
    plant(monkeypatch)
    assert f"{FUSED}.gate_up_proj" in differences(names_of(tmp_path), model.state_dict(), tmp_path)


def sliced(names: Names, transposed: bool = False) -> Names:
    """Names of the single experts of one layer: of E fused matrices, in halves for gate and up."""
    slices = {}
    for expert in range(EXPERTS):
        for place, (name, rows) in enumerate((("gate", slice(0, 24)), ("up", slice(24, 48)))):
            del place
            slices[f"{FUSED}.{expert}.{name}"] = Slice(f"{FUSED}.gate_up_proj", expert, rows, transposed)
        slices[f"{FUSED}.{expert}.down"] = Slice(f"{FUSED}.down_proj", expert, slice(None), transposed)
    return names.with_slices(slices)


@pytest.mark.parametrize("save", [save_small_model, fused_file])
def test_one_expert_is_read_alone_and_written_where_it_was(
    save: Callable[[Path, str], PreTrainedModel], tmp_path: Path
) -> None:
    state = save(tmp_path, "qwen3_moe").state_dict()
    names = sliced(names_of(tmp_path))
    for expert in range(EXPERTS):
        gate, up = state[f"{FUSED}.gate_up_proj"][expert].chunk(2)
        assert torch.equal(names.read(f"{FUSED}.{expert}.gate"), gate)
        assert torch.equal(names.read(f"{FUSED}.{expert}.up"), up)
        assert torch.equal(names.read(f"{FUSED}.{expert}.down"), state[f"{FUSED}.down_proj"][expert])
    file, back = load_file(tmp_path / "model.safetensors"), written(names)
    assert back.keys() == file.keys()
    assert all(same(back[name], file[name]) for name in file)
    own = names.own_name(f"{FUSED}.10.gate")
    assert own == (f"{FUSED}.10.gate_proj.weight" if save is save_small_model else None)
    assert len(names.together(f"{FUSED}.10.gate")) == (1 if own else 2 * EXPERTS)


def without(*parts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def renumbered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An expert's number beyond the last one."""
    return {name.replace(".experts.3.gate_proj", ".experts.12.gate_proj"): t for name, t in tensors.items()}


def narrower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t[:, :-1].contiguous() if ".experts.11.up_proj" in n else t for n, t in tensors.items()}


def one_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {n.replace(".experts.3.", ".experts.12."): t.clone() for n, t in tensors.items() if ".experts.3." in n}
    return tensors | more


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without(".experts.7.down_proj"), r"experts\.7\.down_proj"),
        (renumbered, r"experts\.3\.gate_proj"),
        (narrower, r"experts\.11\.up_proj"),
        (one_more, r"experts\.12\."),
        (without("e_score_correction_bias"), "e_score_correction_bias"),
        (without(".mlp.gate.weight"), r"mlp\.gate\.weight"),
    ],
)
def test_what_is_lost_or_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str, tmp_path: Path
) -> None:
    save_small_model(tmp_path, "deepseek_v3")
    file = tmp_path / "model.safetensors"
    save_file(change({name: tensor.clone() for name, tensor in load_file(file).items()}), file)
    with pytest.raises(CorruptCheckpoint, match=told) as refused:
        names_of(tmp_path)
    assert refused.value.hint


def test_a_block_that_a_pattern_of_the_model_would_leave_aside_is_a_block(tmp_path: Path) -> None:
    """glm4_moe leaves layers.46 aside, the prediction layer of one size, which is a block of a larger one."""
    model = small_model("glm4_moe", num_hidden_layers=48, n_routed_experts=2, num_experts_per_tok=1)
    assert model._keys_to_ignore_on_load_unexpected
    model.save_pretrained(tmp_path)
    names = names_of(tmp_path)
    assert any(name.startswith("model.layers.46.") for name in names.parameters)
    assert not names.ignored


def test_a_prediction_layer_fills_nothing_and_is_named(tmp_path: Path) -> None:
    save_small_model(tmp_path, "deepseek_v3")
    file = tmp_path / "model.safetensors"
    extra = {"model.layers.2.eh_proj.weight": torch.ones(4, 4), "model.layers.61.eh_proj.weight": torch.ones(4, 4)}
    save_file(load_file(file) | extra, file)
    names = names_of(tmp_path)
    assert names.foreign == ("model.layers.2.eh_proj.weight",)
    assert names.ignored == ("model.layers.61.eh_proj.weight",)


def test_a_tied_head_has_one_tensor(tmp_path: Path) -> None:
    model = save_small_model(tmp_path, "llama", tie_word_embeddings=True)
    names = names_of(tmp_path)
    assert names.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert torch.equal(names.read("lm_head.weight"), model.lm_head.weight)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for copy, right in ((tensors["model.embed_tokens.weight"].clone(), True), (torch.ones(64, 32), False)):
        save_file(tensors | {"lm_head.weight": copy}, file)
        if right:
            assert names_of(tmp_path).ignored == ("lm_head.weight",)
        else:
            with pytest.raises(CorruptCheckpoint, match="ties lm_head"):
                names_of(tmp_path)


def edited(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_fewer_experts_than_the_file_has_are_refused(tmp_path: Path) -> None:
    save_small_model(tmp_path, "mixtral")
    edited(tmp_path, num_local_experts=EXPERTS - 2)
    with pytest.raises(BitwrightError):
        names_of(tmp_path)
