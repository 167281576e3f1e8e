"""The same decoder and training step in PyTorch, in the manner of nanoGPT (https://github.com/karpathy/nanoGPT).

On a CPU eager and in float32; on a GPU with bfloat16 autocast and `torch.compile`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for y in self.qkv(x).split(width, dim=-1)
        )
        y = F.scaled_dot_product_attention(rotary(q, cos, sin), rotary(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, workload: Any):
        super().__init__()
        width, half = workload.width, workload.width // workload.heads // 2
        self.embed = nn.Embedding(workload.vocab, width)
        self.blocks = nn.ModuleList(Block(width, workload.heads, workload.hidden) for _ in range(workload.layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, workload.vocab, bias=False)
        angles = torch.outer(torch.arange(workload.length), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1), ignore_index=-1)


def load(model: Model, weights: Mapping[str, np.ndarray]) -> None:
    """Copies weights in; a Linear holds the transpose of a kernel."""
    state = {"embed.weight": weights["embed"], "norm.weight": weights["norm/scale"]}
    state["head.weight"] = weights["head/kernel"].T
    for i in range(len(model.blocks)):
        block = {name.removeprefix("blocks/"): w[i] for name, w in weights.items() if name.startswith("blocks/")}
        qkv = np.concatenate([block[f"attention/{part}/kernel"] for part in "qkv"], axis=1)
        state[f"blocks.{i}.attention.qkv.weight"] = qkv.T
        state[f"blocks.{i}.attention.out.weight"] = block["attention/o/kernel"].T
        state |= {
            f"blocks.{i}.{part}.weight": block[f"feed_forward/{part}/kernel"].T for part in ("gate", "up", "down")
        }
        state[f"blocks.{i}.norm1.weight"] = block["attention_norm/scale"]
        state[f"blocks.{i}.norm2.weight"] = block["feed_forward_norm/scale"]
    model.load_state_dict({name: torch.tensor(w) for name, w in state.items()} | dict(model.named_buffers()))


def train(workload: Any, hyper: Any, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[Any, Any]]:
    """Yields the loss and the norm of the gradient of each step."""
    gpu = workload.dtype == "bfloat16"
    device = torch.device("cuda" if gpu else "cpu")
    torch.set_float32_matmul_precision("high" if gpu else "highest")
    model = Model(workload)
    load(model, weights)
    model.to(device)
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": hyper.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=hyper.learning_rate, betas=(hyper.b1, hyper.b2), eps=hyper.epsilon, fused=True
    )
    loss_fn = torch.compile(model) if gpu else model
    precision = torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()
    for batch in workload.batches():
        tokens = torch.from_numpy(batch.astype(np.int64))
        if gpu:
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        targets = tokens.roll(-1, dims=1)
        targets[:, -1] = -1
        with precision:
            loss = loss_fn(tokens, targets)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), hyper.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.detach(), grad_norm
