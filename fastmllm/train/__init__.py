"""Training: one stage at a time, resumable to the bit, behind DeepSpeed ZeRO."""

from fastmllm.train.checkpoint import CheckpointError, load_trainable, save_trainable
from fastmllm.train.engine import EngineConfig
from fastmllm.train.meters import StepRecord, read_log
from fastmllm.train.stages import StageConfig
from fastmllm.train.trainer import NonFiniteLossError, StageResult, Trainer, TrainingInterrupted

__all__ = [
    "CheckpointError",
    "EngineConfig",
    "NonFiniteLossError",
    "StageConfig",
    "StageResult",
    "StepRecord",
    "Trainer",
    "TrainingInterrupted",
    "load_trainable",
    "read_log",
    "save_trainable",
]
