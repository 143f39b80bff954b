"""Quality from sums over the tokens of each sequence: means, their standard errors, and what is said of kinds of text.

With d_s the mean of a figure over the tokens of sequence s, of S sequences, the figure is their mean and its standard
error is std(d) / sqrt(S), with S - 1 degrees of freedom. Perplexity is exp of a mean loss, so that its standard error
is perplexity times that of the loss.
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from bitwright.errors import NumericalFailure
from bitwright.measured.kinds import KindQuality
from bitwright.measured.noise import STANDARD_ERRORS, Noise
from bitwright.report import Quality
from workers.engine.model.overflow import ALSO_DTYPE
from workers.engine.text.mixture import Probe
from workers.engine.text.sequences import Sequences

APART = 2.0
"""Times as large a KL, from which on a text is said to be another one's, beyond the noise of both."""
FULL = 1e-6
"""Nats a token: below it a distance is rounding."""


def quality_of(sums: Tensor, tokens: int, sequences: Sequences, probes: Sequence[Probe], seeds: int) -> Quality:
    """The quality on a text, and on the probes that follow it.

    sums     -log p(x), -log q(x), KL and agreement of each sequence, summed over its tokens, fp64 (sequences, 4)
    tokens   of a sequence that have one before them

    Raises:
        NumericalFailure: a sum is not finite.
    """
    means, count = sums / tokens, len(sequences.ids)
    own = means[:count]
    original, quantized, divergence, agreement = own.mean(0).tolist()
    if not all(map(math.isfinite, (original, quantized, divergence))):
        raise NumericalFailure(
            f"on the evaluation text the loss is {original} before and {quantized} after quantization",
            field="quantization",
            hint="use more bits or smaller groups" + ALSO_DTYPE,
        )
    draws = own[:, 2].reshape(seeds, -1).mean(1) if seeds > 1 and count % seeds == 0 else own[:0, 2]
    return Quality(
        text=sequences.report(),
        perplexity_original=exp(original),
        perplexity=exp(quantized),
        kl_divergence=max(0.0, divergence),
        top1_agreement=agreement,
        noise=noise_of(own),
        draws=tuple(max(0.0, kl) for kl in draws.tolist()),
        kinds=tuple(_kinds(means[count:], tokens, probes)),
    )


def _kinds(means: Tensor, tokens: int, probes: Sequence[Probe]) -> Iterator[KindQuality]:
    first = 0
    for probe in probes:
        own = means[first : first + len(probe.ids)]
        first += len(probe.ids)
        if not len(own) or not bool(own.isfinite().all()):
            continue
        original, quantized, divergence, agreement = own.mean(0).tolist()
        yield KindQuality(
            name=probe.name,
            calibrates=probe.calibrates,
            share=probe.share,
            sequences=probe.sequences,
            tokens=len(own) * tokens,
            perplexity_original=exp(original),
            perplexity=exp(quantized),
            kl_divergence=max(0.0, divergence),
            top1_agreement=agreement,
            noise=noise_of(own),
        )


def noise_of(means: Tensor) -> Noise:
    """Standard errors of the means over sequences; rows are sequences, columns as in `quality_of`."""
    count = len(means)
    if count < 2:
        none = dict.fromkeys(("perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement"))
        return Noise(sequences=count, **none)
    loss, kl, agreement = ((means[:, column].std() / math.sqrt(count)).item() for column in (1, 2, 3))
    change = means[:, 1] - means[:, 0]
    ratio = exp(change.mean().item()) * (change.std() / math.sqrt(count)).item()
    perplexity = exp(means[:, 1].mean().item()) * loss
    found = {"perplexity": perplexity, "perplexity_ratio": ratio, "kl_divergence": kl, "top1_agreement": agreement}
    return Noise(sequences=count, **{name: value if math.isfinite(value) else None for name, value in found.items()})


def exp(nats: float) -> float:
    """exp, limited to what JSON can hold."""
    return math.exp(min(nats, 700.0))


def kind_warnings(quality: Quality) -> Iterator[tuple[str, str]]:
    """Code and message where the result is much nearer on one text than on another, beyond the noise of both."""
    calibrated = next((kind for kind in quality.kinds if kind.calibrates), None)
    if calibrated is not None and _is_apart(quality, calibrated):
        yield (
            "calibration_overfitted",
            f"KL is {quality.kl_divergence:.4g} on the evaluation text and {calibrated.kl_divergence:.4g} on text that "
            "calibrated: calibrate on text like that to be written, on more of it, or with fewer steps",
        )
    kinds = [kind for kind in quality.kinds if not kind.calibrates]
    nearest = min(kinds, key=lambda kind: kind.kl_divergence, default=None)
    for kind in kinds:
        if nearest is not None and _is_apart(kind, nearest):
            yield (
                "kind_far",
                f"KL on held-out {kind.name}, of which {kind.sequences} sequences calibrated, is "
                f"{kind.kl_divergence:.4g}, and on {nearest.name} ({nearest.sequences}) {nearest.kl_divergence:.4g}: "
                "give it a larger share, or more calibration.num_samples",
            )


def _is_apart(one: Quality | KindQuality, nearer: Quality | KindQuality) -> bool:
    errors = [each.noise.kl_divergence if each.noise is not None else None for each in (one, nearer)]
    noise = math.hypot(*(error or 0.0 for error in errors))
    difference = one.kl_divergence - nearer.kl_divergence
    return one.kl_divergence > max(FULL, APART * nearer.kl_divergence) and difference > STANDARD_ERRORS * noise
