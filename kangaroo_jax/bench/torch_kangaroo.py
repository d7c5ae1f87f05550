"""A plain PyTorch Kangaroo to measure against: eager mode, with transformers' Llama as decoder.

It needs the extra `convert`; only the benchmark and its test import it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.models.eva_clip import PIXEL_MEAN, PIXEL_STD
from kangaroo_jax.models.layers import rotary_2d
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.training.optimizer import NO_DECAY, make_schedule


class Attention(nn.Module):
    """Self-attention of EVA-02, as in timm."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, length, width = x.shape
        query, key, value = (
            layer(x).view(n, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.out(self.norm(y.transpose(1, 2).reshape(n, length, width)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [n, N, P, H] by cos and sin [P, H]."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)
    return x * cos + turned * sin


class MLP(nn.Module):
    """SwiGLU with a norm inside."""

    def __init__(self, width: int, hidden: int, eps: float):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """One layer of EVA-02."""

    def __init__(self, config: Any):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config.width, config.heads, config.norm_eps)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Vision(nn.Module):
    """EVA-02 up to its last block, for frames of the size of its position embedding."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(1 + config.pos_embed_grid**2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        cos, sin = rotary_2d(
            config.pos_embed_grid, config.width // config.heads, config.rope_theta, config.rope_reference_grid
        )
        self.register_buffer("cos", torch.from_numpy(np.pad(cos, ((1, 0), (0, 0)), constant_values=1).repeat(2, -1)))
        self.register_buffer("sin", torch.from_numpy(np.pad(sin, ((1, 0), (0, 0))).repeat(2, -1)))
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(PIXEL_STD)[:, None, None])

    def forward(self, frames: Tensor) -> Tensor:
        """uint8[n, S, S, 3] -> [n, P, D]."""
        pixels = (frames.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std  # type: ignore[operator]
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.position_embedding
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return x[:, 1:]


def llama_config(llm: Any, **settings: Any) -> LlamaConfig:
    """The decoder's sizes, `config.model.llm`, in transformers' words, with other settings of LlamaConfig."""
    return LlamaConfig(
        vocab_size=llm.vocab_size,
        hidden_size=llm.width,
        intermediate_size=llm.mlp_width,
        num_hidden_layers=llm.depth,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        head_dim=llm.head_dim,
        rms_norm_eps=llm.norm_eps,
        tie_word_embeddings=llm.tied_head,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        **settings,
    )


class PlainKangaroo(nn.Module):
    """The whole model; `config` is our `config.model`. `forward` returns the mean loss of a batch."""

    def __init__(self, config: Any):
        super().__init__()
        vision, llm = config.vision, config.llm
        self.config = config
        self.vision = Vision(vision)
        kernel = tuple(config.patchify.kernel)
        self.patchify = nn.Conv3d(vision.width, vision.width, kernel, kernel, groups=vision.width)
        self.projector = nn.Sequential(nn.Linear(vision.width, llm.width), nn.GELU(), nn.Linear(llm.width, llm.width))
        self.special_embedding = nn.Parameter(torch.empty(4, llm.width))
        self.llm = LlamaForCausalLM(llama_config(llm, use_cache=False))

    def encode(self, frames: Tensor, times: Tensor) -> Tensor:
        """uint8[B, F, S, S, 3], float32[B, F] -> [B, R, D]."""
        b, f = times.shape
        x = self.vision(frames.flatten(0, 1))
        grid, width = round(x.shape[1] ** 0.5), x.shape[2]
        angles = times[..., None] * self.config.tpe.theta ** (-torch.arange(0, width, 2) / width)
        time = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)
        x = x.view(b, f, grid, grid, width) + time[:, :, None, None]
        x = self.patchify(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return self.projector(x).flatten(1, 3)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        vision = self.encode(batch["frames"], batch["frame_times"])
        x = self.llm.model.embed_tokens(batch["tokens"])
        ids = self.config.special_ids
        for row, mark in enumerate((ids.vi_start, ids.eof, ids.eov, ids.vi_end)):
            x = torch.where((batch["tokens"] == mark)[..., None], self.special_embedding[row], x)
        index = batch["vision_index"]
        rows = vision.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.where((index >= 0)[..., None], rows, x)
        hidden = self.llm.model(
            inputs_embeds=x, attention_mask=batch.get("mask"), position_ids=batch["positions"]
        ).last_hidden_state
        logits = self.llm.lm_head(hidden).flatten(0, 1)
        return F.cross_entropy(logits, batch["targets"].flatten(), ignore_index=-100)


class TorchTrainer:
    """Trains a PlainKangaroo with our weights and the optimiser of `config` repeatedly on one batch."""

    def __init__(self, config: Any, batch: PackedBatch, params: Mapping[str, Any]) -> None:
        torch.set_num_threads(usable_cpus())
        self.model = PlainKangaroo(config.model)
        copy_weights(params, self.model)
        o = config.optimizer
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        plain = [weight for weight in self.model.parameters() if NO_DECAY.fullmatch(names[id(weight)])]
        rest = [weight for weight in self.model.parameters() if not NO_DECAY.fullmatch(names[id(weight)])]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": o.weight_decay}]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(o.b1, o.b2), eps=o.eps)
        self.schedule = make_schedule(o, config.train.steps)
        self.clip_norm, self.steps, self.batch = o.clip_norm, 0, torch_batch(batch)

    def step(self) -> float:
        """One step; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.schedule(self.steps))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.steps += 1
        return float(loss.detach())


def torch_batch(batch: PackedBatch) -> dict[str, Tensor]:
    """A batch with weights 0 or 1 as torch tensors; without a mask if each row is one segment."""
    arrays = {name: torch.from_numpy(np.array(getattr(batch, name))) for name in ("frames", "frame_times")}
    for name in ("tokens", "positions", "vision_index"):
        arrays[name] = torch.from_numpy(np.array(getattr(batch, name))).long()
    arrays["targets"] = torch.from_numpy(np.where(np.asarray(batch.weights) > 0, batch.targets, -100)).long()
    segments = torch.from_numpy(np.array(batch.segment_ids))
    if not bool((segments == 1).all()):
        same = segments[:, None, :, None] == segments[:, None, None, :]
        seen = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        arrays["mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return arrays


LLAMA = {
    "llm.embedding": "llm.model.embed_tokens.weight",
    "llm.head.kernel": "llm.lm_head.weight",
    "llm.norm.scale": "llm.model.norm.weight",
    "llm.layers.attention_norm.scale": "llm.model.layers.{}.input_layernorm.weight",
    "llm.layers.mlp_norm.scale": "llm.model.layers.{}.post_attention_layernorm.weight",
    "llm.layers.attention.query.kernel": "llm.model.layers.{}.self_attn.q_proj.weight",
    "llm.layers.attention.key.kernel": "llm.model.layers.{}.self_attn.k_proj.weight",
    "llm.layers.attention.value.kernel": "llm.model.layers.{}.self_attn.v_proj.weight",
    "llm.layers.attention.out.kernel": "llm.model.layers.{}.self_attn.o_proj.weight",
    "llm.layers.mlp.gate.kernel": "llm.model.layers.{}.mlp.gate_proj.weight",
    "llm.layers.mlp.up.kernel": "llm.model.layers.{}.mlp.up_proj.weight",
    "llm.layers.mlp.down.kernel": "llm.model.layers.{}.mlp.down_proj.weight",
    "projector.first": "projector.0",
    "projector.second": "projector.2",
}


def copy_weights(params: Mapping[str, Any], model: PlainKangaroo) -> None:
    """Copy our flat parameters ("llm/layers/..." -> array) into `model`. Raises KeyError if a name is left over."""
    targets = dict(model.named_parameters())
    with torch.no_grad():
        for path, array in params.items():
            name, array = path.replace("/", "."), np.asarray(array, np.float32)
            stacked = ".layers." in name or ".blocks." in name
            for layer, values in enumerate(array if stacked else array[None]):
                target = targets.pop(torch_name(name, layer))
                target.copy_(torch.from_numpy(torch_layout(name, values).reshape(target.shape).copy()))
    if targets:
        raise KeyError(f"no values for {', '.join(targets)}")


def torch_name(name: str, layer: int) -> str:
    """The name in PlainKangaroo of a weight, from our name and the layer's number."""
    for ours, theirs in LLAMA.items():
        if name == ours or name.startswith(ours + "."):
            name = name.replace(ours, theirs.format(layer))
    name = name.replace(".blocks.", f".blocks.{layer}.")
    return name if name.startswith("llm.") else name.replace(".kernel", ".weight").replace(".scale", ".weight")


def torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    """One layer's weight in torch's dimension order (up to a reshape)."""
    if name == "patchify.kernel":
        return array.transpose(3, 0, 1, 2)
    if name == "vision.patch_embedding.kernel":
        side = int((array.shape[0] / 3) ** 0.5)
        return array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    if name.endswith("out.kernel"):
        return array.reshape(-1, array.shape[-1]).T
    return array.reshape(array.shape[0], -1).T if name.endswith("kernel") else array
