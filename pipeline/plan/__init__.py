"""What a recipe will take, before it is run (`otpo plan`, and a line at the start of every training)."""

from pipeline.plan.lengths import Lengths, assumed, measured
from pipeline.plan.machine import GPUS, Gpu, Machine, gpu_machine, known_gpu
from pipeline.plan.plan import Plan, plan
from pipeline.plan.shape import Shape, shape_of

__all__ = [
    "GPUS",
    "Gpu",
    "Lengths",
    "Machine",
    "Plan",
    "Shape",
    "assumed",
    "gpu_machine",
    "known_gpu",
    "measured",
    "plan",
    "shape_of",
]
