"""Every option of every command, once: the field's docstring is the `--help` text, its bounds are the check.

Settings are frozen and strict: an unknown name or a value out of range is refused with the field, the value and what
is allowed. This module imports nothing heavy, so that `indra --help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
WIKITEXT = "Salesforce/wikitext"
ALPACA = (
    "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/"
    "761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json"
)


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown names, the docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DeviceSettings(Settings):
    """Where a command computes."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads; 0 leaves the choice to torch. The same number gives the same bits."""


class PrepareSettings(Settings):
    """Text to training rows."""

    wikitext: str = WIKITEXT
    """WikiText: a text file or table as for --text, or a dataset's id on the hub, maybe id@revision."""
    alpaca: str = ALPACA
    """Stanford Alpaca: a file as for --instructions, or a URL, maybe with #sha256=HEX to pin its content."""
    tokenizer: str = TINYLLAMA
    """Tokenizer: a folder with tokenizer.json or tokenizer.model, such a file, or a hub id, maybe id@revision."""
    document_start: Literal["auto", "bos", "eos", "none"] = "auto"
    """What documents begin with: BOS, EOS, or nothing; auto does as the tokenizer's own models expect."""
    wikitext_samples: int = Field(default=22_000, ge=0)
    """WikiText paragraphs to draw; fewer than asked for takes all."""
    alpaca_samples: int = Field(default=52_000, ge=0)
    """Alpaca samples to draw; fewer than asked for takes all."""
    wikitext_weight: float | None = Field(default=None, gt=0, le=1000)
    """Draw this many times what WikiText holds in place of wikitext-samples: 0.5 half of it, 2 each one twice."""
    alpaca_weight: float | None = Field(default=None, gt=0, le=1000)
    """The same for Alpaca, in place of alpaca-samples."""
    text: tuple[str, ...] | None = None
    """Another text source: PATH, PATH=SAMPLES or PATH=WEIGHTx; may be repeated. docs/FORMATS.md says what it may be."""
    instructions: tuple[str, ...] | None = None
    """Another source of instructions: PATH, PATH=SAMPLES or PATH=WEIGHTx; may be repeated. See docs/FORMATS.md."""
    conversations: Literal["refuse", "single"] = "refuse"
    """Instructions that are lists of messages: refuse them, or read those of a single turn and leave out the others."""
    empty_noinput: bool = False
    """Take an input that says there is none, such as <noinput> or Noinput, as empty."""
    documents: Literal["auto", "paragraphs", "articles", "records"] = "auto"
    """A document of a text: a paragraph, an article, or a record; auto goes by the kind of file (docs/FORMATS.md)."""
    separator: str = Field(default="auto", min_length=1)
    """The line between two documents of a text, or blank-line; auto finds markers such as <|endoftext|>, or none."""
    detokenize: bool = False
    """Undo WikiText's own tokenisation: ` @-@ `, spaces before punctuation, `= Title =`."""
    duplicates: Literal["keep", "count", "exact", "near"] = "keep"
    """Copies of earlier samples: keep them, count near ones too, remove exact ones, or remove near ones as well."""
    skip_bad: bool = False
    """Leave out records that are wrong, with a count and a list in skipped.jsonl, in place of refusing the source."""
    max_length: int = Field(default=128, ge=8, le=32_768)
    """Tokens in a row."""
    output: Path = Path("data/mixed_train.pkl")
    """The pickle to write; the packed dataset stands beside it, named without .pkl."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides which samples are drawn and their order."""


class ShowSettings(Settings):
    """Which rows of a prepared dataset to look at."""

    tokenizer: str | None = None
    """The tokenizer of a pickle (folder, file or hub id); a packed folder carries its own."""
    split: Literal["train", "validation", "test"] = "train"
    """Which part of the dataset."""
    first: int = Field(default=0, ge=0)
    """Number of the first row to show, from 0."""
    rows: int = Field(default=3, ge=1)
    """How many rows."""


