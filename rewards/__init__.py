"""Rewards for GRPO: what an answer earns, from tensors, from texts, and as TRL calls it.

`rewards.base` holds what all of them share, among it the table of what an unreadable answer and a stated absence earn.
"""

from rewards.answer_format import AnswerFormat
from rewards.base import Reward
from rewards.boundary_distance import BoundaryDistance
from rewards.composite import CompositeReward
from rewards.generalized_iou import GeneralizedIoU
from rewards.length_penalty import LengthPenalty
from rewards.reward_registry import REWARDS, build_reward, register_reward
from rewards.segment_overlap import SegmentOverlap
from rewards.shaped_iou import ShapedIoU
from rewards.spread import zero_spread_share
from rewards.step_consistency import StepConsistency
from rewards.temporal_iou import TemporalIoU
from rewards.timestamp_iou import TimestampIoU
from rewards.window_matching import WindowMatching

__all__ = [
    "REWARDS",
    "AnswerFormat",
    "BoundaryDistance",
    "CompositeReward",
    "GeneralizedIoU",
    "LengthPenalty",
    "Reward",
    "SegmentOverlap",
    "ShapedIoU",
    "StepConsistency",
    "TemporalIoU",
    "TimestampIoU",
    "WindowMatching",
    "build_reward",
    "register_reward",
    "zero_spread_share",
]
