"""The method: ALFA (arXiv 2404.09654), reconstructed from its abstract. Pure torch, no I/O but loading weights."""

from pipeline.alfa.detector import Detection, Detector, Features, Pending, PromptEmbeddings
from pipeline.alfa.encoder import Encoder, ModelError, Preprocess, Weights, load_encoder, locate_weights, text_fits
from pipeline.alfa.explain import Evidence
from pipeline.alfa.references import ReferenceMemory

__all__ = [
    "Detection",
    "Detector",
    "Encoder",
    "Evidence",
    "Features",
    "ModelError",
    "Pending",
    "Preprocess",
    "PromptEmbeddings",
    "ReferenceMemory",
    "Weights",
    "load_encoder",
    "locate_weights",
    "text_fits",
]
