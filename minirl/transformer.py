"""A small decoder-only transformer (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Radford et al. 2019)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]  # for each block, the keys and values of the tokens so far


class Block(nn.Module):
    """Attention to the tokens so far, then an MLP; each normalises its input (pre-norm) and adds its output to it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, L, width), and keys and values of earlier tokens -> (B, L, width), and those of all tokens."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # (B, heads, L, width / heads) each
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=past is None)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), (keys, values)


class Transformer(nn.Module):
    """Features of each token of a text, which depend on it and on earlier tokens, but on no later ones.

    There is no dropout: a text must be as likely in training as it was when it was generated.

    Args:
        num_tokens: how many different tokens there are.
        context: maximum tokens of a text.
        width: of the features.
        num_layers: number of blocks.
        num_heads: attention heads; must divide the width.
    """

    def __init__(self, num_tokens: int, context: int, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(num_tokens, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)  # as in GPT-2

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Tokens (B, L) -> features (B, L, width).

        A `cache`, empty at first, keeps keys and values, and `tokens` continue the earlier ones: several in the first
        call, then one at a time.
        """
        start = cache[0][0].shape[2] if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        past: list[Any] = list(cache) if cache else [None] * len(self.blocks)
        for number, block in enumerate(self.blocks):
            x, past[number] = block(x, past[number])
        if cache is not None:
            cache[:] = past
        features: Tensor = self.norm(x)
        return features
