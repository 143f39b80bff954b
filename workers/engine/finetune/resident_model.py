"""The whole quantized model on the device with its adapters: what a training step runs.

Norms, and embeddings and head unless quantized, are as the checkpoint has them, in a 16-bit compute dtype; the blocks
are the model's own modules, with an `AdaptedLinear` for every quantized linear while the context lasts. How the model
calls a block is recorded as for every other stage; where a sequence holds several examples, the same masks and rotary
angles are made for them: attention only within an example, positions from 0 in each.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitwright.errors import UnsupportedArchitecture
from workers.contracts.adapters import AttachAdapters, TrainableAdapter
from workers.engine.finetune.adapted_linear import AdaptedLinear, MakeWeight, rebuilt
from workers.engine.finetune.token_loss import token_loss
from workers.engine.model.block_calls import BlockCall
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.seeds import derived_seed
from workers.engine.text.packing import Batch
from workers.numerics.quantized import LinearResult


@dataclass(frozen=True)
class Residence:
    """Storage of the model on the device.

    length       tokens of the longest sequence
    keeps        whether dequantized weights are kept, instead of made anew for each use
    recomputed   blocks, from the first on, whose activations are computed again for the backward pass
    """

    length: int
    keeps: bool
    recomputed: int


@dataclass(frozen=True)
class ResidentModel:
    """The loaded model, its blocks with adapters, and the adapters by full linear name."""

    model: StreamedModel
    adapters: Mapping[str, TrainableAdapter]
    calls: tuple[BlockCall, ...]
    dtype: torch.dtype
    recomputed: int

    @property
    def is_capturable(self) -> bool:
        """True if its passes draw nothing that has to be drawn again: a graph's generator cannot be set back."""
        return not self.recomputed or not self._draws

    @property
    def _draws(self) -> bool:
        return any(adapter.draws_noise for adapter in self.adapters.values())

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the losses of a batch's targets, fp32 ()."""
        return token_loss(self.model, self.hidden(batch), batch.target_positions, batch.labels)

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states after the last block, (rows, length, width)."""
        hidden, calls, draws = self.model.embed(batch.ids), self._calls(batch), self._draws
        for index, (block, call) in enumerate(zip(self.model.blocks, calls, strict=True)):
            if index < self.recomputed and torch.is_grad_enabled():
                # The generator's state is read, which waits for the device, only where it has to be the same again.
                hidden = checkpoint(call, block, hidden, use_reentrant=False, preserve_rng_state=draws)
            else:
                hidden = call(block, hidden)
        return hidden

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around the passes of a batch: what all adapters of a class compute at once."""
        with ExitStack() as stack:
            for kind, adapters in self._by_class().items():
                stack.enter_context(kind.together(adapters))
            yield

    def penalties(self) -> list[Tensor]:
        """Terms that classes of adapters add to a step's loss, each (); some may have no gradient."""
        penalties = [kind.penalty(adapters) for kind, adapters in self._by_class().items()]
        return [penalty for penalty in penalties if penalty is not None]

    def _by_class(self) -> dict[type[TrainableAdapter], list[TrainableAdapter]]:
        classes: dict[type[TrainableAdapter], list[TrainableAdapter]] = {}
        for adapter in self.adapters.values():
            classes.setdefault(type(adapter), []).append(adapter)
        return classes

    def _calls(self, batch: Batch) -> list[BlockCall]:
        """The call of each block with a batch; blocks that share a call share its masks."""
        by_id: dict[int, BlockCall] = {}
        for call in self.calls:
            if id(call) not in by_id:
                by_id[id(call)] = self._call(call, batch)
        return [by_id[id(call)] for call in self.calls]

    def _call(self, call: BlockCall, batch: Batch) -> BlockCall:
        length, mask = batch.ids.shape[1], call.keywords.get("attention_mask")
        angles = tuple(angle[:, :length].to(self.dtype) for angle in call.keywords["position_embeddings"])
        mask = None if mask is None else mask[..., :length, :length]
        if batch.documents is not None:
            angles = tuple(angle[0][batch.positions] for angle in angles)
            mask = _within_documents(mask, batch.documents, self.dtype)
        changed = {"attention_mask": mask, "position_embeddings": angles, "position_ids": batch.positions}
        return BlockCall(call.arguments, call.keywords | changed)


