"""An open_clip ViT as ALFA needs it: class embedding, patch tokens of chosen blocks, value path, texts."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPVisionCfg
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.alfa.device import to_device
from schemas.job import EMBEDDED_MODEL, FORMER_EMBEDDED_MODELS, Model

_EMBEDDED = Path(__file__).parent / "models" / EMBEDDED_MODEL
_TEXTS_AT_ONCE = 64
_POSITIONS = "visual.positional_embedding"
_CUSTOM_BLOCKS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


class ModelError(RuntimeError):
    """A model or its weights cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Weights:
    """A weights file. `label` names model and weights for rows; is_embedded: it comes with the package."""

    path: Path
    sha256: str
    label: str
    is_embedded: bool


@dataclass(frozen=True)
class Preprocess:
    """What the model was trained on: the whole image resized to size (height, width), then (x / 255 - mean) / std."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


@dataclass(frozen=True)
class ImageFeatures:
    """One forward pass over B images with P patches; W is the width of the ViT, D its joint dimension.

    embedding: class embedding [B, D], normalised, float32.
    embedded: tokens that enter the first block [B, 1 + P, W].
    tokens: patch tokens after each wanted block [L, B, P, W], float32; None where the value path was asked for.
    values: the value path after each wanted block [L, B, P, W]; None where it was not asked for.
    compared_tokens: patch tokens after each block wanted for comparisons [C, B, P, W], float32; C may be 0.
    """

    embedding: Tensor
    embedded: Tensor
    tokens: Tensor | None
    values: Tensor | None
    compared_tokens: Tensor


def locate_weights(model: Model) -> Weights:
    """The weights file of a model: embedded, a named file, or an open_clip tag (downloaded on first use).

    Builds no model. Raises ModelError for unknown or unsupported models, and for files or tags that cannot be had.
    """
    _config(model.name)
    if model.pretrained is None:
        path, label = _EMBEDDED / f"{EMBEDDED_MODEL}.safetensors", EMBEDDED_MODEL
    elif Path(model.pretrained).is_file():
        path = Path(model.pretrained)
        label = f"{model.name}/{path.name}"
    else:
        path, label = _download(model.name, model.pretrained), f"{model.name}/{model.pretrained}"
    return Weights(path, _sha256(path), label, model.is_embedded)


def text_fits(model: Model) -> Callable[[str], bool]:
    """Whether the model's tokenizer reads a text whole, start and end tokens included. Loads no weights.

    Raises ModelError for unknown or unsupported models.
    """
    return partial(_fits, _tokenizer(model.name, _config(model.name)))


def load_encoder(model: Model, weights: Weights) -> Encoder:
    """Builds the model with its weights; nothing is ever left at random.

    A weights file without a tag is taken to expect open_clip's default mean, std and interpolation. QuickGELU is used
    where the tag or the configuration (ViT-B-16-quickgelu) says so. Raises ModelError where weights are missing,
    partial or of another model, where the model is no open_clip ViT with a class token, or the device is not there.
    """
    config = _config(model.name)
    from_file = model.pretrained is None or Path(model.pretrained).is_file()
    tag = {} if from_file else open_clip.get_pretrained_cfg(model.name, model.pretrained)
    device = _device(model)
    vision = CLIPVisionCfg(**config["vision_cfg"])
    trained, patch = _pair(vision.image_size), _pair(vision.patch_size)
    size = trained if model.image_size is None else _pair(model.image_size)
    if any(side % step for side, step in zip(size, patch, strict=True)):
        raise ModelError(
            f"model.image_size {model.image_size} is no multiple of the patch size of {model.name}, {patch[0]} pixels; "
            f"take {max(1, round(size[0] / patch[0])) * patch[0]}"
        )
    config["vision_cfg"]["image_size"] = size
    config["quick_gelu"] = config.get("quick_gelu", False) or tag.get("quick_gelu", False)
    try:
        clip = open_clip.CLIP(**config)
        state = _read_state(weights.path)
        if size != trained:
            state[_POSITIONS] = resize_positions(state[_POSITIONS], _grid(trained, patch), _grid(size, patch))
        clip.load_state_dict(state, strict=True)
    except Exception as error:  # torch, safetensors and open_clip fail in many ways on a bad file
        raise ModelError(
            f"{weights.path} does not load as {model.name}: {str(error)[:600]}; name the weights that belong to "
            f"model.name, or the model that belongs to the weights"
        ) from error
    bf16 = model.precision == "bf16" or (model.precision == "auto" and device.type == "cuda")
    preprocess = Preprocess(
        size,
        tuple(tag.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        tuple(tag.get("std", open_clip.OPENAI_DATASET_STD)),
        tag.get("interpolation", "bicubic"),
    )
    clip = clip.eval().requires_grad_(False).to(device)
    return Encoder(clip, _tokenizer(model.name, config), preprocess, device, torch.bfloat16 if bf16 else torch.float32)


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positional embeddings [1 + P, W], the class token first, from one patch grid (rows, columns) to another.

    Bicubic with antialiasing, as open_clip does it, but for grids that need not be square. Raises ValueError where
    positions do not belong to the old grid.
    """
    if len(positions) != 1 + old[0] * old[1]:
        raise ValueError(f"{len(positions) - 1} positions do not belong to a grid of {old[0]} x {old[1]} patches")
    grid = positions[1:].float().T.unflatten(1, old)[None]
    resized = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1].float(), resized[0].flatten(1).T])


