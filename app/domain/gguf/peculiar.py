"""Checks of single architectures of llama.cpp: words on what a configuration says and it does not compute."""

from collections.abc import Iterator, Mapping

Config = Mapping[str, object]
SLIDING = "sliding_attention"
OWN_OF_FULL_LAYERS = frozenset({"head_dim", "num_key_value_heads"})


def nothing(config: Config) -> Iterator[str]:
    """No words."""
    del config
    yield from ()


def _numbers(config: Config, *names: str) -> list[int] | None:
    found = [config.get(name) for name in names]
    return [n for n in found if isinstance(n, int)] if all(isinstance(n, int) for n in found) else None


def _scale_of_attention(config: Config, narrow: int) -> Iterator[str]:
    scalar, found = config.get("query_pre_attn_scalar"), _numbers(config, "head_dim", "num_hidden_layers")
    sizes = _numbers(config, "hidden_size", "num_attention_heads")
    if not isinstance(scalar, int | float) or found is None or sizes is None:
        return
    wanted = sizes[0] // sizes[1] if found[1] == narrow else found[0]
    if scalar != wanted:
        yield f"query_pre_attn_scalar = {scalar!r}, and it computes with {wanted}"


def gemma2(config: Config) -> Iterator[str]:
    """Attention is scaled by the width of a head, and in the model of 46 blocks by width over heads."""
    return _scale_of_attention(config, 46)


def gemma3(config: Config) -> Iterator[str]:
    """The same, with 62 blocks; heads of layers with windows are never scaled."""
    yield from _scale_of_attention(config, 62)
    rope = config.get("rope_parameters")
    sliding = rope.get(SLIDING) if isinstance(rope, Mapping) else None
    if isinstance(sliding, Mapping) and sliding.get("rope_type", "default") != "default":
        yield f"rotary scaling of the type {sliding['rope_type']!r} in layers with windows, and it scales none there"


def gemma4(config: Config) -> Iterator[str]:
    """Layers that see the whole text share what they have of their own: widths and heads of keys and values."""
    given, types = config.get("per_layer_config"), config.get("layer_types")
    if not isinstance(given, Mapping) or not given or not isinstance(types, list):
        return
    full = [str(layer) for layer, kind in enumerate(types) if kind != SLIDING]
    own = [given.get(layer) for layer in full]
    names = {name for each in given.values() if isinstance(each, Mapping) for name in each}
    if any(layer not in full for layer in given) or own.count(own[0]) < len(own) or names - OWN_OF_FULL_LAYERS:
        yield f"per_layer_config of {sorted(names)}, and it has widths of heads alone, the same in all full layers"


def every_fourth_unturned(config: Config) -> Iterator[str]:
    """Every fourth layer is without a rotary embedding."""
    given = config.get("no_rope_layers")
    if isinstance(given, list) and given != [int((layer + 1) % 4 != 0) for layer in range(len(given))]:
        yield f"no_rope_layers = {given!r}, and it leaves every fourth layer unturned"


def exaone4(config: Config) -> Iterator[str]:
    """Windows, and layers that are not turned, are those of the model of 64 blocks."""
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if isinstance(types, list) and isinstance(layers, int) and (SLIDING in types) is not (layers == 64):
        yield f"layer_types = {sorted(set(map(str, types)))} in {layers} layers, and it has windows in 64 alone"


