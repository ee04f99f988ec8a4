"""Writes the model itself as a folder of transformers that needs nothing of this package.

The folder holds the model's code in one file (see standalone.py), which `trust_remote_code=True` allows transformers to
run. In a program that has imported indraquantum, the package's own class is used instead.
"""

from __future__ import annotations

from pathlib import Path

from indraquantum.config import ExportSettings, TestSettings
from indraquantum.data.fast_tokenizer import padding_id, save_chat_tokenizer
from indraquantum.inference.load import ALIGNED, Loaded
from indraquantum.inference.model_card import Exported
from indraquantum.inference.standalone import CODE_NAME, standalone_code
from indraquantum.teacher.refusals import quiet_transformers

EXAMPLE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
chat = [{"role": "user", "content": "Name three colours."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```"""


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Exported:
    """Write the model at `loaded` into `folder`."""
    model = loaded.model
    setattr(model.config, ALIGNED, sorted(loaded.aligned or ()))
    give_generation_config(model, loaded)
    with quiet_transformers():
        model.save_pretrained(folder)
    config = model.config.to_dict() | {"auto_map": auto_map()}
    model.config.from_dict(config).save_pretrained(folder)
    (folder / CODE_NAME).write_text(standalone_code(), encoding="utf-8")
    save_chat_tokenizer(loaded.tokenizer, folder, model.config.max_position_embeddings)
    return Exported(
        use='AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True) loads it without this package.',
        example=EXAMPLE,
        notes=(f"`{CODE_NAME}` is the model's code, which `trust_remote_code=True` lets transformers run.",),
    )


def auto_map() -> dict[str, str]:
    """Return what config.json says about the code."""
    module = Path(CODE_NAME).stem
    return {"AutoConfig": f"{module}.IndraQuantumConfig", "AutoModelForCausalLM": f"{module}.IndraQuantumPhase2"}


def give_generation_config(model: object, loaded: Loaded) -> None:
    """Give a model of transformers the sampling of `indra test`, and the tokens to stop at and to pad with.

    It says nothing about the length: there, max_new_tokens outweighs the max_length of a call (transformers 5.23), and
    vLLM takes it for the most that any request gets.
    """
    from transformers import GenerationConfig

    sampling, tokenizer = TestSettings(), loaded.tokenizer
    pad = padding_id(tokenizer)
    model.config.pad_token_id = pad
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        pad_token_id=pad,
    )  # fmt: skip
