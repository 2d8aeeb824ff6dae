"""What is updated: the parameter lists of real models, and a few synthetic ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
ITEMSIZE = {"float32": 4, "bfloat16": 2}
MOMENTS = {"sgd": 1, "adamw": 2}  # that an optimizer of the benchmark keeps of an element


@dataclass(frozen=True)
class Work:
    """A set of named parameters."""

    name: str
    title: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.parameters)

    def least_bytes(self, dtype: str, optimizer: str) -> int:
        """What a step must move: parameters and moments both ways, gradients in."""
        return (3 + 2 * MOMENTS[optimizer]) * self.elements * ITEMSIZE[dtype]


MODELS = ("resnet50", "gpt2", "llama_3_2_1b", "lora_llama_3_2_1b", "lora_llama_2_7b")
SYNTHETIC = {
    "16M": (1, (1 << 24,)),
    "268M": (1, (1 << 28,)),
    "448x64": (448, (64,)),
    "448x16x1024": (448, (16, 1024)),
    "448x16x4096": (448, (16, 4096)),
    "150x4096x1024": (150, (4096, 1024)),
}
# A LoRA training step of bench/training.py: work with a forward and a backward pass.
LORA_TRAINING = "lora_training"
NAMES = (*SYNTHETIC, *MODELS, LORA_TRAINING)

# What runs by default: on the CPU, sizes for a small machine.
DEFAULT = {
    "cpu": (
        "16M",
        "448x16x1024",
        "448x64",
        "resnet50",
        "lora_llama_3_2_1b",
        "lora_llama_2_7b",
        LORA_TRAINING,
    ),
    "gpu": (
        "268M",
        "448x16x4096",
        "150x4096x1024",
        "448x64",
        *MODELS,
        LORA_TRAINING,
    ),
}
QUICK = ("448x64", LORA_TRAINING)


def load(name: str) -> Work:
    """The work of this name."""
    if name in SYNTHETIC:
        count, shape = SYNTHETIC[name]
        tensors = "one tensor" if count == 1 else f"{count} tensors"
        lengths = " x ".join(f"{length:,}" for length in shape)
        rows = tuple((f"layers.{i}.weight", shape) for i in range(count))
        return Work(name, f"{tensors} of {lengths}", rows)
    if name in MODELS:
        model = json.loads((DATA / f"{name}.json").read_text())
        return Work(name, model["model"], tuple(_expanded(model["blocks"])))
    raise ValueError(f"[shapes] no such work: got '{name}', allowed {', '.join(NAMES)}.")


def _expanded(blocks):
    """The parameters of a data file, in order; "{}" in a name is the layer's number."""
    for block in blocks:
        for layer in range(block["first"], block["first"] + block["repeat"]):
            for name, shape in block["parameters"]:
                yield name.replace("{}", str(layer)), tuple(shape)
