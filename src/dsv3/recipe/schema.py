"""The recipe: everything that decides what a training run computes, section by section.

Where the report (arXiv 2412.19437) gives a value, it is the default and its section is named; where no source
gives one, the docstring says so, and the default is our choice.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dsv3.recipe.network import ModelSection
from dsv3.recipe.parallel import ParallelSection, check_exchange, check_experts, check_micro_batches, check_pipeline
from dsv3.recipe.quantity import Length, Quantity
from dsv3.recipe.schedule import Schedules, round_down
from dsv3.recipe.section import Section
from dsv3.recipe.segment import Scheduled, ScheduledCount, as_segments

Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16", "fp8"]
Recomputable = Literal["norms", "mla_up", "swiglu"]
Sink = Literal["wandb", "trackio"]
Task = Literal["bpb", "tinypy", "needle", "position", "mtp"]


def _deviation_or_rule(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if not number and value != "fan_in":
        raise ValueError("expected a standard deviation above 0, or 'fan_in'")
    return value


class TokenizerSection(Section):
    """`[tokenizer]`: byte-level BPE (report, section 4.1). Its vocabulary size is `model.vocab_size`."""

    digits: int = Field(default=3, ge=1, le=3)
    """Most digits of a number that one token may hold; the released tokenizer takes 3."""
    training_bytes: Quantity = 20_000_000
    """Bytes of the training split that the merges are learned from; not published."""
    path: str | None = None
    """Directory of a finished tokenizer to use instead of training one."""


class Source(Section):
    """One corpus of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What logs, shards and scores call it; also the name of its directory."""
    uri: str
    """A file, a directory or a glob of text, here or at a URL that fsspec opens; `hf:NAME`, a data set of Hugging Face or a
    directory of one; `package:NAME`, the source of an installed Python package; or a corpus that comes with dsv3:
    `builtin:stdlib`, `builtin:tinypy`, `builtin:needle`."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the training tokens, relative to the other sources' weights."""
    tokens: Quantity | None = None
    """How many tokens of it to build at most; an endless source needs this."""


class DataSection(Section):
    """`[data]`: what is trained on, and how it is laid out (report, section 4.1)."""

    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    """The mixture. The report's own is not published."""
    sequence_length: Length = 4096
    """Tokens a sequence; the report: 4K (section 4.2)."""
    fim_rate: Fraction = 0.1
    """Share of the documents rearranged to prefix, suffix, middle (report, section 4.1)."""
    fim_unit: Literal["character", "line"] = "character"
    """What such a document is cut between, each place as likely as any other: characters, or lines; not published."""
    split_joined_rate: Fraction = 0.1
    """Share of the joined punctuation-and-newline tokens that are split at random while training (report, section
    4.1; the proportion is not published)."""
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents held out, chosen by a hash; ours."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of what is drawn up to the shards (generated documents, fill-in-the-middle); by default `training.seed`. Runs
    that share it have the same tokenizer, shards and held-out texts."""
    deduplicate: bool = False
    """Whether a document whose text came before, in any source or split, is left out; what the report does is not
    published in detail."""
    packing: Literal["best_fit", "in_order"] = "best_fit"
    """How documents fill the rows: `best_fit` cuts only those longer than a row (Ding et al. 2024, which the report cites in
    section 4.1, its own algorithm not being published); `in_order` lays them end to end and cuts where a row ends."""
    document_mask: bool = False
    """Whether a token sees only its own document; the report packs without it in pre-training (section 4.1)."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"expected sources with different names, and {sorted(twice)[0]!r} is there twice")
        return self


