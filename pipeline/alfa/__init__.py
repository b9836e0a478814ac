"""The method in pure torch: encoder, prompt adaptation, aligner, references, explanation, detector.

In: uint8 pixels and prompts. Out: scores, anomaly maps, explanations.
May import: tiling, schemas. It knows no storage, no Ray and no files but weights.
"""

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
