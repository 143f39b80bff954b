"""Findings of a dry run about a model, and models that it refuses by what they do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitwright.errors import UnsupportedArchitecture
from tests.engine.architectures.configurations import configuration
from workers.engine.model.block_calls import BlockCall
from workers.engine.model.block_linears import block_linears
from workers.engine.model.dry_run import Walk, walk_of
from workers.engine.model.layouts import Layout, layout_of
from workers.engine.model.meta_model import empty_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


def opened(model_type: str) -> tuple[PreTrainedModel, Layout]:
    """A model without weights, and its layout."""
    model = empty_model(configuration(model_type), torch.float32, CPU)
    return model, layout_of(model)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", Walk(0, frozenset(), embeds=True, norm="model.norm", plain=True, width=64)),
        ("granite", Walk(0, frozenset(), embeds=False, norm="model.norm", plain=True, width=64)),
        ("bamba", Walk(2, frozenset(), embeds=True, norm="model.final_layernorm", plain=True, width=64)),
        ("bloom", Walk(1, frozenset({"alibi"}), embeds=False, norm="transformer.ln_f", plain=True, width=64)),
    ],
)
def test_the_way_through_a_model(model_type: str, expected: Walk) -> None:
    model, layout = opened(model_type)
    assert walk_of(model, layout, CPU) == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}, "no weight stays"


@pytest.mark.parametrize(
    ("model_type", "decoder", "blocks", "head", "body"),
    [
        ("gpt2", "transformer", "transformer.h", "lm_head", "transformer"),
        ("opt", "model.decoder", "model.decoder.layers", "lm_head", "model"),
        ("mamba2", "backbone", "backbone.layers", "lm_head", "backbone"),
        ("llava", "model.language_model", "model.language_model.layers", "lm_head", "model"),
    ],
)
def test_the_layout_of_a_model(model_type: str, decoder: str, blocks: str, head: str, body: str) -> None:
    _, layout = opened(model_type)
    assert (layout.decoder, layout.blocks, layout.head, layout.body) == (decoder, blocks, head, body)
    assert layout.embeddings in layout.outer
    assert not any(name.startswith(blocks) for name in layout.outer)
    assert bool(layout.folds) == (model_type == "llava"), "llava's language model is a Llama"


def changed_forward(model: PreTrainedModel, change: Callable[..., dict[str, Any]]) -> None:
    """Every block is called with more: what `change` makes of the token ids."""
    decoder = model.get_decoder()
    forward, seen = decoder.forward, list[Tensor]()

    def noted(input_ids: Tensor, **keywords: Any) -> Any:
        seen.append(input_ids)
        return forward(input_ids=input_ids, **keywords, **change(input_ids))

    decoder.forward = noted


REFUSED: dict[str, tuple[Callable[[Tensor], dict[str, Any]], str]] = {
    "per-token argument": (
        lambda ids: {"extra": ids.float()},
        "extra, an argument of its blocks, depends on the tokens",
    ),
    "shared state": (lambda _: {"state": object()}, "block calls share state, a object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_whose_blocks_know_more_than_hidden_states_is_refused_by_name(case: str) -> None:
    model, layout = opened("llama")
    change, message = REFUSED[case]
    changed_forward(model, change)
    with pytest.raises(UnsupportedArchitecture, match=message) as caught:
        walk_of(model, layout, CPU)
    assert caught.value.hint


def test_a_model_that_changes_hidden_states_between_blocks_is_refused() -> None:
    model, layout = opened("llama")
    blocks = model.get_submodule(layout.blocks)
    decoder = model.get_decoder()

    def forward(input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        hidden = decoder.embed_tokens(input_ids)
        for block in decoder.get_submodule("layers").children():
            hidden = block(hidden * 2)
        return (hidden,)

    decoder.forward = forward
    assert len(list(blocks.children())) == 4
    with pytest.raises(UnsupportedArchitecture, match="get other hidden states"):
        walk_of(model, layout, CPU)


def test_a_model_that_uses_what_a_block_returns_besides_is_refused() -> None:
    model, layout = opened("bamba")
    decoder = model.get_decoder()

    def forward(input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        hidden, beside = decoder.embed_tokens(input_ids), None
        for block in decoder.get_submodule("layers").children():
            hidden, beside = block(hidden, before=beside)
        return (hidden,)

    decoder.forward = forward
    with pytest.raises(UnsupportedArchitecture, match="before is what the block before returned"):
        walk_of(model, layout, CPU)


class Odd(nn.Module):
    """A block with a linear that is called twice, one whose weight alone is used, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.twice, self.unused, self.gate = (nn.Linear(8, 8, bias=False, device="meta") for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        states = self.twice(self.twice(self.plain(hidden)))
        made: Tensor = states @ self.unused.weight + self.gate(hidden)
        return made


def test_linears_that_are_not_called_once_are_left_alone() -> None:
    found = block_linears(Odd(), BlockCall((), {}), (4, 8), torch.float32)
    assert found.names == ("plain",)
    assert found.groups == (("plain",),)


def test_arguments_by_row_are_repeated_for_a_batch() -> None:
    seen: list[Tensor] = []

    def block(hidden: Tensor, *, alibi: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        seen.extend((alibi, mask))
        return hidden, None

    alibi, mask = torch.arange(6.0).view(3, 1, 2), torch.ones(1, 1, 2, 2)
    call = BlockCall((), {"alibi": alibi, "mask": mask}, frozenset({"alibi"}))
    hidden = torch.zeros(2, 2, 5)
    assert call(block, hidden) is hidden
    assert torch.equal(seen[0], torch.cat([alibi, alibi]))
    assert seen[1] is mask
