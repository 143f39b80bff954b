"""Checkpoints of compressed-tensors in vLLM's GPU kernels of every width: Humming's products, the engine's weights.

vLLM runs 2, 3, 5, 6 and 7 bits, 8 bits with zero points and odd groups through these kernels alone. They read the
tensors and the configuration as the format writes them.
"""

from typing import Any

import pytest
import torch

from app.domain.methods import Scheme
from tests.formats.examples import Made, random_result
from workers.formats import compressed_tensors

pytestmark = pytest.mark.gpu
humming = pytest.importorskip("humming.layer", reason="the package humming-kernels is not installed")
tune = pytest.importorskip("humming.tune", reason="the package humming-kernels is not installed")

OUT, IN, TOKENS = 512, 1024, 32


def config_of(scheme: Scheme) -> dict[str, Any]:
    """The group of config.json that describes such linears."""
    groups: Any = compressed_tensors.config({"x": scheme}, ())["config_groups"]
    (group,) = groups.values()
    return {**group["weights"], "format": group["format"], "quant_method": "compressed-tensors"}


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_product_of_the_kernels_is_that_of_the_engines_weight(bits: int, symmetric: bool, group_size: int) -> None:
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    result = random_result((OUT, IN), Made(scheme), torch.bfloat16, seed=bits)
    tensors = {name.removeprefix("x."): t for name, t in compressed_tensors.compress("x", result).items()}
    layer = humming.HummingLayer(OUT, IN, weight_config=config_of(scheme), torch_dtype=torch.bfloat16).cuda()
    layer.load_from_tensors({name: tensor.cuda() for name, tensor in tensors.items()})
    layer.transform()
    inputs = torch.randn(TOKENS, IN, dtype=torch.bfloat16, device="cuda")
    exact = inputs.double() @ result.dequantize().cuda().double().T
    # The kernel for this number of tokens; without it those for every number are compiled, which takes minutes.
    one = tune.get_heuristics_config(layer.humming_config, shape_m=TOKENS)
    assert float((layer(inputs, tuning_config=one).double() - exact).norm() / exact.norm()) < 6e-3
