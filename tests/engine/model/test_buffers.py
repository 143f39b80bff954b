"""Buffers of a model that is built without memory: those of one that is built with it."""

import pytest
import torch

from tests.engine.architectures.configurations import TYPES, configuration
from workers.engine.model.meta_model import empty_model, model_class

QUICK = ("llama", "falcon_h1", "apertus", "minimax", "qwen2_vl", "gemma4", "deepseek_v3")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TYPES]
)
def test_computed_buffers_are_those_of_a_real_model(model_type: str) -> None:
    config = configuration(model_type)
    real = model_class(config)._from_config(config, dtype=torch.float32)
    found = dict(empty_model(config, torch.float32, torch.device("cpu")).named_buffers())
    stored = real.state_dict().keys()
    assert found.keys() == dict(real.named_buffers()).keys()
    for name, buffer in real.named_buffers():
        assert (found[name].dtype, found[name].shape) == (buffer.dtype, buffer.shape)
        if name not in stored:
            assert torch.equal(found[name], buffer), name
