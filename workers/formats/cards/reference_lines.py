"""The reference row of a model card: what round to nearest gives with the same scheme on the same text."""

from bitwright.report import Figures


def reference_lines(reference: Figures | None) -> list[str]:
    """A paragraph below the table of the quality; none where nothing was measured."""
    if reference is None:
        return []
    return [
        f"Round to nearest with the same scheme, on the same text: perplexity {reference.perplexity:.4f}, "
        f"KL divergence {reference.kl_divergence:.5f}, same most likely token {100 * reference.top1_agreement:.2f} %."
    ]
