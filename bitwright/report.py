"""The report of a succeeded job: `report.json` of every checkpoint and `report` of GET /v1/jobs/{id}."""

from typing import Literal, Self

from pydantic import Field

from bitwright.formats import ADAPTER_FOLDER, Form
from bitwright.frontier import FrontierPoint
from bitwright.measured.kinds import KindQuality
from bitwright.measured.noise import Noise
from bitwright.measured.report_part import ReportPart
from bitwright.measured.tasks import TaskReport
from bitwright.money import Money


class TextReport(ReportPart):
    """A text that was read, named so that another run can read the same."""

    source: str = Field(description="Shorthand of the dataset source.", examples=["builtin"])
    sha256: str = Field(description="Of the token ids used.")
    num_samples: int
    sequence_length: int
    tokens: int


class Quality(ReportPart):
    """Distance of the quantized model, with the numbers as stored, from the original on the evaluation text."""

    text: TextReport
    perplexity_original: float
    perplexity: float
    kl_divergence: float = Field(description="KL(original || quantized), nats per token.")
    top1_agreement: float = Field(description="Share of tokens with the same most likely next token.")
    noise: Noise | None = Field(default=None, description="null: an older report.")
    draws: tuple[float, ...] = Field(
        default=(), description="KL of each draw of the text, where `evaluation.seeds` asked for several."
    )
    kinds: tuple[KindQuality, ...] = Field(
        default=(), description="The same of the calibration text, and of held-out rows of each part of a mixture."
    )


class Figures(ReportPart):
    """The measurements of the quantized model: fields of `Quality` without the original's perplexity."""

    perplexity: float
    kl_divergence: float
    top1_agreement: float

    @classmethod
    def of(cls, quality: Quality) -> Self:
        """The figures of a complete measurement."""
        return cls(**quality.model_dump(include=set(Figures.model_fields)))


class ShippedFigures(ReportPart):
    """Figures of checkpoints with the same numbers, loaded one way; on the text of `quality`."""

    checkpoints: tuple[str, ...] = Field(description="By folder; each of them gives these figures.")
    adapter: str | None = Field(description="Folder of the adapter that is loaded beside it; null: it stands alone.")
    whole: bool = Field(description="False: the base alone, without the adapter that belongs to it.")
    figures: Figures


class LinearReport(ReportPart):
    name: str
    shape: tuple[int, int] = Field(description="(out_features, in_features)")
    form: Form = Field(default=Form.AFFINE, description="Of the quantized weight: affine, codebook or float.")
    bits: int
    group_size: int
    symmetric: bool
    scheme: str | None = Field(
        default=None, description="The scheme's name (nvfp4, ...); null: integers or NormalFloat."
    )
    rank: int | None = Field(default=None, description="Of the low-rank correction beside it; null: there is none.")
    weight_error: float = Field(description="||W - W_hat|| / ||W||, Frobenius; W_hat with its correction.")
    output_error: float | None = Field(
        default=None, description="The same norm weighted by the inputs' second moments (diagonal)."
    )


class ExpertsReport(ReportPart):
    """Tokens of the calibration text that the experts of a part of a block got."""

    name: str
    experts: int
    tokens_least: int
    tokens_median: float
    floor: int = Field(description="Tokens below which an expert is starved.")
    starved: dict[str, int] = Field(
        default_factory=dict, description="Tokens of each starved expert, by its full name."
    )
    fallback: str | None = Field(default=None, description="What was done for them; null: there are none.")


class BlockReport(ReportPart):
    index: int
    name: str
    loss_initial: float | None = Field(description="MSE of the block's output with the method's start values.")
    loss: float | None = Field(description="MSE of the block's output with the result, on the same sequences.")
    output_error: float | None = Field(
        description="||Y - Y_hat|| / ||Y|| over the calibration sequences, or the evaluation ones if there are none."
    )
    seconds: float
    linears: tuple[LinearReport, ...]
    counters: dict[str, float] = Field(
        default_factory=dict, description="What happened how often: fallbacks, the best step, and the like; by method."
    )
    experts: tuple[ExpertsReport, ...] = Field(
        default=(), description="Of mixtures of experts, where a calibration text was read."
    )


