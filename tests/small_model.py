"""A model small enough to compare with a reference value by value."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from indraquantum.model import IndraQuantumConfig, IndraQuantumPhase2

V, D_MODEL, HEADS, LAYERS, MLP = 53, 20, 2, 3, 31
# A table of another width than the states: narrower states, or wider ones.
NARROW = {"d_model": 11, "state_width": 7, "num_attention_heads": 1}
WIDE = {"d_model": 7, "state_width": 13, "num_attention_heads": 1}


def make(seed=0, attention="sdpa", **options):
    sizes = {"vocab_size": V, "d_model": D_MODEL, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    config = IndraQuantumConfig(attn_implementation=attention, **{**sizes, "intermediate_size": MLP, **options})
    torch.manual_seed(seed)
    return IndraQuantumPhase2(config).eval()


def tokens(*shape, seed=3):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))


def make_with_twin(**options):
    """The plain variant and transformers' own Llama of the same weights, which is what it must behave as."""
    model = make(projector="none", **options)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D_MODEL,
            num_attention_heads=HEADS,
            num_hidden_layers=LAYERS,
            intermediate_size=MLP,
            rms_norm_eps=model.config.rms_norm_eps,
            tie_word_embeddings=True,
            attn_implementation=options.get("attention", "sdpa"),
            pad_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        model.head.scale_1.fill_(1.0)
    model.head.requires_grad_(False)
    model.readout.requires_grad_(False)
    llama.model.load_state_dict({**model.backbone.state_dict(), "embed_tokens.weight": model.embedding.weight})
    return model, llama
