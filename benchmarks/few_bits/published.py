"""Blocks by the formulas of others, in the engine's own tuning loop: same text, steps and stored bytes as SignRound's.

Block-AP of EfficientQAT (arXiv:2407.11062) trains all that a weight is made of:

    w_hat = s*(clamp(round(W/s) + round(z), 0, 2^b - 1) - round(z))   straight through; D = dL/dw_hat, m = [inside]
    dL/dW = D*m     dL/ds = sum_group D*((q - z) - m*W/s)     dL/dz = -s * sum_group D*(1 - m)
    AdamW, W at 2e-5 and s and z at 1e-4, no decay; from min-max ranges

GSQ (arXiv:2604.18556) at 2 bits has a logit for each of the four levels v = -2, -1, 0, 1 of a weight:

    p = softmax((kappa*a + noise)/tau),  w_hat = s * sum_k p_k*v_k       noise is Gumbel's, new in every step
    dL/da_k = D*s*kappa/tau * p_k*(v_k - sum p*v)             dL/ds = sum_group D * sum_k p_k*v_k
    a starts at .01*(N(0,1) + 6*(-(q - v)^2/2 - mean)), q by GPTQ; tau 2 -> .05, kappa 100 -> 500, linear in the step
    Lion (.9, .95): a at 2e-4 with decay 1, s at 1e-4; what is kept is the likeliest level after the last step

Different from both: rates fall linearly (theirs by a cosine), scales are rounded as stored in every step, and text
and steps are what the benchmark is given (theirs: 4096 sequences). GSQ's target is the block's output for the same, the
quantized, inputs, as theirs is; Block-AP's that of the original chain.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from app.domain.methods import GPTQSpec, Scheme
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.contracts.tuning import TuningSettings
from workers.methods.sign_round import SignRound
from workers.numerics.adamw import AdamW
from workers.numerics.affine import store_scale
from workers.numerics.quantized import AffineWeight, LinearResult

WEIGHT_RATE, RANGE_RATE, SMALLEST_SCALE = 2e-5, 1e-4, 1e-4
LOGIT_RATE, SCALE_RATE, LOGIT_DECAY, LION = 2e-4, 1e-4, 1.0, (0.9, 0.95)
TAU, KAPPA = (2.0, 0.05), (100.0, 500.0)
LEVELS = (-2.0, -1.0, 0.0, 1.0)


class Flat:
    """Linears of one scheme whose groups lie one after another, and the result that was kept last."""

    def __init__(self, weights: Mapping[str, Tensor], scheme: Scheme, width: int, scale_dtype: torch.dtype) -> None:
        self.shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
        self.scheme, self.scale_dtype, first = scheme, scale_dtype, next(iter(weights.values()))
        self.dtype = first.dtype
        self.weight = torch.cat([w.reshape(-1, width) for w in weights.values()]).float()
        count = len(self.weight)
        self.kept = torch.zeros_like(self.weight, dtype=torch.uint8)
        self.kept_scale = torch.zeros(count, dtype=scale_dtype, device=first.device)
        self.kept_zero = torch.zeros(count, dtype=torch.uint8, device=first.device)

    @property
    def highest(self) -> int:
        """The largest code."""
        return int(2**self.scheme.bits) - 1

    def remember(self, better: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Keeps a result if `better`."""
        for kept, present in ((self.kept, codes), (self.kept_scale, scale), (self.kept_zero, zero)):
            kept.copy_(torch.where(better, present.to(kept.dtype), kept))

    def results(self) -> dict[str, LinearResult]:
        found, first = {}, 0
        for name, shape in self.shapes.items():
            rows = slice(first, first := first + math.prod(shape) // self.weight.shape[1])
            zero = None if self.scheme.symmetric else self.kept_zero[rows].reshape(shape[0], -1).clone()
            codes, scale = self.kept[rows].reshape(shape).clone(), self.kept_scale[rows].reshape(shape[0], -1).clone()
            found[name] = LinearResult(AffineWeight(codes, scale, zero, self.scheme, self.dtype))
        return found

    def faults(self) -> int:
        """None are counted: gradients that are not finite count as 0."""
        return 0


class BlockAP(Flat):
    """Weights, scales and zero points that are trained: the `TrainableWeights` of Block-AP."""

    def __init__(self, weights: Mapping[str, Tensor], scheme: Scheme, width: int, scale_dtype: torch.dtype) -> None:
        super().__init__(weights, scheme, width, scale_dtype)
        low, high = self.weight.amin(1).clamp(max=0), self.weight.amax(1).clamp(min=0)
        if scheme.symmetric:
            self.scale = torch.maximum(-low, high) / 2 ** (scheme.bits - 1)
            self.zero = torch.full_like(low, float(2 ** (scheme.bits - 1)))
        else:
            self.scale = (high - low) / self.highest
            self.zero = -low / self.scale.clamp(min=SMALLEST_SCALE)
        self.scale.clamp_(min=SMALLEST_SCALE)
        self._learned = [self.weight, self.scale, self.zero]
        self._starts = [tensor.clone() for tensor in self._learned]
        self._adam = [AdamW.of(tensor) for tensor in self._learned]

    def write(self, out: Tensor) -> None:
        codes, scale, zero = self._rounded()
        out.copy_(((codes - zero) * scale).view_as(out))

    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        changes = zip(self._learned, self._adam, self.gradients(gradient.view_as(self.weight).float()), strict=True)
        for (tensor, adam, by_tensor), own in zip(changes, (WEIGHT_RATE, RANGE_RATE, RANGE_RATE), strict=True):
            adam.step(tensor, by_tensor, rate * own, 0.0)
        self.scale.clamp_(min=SMALLEST_SCALE)
        self.write(out)

    def gradients(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dL/dW (groups, G), dL/ds and dL/dz (groups,); z stays where the scheme is symmetric."""
        codes, scale, zero = self._rounded()
        inside = d * ((self.weight / scale).round() + zero == codes)
        by_scale = (d * (codes - zero) - inside * self.weight / scale).sum(1)
        by_zero = -(scale.squeeze(1) * (d - inside).sum(1)) * (not self.scheme.symmetric)
        return inside, by_scale, by_zero

    def keep(self, better: Tensor) -> None:
        codes, scale, zero = self._rounded()
        self.remember(better, codes, scale.squeeze(1), zero.squeeze(1))

    def restart(self) -> None:
        for tensor, start, adam in zip(self._learned, self._starts, self._adam, strict=True):
            tensor.copy_(start)
            adam.reset()

    def adopt(self, other: "BlockAP") -> None:
        for mine, theirs in zip(self._starts, other._starts, strict=True):
            mine.copy_(theirs)
        self.restart()

    def _rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (groups, G), scales as they are stored and whole zero points, both (groups, 1)."""
        scale = store_scale(self.scale, self.scale_dtype).unsqueeze(1)
        zero = self.zero.round().clamp(0, self.highest).unsqueeze(1)
        return ((self.weight / scale).round() + zero).clamp(0, self.highest), scale, zero


class SoftCodes(Flat):
    """A logit for each level of a weight: the `TrainableWeights` of GSQ at 2 bits, symmetric."""

    def __init__(
        self,
        starts: Mapping[str, AffineWeight],
        scheme: Scheme,
        width: int,
        scale_dtype: torch.dtype,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__({name: start.dequantize() for name, start in starts.items()}, scheme, width, scale_dtype)
        device = self.weight.device
        self._levels = torch.tensor(LEVELS, device=device)
        codes = torch.cat([start.codes.reshape(-1, width) for start in starts.values()]).float() + LEVELS[0]
        near = -((codes.unsqueeze(-1) - self._levels) ** 2) / 2
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(near.shape, generator=generator, device=device)
        self.logits = 0.01 * (noise + 6 * (near - near.mean(-1, keepdim=True)))
        self.scale = torch.cat([start.scale.flatten() for start in starts.values()]).float()
        self._steps, self._done = steps, torch.zeros((), device=device)
        self._odds = torch.zeros_like(self.logits)
        self._learned = [self.logits, self.scale]
        self._starts = [tensor.clone() for tensor in self._learned]
        self._momenta = [torch.zeros_like(tensor) for tensor in self._learned]

    def write(self, out: Tensor) -> None:
        tau, kappa = self._sharpness()
        noise = -torch.empty_like(self.logits).exponential_().log_()
        torch.softmax((kappa * self.logits + noise) / tau, -1, out=self._odds)
        scale = store_scale(self.scale, self.scale_dtype).unsqueeze(1)
        out.copy_((self._odds @ self._levels * scale).view_as(out))

    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        by_logit, by_scale = self.gradients(gradient.view_as(self.weight).float().nan_to_num(0.0, 0.0, 0.0))
        self._lion(0, by_logit, rate * LOGIT_RATE, LOGIT_DECAY)
        self._lion(1, by_scale, rate * SCALE_RATE, 0.0)
        self._done += 1
        self.write(out)

    def gradients(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """dL/da (groups, G, 4) and dL/ds (groups,), through the sample that was written last."""
        (tau, kappa), mean = self._sharpness(), self._odds @ self._levels
        scale = store_scale(self.scale, self.scale_dtype).unsqueeze(1)
        slope = (self._levels - mean.unsqueeze(-1)).mul_(self._odds)
        return slope.mul_((d * scale * kappa / tau).unsqueeze(-1)), (d * mean).sum(1)

    def keep(self, better: Tensor) -> None:
        """Keeps the likeliest levels whatever the loss, which is that of a sample: theirs selects nothing."""
        del better
        codes = self.logits.argmax(-1)
        self.remember(torch.ones((), dtype=torch.bool, device=codes.device), codes, self.scale, self.kept_zero)

    def restart(self) -> None:
        for tensor, start, momentum in zip(self._learned, self._starts, self._momenta, strict=True):
            tensor.copy_(start)
            momentum.zero_()
        self._done.zero_()

    def adopt(self, other: "SoftCodes") -> None:
        for mine, theirs in zip(self._starts, other._starts, strict=True):
            mine.copy_(theirs)
        self.restart()

    def _lion(self, place: int, gradient: Tensor, rate: Tensor, decay: float) -> None:
        parameter, momentum = self._learned[place], self._momenta[place]
        turn = momentum.lerp(gradient, 1 - LION[0]).sign()
        parameter.sub_(rate * (turn + decay * parameter))
        momentum.lerp_(gradient, 1 - LION[1])

    def _sharpness(self) -> tuple[Tensor, Tensor]:
        """tau and kappa of the present step."""
        done = self._done / max(1, self._steps)
        tau, kappa = (first + (last - first) * done for first, last in (TAU, KAPPA))
        return tau, kappa


def block_ap(self: SignRound, task: BlockTask, spec: Any) -> BlockResult:
    """A block by Block-AP, in place of SignRound's."""
    del self
    weights = [BlockAP(own, scheme, width, task.scale_dtype) for (scheme, width), own in task.alike().items()]
    return _tuned(task, weights, spec)


def gsq(self: SignRound, task: BlockTask, spec: Any) -> BlockResult:
    """A block by GSQ, in place of SignRound's."""
    del self
    found = task.quantize(replace(task, tick=lambda _: None), GPTQSpec(act_order=False)).linears
    weights = []
    for (scheme, width), own in task.alike().items():
        starts = {name: found[name].weight for name in own}
        weights.append(SoftCodes(starts, scheme, width, task.scale_dtype, spec.steps, task.seed))  # type: ignore[arg-type]
    with torch.no_grad():
        targets = torch.cat([forward().to(task.targets.device) for forward in task.passes(task.inputs)])
    return _tuned(replace(task, targets=targets), weights, spec)


def _tuned(task: BlockTask, weights: Any, spec: Any) -> BlockResult:
    outcome = task.tune(task, weights, TuningSettings(spec.steps, spec.batch_size, 1.0))
    return BlockResult(outcome.linears, outcome.loss_initial, outcome.loss, {})


BLOCKS: Mapping[str, Callable[[SignRound, BlockTask, Any], BlockResult]] = {"block-ap": block_ap, "gsq": gsq}