class ScaleReport(ReportPart):
    """The stage that tunes all scales together against the original model's next-token distribution.

    On floating-point grids and of integers up to 3 bits the blocks' norms are tuned along, and where there is room the
    codes of these and of MXFP4.
    """

    steps: int
    kl_initial: float = Field(description="KL(original || quantized) on held-out calibration text, with old scales.")
    kl: float = Field(description="The same with the scales that were kept.")
    kept: bool = Field(description="False: the tuned scales were no better there, so the old ones stayed.")
    held_out: int = Field(description="Calibration sequences for validation, which were never trained on.")
    further: int = Field(default=0, description="Sequences that this stage alone has seen, some of them held out.")
    written: int = Field(default=0, description="Those of them that the original model wrote itself.")
    micro_batch: int = Field(description="Sequences that went through the model at once.")
    blocks_recomputed: int = Field(description="Blocks whose activations did not fit and were computed again.")
    captured: bool = Field(description="Whether a step was replayed as one CUDA graph.")
    seconds: float
    norms: int = Field(default=0, description="Norms of blocks that were tuned along.")
    codes: int | None = Field(
        default=None,
        description="Weights whose code changed, where codes were tuned along; null: codes stayed.",
    )


class Validation(ReportPart):
    """A loss on held-out text, nats per token with a label."""

    step: int = Field(description="Steps done before it.")
    loss: float


class LossPoint(ReportPart):
    """The mean training loss of the steps since the point before, up to `step`."""

    step: int
    loss: float


class FinetuningReport(ReportPart):
    """The stage that trains the adapter beside the quantized weights."""

    text: TextReport = Field(description="All training sequences of the dataset, and their tokens.")
    dataset_kind: Literal["hub", "local", "upload", "builtin"] | None = Field(
        default=None, description="Where the dataset is; null: an older report."
    )
    learning_rate: float | None = Field(default=None, description="After warm-up, before decay.")
    batch_size: int | None = Field(default=None, description="Sequences a step, over all micro-batches and devices.")
    tokens_read: int | None = Field(default=None, description="By the steps, padding excluded, all attempts together.")
    held_out_sequences: int = Field(description="Sequences for validation, which are never trained on.")
    rows_cut: int = Field(description="Rows whose completion lost its end: the sequence was full.")
    rows_dropped: int = Field(description="Rows with nothing to learn within a sequence.")
    trainable_parameters: int
    steps: int = Field(description="Steps asked for.")
    steps_done: int
    steps_kept: int = Field(description="Steps after which the parameters are that were kept.")
    steps_resumed: int = Field(description="Steps taken over from previous attempts.")
    stopped_early: bool
    losses: tuple[LossPoint, ...]
    loss_before: float | None = Field(description="On held-out sequences, before training; null: there are none.")
    loss_after: float | None = Field(
        description="The same with the parameters that were kept, beside the quantized weights."
    )
    loss_shipped: float | None = Field(
        default=None, description="The same with the weights that ship, where the adapter lies in them; else null."
    )
    validations: tuple[Validation, ...]
    micro_batch: int = Field(description="Sequences that went through the model at once.")
    blocks_recomputed: int = Field(description="Blocks whose activations were computed again for the gradient.")
    weights_kept: bool = Field(description="Whether dequantized weights stayed in memory.")
    tokens_per_second: float = Field(description="Read by training steps, over all devices.")
    seconds: float = Field(description="Of training steps, all attempts together.")
    peak_device_bytes: int | None = Field(description="Most memory of the device that this stage held.")


class BitOperations(ReportPart):
    """Bit operations per token of gated adapters; activations count 16 bits. Against the same ranks at 16 bits."""

    adapter: int = Field(description="Of the adapters alone, as they are stored.")
    adapter_16bit: int
    adapter_saving: float = Field(description="Share that is saved.")
    model: int = Field(description="With the products of the quantized linears beside them.")
    model_16bit: int
    model_saving: float
    ranks: dict[str, int] = Field(description="By linear: the remaining rank.")
    bits: dict[str, tuple[int, int]] = Field(description="By linear: widths of A and B.")