class OptimizerSection(Section):
    """`[optimizer]`: AdamW as in the report, section 4.2, or Muon for the matrices and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    """The update rule; the report: `adamw`."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of Adam's first and second moment (report, section 4.2)."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's addend to the denominator; not published."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What Adam's moments are kept in; the report: `bf16` (section 3.3.1)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay a unit of learning rate (report, section 4.2)."""
    decay_norms: bool = False
    """Whether the gains of norms decay too; not published."""
    decay_embedding: bool = True
    """Whether the embedding decays; not published. The head does."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global norm of the gradient (report, section 4.2)."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum; the report has no Muon."""
    muon_scale: float = Field(default=1.0, gt=0)
    """Learning rate of Muon's matrices as a multiple of the scheduled one."""

    @model_validator(mode="after")
    def _betas_decay(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected betas from 0 up to, but not including, 1, and found {list(self.betas)}")
        return self


class ScheduleSection(Section):
    """`[schedule]`: what changes while training. Each value is a number, or a list of segments."""

    learning_rate: Scheduled
    """Learning rate (report, section 4.2: five pieces, in `recipes/deepseek-v3/pretrain.toml`)."""
    batch_size: ScheduledCount
    """Sequences an optimizer step (report, section 4.2: 3072 to 15360)."""
    batch_size_multiple: Length = 1
    """What a changing batch size is rounded down to a multiple of, in sequences; not published."""
    mtp_weight: Scheduled = 0.3
    """Weight of the MTP loss, lambda (report, equation 25; 0.3, and 0.1 after 10T tokens)."""
    bias_update_speed: Scheduled = 0.001
    """Change of an expert's bias a step, gamma (report, section 2.1.2; 0.001, and 0 after 14.3T tokens). Used where
    `training.balance` is `bias`."""


class TrainingSection(Section):
    """`[training]`: how long, how exactly, from where."""

    tokens: Quantity
    """Where the training stops, in tokens; the report: 14.8T."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the order of the data and everything else that is drawn."""
    precision: Precision = "bf16"
    """Arithmetic of the matrix products; the weights the optimizer sees are FP32. `fp8` is the report's (section 3.3): the
    linear layers of attention and feed-forward in E4M3, the rest in BF16. Where there are no FP8 tensor cores it is emulated,
    slowly, with the same numbers up to the order of sums."""
    cuda_graphs: bool = True
    """Whether a GPU replays the passes of a micro-batch as a CUDA graph, which spares the host; the result is the same. In `fp32`
    it never does: the host has to read there how many rows each expert has."""
    fp8_scaling: Literal["tiles", "gradient_blocks", "tensors"] = "tiles"
    """What one FP8 scale covers: `tiles` is the report's choice (section 3.3.2). The others are there to compare it with:
    gradients in 128 x 128 blocks (appendix B.2), one scale a tensor."""
    device: str = "auto"
    """Where to train: `cpu`, `cuda`, `cuda:1`, or `auto` for the first GPU if there is one."""
    micro_batch_size: Length | None = None
    """Sequences in one forward pass, a divisor of every batch size; by default the whole batch."""
    balance: Literal["bias", "sequence", "batch"] = "bias"
    """What keeps the experts' loads even: `bias` moves the routing biases (report, section 2.1.2) and adds a small
    sequence-wise loss; `sequence` and `batch` leave the biases alone and rely on an auxiliary loss over each sequence, or
    over the whole batch (section 4.5.3). `batch` with several micro-batches takes a forward pass more, to count the loads."""
    balance_alpha: float = Field(default=1e-4, ge=0)
    """Weight of the balance loss, alpha (report, equation 17: 1e-4 beside the biases). `sequence` and `batch` need one of
    their own, which is not published; DeepSeek-V2 has 0.003."""
    initialization: Annotated[float | Literal["fan_in"], BeforeValidator(_deviation_or_rule)] = 0.006
    """Standard deviation of the initial weights (report, section 4.2), or `fan_in`: one over the root of the inputs."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay a step of an average of the weights, kept in CPU memory and evaluated beside them; none by default. The report
    keeps one (section 3.2.3) and does not publish its decay."""
    recompute: Annotated[tuple[Recomputable, ...], Field(strict=False)] = ()
    """What backward computes again instead of keeping it: `norms`, `mla_up`, `swiglu` (report, sections 3.2.3 and 3.3.3); the
    result is the same."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Steps in a row that may be skipped because loss or gradient is not finite; one more ends the run. Ours."""
    checkpoint_every_steps: Length | None = None
    """Steps between checkpoints; by default one at the end."""
    keep_last: Length | None = None
    """Newest checkpoints that are kept; by default all."""
    keep_every_steps: Length | None = None
    """Checkpoints of every so many steps that are kept beside those."""
    evaluate_every_steps: Length | None = None
    """Steps between evaluations; by default one before and one after."""
    load_every_steps: Length = 10
    """Steps between records of every expert's load."""

    @model_validator(mode="after")
    def _keeps_some_of_several(self) -> Self:
        if self.keep_every_steps is not None and self.keep_last is None:
            raise ValueError("expected keep_last beside keep_every_steps: without it, all checkpoints are kept")
        return self

    @model_validator(mode="after")
    def _auxiliary_loss_has_a_weight(self) -> Self:
        if self.balance != "bias" and "balance_alpha" not in self.model_fields_set:
            raise ValueError(
                f"training.balance = '{self.balance}' needs training.balance_alpha: its default, 1e-4, is for the loss beside "
                "the biases; DeepSeek-V2 has 0.003"
            )
        return self


class ExtensionSection(Section):
    """`[extension]`: for `dsv3 extend`, a training that goes on from the weights of another at a greater length (report,
    section 4.3). Where it goes to is `data.sequence_length`, how positions are scaled `model.rope_scaling`.
    """

    initial_from: str
    """The run, checkpoint or Hugging Face directory to start from; its tokenizer is used as well."""
    from_length: Length
    """The sequence length it was trained with: a start of another length is refused, so that phases keep their order."""
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    """Whether the optimizer forgets the phase before; not published. `fresh` starts from published weights as well."""


class LoggingSection(Section):
    """`[logging]`: where figures go beside `metrics.jsonl` and TensorBoard, which are always written."""

    sinks: Annotated[tuple[Sink, ...], Field(strict=False)] = ()
    """`wandb`, `trackio`: services that are not part of dsv3 and must be installed."""
    project: str = "dsv3"
    """What the run belongs to there."""


class EvaluationSection(Section):
    """`[evaluation]`: what is measured while training; ours."""

    tasks: Annotated[tuple[Task, ...], Field(strict=False)] = ("bpb", "tinypy")
    """What is measured: bits per byte, tasks (where a source is `builtin:tinypy`), needles in haystacks, loss by position,
    how often the MTP modules' drafts are accepted."""
    bits_per_byte_bytes: Quantity = 200_000
    """Held-out bytes scored, a source; also those that loss by position and drafts are taken over."""
    validation_tokens: Quantity = 50_000
    """Held-out tokens of a source, packed as in training, that the validation loss is taken over."""
    tinypy_tasks: int = Field(default=0, ge=0)
    """Held-out function-writing tasks tried."""
    needle_lengths: Annotated[tuple[Length, ...], Field(strict=False)] = ()
    """Tokens of the haystacks; by default a quarter, a half, three quarters and the whole of `data.sequence_length`."""
    needle_depths: int = Field(default=5, ge=2)
    """Places of the needle, evenly from the beginning to the end."""
    needle_samples: int = Field(default=4, ge=1)
    """Haystacks of each length and place."""
    sample_prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Prompts that are continued for the reader."""


class Recipe(Section):
    """One training run. Frozen; made by `load` or `from_dict`, which explain what is wrong with a written recipe."""

    model: ModelSection = ModelSection()
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    training: TrainingSection
    parallel: ParallelSection = ParallelSection()
    extension: ExtensionSection | None = None
    """Where `dsv3 extend` goes on from; a recipe of a training from the beginning has no such section."""
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()
    notes: dict[str, str] = Field(default_factory=dict)
    """Why the recipe is as it is, by topic: shown before the first step and in the report; changes nothing."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """The recipe in a TOML file, with overrides such as `"optimizer.weight_decay=0.05"` applied.

        Raises `UserError` naming file, line and key for whatever is wrong.
        """
        from dsv3.recipe.load import load_recipe

        return load_recipe(path, overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> "Recipe":
        """The recipe that nested mappings describe (`to_dict`'s result is one); `UserError` as in `load`."""
        from dsv3.recipe.load import read_recipe

        return read_recipe(values, overrides)

    @property
    def data_seed(self) -> int:
        """The seed of everything up to the shards."""
        return self.training.seed if self.data.seed is None else self.data.seed

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, complete but for `model`, which holds the preset and what differs from it; `from_dict` reads it."""
        return self.model_dump(mode="json")

    def micro_batches(self, batch_size: int) -> int:
        """Micro-batches that a batch of so many sequences is on one data-parallel rank: what its pipeline's schedule is made for."""
        micro = self.training.micro_batch_size
        return batch_size // (self.parallel.data * micro) if micro is not None else 1

    def content(self) -> dict[str, Any]:
        """All that decides the result, JSON-able: every section but the notes, with the network written field by field.

        A preset and the same network written out have equal content.
        """
        content = self.to_dict()
        content["model"] = self.model.config().to_hf()
        del content["notes"]
        return content

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        config, training = self.model.config(), self.training
        longest = config.max_position_embeddings
        if self.data.sequence_length > longest:
            raise ValueError(
                f"data.sequence_length = {self.data.sequence_length}: expected at most "
                f"model.max_position_embeddings = {longest}; shorten the one or raise the other"
            )
        if self.extension is not None and self.extension.from_length >= self.data.sequence_length:
            raise ValueError(
                f"extension.from_length = {self.extension.from_length}: expected less than data.sequence_length = "
                f"{self.data.sequence_length}, which it is extended to"
            )
        if self.extension is not None and self.tokenizer.path is not None:
            raise ValueError(
                "tokenizer.path and extension.initial_from are both there: an extension keeps the tokenizer of its start; "
                "leave tokenizer.path out"
            )
        check_experts(self.parallel, config.n_routed_experts)
        check_exchange(self.parallel, training.device)
        check_pipeline(self.parallel, config.num_hidden_layers, training.micro_batch_size, training.balance)
        self._check_batches()
        for size in Schedules.resolve(self).batch_sizes:
            check_micro_batches(self.parallel, size, self.micro_batches(size))
        return self

    def _check_batches(self) -> None:
        """`ValueError` where a batch is not whole micro-batches on every data-parallel rank."""
        ranks, micro = self.parallel.data, self.training.micro_batch_size
        unit = ranks * (micro or 1)
        factors = {"parallel.data": ranks, "training.micro_batch_size": micro or 1}
        of = " x ".join(f"{key} = {factor}" for key, factor in factors.items() if factor > 1)
        segments, multiple = as_segments(self.schedule.batch_size), self.schedule.batch_size_multiple
        for size in (round_down(value, multiple) for segment in segments for value in segment.values):
            if size % unit:
                raise ValueError(
                    f"schedule.batch_size = {size} is no multiple of {of}: expected a batch of "
                    f"{max(size // unit, 1) * unit} or {-(-size // unit) * unit} sequences, or another "
                    f"{'micro-batch' if ranks == 1 else 'layout'}"
                )
        if any(segment.kind != "constant" for segment in segments) and multiple % unit:
            raise ValueError(
                f"schedule.batch_size_multiple = {multiple}: expected a multiple of {of}, because the batch size changes "
                "while training"
            )
