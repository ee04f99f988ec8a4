"""Trains a small Llama from scratch on a prepared dataset, as a teacher if no other has the dataset's tokenizer.

    indra teacher --data data/mixed_train --output checkpoints/teacher

It is a run like that of the student, with the same engine, loop, checkpoints and metrics. Its loss is only the
cross-entropy, and it uses Muon for the layers. At its end the teacher is saved in Hugging Face's format.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from indraquantum.config import TeacherSettings, usual_mlp_width
from indraquantum.data.dataset import PreparedDataset, open_dataset
from indraquantum.data.fast_tokenizer import save_tokenizer
from indraquantum.data.system_errors import system_errors_shown
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.files import atomic_folder, write_sums
from indraquantum.interrupts import Interrupts
from indraquantum.kernels.measured import way_for
from indraquantum.kernels.ways import using
from indraquantum.model.masks import document_mask_for
from indraquantum.progress import tell
from indraquantum.strategy import RATES, Stage, Strategy, check_decay
from indraquantum.teacher.refusals import quiet_transformers
from indraquantum.trackers import require_tracker
from indraquantum.training.engine import Engine
from indraquantum.training.folders import HeldFolders, metrics_path_of
from indraquantum.training.loop import complete, evaluate
from indraquantum.training.optimizers import MUON_GROUP, MuonAdamW
from indraquantum.training.parallel import SingleProcess, WeightAverage, choose_precision
from indraquantum.training.plan import Plan, RunStage
from indraquantum.training.run import (
    FREE_SETTINGS,
    Run,
    check_resume,
    choose_attention,
    computed_by,
    model_fits,
    sampler_of,
    stage_identity,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class TeacherReport:
    """The result of training a teacher."""

    folder: Path
    parameters: int
    tokens: int  # real tokens seen
    held_out: dict[str, float]  # cross-entropy per source, nats per token


class LlamaLearner(nn.Module):
    """A Llama with tied embeddings as a learner. It has no bias, no scale and no readouts."""

    bias_V = None
    scale = None

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    @property
    def config(self) -> PretrainedConfig:
        """The Llama's configuration."""
        return self.llama.config

    @property
    def backbone(self) -> nn.Module:
        """The Llama's layers."""
        return self.llama.model

    def lift_table(self, ids_R: Tensor | None = None) -> Tensor:
        """The embedding table (V, D), or its rows (R, D) of the tokens `ids_R`."""
        weight = self.llama.get_input_embeddings().weight
        return weight if ids_R is None else nn.functional.embedding(ids_R, weight)

    def hidden_states(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, segment_ids_BT: Tensor, table_VD: Tensor | None
    ) -> Tensor:
        """Return the states (B, T, D) after the last norm. Documents of a packed row don't see each other."""
        table_VD = self.lift_table() if table_VD is None else table_VD
        return self.backbone(
            inputs_embeds=nn.functional.embedding(input_ids_BT, table_VD),
            position_ids=position_ids_BT,
            attention_mask=document_mask_for(self.config._attn_implementation, segment_ids_BT, table_VD.dtype),
            use_cache=False,
        ).last_hidden_state

    def logits(self, states: Tensor, table_VD: Tensor) -> Tensor:
        """Return the logits (..., V) of `states` (..., D)."""
        return nn.functional.linear(states, table_VD)

    def amplitude(self, states_ND: Tensor) -> None:
        """Return None, because a Llama has no readouts."""


def check_heads(settings: TeacherSettings) -> None:
    """Check the shape of the Llama.

    Raises:
        UserError: the heads don't divide the width into even parts.
    """
    if settings.width % (2 * settings.heads):
        raise UserError("--heads", settings.heads, f"must divide --width {settings.width} into parts of an even width")


def new_llama(settings: TeacherSettings, dataset: PreparedDataset) -> nn.Module:
    """Return a new LlamaForCausalLM with tied embeddings for the dataset's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = dataset.tokenizer
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocabulary_size,
            hidden_size=settings.width,
            intermediate_size=usual_mlp_width(settings.width),
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=max(2048, dataset.row_length),
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            tie_word_embeddings=True,
            initializer_range=settings.width**-0.5 / 2,
        )
    )


def parameter_groups(learner: LlamaLearner, settings: TeacherSettings) -> list[dict]:
    """Return the optimiser's groups. Table and matrices have their own rates, and matrices have weight decay."""
    table = learner.lift_table()
    rest = [p for p in learner.parameters() if p is not table]
    groups = {
        "table": ([table], settings.table_rate, 0.0),
        MUON_GROUP: ([p for p in rest if p.ndim > 1], settings.muon_rate, settings.weight_decay),
        "others": ([p for p in rest if p.ndim <= 1], 1.0, 0.0),
    }
    return [
        {"name": name, "params": parameters, "lr": settings.learning_rate, "rate": rate, "weight_decay": decay}
        for name, (parameters, rate, decay) in groups.items()
    ]