class MergeReport(ReportPart):
    """The proof of a merge into quantized weights; errors are the largest over all weights, absolute."""

    codes_and_scales_kept: bool = Field(description="Whether hashes before and after are the same.")
    linears: int
    rounded: bool = Field(description="Whether offsets became integer zero points.")
    error_exact: float = Field(description="Of the algebra, in fp64.")
    error_stored: float = Field(description="With offsets or zero points as stored.")
    error_shipped: float = Field(description="Of the weights in the dtype that ships.")


class AdapterReport(ReportPart):
    """The adapters that were trained beside the quantized linears."""

    kind: str
    rank: int = Field(description="Of the request: of the LoRA with as many parameters.")
    inner_ranks: tuple[int, int] = Field(description="Least and largest real rank of an adapter.")
    parameters: int = Field(description="Trained numbers, gates included.")
    parameters_lora: int | None = Field(
        default=None, description="Of a LoRA of that rank on the same linears, to compare with."
    )
    flops_per_token: int = Field(description="Of a forward pass through all adapters.")
    bits_per_weight: float = Field(description="As stored in the adapter file, for each weight of the linears.")
    bit_operations: BitOperations | None = Field(default=None, description="Of kinds with gates.")
    merge: MergeReport | None = Field(default=None, description="None where nothing was folded.")
    before_merge: Figures | None = Field(
        default=None,
        description="With the adapter beside the quantized weights, as it was trained; None where nothing was merged. "
        "What ships is `quality`.",
    )


class AllocatedLinear(ReportPart):
    name: str
    bits: int = Field(description="Width of a code.")
    group_size: int
    scheme: str | None = Field(default=None, description="The scheme's name; null: integers or NormalFloat.")
    bits_per_weight: float = Field(description="Scales and zero points included, low-rank factors not.")
    absmax: str | None = Field(
        default=None, description="How a codebook's maxima are stored: width, dtype and groups of their scale."
    )


class AllocationReport(ReportPart):
    """Schemes of all linears, where a bit budget or a goal chose them."""

    average: float | None = Field(description="Bits per weight that were requested; null: a goal was.")
    over: Literal["linears", "model"] = Field(
        default="linears", description="What `average` and `reached` count: the linears alone, or the whole checkpoint."
    )
    reached: float = Field(description="Bits per weight that the choices take, of a budget never more.")
    error: float = Field(description="Sum over linears of what their choices cost in error.")
    gap: float = Field(description="At most this share of the error is above the least that the budget allows.")
    seconds: float = Field(description="Scoring and solving.")
    solver_seconds: float = Field(description="Solving alone.")
    linears: tuple[AllocatedLinear, ...]


class GoalReport(ReportPart):
    """The way to a goal that stood in place of bits."""

    goal: Literal["kl", "bytes", "memory"]
    limit: float = Field(description="As asked for: nats a token, or bytes.")
    weight_limit: int | None = Field(
        default=None, description="Bytes that the weight files may take: of memory, what the KV cache leaves."
    )
    cache_bytes: int | None = Field(default=None, description="Of the KV cache that memory was kept for.")
    text: TextReport | None = Field(description="Held-out calibration text of all figures here; null: none was left.")
    margin: float | None = Field(
        default=None, description="A point holds if KL on that text is at most `limit` divided by this: it is a sample."
    )
    frontier: tuple[FrontierPoint, ...] = Field(description="From the smallest to the largest that was looked at.")
    chosen: int = Field(description="Index in `frontier` of what was made.")
    rounds: int = Field(description="How often the model was quantized and measured on the way, all attempts together.")
    met: bool = Field(description="Whether the result keeps the limit: of kl on that text, of bytes in the files.")
    next_smaller_misses: bool | None = Field(
        description="Whether the point before was measured, and misses; null: there is none, or the goal is a size."
    )
    bytes: dict[str, int] = Field(default_factory=dict, description="Of weight files, by packed checkpoint.")
    seconds: float = Field(description="Of scoring and measuring, without the quantizing.")