class CaptureSettings(DeviceSettings):
    """Asks the teacher once and stores its signals."""

    data: Path = Path("data/mixed_train")
    """The prepared dataset: the packed folder, or a pickle."""
    teacher: str = TINYLLAMA
    """Teacher with the dataset's tokenizer: folder or hub id (id@revision) of a causal LM, or a server's URL."""
    served_model: str | None = None
    """The model to ask a server for; by default the first that it lists."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests to a server at the same time."""
    requests_per_second: float = Field(default=0.0, ge=0, le=100_000)
    """Most requests to a server in a second; 0 sets no limit."""
    output: Path = Path("data/teacher_signals")
    """Folder for the signals; a capture that was stopped goes on there."""
    kind: Literal["sampled", "topk", "full"] = "sampled"
    """What to keep: sampled, random draws, which are unbiased; topk, the likeliest tokens, which tell only the sum of
    the others; or full, every token, which is large."""
    draws: int = Field(default=50, ge=1, le=65_535)
    """Tokens drawn from the teacher at each position."""
    top_k: int = Field(default=50, ge=1, le=65_535)
    """Likeliest tokens kept at each position, for the kind topk."""
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Temperature of the teacher's distribution when drawing."""
    batch_tokens: int | Literal["auto"] = "auto"
    """Tokens in one forward pass of the teacher, at least one row; auto takes what fits the free memory and helps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the teacher computes in; auto takes bfloat16 on CUDA (float16 on old cards) and float32 elsewhere."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Processes that ask the teacher, each with its own copy; the shards are the same for the same --threads."""
    engine: Literal["local", "ray"] = "local"
    """Where the workers run: on this machine, or on Ray's (pip install 'indraquantum[ray]')."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the draws."""

    @field_validator("batch_tokens", mode="before")
    @classmethod
    def _auto_or_positive(cls, value: object) -> object:
        if value == "auto" or (str(value).isdecimal() and int(str(value)) > 0):
            return value
        raise ValueError("must be auto, or a whole number from 1 on")


class ModelSettings(Settings):
    """The shape of IndraQuantumPhase2 and which variant of it is built."""

    d_model: int = Field(default=128, ge=2, le=65_536)
    """Complex width d; the transformer is 2d wide."""
    layers: int = Field(default=4, ge=1, le=1024)
    """Transformer layers."""
    heads: int = Field(default=4, ge=1, le=1024)
    """Attention heads; must divide the transformer's width into even parts."""
    mlp_width: int = Field(default=688, ge=1)
    """Inner width of each layer's gated MLP."""
    projector: Literal["quantum", "phase-only", "frozen", "gated", "linear", "mlp", "none"] = "quantum"
    """How token embeddings become states; all but quantum are controls."""
    head: Literal["interference", "born"] = "interference"
    """How a state becomes logits; born, Born's rule, is slow and for study only."""
    readout: Literal["reference", "mean"] = "reference"
    """How magnitude and phase are read: against learned reference states, or the prototype's mean."""
    magnitude: Literal["softplus", "exp", "linear"] = "linear"
    """What makes a magnitude of its linear map; a linear one may be negative, which turns the phase by pi."""
    phase_spread: float = Field(default=0.02, ge=0, le=100)
    """Standard deviation of the phases at the start, in radians."""
    table_std: float | None = Field(default=None, gt=0, le=100)
    """Standard deviation of the embedding table at the start; by default 1, or 0.5 for projectors linear and none."""
    residual: bool = False
    """Add the embedding to the real part of its state."""
    ends: Literal["shared", "separate"] = "separate"
    """One projector for inputs and head, or one for each, over the same table; --projector none has none."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the attention weights while training."""


class OptimizerSettings(Settings):
    """How any model here is optimised."""

    batch_tokens: int = Field(default=4096, ge=1)
    """Token positions in one optimiser step; at least one row is taken."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Token positions in one forward pass, at least one row; a larger step adds up gradients, the same but rounded."""
    learning_rate: float = Field(default=2e-3, gt=0, le=10)
    """Peak learning rate."""
    table_rate: float = Field(default=50.0, gt=0, le=1000)
    """The embedding table's learning rate, as a multiple of the rest's."""
    muon_rate: float = Field(default=2.0, gt=0, le=1000)
    """Muon's learning rate as a multiple of the rest's; its updates are scaled to be as large as AdamW's."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Part of the run, or of a strategy's stage, over which the learning rate rises from 0."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """What follows: a cosine down to the end, wsd (stable, then a straight decay), or the peak as it is."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Last part of the run, or of a stage, over which wsd decays."""
    final_rate: float = Field(default=0.1, ge=0, le=1)
    """Where cosine and wsd end, as a part of the peak."""
    weight_decay: float = Field(default=0.3, ge=0, le=10)
    """Decoupled weight decay of the matrices but the table; biases and norms have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the initial weights and the order of the rows."""


class TrainerSettings(Settings):
    """What a run does beside its plain steps."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """AdamW for everything, or Muon for the layers' matrices and AdamW for the rest."""
    projector_rate: float = Field(default=0.4, gt=0, le=1000)
    """The projector's learning rate, as a multiple of the rest's, where it has weights to learn."""
    table_weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Decoupled weight decay of the embedding table."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Format of the layers' products, weights and objective stay float32; auto takes 16 bits on CUDA alone."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, a third more work."""
    compile: bool = False
    """Compile the layers with torch.compile, where a compiler works."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is then what is evaluated, say 0.999; 0 keeps none."""
    keep_best: bool = False
    """Keep the checkpoint with the best held-out cross-entropy too, as checkpoint_v4_best.pt."""
    patience: int = Field(default=0, ge=0)
    """Stop after so many evaluations in a row without a better held-out cross-entropy; 0 never does."""


