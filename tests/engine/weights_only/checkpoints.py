"""Checkpoints of types without a model class: tensors drawn at random under names that real families have."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES: dict[str, tuple[int, ...]] = {
    "model.language_model.embed_tokens.weight": (256, 64),
    "model.language_model.layers.0.input_layernorm.weight": (64,),
    "model.language_model.layers.0.self_attn.q_proj.weight": (128, 64),
    "model.language_model.layers.0.self_attn.q_proj.bias": (128,),
    "model.language_model.layers.0.linear_attn.conv1d.weight": (128, 1, 4),
    "model.language_model.layers.0.linear_attn.A_log": (64,),
    "model.language_model.layers.0.linear_attn.in_proj_b.weight": (16, 64),
    "model.language_model.layers.0.mlp.gate.weight": (4, 64),
    "model.language_model.layers.0.mlp.gate.e_score_correction_bias": (4,),
    "model.language_model.layers.0.mlp.shared_expert_gate.weight": (1, 64),
    "model.language_model.layers.0.mlp.shared_expert.gate_proj.weight": (96, 64),
    "model.language_model.layers.0.mlp.experts.gate_up_proj": (4, 96, 64),
    "model.language_model.layers.0.mlp.experts.down_proj": (4, 64, 48),
    "model.language_model.layers.10.self_attn.q_proj.weight": (128, 64),
    "model.language_model.layers.2.self_attn.q_proj.weight": (128, 64),
    "model.visual.blocks.0.attn.qkv.weight": (192, 64),
    "mtp.layers.0.mlp.gate_proj.weight": (96, 64),
    "model.language_model.norm.weight": (64,),
    "lm_head.weight": (256, 64),
}
CONFIG = {
    "model_type": "unheard_of",
    "architectures": ["UnheardOfForConditionalGeneration"],
    "text_config": {"model_type": "unheard_of_text", "hidden_size": 64, "num_hidden_layers": 11},
    "dtype": "bfloat16",
}


def write(
    folder: Path, shapes: Mapping[str, tuple[int, ...]] | None = None, config: Mapping[str, object] | None = None
) -> Path:
    """A checkpoint in two files with these tensors, bf16 but for one norm in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in (shapes or SHAPES).items()}
    if "model.language_model.norm.weight" in tensors:
        tensors["model.language_model.norm.weight"] = tensors["model.language_model.norm.weight"].float()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(config or {})))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
