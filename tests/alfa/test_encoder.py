"""Weights, models and the encoder: nothing random, nothing silent, and the numbers of open_clip."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from pipeline.alfa import Encoder, ModelError, load_encoder, locate_weights, text_fits
from pipeline.alfa.weights import resize_positions
from schemas.job import Model, parse_job
from tests.alfa.conftest import random_pixels, write_model


def open_clip_images(model: Model, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
    clip = open_clip.create_model(model.name, pretrained=model.pretrained, require_pretrained=True, **options).eval()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (clip.visual.image_mean, clip.visual.image_std))
    with torch.no_grad():
        return clip.encode_image((pixels.float() / 255 - mean) / std, normalize=True)


@pytest.mark.parametrize("value_depth", [None, 3])
@pytest.mark.parametrize("kind", ["square", "scaled", "wide"])
def test_class_embedding_is_open_clips(
    kind: str, value_depth: int | None, request: pytest.FixtureRequest, load: Any
) -> None:
    model = request.getfixturevalue(kind)
    encoder = load(model)
    pixels = random_pixels(3, encoder.preprocess.size)
    features = encoder.encode_images(pixels, (0, 3) if value_depth is None else (1, 3), value_depth)
    torch.testing.assert_close(features.embedding, open_clip_images(model, pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_images(pixels).embedding, features.embedding, atol=1e-5, rtol=0)
    found, other = features.tokens, features.values
    if value_depth is not None:
        found, other = other, found
    assert found is not None and found.shape == (2, 3, encoder.grid[0] * encoder.grid[1], 32) and other is None
    assert encoder.embedding_dim == 24 and features.embedding.shape == (3, 24)


@pytest.mark.parametrize("kind", ["square", "scaled", "wide"])
def test_tokens_are_those_of_open_clips_blocks(kind: str, request: pytest.FixtureRequest, load: Any) -> None:
    encoder = load(request.getfixturevalue(kind))
    pixels = random_pixels(2, encoder.preprocess.size)
    plain = encoder.encode_images(pixels, (0, 3), None, (1, 3))
    x, expected = plain.embedded, []
    with torch.no_grad():
        for block in encoder._visual.transformer.resblocks:
            x = block(x)
            expected.append(x[:, 1:])
    tokens, compared = torch.stack([expected[0], expected[3]]), torch.stack([expected[1], expected[3]])
    torch.testing.assert_close(plain.tokens, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.compared_tokens, compared, atol=1e-5, rtol=1e-5)
    beside_values = encoder.encode_images(pixels, (3,), 3, (1, 3))
    torch.testing.assert_close(beside_values.compared_tokens, compared, atol=1e-5, rtol=1e-5)


def test_text_embeddings_are_open_clips_whatever_the_batch(square: Model, encoder: Encoder) -> None:
    texts = [f"a photo of part number {i}" for i in range(70)]
    clip = open_clip.create_model(square.name, pretrained=square.pretrained).eval()
    with torch.no_grad():
        expected = clip.encode_text(open_clip.get_tokenizer(square.name)(texts), normalize=True)
    torch.testing.assert_close(encoder.encode_texts(texts), expected, atol=1e-5, rtol=0)


def test_another_image_size_interpolates_the_positions_as_open_clip_does(square: Model, load: Any) -> None:
    larger = square.model_copy(update={"image_size": 96})
    encoder = load(larger)
    pixels = random_pixels(2, (96, 96))
    assert encoder.grid == (6, 6) and encoder.preprocess.size == (96, 96)
    expected = open_clip_images(square, pixels, force_image_size=96)
    torch.testing.assert_close(encoder.encode_images(pixels, (3,)).embedding, expected, atol=1e-5, rtol=0)


def test_non_square_positions_keep_their_places() -> None:
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    positions = torch.cat([torch.tensor([[7.0, 7.0]]), torch.stack([rows, columns], dim=-1).view(15, 2)])
    resized = resize_positions(positions, (3, 5), (6, 10))
    assert resized[0].tolist() == [7.0, 7.0]
    grid = resized[1:].view(6, 10, 2)
    assert grid[:, :, 0].std(dim=1).max() < 1e-5 and grid[:, :, 1].std(dim=0).max() < 1e-5
    assert (grid[1:, 0, 0] > grid[:-1, 0, 0]).all() and (grid[0, 1:, 1] > grid[0, :-1, 1]).all()
    with pytest.raises(ValueError, match="3 x 4"):
        resize_positions(positions, (3, 4), (6, 8))


def test_wide_model_is_brought_to_a_square(wide: Model, load: Any) -> None:
    encoder = load(wide.model_copy(update={"image_size": 64}))
    assert encoder.grid == (4, 4)
    assert encoder.encode_images(random_pixels(1, (64, 64)), (3,)).tokens.isfinite().all()


def test_image_size_must_be_a_multiple_of_the_patch(square: Model, load: Any) -> None:
    with pytest.raises(ModelError, match="take 96"):
        load(square.model_copy(update={"image_size": 100}))


def test_bf16_stays_inside(square: Model, load: Any, encoder: Encoder) -> None:
    half = load(square.model_copy(update={"precision": "bf16"}))
    pixels = random_pixels(2, (64, 64))
    raw, features = half.encode_images(pixels, (3,)), half.encode_images(pixels, (3,), 3, (1,))
    parts = (features.embedding, features.embedded, features.values, features.compared_tokens, raw.tokens)
    assert {part.dtype for part in (*parts, half.encode_texts(["a nut"]))} == {torch.float32}
    assert F.cosine_similarity(features.embedding, encoder.encode_images(pixels, (3,)).embedding).min() > 0.99


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 48, dtype=torch.uint8)])
def test_wrong_pixels_are_refused(encoder: Encoder, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        encoder.encode_images(pixels, (3,))


def test_quickgelu_where_the_tag_says_so(tmp_path: Path, square: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = {"file": square.pretrained, "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, square.name, {"quick": tag, "plain": {"file": tag["file"]}})
    pixels = random_pixels(1, (64, 64))
    quick, plain = (square.model_copy(update={"pretrained": name}) for name in ("quick", "plain"))
    encoder = load_encoder(quick, locate_weights(quick))
    assert locate_weights(quick).label == "test-vit/quick"
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5) and encoder.preprocess.interpolation == "bilinear"
    expected = open_clip_images(quick, pixels, force_quick_gelu=True)
    torch.testing.assert_close(encoder.encode_images(pixels, (3,)).embedding, expected, atol=1e-5, rtol=0)
    other = load_encoder(plain, locate_weights(plain)).encode_images(pixels, (3,)).embedding
    assert not torch.allclose(other, expected, atol=1e-4)


def test_weights_say_what_they_are(square: Model) -> None:
    weights = locate_weights(square)
    assert weights.sha256 == hashlib.sha256(Path(str(square.pretrained)).read_bytes()).hexdigest()
    assert (weights.label, weights.is_embedded) == ("test-vit/test-vit.pt", False)


def test_embedded_model_loads() -> None:
    weights = locate_weights(Model())
    assert (weights.label, weights.is_embedded) == ("alfa-small", True)
    encoder = load_encoder(Model(), weights)
    assert (encoder.grid, encoder.embedding_dim) == ((16, 16), 192)
    assert encoder.logit_scale == pytest.approx(26.45, abs=0.01)


def test_the_embedded_weights_are_those_of_their_card() -> None:
    path = locate_weights(Model()).path
    card = (path.parent / "MODEL_CARD.md").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert sorted(file.name for file in path.parent.parent.rglob("*.safetensors")) == ["alfa-small.safetensors"]


def test_the_model_of_earlier_versions_scores_no_longer_but_its_jobs_can_be_read() -> None:
    job = parse_job({"dataset": {"images": "in"}, "output": {"uri": "out"}, "model": {"name": "alfa-tiny"}})
    assert job.resolved_method.aligner == "raw" and not job.model.is_embedded
    with pytest.raises(ModelError, match=r"alfa-tiny came with earlier versions.*alfa-small"):
        locate_weights(job.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "visual.proj"}, "Missing key.*visual.proj"),
        (lambda state: {**state, "visual.more": torch.zeros(1)}, "Unexpected key.*visual.more"),
        (lambda state: {**state, "visual.proj": torch.zeros(3, 3)}, "size mismatch for visual.proj"),
        (lambda state: {**state, "visual.positional_embedding": torch.zeros(26, 32)}, "size mismatch.*positional"),
        (lambda state: {}, "Missing key"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    tmp_path: Path, square: Model, load: Callable[[Model], Encoder], change: Any, message: str
) -> None:
    state = torch.load(str(square.pretrained), weights_only=True)
    torch.save(change(state), tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=f"(?s)bad.pt does not load as test-vit.*{message}"):
        load(square.model_copy(update={"pretrained": str(tmp_path / "bad.pt")}))


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_broken_file_is_an_error(tmp_path: Path, square: Model, load: Any, name: str) -> None:
    (tmp_path / name).write_bytes(Path(str(square.pretrained)).read_bytes()[:500])
    with pytest.raises(ModelError, match="does not load"):
        load(square.model_copy(update={"pretrained": str(tmp_path / name)}))


class _Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


def test_code_in_a_weights_file_never_runs(tmp_path: Path, square: Model, load: Any) -> None:
    torch.save({"x": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="does not load"):
        load(square.model_copy(update={"pretrained": str(tmp_path / "evil.pt")}))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_wrapped_state_dict_loads(tmp_path: Path, square: Model, load: Any, encoder: Encoder, wrapper: str) -> None:
    state = torch.load(str(square.pretrained), weights_only=True)
    torch.save({"state_dict": {wrapper + k: v for k, v in state.items()}, "epoch": 3}, tmp_path / "wrapped.pt")
    wrapped = load(square.model_copy(update={"pretrained": str(tmp_path / "wrapped.pt")}))
    assert torch.equal(wrapped.encode_texts(["a nut"]), encoder.encode_texts(["a nut"]))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path, square: Model, load: Any, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    with pytest.raises(ModelError, match="a pointer of Git LFS"):
        load(square.model_copy(update={"pretrained": str(path)}))


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-61", "openai", "no model 'ViT-B-61'.*ViT-B-16"),
        ("ViT-B-16", "nosuchtag", "(?s)neither a weights file here nor a pretrained tag.*laion400m_e32"),
        ("RN50", "openai", "ResNet"),
        ("ViT-B-16-SigLIP", "webli", "timm.*vit_base_patch16_siglip"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "CoCa"),
        ("ViT-L-14-CLIPA", "datacomp1b", "without a class token.*avg"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", "text tower"),
    ],
)
def test_models_that_cannot_be_used_are_refused(name: str, pretrained: str, message: str) -> None:
    model = Model(name=name, pretrained=pretrained)
    with pytest.raises(ModelError, match=message):
        locate_weights(model)
    if "tag" not in message:
        with pytest.raises(ModelError, match=message):
            text_fits(model)


def test_custom_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="custom attention"):
        locate_weights(write_model(tmp_path, "test-vit-qknorm", qk_norm=True))


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cfg: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(
        ModelError, match=r"(?s)ViT-B-16/laion400m_e32 could not be downloaded.*no route.*weights\.safet"
    ):
        locate_weights(Model(name="ViT-B-16", pretrained="laion400m_e32"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ModelError, match="no GPU"):
        load_encoder(Model(device="cuda"), locate_weights(Model()))


@pytest.mark.parametrize("model", [Model(), Model(name="ViT-B-16", pretrained="openai")])
def test_text_fits_counts_start_and_end_tokens(model: Model) -> None:
    fits = text_fits(model)
    assert fits("") and fits("nut " * 75) and not fits("nut " * 76) and not fits("nut " * 200)


def test_a_long_text_is_never_cut(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="longer than the 77 tokens"):
        encoder.encode_texts(["a nut", "nut " * 76])


@pytest.mark.slow  # test_the_readme_shows_ten_lines_that_run_without_ray says it of what imports this too
def test_import_is_light() -> None:
    code = "import sys, pipeline.alfa; print(sorted({'ray', 's3fs', 'litellm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
