"""The files that transformers would load of a folder, and a check that this service reads the same ones.

`from_pretrained` of transformers 5.23 takes `model.safetensors` where there is one, whatever lies beside it; else all
tensors of all files that the index names, the last file in the order of names winning, whatever the index says of each
tensor. A few other files and fields send it elsewhere: such folders are refused, and both choices named.
"""

import re
from collections.abc import Collection, Mapping

from bitwright.errors import CorruptCheckpoint

ADAPTER = "adapter_config.json"
WEIGHTS_FIELD = "transformers_weights"
DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
"""Files of a distributed checkpoint, which transformers takes before all others."""


def check_choice(names: Collection[str], weights: str, config: Mapping[str, object]) -> None:
    """Whether transformers would load what is about to be read.

    names     of the files in the folder
    weights   the file, or the index of the files, that is about to be read
    config    config.json, decoded

    Raises:
        CorruptCheckpoint: it would load something else.
    """
    if ADAPTER in names:
        raise CorruptCheckpoint(
            f"the folder holds {weights} and {ADAPTER}: from_pretrained puts the adapter on the model where peft is "
            f"installed, and reads {weights} alone where it is not",
            field="model",
            value=ADAPTER,
            hint="remove the adapter's files to quantize the model alone, or merge the adapter first: "
            "model.merge_and_unload() of peft",
        )
    explicit = config.get(WEIGHTS_FIELD)
    if explicit is not None and explicit != weights:
        raise CorruptCheckpoint(
            f"config.json has {WEIGHTS_FIELD} = {explicit!r}, which from_pretrained loads in place of {weights}",
            field="model",
            value=explicit,
            hint=f"remove one of the two; without the field {weights} is read",
        )
    shards = sorted(name for name in names if DISTRIBUTED.match(name))
    if shards:
        raise CorruptCheckpoint(
            f"the folder holds {weights} and a distributed checkpoint ({shards[0]}), which from_pretrained loads first",
            field="model",
            value=shards[0],
            hint=f"remove the files shard-*.safetensors to quantize {weights}, or save the model again with "
            "save_pretrained",
        )
