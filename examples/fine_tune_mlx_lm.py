"""Fine-tune with mlx-lm's own program, unpatched, and AdamW with moments of 8 bits.

    python examples/fine_tune_mlx_lm.py MODEL DATA [--optimizer muon] [mlx-lm's options]

MODEL is a folder or a name on Hugging Face, DATA a folder with train.jsonl and valid.jsonl. What
mlx-lm's configuration file gives an optimizer reaches ours, so its file may have options that
`mlx.optimizers` does not know. It needs `pip install mlx-lm`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGURATION = {
    "train": True,
    "optimizer": "adamw",
    "optimizer_config": {
        "adamw": {
            "weight_decay": 0.01,
            "clip_norm": 1.0,  # from here on options of ours
            "skip_nonfinite": True,
            "state_dtype": "8bit",
            "min_8bit_size": 0,  # adapters are small
        },
        "muon": {"momentum": 0.95, "scale": "match_rms_adamw", "clip_norm": 1.0},
    },
    "lr_schedule": {"name": "cosine_decay", "warmup": 10, "arguments": [1e-4, 100, 1e-6]},
    "learning_rate": 1e-4,
}


def main(model: str, data: str, *options: str) -> str:
    """What `--report` says at the end: which optimizer has stepped, how often, and its share."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(CONFIGURATION))  # every JSON is YAML
        accel = [sys.executable, "-m", "mlx_fused_optim.accel", "--report", "-m", "mlx_lm", "lora"]
        chosen = ["--config", str(file), "--model", model, "--data", data, *options]
        result = subprocess.run([*accel, *chosen], stderr=subprocess.PIPE, text=True)
    print(result.stderr, file=sys.stderr)
    result.check_returncode()
    return result.stderr


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