class ModelReport(ReportPart):
    source: str = Field(description="Shorthand of the model source.")
    kind: Literal["hub", "local", "upload"] | None = Field(
        default=None, description="Where the model is; null: an older report."
    )
    revision: str | None
    architecture: str
    dtype: str
    parameters: int
    quantized_source: str | None = Field(
        default=None,
        description="What the source's weights were quantized as, whose error the result has too; null: they were not.",
    )


class StoredParts(ReportPart):
    """Bits per quantized weight by content; their sum is `bits_per_weight`."""

    codes: float
    scales: float = Field(description="Scales with zero points or offsets; the codebooks' absmax with all its levels.")
    codebooks: float
    adapters: float = Field(description="Low-rank factors, as stored.")


class SizeReport(ReportPart):
    """Sizes of the whole model, and then of what was quantized of it.

    Bytes of tensors, of which everything counts that the native format stores of the quantized linears.
    """

    bytes_files: dict[str, int] = Field(
        default_factory=dict, description="Of the weight files, by checkpoint. Empty: an older report."
    )
    bytes_original: int
    bytes_quantized: int
    bits_per_weight_model: float = Field(description="Of all parameters, embeddings and head included.")
    quantized_weights: int = Field(description="Weights that were quantized.")
    bits_per_weight: float = Field(
        description="Of the quantized linears alone, embeddings and head where they are, low-rank factors included."
    )
    parts: StoredParts | None = Field(default=None, description="The components of `bits_per_weight`.")


class PeakMemory(ReportPart):
    host_bytes: int
    device_bytes: int | None = None


class BaseTraining(ReportPart):
    """An adapter that a base job trained, as far as this job's start holds it."""

    adapter: str = Field(description="Its kind.")
    text: TextReport
    dataset_kind: Literal["hub", "local", "upload", "builtin"] | None = None
    steps: int = Field(description="Steps after which the parameters are that were kept.")
    folded: bool = Field(description="Whether it lies in the quantized weights; else training goes on from it.")


class BaseJobReport(ReportPart):
    """The base job whose result this one started from."""

    job_id: str
    blocks_adopted: int = Field(description="Blocks that were taken over as they are, none of them quantized again.")
    adapter_continued: bool = Field(
        description="Whether the adapter started at that job's values: trained ones, or factors that its method made."
    )
    training: tuple[BaseTraining, ...] = Field(
        default=(), description="What that job and those before it trained, the first one first."
    )


class WrittenText(ReportPart):
    """Texts that the original and a result wrote after the same words, each token the most likely one."""

    prompt: str
    original: str
    result: str
    tokens: int = Field(description="Of each of the two texts.")
    same: int = Field(description="Tokens from the first on that are the same in both.")


class LoadReport(ReportPart):
    """A try to read a checkpoint of the job in a runtime, in a process of its own without a network."""

    format: str = Field(description="Folder of the checkpoint.")
    runtime: str
    version: str | None = Field(default=None, description="Of the runtime, as it says itself; null: it said nothing.")
    read: Literal["block", "files"] = Field(
        description="block: one block in the job's schemes, before the rest was made. files: the whole checkpoint."
    )
    result: Literal["loads", "does_not_load", "differs", "not_checked"] = Field(
        description="differs: it loads, and computes something else than was made."
    )
    detail: str | None = Field(default=None, description="The runtime's own words, or why nothing was tried.")
    difference: float | None = Field(
        default=None, description="Of its logits from the engine's, root mean square, in standard deviations."
    )
    tokens_written: int | None = None
    written: WrittenText | None = Field(
        default=None, description="What they say, beside the original's; null: none were written, or none to compare."
    )
    seconds: float = 0.0


