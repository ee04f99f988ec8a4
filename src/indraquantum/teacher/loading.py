"""Loads a teacher from its files, and makes sure that it can teach a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from indraquantum.errors import UserError
from indraquantum.files import read_json
from indraquantum.teacher.checks import is_causal, packs_right, telling_rows
from indraquantum.teacher.gguf_teacher import apply_rope_factors, completed
from indraquantum.teacher.refusals import quiet_transformers, refused_in_one_line
from indraquantum.teacher.teacher_files import TeacherFiles
from indraquantum.teacher.teacher_model import Teacher, keep_weights_rounded, pieces_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from indraquantum.data.prepared import PreparedDataset
    from indraquantum.data.split import Batch


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the format of the weights that `--precision` means on a device; see `load_teacher`."""
    import torch

    from indraquantum.device import best_16_bits

    if device.type == "cuda" and precision == "auto":
        return best_16_bits()
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)


def precision_name(device: torch.device, precision: str) -> str:
    """Return the precision that `--precision` means on a device, without auto; see `load_teacher`."""
    return "mixed" if precision == "mixed" else str(compute_dtype(device, precision)).removeprefix("torch.")


def is_quantised(files: TeacherFiles) -> bool:
    """Return whether the teacher's weights stay quantised when they are loaded. Those of a GGUF file don't.

    Raises:
        UserError: the configuration is not that of a causal LM.
    """
    return getattr(teacher_config(files), "quantization_config", None) is not None and not files.gguf


def teacher_config(files: TeacherFiles) -> PretrainedConfig:
    """Return the teacher's configuration.

    Raises:
        UserError: it is not that of a causal LM.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    about = None if files.gguf else read_json(files.field, files.folder / "config.json")
    if isinstance(about, dict) and about.get("auto_map") and about.get("model_type") not in CONFIG_MAPPING:
        allowed = f"must have an architecture that transformers knows; {about.get('model_type')} needs code of its own"
        raise UserError(files.field, files.name, f"{allowed}, which this program never runs")
    with refused_in_one_line(files), quiet_transformers():
        config = AutoConfig.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=False, **_gguf_option(files)
        )
        if files.gguf:
            config = completed(files.gguf, config)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{config.model_type} is not a causal LM")
        if config.is_encoder_decoder:
            raise ValueError(f"{config.model_type} has an encoder, which needs a second text")
        return config


def load_teacher(
    files: TeacherFiles, dataset: PreparedDataset, device: torch.device, precision: str = "auto"
) -> Teacher:
    """Load the teacher and make sure that it can teach this dataset.

    Args:
        files: from `find_teacher`.
        dataset: the dataset that it is to teach.
        device: the device on which it computes.
        precision: float32, bfloat16, float16, mixed (see `Teacher`), or auto: float32 on the CPU, whatever format it
            was saved in; bfloat16 (float16 on old cards) on CUDA.

    Raises:
        UserError: it is not a causal LM, lacks weights, has fewer tokens than the dataset, or too short a context.
    """
    from indraquantum.model.attention import SHORT

    dtype = compute_dtype(device, precision)
    model = load_model(files, dtype, device)
    longest = max(int(split.pieces[:, 1].max()) for split in (dataset.train, dataset.validation))
    _check_sizes(files, model.config, dataset, longest)
    with refused_in_one_line(files):
        model = model.eval().requires_grad_(False)
        if precision == "mixed":
            keep_weights_rounded(model)
            if device.type == "cpu" and dataset.row_length < SHORT:
                model.set_attn_implementation("eager")
        name = precision_name(device, precision)
        teacher = Teacher(model, device, name, dataset.tokenizer.vocabulary_size)
        _check_answers(files, teacher, telling_rows(dataset))
    return teacher


def _check_sizes(files: TeacherFiles, config: PretrainedConfig, dataset: PreparedDataset, longest: int) -> None:
    """Refuse a teacher with fewer tokens than the dataset, or with a context shorter than the longest piece."""
    about, wanted = config.get_text_config(), dataset.tokenizer.vocabulary_size
    if about.vocab_size < wanted:
        raise UserError(files.field, files.name, f"must have the dataset's {wanted} tokens, not {about.vocab_size}")
    context = getattr(about, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise UserError(files.field, files.name, f"must read {longest} tokens at once, but its context is {context}")


def _check_answers(files: TeacherFiles, teacher: Teacher, rows: Batch) -> None:
    """Refuse a teacher that is not causal, and find out whether and how it takes packed rows."""
    longest = max((rows.input_ids[row, columns] for row, columns in pieces_of(rows)), key=len)
    logits_TV = teacher.alone(longest)
    if logits_TV.shape[-1] < teacher.vocabulary_size:
        allowed = f"must have the dataset's {teacher.vocabulary_size} tokens, not {logits_TV.shape[-1]}"
        raise UserError(files.field, files.name, allowed)
    if not logits_TV.amax(-1).isfinite().all():
        raise UserError(files.field, files.name, "must give finite logits, but gives nan or inf")
    if not is_causal(teacher, longest):
        allowed = "must be causal, but a later token changes its logits at earlier positions, as in BERT"
        raise UserError(files.field, files.name, allowed)
    for layered in sorted({teacher.layered, False}, reverse=True):
        teacher.layered, teacher.packed = layered, True
        if packs_right(teacher, rows):
            return
    teacher.packed = False


def load_model(files: TeacherFiles, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Load the teacher's model as it is, without a dataset, onto the device.

    Raises:
        UserError: transformers can't load it, it lacks weights, or the device has no room for it.
    """
    from transformers import AutoModelForCausalLM

    config = teacher_config(files)
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True, "trust_remote_code": False}
    if getattr(config, "quantization_config", None) is not None:
        options["device_map"] = {"": device}
    if files.gguf:
        from transformers import GgufConfig

        # Without `dequantize` transformers counts the model as quantised and may keep the weights packed.
        options |= {"config": config, "quantization_config": GgufConfig(dequantize=True), **_gguf_option(files)}
    with refused_in_one_line(files), quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(files.folder, attn_implementation="sdpa", **options)
        except (ValueError, ImportError):  # the architecture does not have this attention
            model, info = AutoModelForCausalLM.from_pretrained(files.folder, **options)
    if missing := sorted(info["missing_keys"]):
        allowed = f"must have all of its weights, but {len(missing)} are missing, such as {missing[0]}"
        raise UserError(files.field, files.name, allowed)
    if files.gguf:
        apply_rope_factors(files.gguf, model)
    if "device_map" in options:  # a quantised model stays where it was loaded
        return model
    with refused_in_one_line(files):
        return model.to(device)


def _gguf_option(files: TeacherFiles) -> dict[str, str]:
    """Return the option of transformers that names the file of a GGUF teacher."""
    return {"gguf_file": files.gguf.path.name} if files.gguf else {}
