"""Prompts for a CLIP behind a web service, which is asked for losses, logits or features and nothing else."""

from flops_lightning.service.answering import BadRequest, ClipAnswers
from flops_lightning.service.client import ServiceClient
from flops_lightning.service.local import LocalScorer, clip_info
from flops_lightning.service.network import ServiceCLIP, stage_service
from flops_lightning.service.remote import HttpScorer
from flops_lightning.service.scorer import Scorer, ServiceInfo
from flops_lightning.service.settings import ServiceSettings
from flops_lightning.service.starts import service_image_start, service_text_start
from flops_lightning.service.usage import Usage

__all__ = [
    "BadRequest",
    "ClipAnswers",
    "HttpScorer",
    "LocalScorer",
    "Scorer",
    "ServiceCLIP",
    "ServiceClient",
    "ServiceInfo",
    "ServiceSettings",
    "Usage",
    "clip_info",
    "service_image_start",
    "service_text_start",
    "stage_service",
]