def _within_documents(mask: Tensor | None, documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention mask (rows, 1, length, length): a position sees those of its own example that `mask` allows.

    Booleans; on a GPU, or where the model's own mask is one, the summand of the scores, 0 or -inf, in `dtype`.
    """
    length = documents.shape[1]
    added = documents.is_cuda or (mask is not None and mask.is_floating_point())
    if mask is not None and mask.is_floating_point():
        mask = mask == 0
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=documents.device).tril()
    sees: Tensor = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    if not added:
        return sees
    # As attention's kernel adds it: else each block would make this of the truth values.
    return torch.where(sees, 0.0, -torch.inf).to(dtype)


def compute_dtype(model: StreamedModel) -> torch.dtype:
    """The model's own, but bf16 in place of fp16, in which gradients overflow."""
    return torch.bfloat16 if model.dtype == torch.float16 else model.dtype


@contextmanager
def resident(
    model: StreamedModel,
    load: Callable[[int], Mapping[str, LinearResult]],
    attach: AttachAdapters,
    how: Residence,
    *,
    seed: int,
    head: Tensor | None = None,
    embeddings: Mapping[str, Tensor] = MappingProxyType({}),
    changed: Callable[[int], Mapping[str, Tensor]] = lambda _: MappingProxyType({}),
) -> Iterator[ResidentModel]:
    """The model while it is loaded, with new adapters.

    load        quantized linears of a block by full name
    attach      makes the adapters of a block's linears
    head        dequantized weight of the head, where that is quantized
    embeddings  that of the embeddings by parameter, where they are
    changed     other parameters of a block that quantization changed, by full name

    Raises:
        UnsupportedArchitecture: a training step cannot make the blocks' arguments for its rows.
    """
    dtype, layout = compute_dtype(model), model.layout
    adapters: dict[str, TrainableAdapter] = {}
    calls = model.capture_calls(how.length)
    demand_trainable(model, calls)
    with ExitStack() as stack:
        stack.enter_context(model.filled(_outer_weights(model, dtype, head, embeddings)))
        for index in range(len(model.blocks)):
            results = {name: result.to(model.device) for name, result in load(index).items()}
            attached = attach(results, derived_seed(seed, index))
            adapters |= {name: adapter.to(model.device) for name, adapter in attached.items()}
            given = {name: value.to(model.device, dtype) for name, value in changed(index).items()}
            given |= {f"{name}.weight": torch.empty(0, dtype=dtype) for name in results}
            stack.enter_context(model.filled(_read(model, layout.block(index), dtype, given)))
            for name, result in results.items():
                base, saves = _base(result, attached.get(name), dtype, how), not how.keeps and index < how.recomputed
                stack.enter_context(_adapted(model, name, base, attached.get(name), saves=saves))
        yield ResidentModel(model, adapters, calls, dtype, how.recomputed)


def _outer_weights(
    model: StreamedModel, dtype: torch.dtype, head: Tensor | None, embeddings: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Embeddings, norm and head; a tied head is the embedding matrix itself."""
    layout, there = model.layout, {name: value.to(model.device, dtype) for name, value in embeddings.items()}
    weights = {name: value for part in layout.outer for name, value in _read(model, part, dtype, there).items()}
    given = {} if head is None else {f"{layout.head}.weight": head.to(model.device, dtype)}
    if model.tied:
        given[f"{layout.head}.weight"] = weights[f"{layout.embeddings}.weight"]
    return weights | _read(model, layout.head, dtype, given)


def _read(model: StreamedModel, name: str, dtype: torch.dtype, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return model.read(name, given, lambda tensor, own: tensor.to(model.device, dtype if own == model.dtype else own))


def _base(result: LinearResult, adapter: nn.Module | None, dtype: torch.dtype, how: Residence) -> Tensor | MakeWeight:
    """W_hat, or what makes it. An adapter takes over the low-rank correction that came with the weight."""
    weight = result.weight if adapter is not None or result.low_rank is None else result
    return weight.dequantize().to(dtype) if how.keeps else rebuilt(weight, dtype)


@contextmanager
def _adapted(
    model: StreamedModel, name: str, base: Tensor | MakeWeight, adapter: nn.Module | None, *, saves: bool
) -> Iterator[None]:
    """A linear with its adapter in place of the plain one."""
    plain = model.model.get_submodule(name)
    model.model.set_submodule(name, AdaptedLinear(base, plain.bias, adapter, saves=saves))
    try:
        yield
    finally:
        model.model.set_submodule(name, plain)


TRAINABLE = frozenset({"attention_mask", "position_ids", "position_embeddings", "past_key_values", "use_cache"})
"""Arguments of blocks that can be made for rows of several examples."""


def demand_trainable(model: StreamedModel, calls: tuple[BlockCall, ...]) -> None:
    """Check that a training step can make the blocks' arguments for its own rows.

    Raises:
        UnsupportedArchitecture: blocks get something else, or mix tokens other than by attention.
    """
    known = ("full_attention", "sliding_attention", "chunked_attention")
    kinds = model.layer_types - set(known)
    for call in calls:
        angles = call.keywords.get("position_embeddings")
        rotary = isinstance(angles, tuple) and all(isinstance(a, Tensor) and a.dim() == 3 for a in angles)
        others = [
            n for n, value in call.keywords.items() if n not in TRAINABLE and value is not None and value is not False
        ]
        if call.arguments or others or kinds or not rotary or not model.walk.plain:
            what = ", ".join([*sorted(kinds), *others]) or "more than attention with rotary embeddings"
            detail = f"blocks of {type(model.model).__name__} cannot be finetuned: they take {what}"
            hint = "quantize it without finetune, or finetune a model of another type"
            raise UnsupportedArchitecture(detail, field="model", hint=hint)
