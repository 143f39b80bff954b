"""Names of a source's tensors made plain, so that gguf-py's own map finds llama.cpp's names for them."""

import re
from dataclasses import dataclass

from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor

from workers.formats.gguf.architectures.family import Config, Family
from workers.formats.gguf.architectures.rows import heads_of

WRAPPED = re.compile(r"^(?:model\.language_model\.|language_model\.model\.|model\.text_model\.|language_model\.)")
OUTSIDE = re.compile(
    r"^(?:model\.)?(?:visual|vision_tower|vision_model|vision_embed_tokens|vision_encoder|multi_modal_projector"
    r"|audio_tower|embed_vision|embed_audio|mtp)\."
)
"""Parts beside the language model: towers and their projectors, and blocks that guess several tokens ahead."""
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(?:masked_)?bias$|\.attention\.(?:masked_)?bias$")
"""Buffers of old checkpoints, which are computed."""
EXPERT = re.compile(r"(?P<before>.*\bexperts)\.(?P<number>\d+)\.(?P<after>.+)")
NORM_OF_HEAD = re.compile(r"(?P<before>.*\.(?P<part>[qk])_layernorm)\.norms\.(?P<number>\d+)\.(?P<after>weight)")
BLOCK = re.compile(r"\b(?:layers|h|blocks)\.(?P<block>\d+)\.")
FUSED = re.compile(
    r"(?P<before>.*\bexperts\.)(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)(?P<leaf>_bias|\.weight|)$"
)
LEAVES = (".weight", ".bias")


@dataclass(frozen=True)
class Place:
    """A tensor of the file, and what of it a tensor of the source is.

    name   llama.cpp's
    rows   of the source, in the file's order: int64 (rows,), or a run of them
    slot   number in the stack of `of` tensors of one shape; None: no stack
    """

    name: str
    rows: Tensor | slice
    slot: int | None = None
    of: int = 1


def plain_name(name: str) -> str:
    """A tensor's name without a wrapper's prefix."""
    found = WRAPPED.match(name)
    if found is None:
        return name
    rest = name[found.end() :]
    return rest if rest.startswith("lm_head") else f"model.{rest.removeprefix('model.')}"


class Names:
    """llama.cpp's names of a checkpoint's tensors, and where in them each tensor's rows lie."""

    def __init__(self, kind: MODEL_ARCH, family: Family, config: Config, experts: int) -> None:
        self._family, self._config, self._experts = family, config, experts
        self._blocks = int(config["num_hidden_layers"])
        self._map = get_tensor_name_map(kind, self._blocks)

    def plain(self, name: str) -> str:
        """A tensor's name without a wrapper's prefix, and as newer files of the family have it."""
        name = plain_name(name)
        for pattern, made in self._family.aliases:
            name = re.sub(pattern, made, name)
        return name

    def is_left_out(self, name: str) -> bool:
        """True for tensors that a file has no place for: towers, computed ones, blocks beyond the model's own."""
        if COMPUTED.search(name) or self.is_beside(name):
            return True
        return self._family.left_out is not None and re.search(self._family.left_out, self.plain(name)) is not None

    def is_beside(self, name: str) -> bool:
        """True for parts of the model beside its blocks: towers, and blocks that guess several tokens ahead."""
        block = BLOCK.search(self.plain(name))
        return OUTSIDE.match(name) is not None or (block is not None and int(block["block"]) >= self._blocks)

    @staticmethod
    def is_tower(name: str) -> bool:
        """True for parts of a tower or its projector."""
        return OUTSIDE.match(name) is not None and not name.removeprefix("model.").startswith("mtp.")

    def places(self, name: str, rows: int) -> list[Place] | None:
        """The places of a tensor of so many rows; None if llama.cpp has no name for one of them.

        name   the source's, with `.weight` or `.bias` where it has them
        """
        stem, slot, of = self.plain(name), None, 1
        expert, norm = EXPERT.fullmatch(stem), NORM_OF_HEAD.fullmatch(stem)
        one = expert or norm
        if one is not None:
            stem, slot = f"{one['before']}.{one['after']}", int(one["number"])
            of = self._experts if norm is None else heads_of(norm["part"], self._config)
        leaf = next((leaf for leaf in LEAVES if stem.endswith(leaf)), "")
        stem = stem.removesuffix(leaf)
        parts = self._family.split(stem, rows, self._config)
        if parts is None:
            order = self._family.order(stem, self._config)
            parts = ((stem, slice(None) if order is None else order),)
        places = []
        for part, own in parts:
            found = self.find(part, leaf)
            if found is None:
                return None
            places.append(Place(found, own, slot, of))
        return places

    def find(self, stem: str, leaf: str) -> str | None:
        """llama.cpp's name of a plain name; None without one."""
        for pattern, made in self._family.renames:
            stem = re.sub(pattern, made, stem)
        if stem.startswith("="):
            return stem[1:] + leaf
        found: str | None = self._map.get_name(stem + leaf, try_suffixes=LEAVES)
        if found is None and not leaf:
            found = self._map.get_name(stem)
        return found
