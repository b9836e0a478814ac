"""The method in pure torch: encoder, prompt adaptation, aligner, references, peers, explanation, detector.

In: uint8 pixels and prompts. Out: scores, anomaly maps, explanations.
May import: tiling, schemas. It uses no storage, no Ray, and no files except weights.
"""

from pipeline.alfa.detection import Detection, Features, PromptEmbeddings
from pipeline.alfa.detector import Detector, Pending
from pipeline.alfa.encoder import Encoder, Preprocess
from pipeline.alfa.explain import Evidence
from pipeline.alfa.peers import Calibration, PeerMemory, Unfenced, fence_in, fingerprint_pixels
from pipeline.alfa.references import ReferenceMemory
from pipeline.alfa.weights import ModelError, Weights, load_encoder, locate_weights, text_fits

__all__ = [
    "Calibration",
    "Detection",
    "Detector",
    "Encoder",
    "Evidence",
    "Features",
    "ModelError",
    "PeerMemory",
    "Pending",
    "Preprocess",
    "PromptEmbeddings",
    "ReferenceMemory",
    "Unfenced",
    "Weights",
    "fence_in",
    "fingerprint_pixels",
    "load_encoder",
    "locate_weights",
    "text_fits",
]
