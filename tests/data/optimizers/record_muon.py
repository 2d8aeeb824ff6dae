"""Records eight steps of torch.optim.Muon, into torch_muon.npz beside this file. It needs torch
and NumPy, and nothing of this package."""

import json
from pathlib import Path

import numpy as np

SHAPES = {"square": (16, 16), "tall": (24, 8), "wide": (6, 30)}
STEPS = 8
CONFIGURATIONS = [
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.05, "weight_decay": 0.1, "nesterov": False, "momentum": 0.8},
    {"lr": 0.02, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": 0.02, "weight_decay": 0.5, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    {"lr": 0.05, "weight_decay": 0.0, "ns_coefficients": [2.0, -1.5, 0.5]},
]


def main():
    import torch  # not where tests are collected

    random = np.random.default_rng(15)
    draw = {name: lambda s=shape: random.standard_normal(s) for name, shape in SHAPES.items()}
    first = {name: x().astype(np.float32) for name, x in draw.items()}
    gradients = [{n: x().astype(np.float32) for n, x in draw.items()} for _ in range(STEPS)]
    arrays = {f"w0.{name}": w for name, w in first.items()}
    for step, gradient in enumerate(gradients):
        arrays |= {f"g{step}.{name}": g for name, g in gradient.items()}
    for number, configuration in enumerate(CONFIGURATIONS):
        parameters = {n: torch.nn.Parameter(torch.tensor(w)) for n, w in first.items()}
        optimizer = torch.optim.Muon(parameters.values(), **configuration)
        for step, gradient in enumerate(gradients):
            for name, parameter in parameters.items():
                parameter.grad = torch.tensor(gradient[name])
            optimizer.step()
            for name, parameter in parameters.items():
                arrays[f"{number}.p{step}.{name}"] = parameter.detach().numpy().copy()
                moment = optimizer.state[parameter]["momentum_buffer"]
                arrays[f"{number}.m{step}.{name}"] = moment.numpy().copy()
    about = {"torch": torch.__version__, "steps": STEPS, "configurations": CONFIGURATIONS}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(Path(__file__).parent / "torch_muon.npz", **arrays)


if __name__ == "__main__":
    main()