class RunSettings(Settings):
    """How a training run is logged, evaluated, saved and resumed."""

    logs: Path = Path("logs")
    """Folder for the logs. Metrics go to <logs>/<name of output>/metrics.jsonl."""
    log_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Log metrics to this tracker as well as to metrics.jsonl. Needs its package:
    pip install 'indraquantum[tensorboard]'."""
    evaluate_every: int = Field(default=200, ge=1)
    """Optimiser steps between two evaluations on held-out text."""
    save_every: int = Field(default=200, ge=1)
    """Optimiser steps between two step checkpoints (checkpoint_v4_step_S.pt). A crash loses at most this many steps."""
    keep_last: int = Field(default=2, ge=1)
    """Step checkpoints to keep. Older ones are removed."""
    on_collapse: Literal["warn", "stop", "ignore"] = "warn"
    """When predictions, phases, magnitudes or a loss term collapse: warn, or stop with exit status 3. ignore does not
    check for collapse."""
    resume: str = "auto"
    """auto resumes from the newest valid checkpoint of the run; never fails if there is one; or give the path of a
    checkpoint."""


class TrainSettings(ModelSettings, OptimizerSettings, TrainerSettings, RunSettings, DeviceSettings):
    """One run of semantic distillation, by default the unified one (v4).

    Options that are given replace the strategy's values; those in which its stages differ or clash with it are refused.
    """

    strategy: str = "v4-unified"
    """What learns when: v4-unified, stage1, stage2-v2-aggressive, stage2-v3-gentle, or a YAML (docs/FORMATS.md)."""
    start_from: Path | None = None
    """A checkpoint whose weights to start from; a stage2 strategy then leaves its stage 1 out."""
    data: Path = Path("data/mixed_train")
    """The prepared dataset: the packed folder, or a pickle."""
    tokenizer: str | None = None
    """The tokenizer of a pickle (folder, file or hub id); a packed folder carries its own."""
    signals: Path | None = None
    """The teacher's signals; by default the folder teacher_signals beside the data."""
    teacher: str = TINYLLAMA
    """Teacher to capture from where there are no signals yet: folder or hub id."""
    no_teacher: bool = False
    """Train on cross-entropy alone."""
    output: Path = Path("checkpoints/phase2_v4_unified")
    """Folder for the checkpoints. Each epoch leaves its own, checkpoint_v4_epoch_N.pt. The same command resumes from
    the newest one."""
    epochs: int = Field(default=3, ge=1, le=100_000)
    """Passes over the training rows; more extend a run whose rate is constant, or wsd that has not begun to decay."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimiser steps; the schedules then end there. More extend a run as more epochs do."""
    kd_weight_start: float = Field(default=0.01, ge=0, le=100)
    """Weight of the distillation term at the start of the run, where the strategy is v4-unified or this is given."""
    kd_weight_end: float = Field(default=0.05, ge=0, le=100)
    """Weight of the distillation term at its end; linear in between."""
    phase_weight: float = Field(default=0.1, ge=0, le=100)
    """Weight of the phase term (teacher's entropy)."""
    magnitude_weight: float = Field(default=0.1, ge=0, le=100)
    """Weight of the magnitude term (teacher's confidence)."""
    tail: Literal["auto", "bucket", "uniform", "none"] = "auto"
    """The probability that top-k signals don't store: bucket compares it as one lump, uniform spreads it over the other
    tokens, none ignores it. auto takes bucket for top-k signals; a run that is resumed keeps what it began with."""
    dry_run: bool = False
    """Print shapes, parameters, memory, FLOPs and the time to finish, from real steps that are thrown away."""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """What each process of a torchrun holds: the whole model (ddp, which auto takes), or a shard of it (fsdp2)."""


class LrTestSettings(TrainSettings):
    """The run to test learning rates for, with the options of train."""

    steps: int = Field(default=100, ge=10, le=100_000)
    """Optimiser steps at most; the test ends where the loss has clearly risen."""
    lowest_rate: float = Field(default=1e-5, gt=0, le=10)
    """Learning rate of the first step."""
    highest_rate: float = Field(default=1.0, gt=0, le=100)
    """Learning rate of the last step; in between it rises by equal ratios."""
    picture: Path = Path("lr_test.png")
    """Where to draw the loss over the rate: .png, .pdf or .svg."""


