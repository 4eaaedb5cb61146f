"""MO-DiT's network, training step and sampler in PyTorch, from our weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmark.measure import threads
from experiments.benchmark.world import World
from genret.diffusion import edm, sampler
from genret.diffusion.retriever import Retriever
from genret.modit.queries import HEUN_STEPS
from genret.training.loop import FitOptions
from genret.types import Batch, InputError, PyTree


@functools.cache
def device() -> str:
    """The peer's device, with its threads set."""
    import torch

    torch.set_num_threads(threads())
    if jax.default_backend() == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        problem = "JAX runs on an accelerator that this PyTorch does not reach"
        raise InputError("--peers", problem, "install PyTorch for it, or set JAX_PLATFORMS=cpu")
    return "cuda"


def of(x: Any) -> Any:
    """An array as a tensor on the peer's device, copied."""
    import torch

    return torch.from_numpy(np.array(x)).to(device())


def torch_dit(retriever: Retriever, params: PyTree) -> Any:
    """The prefix DiT as a `torch.nn.Module` with these weights: (z, c_noise, context, mask, domain, anchor)
    -> F. Raises InputError for a model with cross-attention or without adaLN."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    m = retriever.model
    if m.cross or not m.adaln or not m.max_context or m.row_positions:
        raise InputError("peer", "only the prefix DiT with adaLN is ported", "compare another line")
    width, heads, root = m.width, m.heads, math.sqrt(m.embedding)

    def linear(weights: PyTree) -> nn.Linear:
        made = nn.Linear(*weights["kernel"].shape)
        made.weight, made.bias = (nn.Parameter(of(np.asarray(weights[n]).T)) for n in ("kernel", "bias"))
        return made

    class Block(nn.Module):
        def __init__(self, weights: PyTree):
            super().__init__()
            for name, part in weights.items():
                setattr(self, name, linear(part))

        def forward(self, x: Any, c: Any, mask: Any, rows: int) -> Any:
            parts = self.modulation(F.silu(c))[:, None].chunk(6, -1)
            h = F.layer_norm(x, (width,), eps=1e-6) * (1 + parts[1]) + parts[0]
            qkv = self.qkv(h).view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            q, k, v, x = qkv[0][:, :, -rows:], qkv[1], qkv[2], x[:, -rows:]
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, -rows:])
            h = h.transpose(1, 2).reshape(x.shape)
            x = x + parts[2] * self.attention_out(h)
            h = F.layer_norm(x, (width,), eps=1e-6) * (1 + parts[4]) + parts[3]
            return x + parts[5] * self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh"))

    class TorchDiT(nn.Module):
        def __init__(self):
            super().__init__()
            for name in [n for n in params if not n.startswith("block_")]:
                value = params[name]
                if isinstance(value, dict) and "kernel" in value:
                    setattr(self, name, linear(value))
                else:
                    leaf = value["embedding"] if isinstance(value, dict) else value
                    setattr(self, name, nn.Parameter(of(leaf)))
            self.blocks = nn.ModuleList(Block(params[f"block_{i}"]) for i in range(m.depth))
            self.register_buffer("periods", of(2 * np.pi * 2.0 ** np.linspace(-4, 4, 64, dtype=np.float32)))

        def forward(self, z: Any, noise: Any, context: Any, mask: Any, domain: Any, anchor: Any) -> Any:
            angle = noise[:, None] * self.periods
            c = self.noise_in(torch.cat([angle.sin(), angle.cos()], -1))
            c = self.noise_out(F.silu(c))
            asked, kind = self.domain_embedding[domain], self.type_embedding
            rows, seeds = z.shape[1], context.shape[1]
            x = torch.cat(
                [
                    asked[:, None] + kind[0],
                    self.read_anchor(anchor * root)[:, None] + kind[1],
                    self.read_context(context * root) + self.positions[:seeds] + kind[2],
                    self.read_set(z) + kind[3],
                ],
                1,
            )  # [B, 2+S+K, W]
            fixed = mask.new_ones(len(z), 2)
            seen = torch.cat([fixed, mask, mask.new_zeros(len(z), rows)], 1)
            every = torch.cat([fixed, mask, mask.new_ones(len(z), rows)], 1)
            is_set = torch.arange(x.shape[1], device=x.device) >= 2 + seeds
            allowed = torch.where(is_set[None, :, None], every[:, None], seen[:, None])[:, None]
            c = c + asked
            for block in self.blocks[:-1]:
                x = block(x, c, allowed, x.shape[1])
            x = self.blocks[-1](x, c, allowed, rows)
            shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, -1)
            h = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
            means = torch.einsum("bd,mde->bme", anchor * root, self.mean_map)
            mean = means[torch.arange(len(z), device=z.device), domain]
            sigma = torch.exp(4 * noise)[:, None]
            return self.write_set(h) + (mean * sigma * torch.rsqrt(1 + sigma**2))[:, None]

    return TorchDiT().to(device())


class TorchTrainer:
    """EDM loss, backward, clipping, AdamW and EMA of a `torch_dit`, with the options of our train step.

    compiled: the loss goes through torch.compile. autocast: matmuls in bfloat16.
    """

    def __init__(
        self, world: World, batch: Batch, options: FitOptions, *, compiled: bool = False,
        autocast: bool = False,
    ):  # fmt: skip
        import torch

        r = world.retriever
        self.torch, self.retriever, self.net = torch, r, torch_dit(r, world.params)
        self.scale, self.directions = of(world.space.scale), of(world.space.directions)
        c = batch.condition
        self.context, self.mask, self.domain = of(c.context), of(c.mask), of(c.domain).long()
        self.target, self.weight = of(batch.target), of(batch.weight)
        decayed = [p for n, p in self.net.named_parameters() if n.endswith(".weight")]
        ids = {id(p) for p in decayed}
        plain = [p for p in self.net.parameters() if id(p) not in ids]
        self.parameters = decayed + plain
        self.ema = [p.detach().clone() for p in self.parameters]
        groups = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.options, self.autocast, self.done = options, autocast, 0
        self.kind = device()  # torch.compile cannot trace the look-up
        self.value = torch.compile(self.loss) if compiled else self.loss

    def anchor(self) -> Any:
        """μ(c) of `Space.anchor`, centred form."""
        unit = functools.partial(self.torch.nn.functional.normalize, dim=-1, eps=1e-6)
        weight = self.mask[..., None].float()
        mean = (self.context * weight).sum(1) / weight.sum(1).clamp(min=1)
        return unit(unit(mean) + self.directions[self.domain])

    def denoise(self, z: Any, sigma: Any, domain: Any, anchor: Any) -> Any:
        """D(z; σ) of `edm.denoiser`."""
        s = sigma[:, None, None]
        root = (s**2 + 1).sqrt()
        with self.torch.autocast(self.kind, self.torch.bfloat16, enabled=self.autocast):
            out = self.net(z / root, sigma.log() / 4, self.context, self.mask, domain, anchor)
        return z / root**2 + s / root * out.float()

    def loss(self, dropped: Any, sigma: Any, noise: Any) -> Any:
        """Σ w l / Σ w of `Retriever.loss`."""
        anchor = self.anchor()
        clean = (self.target - anchor[:, None]) / self.scale
        domain = self.torch.where(dropped, self.retriever.model.domains, self.domain)
        found = self.denoise(clean + sigma[:, None, None] * noise, sigma, domain, anchor)
        error = ((sigma**2 + 1) / sigma**2) * ((found - clean) ** 2).mean((1, 2))
        return (self.weight * error).sum() / self.weight.sum()

    def draw(self) -> tuple[Any, Any, Any]:
        """Dropped conditions, stratified log-uniform σ and ε, drawn by PyTorch."""
        torch, count = self.torch, len(self.target)
        options = {"device": self.target.device}
        uniform = (torch.arange(count, **options) / count + torch.rand((), **options)) % 1
        low, high = math.log(edm.SIGMA_MIN), math.log(edm.SIGMA_MAX)
        dropped = torch.rand(count, **options) < self.retriever.drop
        return dropped, (low + uniform * (high - low)).exp(), torch.randn_like(self.target)

    def step(self, dropped: Any, sigma: Any, noise: Any) -> Any:
        """One optimiser step; the loss before it."""
        torch, o = self.torch, self.options
        loss = self.value(dropped, sigma, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, o.clip)
        start = o.learning_rate / o.warmup
        for group in self.adamw.param_groups:  # linear warm-up; the cosine is flat over a benchmark
            group["lr"] = start + (o.learning_rate - start) * min(self.done / o.warmup, 1)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        decay = min(o.ema_decay, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        self.done += 1
        return loss.detach()

    def wait(self) -> None:
        """Until the device is done."""
        if self.kind == "cuda":
            self.torch.cuda.synchronize()


def torch_heun(trainer: TorchTrainer, noise: Any, net: Callable | None = None) -> Any:
    """`sampler.heun` over `HEUN_STEPS` levels, and `Space.decode`: unit rows [B, K, D]."""
    denoise = net or trainer.denoise
    anchor, sigmas = trainer.anchor(), sampler.schedule(HEUN_STEPS)
    z = float(sigmas[0]) * noise
    level = lambda s: z.new_full((len(z),), float(s))  # noqa: E731
    for s, t in zip(sigmas[:-2].tolist(), sigmas[1:-1].tolist(), strict=True):
        slope = (z - denoise(z, level(s), trainer.domain, anchor)) / s
        guess = z + (t - s) * slope
        z = z + (t - s) / 2 * (slope + (guess - denoise(guess, level(t), trainer.domain, anchor)) / t)
    z = denoise(z, level(sigmas[-2]), trainer.domain, anchor)  # Euler's last step, to 0
    return trainer.torch.nn.functional.normalize(anchor[:, None] + z * trainer.scale, dim=-1)
