"""Loads the encoder of a model by name: its configuration, its weights file, its tokenizer.

open_clip is imported where it is used, because that takes seconds, and not every process loads a model.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pipeline.alfa.encoder import Encoder, Preprocess, reads_whole
from schemas.job import EMBEDDED_MODEL, FORMER_EMBEDDED_MODELS, Model

_EMBEDDED = Path(__file__).parent / "models" / EMBEDDED_MODEL
_LFS_POINTER = b"version https://git-lfs"
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
"""What distributed training and torch.compile put before the names of a model's tensors."""
_POSITIONS = "visual.positional_embedding"
_CUSTOM_BLOCKS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


class ModelError(RuntimeError):
    """A model or its weights cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Weights:
    """A weights file. label: names model and weights in rows. is_embedded: whether it comes with the package."""

    path: Path
    sha256: str
    label: str
    is_embedded: bool


def locate_weights(model: Model) -> Weights:
    """Finds the weights file of a model: the embedded one, a named file, or that of a tag, which open_clip downloads.

    Builds no model. Raises ModelError for unknown or unsupported models, and for missing files or tags.
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
    return partial(reads_whole, _tokenizer(model.name, _config(model.name)))


def load_encoder(model: Model, weights: Weights) -> Encoder:
    """Builds the model with its weights. It never leaves any weights random.

    A weights file without a tag is assumed to expect open_clip's default mean, std and interpolation. QuickGELU is used
    if the tag or the configuration (ViT-B-16-quickgelu) says so. Raises ModelError if weights are missing, partial or
    of another model, if the model is not an open_clip ViT with a class token, or if the device is missing.
    """
    import open_clip
    from open_clip.model import CLIPVisionCfg

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
    except Exception as error:  # torch, safetensors and open_clip raise many types for a bad file
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
    """Resizes positional embeddings [1 + P, W], class token first, from one patch grid (rows, columns) to another.

    It is bicubic with antialiasing, as in open_clip, but grids need not be square. Raises ValueError if the positions
    do not fit the old grid.
    """
    if len(positions) != 1 + old[0] * old[1]:
        raise ValueError(f"{len(positions) - 1} positions do not belong to a grid of {old[0]} x {old[1]} patches")
    grid = positions[1:].float().T.unflatten(1, old)[None]
    resized = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1].float(), resized[0].flatten(1).T])


def _config(name: str) -> dict[str, Any]:
    """Returns the open_clip configuration of a model. Raises ModelError for a model that ALFA cannot use."""
    if name == EMBEDDED_MODEL:
        config: dict[str, Any] = json.loads((_EMBEDDED / f"{EMBEDDED_MODEL}.json").read_text())
        return config
    if name in FORMER_EMBEDDED_MODELS:
        raise ModelError(
            f"{name} came with earlier versions of alfa and is no longer here; leave model.name out to score with "
            f"{EMBEDDED_MODEL}, or name an open_clip ViT"
        )
    import open_clip

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
    from open_clip.model import CLIPVisionCfg

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
    import open_clip

    found = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ModelError(f"{tag!r} is neither a weights file here nor a pretrained tag of {name}; its tags: {known}")
    try:
        return Path(open_clip.download_pretrained(found))
    except Exception as error:  # every hub client raises other types
        raise ModelError(
            f"the weights {name}/{tag} could not be downloaded ({type(error).__name__}: {str(error)[:200]}); without "
            f"network, name a weights file: model.pretrained=/path/to/weights.safetensors"
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a weights file, as safetensors or by torch.load with weights_only: no code in it is run."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError("it is a pointer of Git LFS and not the weights themselves, which git lfs pull fetches")
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
    return {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _tokenizer(name: str, config: dict[str, Any]) -> Any:
    import open_clip

    if name == EMBEDDED_MODEL:
        return open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # Hugging Face tokenizers need a package and a download
        raise ModelError(f"the tokenizer of {name} could not be had ({type(error).__name__}: {error})") from error


def _device(model: Model) -> torch.device:
    if model.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch sees no GPU here; set model.device=auto or mend the driver")
    return torch.device("cuda" if model.device != "cpu" and torch.cuda.is_available() else "cpu")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _grid(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    return size[0] // patch[0], size[1] // patch[1]