class TeacherSettings(OptimizerSettings, RunSettings, DeviceSettings):
    """Trains a small Llama teacher from scratch on a prepared dataset. The same command resumes after a stop."""

    learning_rate: float = Field(default=3e-3, gt=0, le=10)
    """Peak learning rate."""
    table_rate: float = Field(default=10.0, gt=0, le=1000)
    """The embedding table's learning rate, as a multiple of the rest's."""
    data: Path = Path("data/mixed_train")
    """The packed dataset to train on."""
    output: Path = Path("checkpoints/teacher")
    """Folder for the teacher, in Hugging Face's format. The run's checkpoints go to <output>_run beside it."""
    width: int = Field(default=256, ge=2)
    """Width of the Llama."""
    layers: int = Field(default=6, ge=1)
    """Transformer layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; must divide the width into even parts."""
    steps: int = Field(default=1000, ge=1)
    """Optimiser steps."""


class WeightsSettings(Settings):
    """Which of a checkpoint's weights to use."""

    weights: Literal["auto", "ema", "last"] = "auto"
    """The moving average of the weights, or the last ones; auto takes the average where the checkpoint has one."""


class TestSettings(WeightsSettings, DeviceSettings):
    """Writes text with a trained checkpoint."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    prompt: str | None = None
    """Text to continue."""
    instruction: str | None = None
    """An instruction to answer, put into the Alpaca prompt."""
    input: str | None = None
    """The instruction's input."""
    max_new_tokens: int = Field(default=64, ge=1, le=100_000)
    """Tokens to write at most."""
    temperature: float = Field(default=0.8, ge=0, le=100)
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Keep the likeliest tokens up to this probability mass."""
    top_k: int = Field(default=50, ge=0)
    """Keep this many of the likeliest tokens; 0 keeps all."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides what is sampled."""
    show_state: bool = False
    """Print each token's confidence and uncertainty, read from the model's own state where a teacher aligned it."""


class EvalSettings(WeightsSettings, DeviceSettings):
    """One checkpoint's figures on held-out text."""

    data: Path = Path("data/mixed_train")
    """The prepared dataset whose held-out documents are predicted."""
    split: Literal["validation", "test"] = "validation"
    """Which held-out documents. Keep test for a last report and choose nothing by it. Each reading of it is recorded
    beside the data."""
    text: str | None = None
    """A text to predict instead: a file or folder as for `indra prepare --text`, with documents as there."""
    row_length: int = Field(default=128, ge=8, le=32_768)
    """Tokens in a row of it; the model sees no further back. By default as `indra prepare` lays training text."""
    signals: Path | None = None
    """Teacher signals of the dataset, to correlate the model's readouts with; by default those beside it, if any."""
    json_file: Path | None = None
    """Write the figures here too."""


class AblateSettings(DeviceSettings):
    """Variants and seeds at equal training tokens, and one report of them all."""

    data: Path | None = None
    """The prepared dataset, in place of the plan's."""
    signals: Path | None = None
    """The teacher's signals, in place of the plan's."""
    output: Path | None = None
    """Folder for a JSON of each run and the report; by default results/<name of the plan>."""
    work: Path | None = None
    """Folder for checkpoints and logs of runs under way; by default runs/ablate/<name of the plan>."""
    jobs: int = Field(default=1, ge=1, le=1024)
    """Runs at the same time, each in a process of its own."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of each run. The same number gives the same bits."""
    only: tuple[str, ...] | None = None
    """A variant to run, and no other; may be repeated."""
    keep_checkpoints: bool = False
    """Leave the last checkpoint of each run in the work folder."""
    dry_run: bool = False
    """Print variants, parameters, steps and tokens, and run nothing."""
    final: bool = False
    """When all runs are done, measure each on the dataset's test split too, once, for a last report. It needs their
    checkpoints, and keeps those of the runs that are still to be done."""
    report_only: bool = False
    """Make the report anew from the JSONs that are there, and run nothing."""


class RunsSettings(Settings):
    """Where the runs are."""

    logs: Path = Path("logs")
    """The folder of the logs; every folder below it that holds a metrics.jsonl is a run."""


class BenchSettings(Settings):
    """Speed and memory beside the machine's own limits."""

    threads: int = Field(default=2, ge=1, le=1024)
    """CPU threads."""
    repeats: int = Field(default=7, ge=1, le=1000)
    """Measured rounds; the medians are printed."""
    quick: bool = False
    """Toy sizes, to see that it runs."""
    json_file: Path | None = None
    """Write the figures here too."""


class DemoSettings(DeviceSettings):
    """The whole pipeline on Python's own manual, offline."""

    output: Path = Path("demo")
    """Folder for everything the demo writes."""
    tiny: bool = False
    """The same path at toy size, in seconds."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides everything that is random."""
