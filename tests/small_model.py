"""A model small enough to compare with a reference value by value."""

import torch

from indraquantum.model import IndraQuantumConfig, IndraQuantumPhase2

V, D_MODEL, HEADS, LAYERS, MLP = 53, 20, 2, 3, 31


def make(seed=0, attention="sdpa", **options):
    sizes = {"d_model": D_MODEL, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": MLP}
    config = IndraQuantumConfig(vocab_size=V, attn_implementation=attention, **{**sizes, **options})
    torch.manual_seed(seed)
    return IndraQuantumPhase2(config).eval()


def tokens(*shape, seed=3):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))
