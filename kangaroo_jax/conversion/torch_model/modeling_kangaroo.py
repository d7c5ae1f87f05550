"""Kangaroo, a video-language model for long videos (arXiv 2408.15542), in PyTorch.

frames -> EVA-02 ViT -> + time in seconds -> 3D depthwise patchify -> projector -> tokens among the text -> Llama 3
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_kangaroo import KangarooConfig
from .media_kangaroo import load_media as load_media  # transformers 4 copies no file that this one does not name
from .processing_kangaroo import KangarooProcessor, as_part

FRAMES_AT_A_TIME = 16  # frames that the ViT encodes at a time
IS_5 = hasattr(LlamaConfig(), "rope_parameters")  # transformers 5, which names some things otherwise than 4
# The name of the key-value cache in a decoder's arguments and results.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def llama_config(config: KangarooConfig) -> LlamaConfig:
    """The decoder's configuration; transformers 4 and 5 name the rotary embedding's parameters differently."""
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"]
    kwargs: dict[str, Any] = {name: getattr(config, name) for name in names}
    kwargs.update(attention_bias=False, mlp_bias=False, hidden_act="silu")
    kwargs["tie_word_embeddings"] = config.tie_word_embeddings
    if IS_5:
        kwargs["rope_parameters"] = dict(config.rope_parameters)
    else:
        scaling = dict(config.rope_parameters)
        kwargs["rope_theta"] = scaling.pop("rope_theta")
        kwargs["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    llama = LlamaConfig(**kwargs)
    llama._attn_implementation = getattr(config, "_attn_implementation", None) or "sdpa"
    return llama


# ------------------------------------------------------------------------------ vision tower


class Attention(nn.Module):
    """Full attention; q and v have separate biases, and a LayerNorm precedes the output projection."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        width = c["width"]
        self.heads = c["heads"]
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=c["norm_eps"])
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x) + self.q_bias  # called as a module, so that an adapter in its place is used
        k = self.k_proj(x)
        v = self.v_proj(x) + self.v_bias
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(self.inner_attn_ln(y.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.w1 = nn.Linear(c["width"], c["mlp_width"])
        self.w2 = nn.Linear(c["width"], c["mlp_width"])
        self.ffn_ln = nn.LayerNorm(c["mlp_width"], eps=c["norm_eps"])
        self.w3 = nn.Linear(c["mlp_width"], c["width"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Block(GradientCheckpointingLayer):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c["width"], eps=c["norm_eps"]), Attention(c)
        self.norm2, self.mlp = nn.LayerNorm(c["width"], eps=c["norm_eps"]), SwiGLU(c)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.proj = nn.Conv2d(3, c["width"], c["patch_size"], c["patch_size"])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionTower(nn.Module):
    """EVA-02 as EVA-CLIP uses it: pixels [F, 3, S, S] -> patch tokens [F, P, D]."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c = c
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c["width"]))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c["pos_embed_grid"] ** 2, c["width"]))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["depth"]))
        self.norm = nn.LayerNorm(c["width"], eps=c["norm_eps"])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(pixels.to(self.cls_token.dtype))
        grid = pixels.shape[-1] // self.c["patch_size"]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(grid).to(x.dtype)
        cos, sin = self.rotary(grid, x.device, x.dtype)
        if self.training and torch.is_grad_enabled() and not x.requires_grad:
            # A checkpointed block has gradients only if its input requires them; adapters on frozen weights need that.
            x.requires_grad_(any(weight.requires_grad for weight in self.blocks.parameters()))
        for block in self.blocks:
            x = block(x, cos, sin)
        return (self.norm(x) if self.c["output_norm"] else x)[:, 1:]

    def positions(self, grid: int) -> torch.Tensor:
        """The position embedding, resized from the stored grid; the CLS row is unchanged."""
        stored = self.c["pos_embed_grid"]
        if grid == stored:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def rotary(self, grid: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1 + P, H/2]: a quarter of the width rotates by row, a quarter by column; CLS does not."""
        half = self.c["width"] // self.c["heads"] // 2
        power = torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half
        place = torch.arange(grid, dtype=torch.float64, device="cpu") / grid * self.c["rope_reference_grid"]
        angles = torch.outer(place, self.c["rope_theta"] ** -power)
        rows = angles[:, None].expand(grid, grid, -1)
        columns = angles[None, :].expand(grid, grid, -1)
        table = torch.cat([rows, columns], dim=-1).reshape(grid * grid, half)
        table = torch.cat([torch.zeros(1, half, dtype=torch.float64, device="cpu"), table])
        return table.cos().to(device, dtype), table.sin().to(device, dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [..., tokens, H]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def time_encoding(seconds: torch.Tensor, width: int, theta: float) -> torch.Tensor:
    """float32[F] -> float32[F, width]: alternating sines and cosines of the frames' real times."""
    power = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    angles = seconds.float()[:, None] * (theta**-power).float().to(seconds.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


# ------------------------------------------------------------------------------------- model


@dataclasses.dataclass
class Seen:
    """The vision tokens of the prompts of one `generate`: the prompts' length in tokens, and for each prompt the number
    of vision tokens in the cache and the others, [n, D]."""

    prompt: int
    rows: list[tuple[int, torch.Tensor]]


class KangarooForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model. `chat` answers questions; `forward` and `generate` are those of any causal model, and also
    take `pixel_values` [F, 3, S, S] and `frame_times` [F]: the frames of all rows of the batch, one after the other
    (see `KangarooProcessor`)."""

    config_class = KangarooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "Block"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_cache_class = True
    _tied_weights_keys: Any = {"lm_head.weight": "model.embed_tokens.weight"} if IS_5 else ["lm_head.weight"]

    def __init__(self, config: KangarooConfig):
        super().__init__(config)
        width = config.vision_config["width"]
        self.model = LlamaModel(llama_config(config))
        self.vision_tower = VisionTower(config.vision_config)
        kernel = tuple(config.patchify_config["kernel"])
        has_bias = config.patchify_config["bias"]
        self.patchify = nn.Conv3d(width, width, kernel, kernel, groups=width, bias=has_bias)
        if config.mm_projector_type == "linear":
            self.mm_projector: nn.Module = nn.Linear(width, config.hidden_size)
        else:
            second = nn.Linear(config.hidden_size, config.hidden_size)
            self.mm_projector = nn.Sequential(nn.Linear(width, config.hidden_size), nn.GELU(), second)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def encode_frames(self, pixel_values: torch.Tensor, frame_times: torch.Tensor) -> torch.Tensor:
        """pixels [F, 3, S, S], seconds [F] -> vision tokens [R, D]; F is a multiple of the frames joined."""
        features = torch.cat([self.vision_tower(part) for part in pixel_values.split(FRAMES_AT_A_TIME)])
        frames, patches, width = features.shape
        if self.config.time_config["enabled"]:
            times = frame_times.to(features.device)
            encoding = time_encoding(times, width, self.config.time_config["theta"])
            features = features + encoding[:, None].to(features.dtype)
        if self.config.patchify_config["enabled"]:
            grid = round(patches**0.5)
            volume = features.reshape(1, frames, grid, grid, width).permute(0, 4, 1, 2, 3)
            features = self.patchify(volume).permute(0, 2, 3, 4, 1)
        return self.mm_projector(features).reshape(-1, self.config.hidden_size)

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, frame_times: torch.Tensor | None
    ) -> torch.Tensor:
        """ids [B, T] -> embeddings [B, T, D], with the vision tokens, in order, in place of the placeholders.

        Raises ValueError if the numbers of vision tokens and placeholders differ.
        """
        if pixel_values is None:
            return self.model.embed_tokens(input_ids)
        seen = self._look(input_ids, pixel_values, frame_times)
        return self._laid_in(input_ids, input_ids, seen)

    def _look(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, frame_times: torch.Tensor | None, cached: int = 0
    ) -> Seen:
        """Encode the frames of prompts [B, T], except those among the first `cached` tokens."""
        if frame_times is None:
            raise ValueError("pixel_values need frame_times, the frames' seconds")
        grid = pixel_values.shape[-1] // self.config.vision_config["patch_size"]
        kernel = self.config.patchify_config["kernel"] if self.config.patchify_config["enabled"] else (1, 1, 1)
        per_group = (grid // kernel[1]) * (grid // kernel[2])
        place = input_ids == self.config.special_ids["vision"]
        places, known = place.sum(1).tolist(), place[:, :cached].sum(1).tolist()
        vision_tokens = len(pixel_values) // kernel[0] * per_group
        if sum(places) != vision_tokens or any(n % per_group for n in places):
            raise ValueError(f"{sum(places)} places for {vision_tokens} vision tokens")
        firsts = [n // per_group for n in known]
        is_new = [i >= first for n, first in zip(places, firsts, strict=True) for i in range(n // per_group)]
        frames = torch.tensor(is_new, device=pixel_values.device).repeat_interleave(kernel[0])
        pixels, times = pixel_values[frames], frame_times.to(pixel_values.device)[frames]
        device = self.model.embed_tokens.weight.device
        tokens = self.encode_frames(pixels.to(device), times) if len(pixels) else pixels.new_zeros(0, 0)
        firsts = [first * per_group for first in firsts]
        parts = tokens.split([n - first for n, first in zip(places, firsts, strict=True)])
        return Seen(input_ids.shape[1], list(zip(firsts, parts, strict=True)))

    def _laid_in(self, input_ids: torch.Tensor, latest: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Embeddings [B, n, D] of `latest` [B, n], the last of `input_ids` [B, T], with the vision tokens in place.

        A placeholder after the prompt is an ordinary token: generated, or guessed from the prompt.
        """
        x = self.model.embed_tokens(latest)
        place = input_ids == self.config.special_ids["vision"]
        place[:, seen.prompt :] = False
        start = input_ids.shape[1] - latest.shape[1]
        before, place = place[:, :start].sum(1).tolist(), place[:, start:]
        counts = place.sum(1).tolist()
        if not any(counts):
            return x
        rows = zip(seen.rows, before, counts, strict=True)
        vision = torch.cat([tokens[n - first : n - first + count] for (first, tokens), n, count in rows if count])
        return x.masked_scatter(place[..., None].expand_as(x), vision.to(x.device, x.dtype))

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Encode frames once for the whole of `generate`; all copies of a prompt share them."""
        frames = {name: kwargs.pop(name, None) for name in ("pixel_values", "frame_times")}
        assisted, seen = kwargs.pop("seen", None), None  # those of the model that this one drafts tokens for
        if frames["pixel_values"] is not None:
            if input_ids is None or kwargs.get("inputs_embeds") is not None:
                raise ValueError("pixel_values need input_ids: embeddings do not say where the frames stand")
            cache = kwargs.get(CACHE)
            cached = 0 if cache is None else int(cache.get_seq_length())
            prompt = input_ids if assisted is None else input_ids[:, : assisted.prompt]
            seen = self._look(prompt, **frames, cached=cached)
            seen.rows = [row for row in seen.rows for _ in range(expand_size)]
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, kwargs = expand(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs if seen is None else {**kwargs, **frames, "seen": seen}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        seen: Seen | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs that transformers prepares, with the vision tokens in the embeddings."""
        if seen is not None:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("pixel_values", "frame_times")}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        latest = inputs.get("input_ids")
        if seen is not None and latest is not None and input_ids.shape[1] - latest.shape[1] < seen.prompt:
            inputs["inputs_embeds"] = self._laid_in(input_ids, inputs.pop("input_ids"), seen)
        return inputs

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pixel_values: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
        cache: Any = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments and results as in a Llama; `cache` is the name of `past_key_values` since transformers 5.24.

        With a filled cache the frames are those of `input_ids`, without those in the cache. The loss is the mean over
        the labels, or, for a part of a batch with `num_items_in_batch` labels, their sum divided by that number.
        """
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            goes_on = cache is not None and int(cache.get_seq_length()) > 0
            shows = not goes_on or bool((input_ids == self.config.special_ids["vision"]).any())
            inputs_embeds = self.embed(input_ids, pixel_values if shows else None, frame_times)
        kwargs.pop("return_dict", None)
        kwargs[CACHE] = cache
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept]).float()
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].to(logits.device)
            how = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction=how)
            if isinstance(num_items_in_batch, torch.Tensor):
                num_items_in_batch = num_items_in_batch.to(loss.device)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        filled: dict[str, Any] = {CACHE: outputs[CACHE] if CACHE in outputs else None}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **filled)

    @torch.no_grad()
    def chat(
        self,
        video_path: str | os.PathLike | Sequence[Any] | Any = None,
        query: str = "",
        tokenizer: Any = None,
        history: list[dict[str, Any]] | None = None,
        max_new_tokens: int = 512,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        temperature: float = 0.6,
        top_p: float = 0.9,
        frame_times: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[dict[str, Any]]]:
        """Answer a query about a video, an image or frames.

        Args:
            video_path: file of a video or image, a PIL image, or a list of frames (paths, arrays, PIL images). It
                may be given again in later rounds: media in the history are not shown twice.
            query: the question.
            tokenizer: `AutoTokenizer.from_pretrained` of the same folder.
            history: the history that the last round returned.
            max_new_tokens: longest answer.
            eos_token_id: tokens that end the answer; by default the end of text and the end of a turn.
            do_sample: False always takes the most likely token.
            temperature, top_p: settings of the sampling.
            frame_times: times of the frames of a list in seconds; by default one a second.
            kwargs: passed to `generate`.

        Returns:
            The answer, and the history with this round in it.
        """
        if not query.strip():
            raise ValueError("the query is empty: say what to ask")
        if tokenizer is None:
            raise ValueError("give tokenizer=AutoTokenizer.from_pretrained(...) of the model's folder")
        turns = list(history or [])
        content = [{"type": "text", "text": query}]
        if video_path is not None:
            part = as_part(video_path, frame_times)
            if not any(_is_same(part, seen) for turn in turns for seen in _media(turn)):
                content = [part, *content]
        turns.append({"role": "user", "content": content if len(content) > 1 else query})
        processor = KangarooProcessor(self.config, tokenizer)
        inputs = {name: value.to(self.device) for name, value in processor.apply_chat_template(turns).items()}
        embeddings = self.embed(inputs["input_ids"], inputs.get("pixel_values"), inputs.get("frame_times"))
        if do_sample:
            kwargs.update(temperature=temperature, top_p=top_p)
        else:
            kwargs.update(temperature=None, top_p=None)
        ids: torch.Tensor = self.generate(  # type: ignore[misc, assignment]
            inputs_embeds=embeddings,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            eos_token_id=self.config.eos_token_id if eos_token_id is None else eos_token_id,
            pad_token_id=self.config.pad_token_id,
            **kwargs,
        )
        answer = processor.decode(ids[0]).strip()
        return answer, [*turns, {"role": "assistant", "content": answer}]


def _media(turn: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in turn["content"] if part["type"] != "text"] if isinstance(turn["content"], list) else []


def _is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two parts are the same file, or identical frames."""
    if a["type"] != b["type"]:
        return False
    x, y = a[a["type"]], b[b["type"]]
    if isinstance(x, list) and isinstance(y, list):
        return len(x) == len(y) and all(m is n or (isinstance(m, str) and m == n) for m, n in zip(x, y, strict=True))
    return x is y or (isinstance(x, str) and x == y)