class Report(ReportPart):
    """The steps of a job and their outcome."""

    version: str = Field(description="Version of Bitwright.")
    method: str
    scheme: str | None = Field(
        default=None,
        description="What was asked for, in words: a scheme's or a mix's name, numbers of integers, or what each "
        "linear's was chosen for. null in reports of releases before.",
    )
    seed: int
    device: str
    plan: dict[str, str | int | float | bool | None] = Field(
        description="Decisions that the engine took: dtypes, micro-batch, where activations live."
    )
    model: ModelReport
    calibration: TextReport | None
    quality: Quality | None = Field(
        description="Of the checkpoints that were asked for, the first way to load them in `shipped`."
    )
    served: str | None = Field(
        default=None,
        description="What a server rounds besides weights and the figures of `quality`, `shipped` and "
        "`round_to_nearest` include, in words: inputs of linears, a key-value cache. null: nothing.",
    )
    shipped: tuple[ShippedFigures, ...] = Field(
        default=(),
        description="Every way to load what was stored, measured with the numbers that are stored: those of `quality` "
        "first, what is not the whole result last. Empty where nothing was evaluated.",
    )
    tasks: tuple[TaskReport, ...] = Field(default=(), description="Of `evaluation.tasks`, with what `quality` is of.")
    round_to_nearest: Figures | None = Field(
        default=None,
        description="Figures row of `quality`: round to nearest with the same schemes on the same text. None where "
        "nothing was measured, where the method is round to nearest itself, and where the row would cost a tenth of "
        "the job or more.",
    )
    embeddings: LinearReport | None = Field(
        default=None,
        description="The matrix of embeddings, where it was quantized; of a model that ties them the head's, too.",
    )
    head: LinearReport | None = Field(
        default=None, description="The output head, where it was quantized as a matrix of its own."
    )
    base_job: BaseJobReport | None = Field(default=None, description="None if this job quantized the model itself.")
    exported_from: str | None = Field(
        default=None,
        description="Id of the job that made the result, where this one only wrote it in other formats: all figures "
        "are of that one, but for time and memory.",
    )
    blocks: tuple[BlockReport, ...] = Field(
        description="As they were quantized, before scales were tuned together. With `base_job`, its errors of linears."
    )
    allocation: AllocationReport | None = Field(default=None, description="None if bits was not a budget, nor a goal.")
    goal: GoalReport | None = Field(default=None, description="None where the request had no goal.")
    scales: ScaleReport | None = Field(
        default=None, description="None if scales were not tuned end to end, or that was skipped; see the warnings."
    )
    finetuning: FinetuningReport | None = Field(default=None, description="None where nothing was trained.")
    cost: Money | None = Field(
        default=None,
        description="Of the time that the job's attempts took their devices. Added when the job ends, so that the file "
        "`report.json` has none; null: the service has no price.",
    )
    adapter: AdapterReport | None = Field(default=None, description="None where nothing was trained.")
    loads: tuple[LoadReport, ...] = Field(
        default=(), description="What runtimes of the worker made of the result, as far as `verify` asked for it."
    )
    size: SizeReport
    scales_rounded: dict[str, float] = Field(
        default_factory=dict,
        description="Formats that store scales in another dtype than they were fitted in, and had to round some: the "
        "largest relative error.",
    )
    seconds: dict[str, float] = Field(description="Wall time by stage; the stages add up to `total`.")
    peak_memory: PeakMemory
    blocks_computed: int = Field(description="Blocks quantized by this attempt.")
    blocks_resumed: int = Field(description="Blocks taken over from previous attempts.")
    warnings: tuple[str, ...] = ()

    def quality_of(self, checkpoint: str) -> Quality | None:
        """Quality of the complete result loaded from this folder: by itself if that can be, else with its adapter.

        For an adapter's folder: quality of the base with it. None if nothing was evaluated.
        """
        if self.quality is None:
            return None
        whole = [way for way in self.shipped if way.whole]
        figures = [way.figures for way in whole if checkpoint in way.checkpoints and way.adapter is None]
        figures += [way.figures for way in whole if checkpoint in (*way.checkpoints, way.adapter)]
        if not figures and checkpoint == ADAPTER_FOLDER:
            figures += [way.figures for way in whole if way.adapter is not None]
            figures += [] if self.adapter is None or self.adapter.before_merge is None else [self.adapter.before_merge]
        return self.quality.model_copy(update=figures[0].model_dump()) if figures else self.quality
