"""`params.yaml` as typed, frozen settings: parsed once, every unknown or misspelt key refused.

One file per group of sections; `Settings` is the whole, and `load` reads it.
"""

from domainstudio.config.adaptation import (
    Adaptation,
    AdaptationSettings,
    PriorSettings,
    PromptPair,
    PromptSettings,
)
from domainstudio.config.base import Name, Section
from domainstudio.config.choosing import ChooseSettings
from domainstudio.config.combination import (
    Combination,
    GuideSettings,
    InterpolateSettings,
    SwitchSettings,
    combination_of,
)
from domainstudio.config.data import NO_IMAGES, PrepareSettings
from domainstudio.config.evaluation import EvaluateSettings
from domainstudio.config.flow import FlowSettings
from domainstudio.config.method import MIN_PAIRED_BATCH, LoraSettings, LossWeights, Method
from domainstudio.config.model import (
    AutoencoderSettings,
    FlowModelSettings,
    NoiseSettings,
    TextEncoderSettings,
    TextModelSettings,
    UNetSettings,
)
from domainstudio.config.pretraining import Style
from domainstudio.config.registry import GateSettings
from domainstudio.config.sampling import SampleSettings
from domainstudio.config.settings import Settings, load
from domainstudio.config.sweep import ObjectiveSettings, RangeSettings, SweepSettings
from domainstudio.config.tradeoff import TradeoffSettings
from domainstudio.config.training import LaunchSettings, TrainingSettings

__all__ = [
    "MIN_PAIRED_BATCH",
    "NO_IMAGES",
    "Adaptation",
    "AdaptationSettings",
    "AutoencoderSettings",
    "ChooseSettings",
    "Combination",
    "EvaluateSettings",
    "FlowModelSettings",
    "FlowSettings",
    "GateSettings",
    "GuideSettings",
    "InterpolateSettings",
    "LaunchSettings",
    "LoraSettings",
    "LossWeights",
    "Method",
    "Name",
    "NoiseSettings",
    "ObjectiveSettings",
    "PrepareSettings",
    "PriorSettings",
    "PromptPair",
    "PromptSettings",
    "RangeSettings",
    "SampleSettings",
    "Section",
    "Settings",
    "Style",
    "SweepSettings",
    "SwitchSettings",
    "TextEncoderSettings",
    "TextModelSettings",
    "TradeoffSettings",
    "TrainingSettings",
    "UNetSettings",
    "combination_of",
    "load",
]
