"""Encodes images and texts with an open_clip ViT: class embedding, patch tokens of chosen blocks, value path, texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.alfa.device import to_device

_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Preprocess:
    """The model's pre-processing: the whole image is resized to size (height, width), then (x / 255 - mean) / std."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


@dataclass(frozen=True)
class ImageFeatures:
    """The result of one forward pass over B images with P patches; W is the width of the ViT, D its joint dimension.

    embedding: class embedding [B, D], normalised, float32.
    embedded: tokens that enter the first block [B, 1 + P, W].
    tokens: patch tokens after each chosen block [L, B, P, W], float32; None with a value path.
    values: the value path after each chosen block [L, B, P, W]; None without a value path.
    compared_tokens: patch tokens after each block chosen for comparisons [C, B, P, W], float32; C may be 0.
    """

    embedding: Tensor
    embedded: Tensor
    tokens: Tensor | None
    values: Tensor | None
    compared_tokens: Tensor


class Encoder:
    """Encodes images and texts in inference mode. All results are float32, whatever the precision inside.

    It takes clip over: the weights of its image tower are converted to `dtype`.

    grid: rows and columns of patches; blocks: depth of the ViT; logit_scale: 1 / tau; embedding_dim: D.
    """

    def __init__(
        self, clip: Any, tokenizer: Any, preprocess: Preprocess, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._clip = clip
        self._visual = clip.visual
        self._tokenizer = tokenizer
        self.preprocess = preprocess
        self.device = device
        self.grid: tuple[int, int] = tuple(clip.visual.grid_size)
        self.blocks: int = len(clip.visual.transformer.resblocks)
        self.logit_scale = float(clip.logit_scale.exp())
        self.embedding_dim: int = clip.visual.output_dim
        self._mean = torch.tensor(preprocess.mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(preprocess.std, device=device).view(1, 3, 1, 1) * 255
        self._visual.conv1.to(dtype)
        for block in self._visual.transformer.resblocks:
            block.attn.to(dtype)
            block.mlp.to(dtype)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts to normalised embeddings [P, D], float32, on the CPU.

        Raises ValueError for a text that the tokenizer would cut.
        """
        for text in texts:
            if not reads_whole(self._tokenizer, text):
                raise ValueError(
                    f"longer than the {self._tokenizer.context_length} tokens that the model reads: {text!r}"
                )
        chunks = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        encoded = [self._clip.encode_text(self._tokenizer(list(chunk)).to(self.device)) for chunk in chunks]
        return F.normalize(torch.cat(encoded), dim=-1).cpu()

    @torch.inference_mode()
    def encode_images(
        self,
        pixels: Tensor,
        levels: Sequence[int] = (),
        value_depth: int | None = None,
        compared_levels: Sequence[int] = (),
    ) -> ImageFeatures:
        """Encodes pixels [B, 3, H, W], uint8, of the model's size, in one forward pass; normalises them on the device.

        levels: blocks to keep, from 0, ascending. value_depth: number of last blocks in the value path; None: no value
        path. compared_levels: blocks to keep for the comparison with other images, ascending.

        Raises ValueError for pixels of another type or size.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (3, *self.preprocess.size):
            shape = ["B", 3, *self.preprocess.size]
            raise ValueError(f"pixels must be torch.uint8 {shape}, not {pixels.dtype} {list(pixels.shape)}")
        images = (to_device(pixels, self.device).float() - self._mean) / self._std
        first, last = self.blocks - (value_depth or 0), self.blocks - 1
        patches_leave = last in compared_levels or (not value_depth and last in levels)
        wanted: list[Tensor] = []
        compared: list[Tensor] = []
        x = embedded = self._embed(images)
        y: Tensor | None = None
        for number, block in enumerate(self._visual.transformer.resblocks):
            class_only = number == last and not patches_leave
            output, update = run_block(block, x, with_values=number >= first, class_only=class_only)
            if update is not None:
                y = (x if y is None else y) + update
            x = output
            if number in levels:
                wanted.append((x if y is None else y)[:, 1:])
            if number in compared_levels:
                compared.append(x[:, 1:])
        stacked = torch.stack(wanted) if wanted else None
        return ImageFeatures(
            self.project(x[:, 0]),
            embedded,
            None if value_depth else stacked,
            stacked if value_depth else None,
            torch.stack(compared) if compared else x.new_empty(0, *embedded[:, 1:].shape),
        )

    @torch.inference_mode()
    def project(self, tokens: Tensor) -> Tensor:
        """Projects tokens [..., W] to normalised embeddings [..., D], float32, as CLIP does with its class token."""
        return F.normalize(self._visual.ln_post(tokens) @ self._visual.proj, dim=-1)

    @torch.inference_mode()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encodes sequences [N, T, W] of embedded tokens, class token first, to class embeddings [N, D], normalised."""
        *blocks, last = self._visual.transformer.resblocks
        for block in blocks:
            tokens, _ = run_block(block, tokens)
        tokens, _ = run_block(last, tokens, class_only=True)
        return self.project(tokens[:, 0])

    def _embed(self, images: Tensor) -> Tensor:
        visual = self._visual
        patches = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2).float()
        classes = visual.class_embedding.expand(len(patches), 1, -1)
        tokens: Tensor = visual.ln_pre(torch.cat([classes, patches], dim=1) + visual.positional_embedding)
        return tokens


def run_block(
    block: nn.Module, x: Tensor, *, with_values: bool = False, class_only: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Applies a residual block of CLIP to x [B, T, W], float32. Returns its output, and its step of the value path.

    The step is W_o softmax(v v^T / sqrt(d_head)) v [B, T, W] (aligner `value`); None unless with_values. Both
    attentions share v, so it costs one attention and one product with W_o. class_only: return only the output of the
    class token, [B, 1, W].
    """
    parts: Any = block
    attention = parts.attn
    # Products have the precision of their weights, but the residual stream stays float32, because the cosines of normal
    # and anomalous prompts only differ in the third digit.
    dtype = attention.in_proj_weight.dtype
    projected = F.linear(parts.ln_1(x).to(dtype), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
    if class_only:
        x, q = x[:, :1], q[:, :, :1]

    def attend(queries: Tensor, keys: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(queries, keys, v).transpose(1, 2).flatten(2)
        result: Tensor = parts.ls_1(attention.out_proj(mixed))
        return result

    values = attend(v, v) if with_values else None
    x = x + attend(q, k)
    return x + parts.ls_2(parts.mlp(parts.ln_2(x).to(dtype))), values


def reads_whole(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer of open_clip reads a text whole, start and end tokens included."""
    # It does if the token after the last one that the model reads is padding.
    text_end, padding = tokenizer([text, ""], context_length=tokenizer.context_length + 1)[:, -1].tolist()
    return bool(text_end == padding)
