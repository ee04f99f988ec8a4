#!/usr/bin/env bash
# transformers 5.23.0: Trainer(label_smoothing_factor=...) shifts the labels of its own causal models, but not those of a
# causal model that was registered with AutoModelForCausalLM.register. It looks for the class's name in a table of its own
# models, which register does not extend. So such a model is taught to copy its input, without a warning; with a factor of
# 0 the same model learns the next token.
# Seen with transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 on Python 3.11:
#     LlamaForCausalLM: the smoothed loss of the next token; a registered model: that of the same token
# Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0
cat > compare.py <<'PYTHON'
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY, SMOOTHING = 11, 0.1


class OwnConfig(PreTrainedConfig):
    model_type = "own-bigram"


class OwnModel(PreTrainedModel):
    """A causal model as small as can be: its logits depend on the current token alone."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.post_init()

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.table(input_ids)
        loss = None if labels is None else self.loss_function(logits, labels, VOCABULARY)
        return CausalLMOutput(loss=loss, logits=logits)


def smoothed(log_probs, targets):
    of_targets = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    return -((1 - SMOOTHING) * of_targets + SMOOTHING * log_probs.mean(-1)).mean().item()


AutoConfig.register("own-bigram", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnModel)
torch.manual_seed(0)
ids = torch.randint(0, VOCABULARY, (4, 9))
llama = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)
told = {}
for model in (LlamaForCausalLM(llama), AutoModelForCausalLM.from_config(OwnConfig())):
    arguments = TrainingArguments("out", label_smoothing_factor=SMOOTHING, use_cpu=True, report_to=[])
    with torch.no_grad():
        loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()}).item()
        log_probs = model(input_ids=ids).logits.log_softmax(-1)
    following, same = smoothed(log_probs[:, :-1], ids[:, 1:]), smoothed(log_probs, ids)
    print(f"{type(model).__name__}: Trainer {loss:.5f}, next token {following:.5f}, same token {same:.5f}")
    told[type(model).__name__] = (abs(loss - following) < 1e-4, abs(loss - same) < 1e-4)
raise SystemExit(told != {"LlamaForCausalLM": (True, False), "OwnModel": (False, True)})
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python compare.py
