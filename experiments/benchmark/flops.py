"""FLOPs and bytes by formula: a multiply-add is two, element-wise arithmetic is left out.

Symbols: W width, r MLP ratio, T tokens of an example, K rows of the set, S context, D embedding, C rows of
the memory, E their width, M domains. A product whose input needs no gradient costs twice its forward pass in
training, every other three times.
"""

from __future__ import annotations

from typing import NamedTuple

from genret.diffusion.dit import DiT
from genret.language.decoder import Decoder, DecoderConfig

DIT = (
    "per layer 2T(4+2r)W^2 + 4T^2 W (+ cross-attention) + 2W 6W, the last with 6TW^2 + 2K(1+2r)W^2 + 4KTW "
    "for the first two, and the maps in and out"
)
TRAIN = f"3 x forward, 2 x for maps that read data; forward: {DIT}"


class Forward(NamedTuple):
    """FLOPs of one example's forward pass: total, and the part whose input is data."""

    total: float
    data: float

    @property
    def train(self) -> float:
        """Forward and backward pass."""
        return 3 * self.total - self.data


def dit(model: DiT, *, rows: int, context: int = 0, memory: int = 1) -> Forward:
    """One example through a `DiT`, of `rows` set rows, S = context items and C = memory rows."""
    w, d, e = model.width, model.embedding, model.memory_width or model.embedding
    tokens = rows + (2 + context if model.max_context else 0)

    def layer(out: int) -> float:
        """A block whose last `out` tokens go on."""
        total = 6 * tokens * w * w + 2 * out * (1 + 2 * model.mlp_ratio) * w * w + 4 * out * tokens * w
        total += 2 * w * (9 if model.cross else 6) * w if model.adaln else 0
        read = 4 * out * w * w + 4 * out * memory * w if memory > 1 else 2 * w * w
        return total + read * model.cross

    data = 2 * rows * d * w + 2 * 128 * w  # the set and the noise features
    if model.cross:
        data += model.depth * 2 * memory * e * 2 * w
    if model.max_context:
        data += 2 * (1 + context) * d * w
    if model.adaln:
        data += 2 * (model.domains + 1) * d * d if model.max_context else 2 * e * d
    head = 2 * w * w + 2 * rows * w * d + (2 * w * 2 * w if model.adaln else 0)
    return Forward(float((model.depth - 1) * layer(tokens) + layer(rows) + head + data), float(data))


def softmax_term(corpus: int, positives: int, width: int) -> float:
    """The retrieval-aware term of one query, forward and backward: the table gets no gradient."""
    return 2 * (2.0 * corpus * width + 2 * positives * width)


def layer_weights(c: DecoderConfig) -> int:
    """Weights of one layer's matrices."""
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return c.hidden_size * (2 * heads + 2 * kv) + 3 * c.hidden_size * c.intermediate_size


def decoder_pass(c: DecoderConfig, tokens: int, slots: int, layers: int | None = None) -> float:
    """`tokens` tokens through the layers, each against `slots` cache slots; no head."""
    attention = 4 * slots * c.num_attention_heads * c.head_dim
    return float(
        tokens * (c.num_hidden_layers if layers is None else layers) * (2 * layer_weights(c) + attention)
    )


def head(c: DecoderConfig, tokens: int) -> float:
    """Logits of `tokens` tokens."""
    return 2.0 * tokens * c.hidden_size * c.vocab_size


GENERATE = "2 x weights per token, 4 x slots x heads x head width for attention, a head per new token"


def generation(c: DecoderConfig, batch: int, prompt: int, new: int, prefix: int = 0) -> float:
    """`generate`: a prefill, then new - 1 steps, all against the whole cache."""
    slots = prefix + prompt + new - 1
    total = decoder_pass(c, batch * (prompt + new - 1), slots) + head(c, batch * new)
    return total + decoder_pass(c, prefix, slots)


def generation_bytes(
    c: DecoderConfig, batch: int, prompt: int, new: int, itemsize: int, prefix: int = 0
) -> float:
    """Weights once and the cache once in each of the `new` passes."""
    weights = c.num_hidden_layers * layer_weights(c) + c.vocab_size * c.hidden_size
    slots = prefix + prompt + new - 1
    cache = 2 * c.num_hidden_layers * batch * c.num_key_value_heads * slots * c.head_dim
    return float(new * (weights + cache) * itemsize)


TRAFFIC = "(all weights + the whole cache) x passes"

LORA = (
    "all layers forward, activations' gradients through those with factors (products once, attention twice), "
    "head forward twice (recomputed) and backward once, factors three times"
)


def lora_update(decoder: Decoder, batch: int, prompt: int, new: int, prefix: int = 0) -> float:
    """Forward and backward pass of `token_log_probs` for the factors alone."""
    c, tokens, slots = decoder.config, batch * (prompt + new), prefix + prompt + new
    layers = decoder.lora_layers or c.num_hidden_layers
    attention = 4.0 * tokens * layers * slots * c.num_attention_heads * c.head_dim
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sides = 2 * (c.hidden_size + heads) + 2 * (c.hidden_size + kv) + 3 * (c.hidden_size + c.intermediate_size)
    factors = 3 * 2 * decoder.lora_rank * sides * tokens * layers
    backward = decoder_pass(c, tokens, slots, layers) + attention
    return decoder_pass(c, tokens + prefix, slots) + backward + factors + 3 * head(c, batch * new)