def teacher_plan(settings: TeacherSettings, dataset: PreparedDataset) -> Plan:
    """Return the plan of a teacher's run: one stage over all rows, with only the cross-entropy."""
    spec = Stage(name="teacher", steps=settings.steps, **{name: getattr(settings, name) for name in RATES})
    stage = RunStage(
        number=0,
        spec=spec,
        settings=settings,
        dataset=dataset,
        train=dataset.train,
        first=0,
        steps=settings.steps,
        first_epoch=0,
    )
    return Plan(Strategy(stages=(spec,)), dataset, (stage,))


def run_folder(settings: TeacherSettings) -> Path:
    """Return the folder for the run's checkpoints. It is beside the teacher's folder, which holds nothing else."""
    return settings.output.with_name(f"{settings.output.name}_run")


def start_teacher(settings: TeacherSettings, plan: Plan, device: torch.device) -> Run:
    """Return the run of a teacher at its first step, with seeded weights and a new optimiser."""
    torch.manual_seed(settings.seed)
    with model_fits(device):
        learner = LlamaLearner(new_llama(settings, plan.dataset)).to(device).train()
    precision, sampler = choose_precision(settings, device), sampler_of(settings.softmax, plan)
    choose_attention(learner.backbone, plan, precision, device)
    parallel = SingleProcess(learner, precision=precision)
    chosen = settings.model_dump(mode="json", exclude=FREE_SETTINGS)
    stages = {stage.spec.name: stage_identity(stage, plan) for stage in plan.stages}
    return Run(
        settings=settings,
        plan=plan,
        engine=Engine(parallel, MuonAdamW(parameter_groups(learner, settings)), sampler=sampler),
        device=device,
        average=WeightAverage(learner, 0.0),
        identity={**chosen, "data": plan.dataset.content_sha256, "stages": stages, **computed_by(precision)},
        folder=run_folder(settings),
        name="teacher",
        epoch_checkpoints=False,  # a teacher often sees its rows many times
    )


def pretrain_teacher(settings: TeacherSettings) -> TeacherReport:
    """Train a teacher with `settings`, or resume its run, and save it with its tokenizer.

    After the first SIGTERM, SIGINT or SIGHUP, the run finishes the current step, writes a checkpoint and ends. A second
    SIGTERM or SIGINT ends it at once.

    Raises:
        UserError: settings or data don't fit, or a folder holds something else or is in use.
        TrainingStopped: the loss or a gradient is not finite.
        Interrupted: a signal came.
    """
    metrics_path = metrics_path_of(settings)
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        check_decay(settings)
        require_tracker(settings.log_to)
        device = choose_device(settings)
        if settings.data.is_file():
            raise UserError("--data", settings.data, "must be the packed folder, which has a tokenizer")
        dataset = open_dataset("--data", settings.data, verify=True)
        check_replaceable(settings.output)
        if metrics_path.parent.resolve() == settings.output.resolve():
            allowed = "must not put the metrics into the teacher's folder, which is replaced as a whole"
            raise UserError("--logs", settings.logs, allowed)
        plan = teacher_plan(settings, dataset)
        check_heads(settings)
        check_resume(settings.resume, run_folder(settings), plan)
        folders = HeldFolders(run_folder(settings), metrics_path.parent, stack)
        stack.enter_context(using(way_for(device)))
        run = start_teacher(settings, plan, device)
        complete(run, metrics_path, interrupts, folders)
        held_out = run.held_out or evaluate(run)
        save_teacher(run.model, dataset, settings.output)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in held_out.items())
    tell(f"teacher after {run.tokens:,} tokens: held-out cross-entropy (nats/token) {figures}; wrote {settings.output}")
    return TeacherReport(settings.output, sum(p.numel() for p in run.model.parameters()), run.tokens, held_out)


def check_replaceable(folder: Path) -> None:
    """Check that a new teacher may replace `folder`: it must be new, empty, or hold an earlier teacher.

    Raises:
        UserError: it is the current folder, a file, or holds something else.
    """
    if folder.resolve() == Path.cwd():
        raise UserError("--output", folder, "must not be the current folder")
    if not folder.exists():
        return
    there = list(folder.iterdir()) if folder.is_dir() else [folder]
    is_teacher = {"config.json", "model.safetensors"} <= {path.name for path in there}
    if there and (not is_teacher or any(path.is_dir() for path in there)):
        raise UserError("--output", folder, "must be new, empty, or an earlier teacher's folder, which is replaced")


def save_teacher(learner: LlamaLearner, dataset: PreparedDataset, folder: Path) -> None:
    """Save the Llama and its tokenizer, so that AutoModelForCausalLM and AutoTokenizer can load them."""
    # Without its bar for a single small file.
    with system_errors_shown(folder), atomic_folder(folder) as temporary, quiet_transformers():
        learner.llama.save_pretrained(temporary)
        save_tokenizer(dataset.tokenizer, temporary)
        write_sums(temporary)