def with_alpha(config: Config) -> Iterator[str]:
    """Hunyuan's dynamic scaling is a larger base."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if isinstance(rope, Mapping) and "dynamic" in (rope.get("rope_type"), rope.get("type")) and not rope.get("alpha"):
        yield "rotary scaling of the type 'dynamic' without alpha, and it has no base that grows with the text"


def a_key_for_each_query(config: Config) -> Iterator[str]:
    """As many heads of keys as of queries."""
    found = _numbers(config, "num_attention_heads", "num_key_value_heads")
    if found is not None and found[0] != found[1]:
        yield f"num_key_value_heads = {found[1]}, and it has as many as queries, {found[0]}"


def ernie_experts(config: Config) -> Iterator[str]:
    """Experts up to the last block."""
    end, layers = config.get("moe_layer_end_index"), config.get("num_hidden_layers")
    if isinstance(end, int) and isinstance(layers, int) and end not in (-1, layers - 1):
        yield f"moe_layer_end_index = {end}, and it has experts up to the last of {layers} layers"


def llama4(config: Config) -> Iterator[str]:
    """Three layers that see a chunk before one that sees all and is not turned; experts at every so many layers."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    fourth = [(layer + 1) % 4 == 0 for layer in range(layers)]
    types, turned = config.get("layer_types"), config.get("no_rope_layers")
    if isinstance(types, list) and [kind == "full_attention" for kind in types] != fourth:
        yield "layer_types that are not three of chunked_attention before each full_attention, and it has no others"
    if isinstance(turned, list) and turned and [not own for own in turned] != fourth:
        yield f"no_rope_layers = {turned!r}, and it leaves every fourth layer unturned"
    step, experts = config.get("interleave_moe_layer_step"), config.get("moe_layers")
    if isinstance(step, int) and isinstance(experts, list) and experts != list(range(step - 1, layers, step)):
        yield f"moe_layers = {experts!r}, and it has experts in every block of number {step}"
    normed = config.get("num_local_experts") != 128
    if config.get("use_qk_norm", normed) is not normed:
        yield f"use_qk_norm = {config['use_qk_norm']!r}, and it computes so with 128 experts alone"


def heads_of_one_width(config: Config) -> Iterator[str]:
    """Keys and values of linear attention have heads of one width."""
    found = _numbers(config, "linear_key_head_dim", "linear_value_head_dim")
    if found is not None and found[0] != found[1]:
        yield f"linear_key_head_dim = {found[0]} and linear_value_head_dim = {found[1]}, and it has one width for both"


def twice_as_wide(config: Config) -> Iterator[str]:
    """The state space's input is twice as wide as the model."""
    found = _numbers(config, "hidden_size", "intermediate_size")
    if found is not None and found[1] != 2 * found[0]:
        yield f"intermediate_size = {found[1]}, and it takes twice the hidden_size of {found[0]}"


def turned_experts(config: Config) -> Iterator[str]:
    """Attention alone beside experts is what `granitemoe` computes, and that always turns heads."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    alone = isinstance(kinds, list) and {str(kind) for kind in kinds} <= {"attention", "full_attention"}
    if alone and config.get("num_local_experts") and config.get("position_embedding_type") != "rope":
        yield "experts, layers of attention alone and no rotary embedding, and its granitemoe always has one"


def one_kind_of_parts(config: Config) -> Iterator[str]:
    """Feed-forward parts all with experts, or all without."""
    kinds = config.get("layers_block_type")
    if isinstance(kinds, list) and {"moe", "mlp"} <= set(map(str, kinds)):
        yield "layers_block_type of both moe and mlp, and it has feed-forward parts of one kind"


def minimax(config: Config) -> Iterator[str]:
    """One factor for all residual streams, and none for what is added to them."""
    kinds = ("full_attn", "linear_attn", "mlp")
    factors = {f"{kind}_alpha_factor": config.get(f"{kind}_alpha_factor", 1) for kind in kinds}
    if len(set(factors.values())) > 1:
        yield f"{factors}, and it has one factor for all three"
    for kind in kinds:
        name = f"{kind}_beta_factor"
        if config.get(name, 1) != 1:
            yield f"{name} = {config[name]!r}, and it adds what layers make as it is"


def mpt(config: Config) -> Iterator[str]:
    """ALiBi, with the usual scale."""
    attention = config.get("attn_config")
    if isinstance(attention, Mapping):
        for name, wanted in (("alibi", True), ("qk_ln", False), ("prefix_lm", False)):
            if attention.get(name, wanted) is not wanted:
                yield f"attn_config.{name} = {attention[name]!r}, and it computes with {wanted}"
        if attention.get("softmax_scale") is not None:
            yield f"attn_config.softmax_scale = {attention['softmax_scale']!r}, and it takes the usual one"
