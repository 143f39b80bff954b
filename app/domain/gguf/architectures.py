"""llama.cpp's architectures by transformers' `model_type`, and what of each a GGUF file can say.

A GGUF file names one of llama.cpp's architectures and some numbers. What else a configuration decides in transformers
(the activation, biases, the mask, the rotary embedding) is built into llama.cpp. Read in llama.cpp b11434 and v0.5.0,
`src/models/*.cpp`; `tests/engine/ships/gguf/test_architectures.py` holds every row against its library.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from app.domain.gguf import peculiar

RELEASE = "v0.5.0"
"""The release of llama.cpp whose architectures these are."""
SILU = frozenset({"silu", "swish"})
GELU = frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"})
SQUARED = frozenset({"relu2"})
DEFAULT = frozenset({"default"})
SCALED = DEFAULT | {"linear", "yarn"}
LLAMA_ROTARY = SCALED | {"llama3"}

Config = Mapping[str, object]
Check = Callable[[Config], Iterator[str]]


@dataclass(frozen=True)
class GgufArchitecture:
    """A `model_type` as llama.cpp computes it.

    name        llama.cpp's name
    activation  what it computes, under all names
    rotary      types of rotary embedding that the file can say
    biases      fields that add biases which it has no tensors for
    square      whether heads times head_dim is the model's width
    windows     whether a file says which layers see a window
    window      what transformers assumes of `sliding_window` where config.json is silent, if every layer slides
    by_layer    whether layers slide one by one, as `use_sliding_window` and `layer_types` say
    positions   what transformers assumes of `max_position_embeddings`
    demands     further fields, and the values that it computes with
    check       words on what else it does not compute
    partial     whether transformers turns heads in part where the configuration says so
    per_layer   whether some numbers of single layers may differ
    own_scale   whether it reads what YaRN's mscale_all_dim does to the scale of attention
    """

    name: str
    activation: frozenset[str] = SILU
    rotary: frozenset[str] = DEFAULT
    biases: tuple[str, ...] = ()
    square: bool = False
    windows: bool = False
    window: int | None = None
    by_layer: bool = False
    positions: int = 32_768
    demands: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: MappingProxyType({}))
    check: Check = peculiar.nothing
    partial: bool = False
    own_scale: bool = False
    per_layer: bool = False


BOTH = ("attention_bias", "mlp_bias")
EVERY_BLOCK: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
)
"""Experts in all blocks."""
TURNED: Mapping[str, tuple[object, ...]] = MappingProxyType({"rope_interleave": (True,)})


def _demands(**fields: tuple[object, ...]) -> Mapping[str, tuple[object, ...]]:
    return MappingProxyType(fields)


DENSE: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        "llama": GgufArchitecture("llama", rotary=LLAMA_ROTARY, positions=2048),
        "mistral": GgufArchitecture("llama", rotary=LLAMA_ROTARY, window=4096, positions=131_072),
        "ministral": GgufArchitecture("llama", rotary=LLAMA_ROTARY, windows=True, positions=131_072),
        "cwm": GgufArchitecture("llama", rotary=LLAMA_ROTARY, biases=("mlp_bias",), windows=True, positions=131_072),
        "helium": GgufArchitecture("llama", rotary=SCALED, square=True, positions=4096),
        "ministral3": GgufArchitecture("mistral3", rotary=SCALED, window=1 << 30, positions=262_144, own_scale=True),
        "qwen2": GgufArchitecture("qwen2", rotary=SCALED, square=True, by_layer=True),
        "qwen3": GgufArchitecture("qwen3", rotary=SCALED, biases=("attention_bias",), by_layer=True),
        "gemma": GgufArchitecture("gemma", GELU, biases=("attention_bias",)),
        "gemma2": GgufArchitecture("gemma2", GELU, biases=("attention_bias",), windows=True, check=peculiar.gemma2),
        "gemma3_text": GgufArchitecture(
            "gemma3",
            GELU,
            rotary=DEFAULT | {"linear"},
            biases=("attention_bias",),
            windows=True,
            demands=_demands(attn_logit_softcapping=(None,), use_bidirectional_attention=(False, None)),
            check=peculiar.gemma3,
        ),
        "gemma4_text": GgufArchitecture(
            "gemma4",
            GELU,
            rotary=frozenset({"proportional"}),
            biases=("attention_bias",),
            windows=True,
            demands=_demands(
                hidden_size_per_layer_input=(0, None), use_bidirectional_attention=(False, None, "vision")
            ),
            partial=True,
            per_layer=True,
            check=peculiar.gemma4,
        ),
        "phi": GgufArchitecture("phi2", GELU, demands=_demands(qk_layernorm=(False,)), partial=True),
        "phi3": GgufArchitecture("phi3", rotary=DEFAULT | {"longrope"}, window=1 << 30, positions=4096, partial=True),
        "olmo": GgufArchitecture("olmo", biases=("attention_bias",)),
        "olmo2": GgufArchitecture("olmo2", biases=("attention_bias",)),
        "olmo3": GgufArchitecture("olmo2", rotary=DEFAULT | {"yarn"}, biases=("attention_bias",), windows=True),
        "granite": GgufArchitecture("granite", square=True, biases=("mlp_bias",)),
        "smollm3": GgufArchitecture(
            "smollm3", rotary=SCALED, biases=BOTH, by_layer=True, check=peculiar.every_fourth_unturned
        ),
        "glm": GgufArchitecture("chatglm", partial=True),
        "glm4": GgufArchitecture("glm4", partial=True),
        "cohere": GgufArchitecture("command-r", biases=("attention_bias",), demands=_demands(use_qk_norm=(False,))),
        "cohere2": GgufArchitecture("cohere2", biases=("attention_bias",), windows=True),
        "stablelm": GgufArchitecture("stablelm", partial=True),
        "starcoder2": GgufArchitecture("starcoder2", GELU, window=1 << 30, demands=_demands(use_bias=(True,))),
        "nemotron": GgufArchitecture("nemotron", SQUARED, partial=True),
        "exaone4": GgufArchitecture("exaone4", rotary=DEFAULT | {"llama3"}, windows=True, check=peculiar.exaone4),
        "ernie4_5": GgufArchitecture("ernie4_5", biases=("use_bias",)),
        "hunyuan_v1_dense": GgufArchitecture(
            "hunyuan-dense", rotary=DEFAULT | {"dynamic"}, biases=("attention_bias",), check=peculiar.with_alpha
        ),
        "seed_oss": GgufArchitecture("seed_oss", biases=("attention_out_bias", "mlp_bias")),
        "apertus": GgufArchitecture("apertus", frozenset({"xielu"}), rotary=DEFAULT | {"llama3"}, biases=BOTH),
        "arcee": GgufArchitecture("arcee", SQUARED, rotary=SCALED, biases=BOTH),
        "qwen2_vl_text": GgufArchitecture("qwen2vl", square=True, by_layer=True),
        "qwen2_5_vl_text": GgufArchitecture("qwen2vl", square=True, by_layer=True),
        "qwen3_vl_text": GgufArchitecture("qwen3vl", biases=("attention_bias",)),
    }
)
MIXTURES: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        "mixtral": GgufArchitecture("llama", rotary=SCALED, window=1 << 30, positions=131_072),
        "qwen2_moe": GgufArchitecture(
            "qwen2moe",
            square=True,
            by_layer=True,
            demands=MappingProxyType({**EVERY_BLOCK, "norm_topk_prob": (False,)}),
        ),
        "qwen3_moe": GgufArchitecture(
            "qwen3moe",
            rotary=SCALED,
            biases=("attention_bias",),
            by_layer=True,
            demands=MappingProxyType({**EVERY_BLOCK, "norm_topk_prob": (True,)}),
        ),
        "olmoe": GgufArchitecture(
            "olmoe",
            biases=("attention_bias",),
            demands=_demands(norm_topk_prob=(False,), clip_qkv=(None,)),
            check=peculiar.a_key_for_each_query,
        ),
        "granitemoe": GgufArchitecture("granitemoe", square=True),
        "granitemoeshared": GgufArchitecture("granitemoe", square=True),
        "gpt_oss": GgufArchitecture("gpt-oss", rotary=DEFAULT | {"yarn"}, windows=True),
        "deepseek_v2": GgufArchitecture(
            "deepseek2",
            rotary=DEFAULT | {"yarn"},
            biases=BOTH,
            demands=_demands(topk_method=("greedy",), norm_topk_prob=(False,)),
            own_scale=True,
        ),
        "deepseek_v3": GgufArchitecture(
            "deepseek2", rotary=DEFAULT | {"yarn"}, biases=BOTH, demands=TURNED, own_scale=True
        ),
        "glm4_moe": GgufArchitecture("glm4moe", demands=_demands(n_group=(1,)), partial=True),
        "glm4_moe_lite": GgufArchitecture("deepseek2", biases=BOTH, demands=TURNED),
        "minimax": GgufArchitecture("minimax-01", check=peculiar.minimax, window=1 << 30, positions=131_072),
        "minimax_m2": GgufArchitecture("minimax-m2", partial=True),
        "ernie4_5_moe": GgufArchitecture("ernie4_5-moe", biases=("use_bias",), check=peculiar.ernie_experts),
        "hunyuan_v1_moe": GgufArchitecture(
            "hunyuan-moe", rotary=DEFAULT | {"dynamic"}, biases=("attention_bias",), check=peculiar.with_alpha
        ),
        "llama4_text": GgufArchitecture(
            "llama4",
            rotary=DEFAULT | {"llama3"},
            biases=("attention_bias",),
            windows=True,
            demands=_demands(attention_chunk_size=(8192,)),
            check=peculiar.llama4,
        ),
    }
)
RECURRENT: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        "qwen3_next": GgufArchitecture(
            "qwen3next",
            biases=("attention_bias",),
            demands=MappingProxyType({**EVERY_BLOCK, "norm_topk_prob": (True,)}),
            check=peculiar.heads_of_one_width,
            partial=True,
        ),
        "qwen3_5_text": GgufArchitecture(
            "qwen35", biases=("attention_bias",), check=peculiar.heads_of_one_width, partial=True
        ),
        "qwen3_5_moe_text": GgufArchitecture(
            "qwen35moe", biases=("attention_bias",), check=peculiar.heads_of_one_width, partial=True
        ),
        "lfm2": GgufArchitecture("lfm2", biases=("conv_bias",)),
        "lfm2_moe": GgufArchitecture(
            "lfm2moe",
            biases=("conv_bias",),
            demands=_demands(norm_topk_prob=(True,), use_expert_bias=(True,), routed_scaling_factor=(1.0, 1)),
        ),
        "bamba": GgufArchitecture("granitehybrid", partial=True),
        "granitemoehybrid": GgufArchitecture("granitehybrid", square=True, check=peculiar.turned_experts),
        "mamba": GgufArchitecture("mamba", biases=("use_bias",), check=peculiar.twice_as_wide),
        "falcon_mamba": GgufArchitecture("mamba", biases=("use_bias",), check=peculiar.twice_as_wide),
        "mamba2": GgufArchitecture("mamba2", biases=("use_bias",)),
        "jamba": GgufArchitecture("jamba"),
        "nemotron_h": GgufArchitecture(
            "nemotron_h",
            biases=("use_bias", "mamba_proj_bias"),
            demands=_demands(mlp_hidden_act=("relu2",), moe_latent_size=(None,), topk_group=(1,), n_group=(1,)),
            check=peculiar.one_kind_of_parts,
        ),
    }
)
OLDER: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        "gpt_neox": GgufArchitecture("gptneox", GELU, demands=_demands(attention_bias=(True,)), partial=True),
        "gpt2": GgufArchitecture(
            "gpt2",
            GELU,
            demands=_demands(scale_attn_by_inverse_layer_idx=(False,), scale_attn_weights=(True,)),
        ),
        "falcon": GgufArchitecture(
            "falcon", GELU, biases=("bias",), demands=_demands(alibi=(False,), parallel_attn=(True,))
        ),
        "bloom": GgufArchitecture("bloom", GELU, demands=_demands(apply_residual_connection_post_layernorm=(False,))),
        "mpt": GgufArchitecture("mpt", GELU, check=peculiar.mpt),
        "gpt_bigcode": GgufArchitecture(
            "starcoder", GELU, demands=_demands(multi_query=(True,), scale_attn_weights=(True,))
        ),
    }
)
ARCHITECTURES: Mapping[str, GgufArchitecture] = MappingProxyType({**DENSE, **MIXTURES, **RECURRENT, **OLDER})
"""`model_type` of the language model -> what llama.cpp makes of it."""
WRAPPERS: Mapping[str, str] = MappingProxyType(
    {
        "gemma3": "gemma3_text",
        "gemma4": "gemma4_text",
        "llama4": "llama4_text",
        "llava": "llama",
        "mistral3": "mistral",
        "qwen2_vl": "qwen2_vl_text",
        "qwen2_5_vl": "qwen2_5_vl_text",
        "qwen3_vl": "qwen3_vl_text",
        "qwen3_5": "qwen3_5_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
    }
)
"""`model_type` of a model with a vision tower -> that of the language model in it, where config.json is silent."""
COMPUTED_OTHERWISE: Mapping[str, str] = MappingProxyType(
    {
        "phimoe": "it computes other norms and another choice of experts than the model",
        "falcon_h1": "its file holds weights times the model's multipliers, and tuned ones would be rounded anew",
    }
)
"""Types whose name llama.cpp has, and why a file of it is not written."""