class Encoder:
    """Images and texts to embeddings, in inference mode. All results are float32, whatever the precision inside.

    clip is taken over: the products of its image tower are done in `dtype` from now on.

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
        """Normalised text embeddings [P, D], float32, on the CPU.

        Raises ValueError for a text that the tokenizer would cut.
        """
        for text in texts:
            if not _fits(self._tokenizer, text):
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
        """One forward pass over pixels [B, 3, H, W], uint8, of the model's size; normalised on the device.

        levels: blocks to keep, from 0, ascending; value_depth: blocks of the value path, counted from the last; None:
        no path; compared_levels: blocks to keep for the comparison with other images, ascending.

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
        """The map that CLIP applies to its class token: tokens [..., W] to normalised embeddings [..., D], float32."""
        return F.normalize(self._visual.ln_post(tokens) @ self._visual.proj, dim=-1)

    @torch.inference_mode()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Normalised class embeddings [N, D], float32, of sequences [N, T, W] of embedded tokens, class token first."""
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
    """A residual block of CLIP on x [B, T, W], float32: its output, and with_values its step of the value path,
    W_o softmax(v v^T / sqrt(d_head)) v [B, T, W] (fine-grained aligner, `value`), else None.

    class_only: the output is that of the class token alone, [B, 1, W]. Both attentions share v, so the value path costs
    one attention and one product with W_o.
    """
    parts: Any = block
    attention = parts.attn
    # Products in the precision of their weights; the residual stream stays float32: the cosines of normal and anomalous
    # prompts differ in the third digit.
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


def _config(name: str) -> dict[str, Any]:
    """The open_clip configuration of a model that ALFA can use; ModelError for any other."""
    if name == EMBEDDED_MODEL:
        config: dict[str, Any] = json.loads((_EMBEDDED / f"{EMBEDDED_MODEL}.json").read_text())
        return config
    if name in FORMER_EMBEDDED_MODELS:
        raise ModelError(
            f"{name} came with earlier versions of alfa and is no longer here; leave model.name out to score with "
            f"{EMBEDDED_MODEL}, or name an open_clip ViT"
        )
    found = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if found is None:
        near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)) or "none"
        raise ModelError(f"open_clip has no model {name!r}; nearest names: {near}")
    obstacle = _obstacle(found)
    if obstacle is not None:
        raise ModelError(
            f"{name} has {obstacle}; ALFA needs an open_clip ViT with a class token, such as ViT-B-16, "
            f"ViT-B-16-plus-240 or ViT-L-14"
        )
    return dict(found)


def _obstacle(config: dict[str, Any]) -> str | None:
    vision = asdict(CLIPVisionCfg(**config["vision_cfg"]))
    if vision["timm_model_name"]:
        return f"a timm image tower ({vision['timm_model_name']})"
    if isinstance(vision["layers"], list | tuple):
        return "a ResNet (ModifiedResNet) as its image tower"
    if vision["attentional_pool"] or "multimodal_cfg" in config:
        return "a CoCa image tower (attentional pooling)"
    if vision["pool_type"] != "tok":
        return f"a ViT without a class token as its image tower ({vision['pool_type']} pooling)"
    if vision.get("block_type") == "custom" or any(vision.get(option) for option in _CUSTOM_BLOCKS):
        return "a ViT of custom attention blocks as its image tower"
    if config["text_cfg"].get("hf_model_name") or config.get("custom_text"):
        return "a text tower that is not open_clip's own"
    return None


def _download(name: str, tag: str) -> Path:
    found = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ModelError(f"{tag!r} is neither a weights file here nor a pretrained tag of {name}; its tags: {known}")
    try:
        return Path(open_clip.download_pretrained(found))
    except Exception as error:  # every hub client fails in its own way
        raise ModelError(
            f"the weights {name}/{tag} could not be downloaded ({type(error).__name__}: {str(error)[:200]}); without "
            f"network, name a weights file: model.pretrained=/path/to/weights.safetensors"
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file. Nothing in it is ever executed: safetensors, or torch.load with weights_only."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _tokenizer(name: str, config: dict[str, Any]) -> Any:
    if name == EMBEDDED_MODEL:
        return open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # Hugging Face tokenizers need a package and a download
        raise ModelError(f"the tokenizer of {name} could not be had ({type(error).__name__}: {error})") from error


def _fits(tokenizer: Any, text: str) -> bool:
    """True where one token more than the model reads would be padding."""
    text_end, padding = tokenizer([text, ""], context_length=tokenizer.context_length + 1)[:, -1].tolist()
    return bool(text_end == padding)


def _device(model: Model) -> torch.device:
    if model.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch sees no GPU here; set model.device=auto or mend the driver")
    return torch.device("cuda" if model.device != "cpu" and torch.cuda.is_available() else "cpu")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _grid(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    return size[0] // patch[0], size[1] // patch[1]
