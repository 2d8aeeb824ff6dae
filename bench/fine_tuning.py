"""Fine-tune a small random model with mlx-lm's own program, with accel and without.

    python bench/fine_tuning.py [--iters N] [--repeats N] [--layers N] [--width N] [--write]

Each run is a process of its own and they take turns. It prints milliseconds an iteration (by the
clock, and of the CPUs, which a busy machine disturbs less: medians of the reports of all runs),
peak memory and the last loss, as a table; --write puts it into docs/accelerate.md. Nothing is
downloaded: the model, the tokenizer and the data are made here, and what is ours comes from
mlx-lm's configuration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

PAGE = Path(__file__).parent.parent / "docs" / "accelerate.md"
MARKS = "<!-- fine-tuning: begin -->\n", "<!-- fine-tuning: end -->\n"

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
WORDS = [*"abcdefghijklmnop"]
EVERY = 5  # iterations of a report


class Run(NamedTuple):
    """A fine-tune with mlx-lm alone and with accel."""

    kind: str
    optimizer: str
    ours: dict[str, Any] = {}  # noqa: RUF012  what only accel's configuration has

    def __str__(self) -> str:
        options = ", ".join(f"`{name}: {value}`" for name, value in self.ours.items())
        return f"{self.kind}, `{self.optimizer}`" + (f", accel with {options}" if options else "")


RUNS = [
    Run("lora", "adamw"),
    Run("dora", "adam"),
    Run("full", "adamw"),
    Run("full", "adamw", {"state_dtype": "8bit"}),
    Run("full", "sgd"),
    Run("full", "muon"),
]


def make(folder: Path, **config: object) -> None:
    """``folder/model`` for ``--model`` and ``folder/data`` for ``--data``."""
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = {**CONFIG, **config}
    model, data = folder / "model", folder / "data"
    model.mkdir()
    data.mkdir()
    mx.random.seed(7)
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    (model / "config.json").write_text(json.dumps(config))

    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(special))

    for number, name in enumerate(("train", "valid", "test")):
        texts = (" ".join(WORDS[(i * i + j + number) % 16] for j in range(9)) for i in range(8))
        lines = [json.dumps({"text": text}) for text in texts]
        (data / f"{name}.jsonl").write_text("\n".join(lines))


class Recorder:
    """What mlx-lm reports while it trains."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        info["cpu"] = time.process_time()
        self.reports.append(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass


def child(config: str, out: str) -> None:
    """mlx-lm's program, in this process; run by python or by accel."""
    from mlx_lm import lora

    recorder = Recorder()
    lora.get_reporting_callbacks = lambda *args, **kwargs: recorder
    sys.argv = ["mlx_lm.lora", "--config", config]
    lora.main()
    Path(out).write_text(json.dumps(recorder.reports))


def measured(folder: Path, accel: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    config, out = folder / "config.yaml", folder / "reports.json"
    paths = {name: str(folder / name) for name in ("model", "data")}
    config.write_text(json.dumps({**paths, **options, "adapter_path": str(folder / "adapters")}))
    before = ["-m", "mlx_fused_optim.accel"] if accel else []
    command = [sys.executable, *before, __file__, "--child", str(config), str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def compared(folder: Path, run: Run, usual: dict[str, Any], repeats: int) -> str:
    """A line of the table."""
    options = {**usual, "fine_tune_type": run.kind, "optimizer": run.optimizer}
    clock: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    last = {}
    for repeat in range(repeats + 1):
        for accel in clock:
            own = {run.optimizer: run.ours if accel else {}}
            reports = measured(folder, accel, {**options, "optimizer_config": own})
            last[accel] = reports[-1]
            if not repeat:  # MLX compiles
                continue
            # Validations are in the first and in the last.
            for one, two in itertools.pairwise(reports[:-1]):
                clock[accel].append(1e3 / two["iterations_per_second"])
                cpu[accel].append(1e3 * (two["cpu"] - one["cpu"]) / EVERY)
    weights = mx.load(str(folder / "adapters" / "adapters.safetensors"))
    size = sum(array.size for array in weights.values())
    columns = [
        str(run),
        f"{len(weights)} tensors, {size / 1e6:.2f} M",
        *(f"{statistics.median(clock[accel]):.1f}" for accel in clock),
        *(f"{statistics.median(cpu[accel]):.1f}" for accel in cpu),
        *(f"{1e3 * last[accel]['peak_memory']:.1f}" for accel in last),
        *(f"{last[accel]['train_loss']:.4f}" for accel in last),
    ]
    return f"| {' | '.join(columns)} |"


def caption(given: argparse.Namespace, run: dict[str, Any], load: float) -> str:
    """What the table is of, and whether to believe it; the load is that of the end."""
    from report import BUSY

    machine = run["machine"]
    text = (
        f"A Llama of {given.layers} layers of {given.width}, in float32: `python "
        f"bench/fine_tuning.py --iters {given.iters} --repeats {given.repeats} --write`, on "
        f"{machine.get('gpu', machine['processor'])} with {machine['cores']} cores, MLX "
        f"{run['versions']['mlx']}, {run['date']}; load average {machine['load']} at the start, "
        f"{load:.1f} at the end."
    )
    # A run itself keeps a core busy, and the compiler now and then another.
    if max(machine["load"], load - 1) > BUSY * machine["cores"]:
        text += " **The machine was busy with other work**: memory and losses count, times do not."
    return text


def lines_of(given: argparse.Namespace) -> Iterator[str]:
    """The table and what it is of."""
    from timing import header  # not for the children, one of which is mlx-lm alone

    gpu = mx.default_device() == mx.Device(mx.gpu)
    run = header("gpu" if gpu else "cpu")
    pairs = ("ms an iteration", "ms of the CPUs", "peak MB", "loss")
    yield f"| | trained | {' | '.join(f'{name} | with accel' for name in pairs)} |"
    yield "|---|---|" + "---:|" * 8
    shape = {
        "num_hidden_layers": given.layers,
        "hidden_size": given.width,
        "intermediate_size": 3 * given.width,
    }
    usual = {"train": True, "iters": given.iters, "num_layers": given.layers, "val_batches": 1}
    usual |= {"steps_per_report": EVERY, "learning_rate": 1e-4, "batch_size": 1}
    usual |= {"lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}}
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), **shape)
        for chosen in RUNS:
            yield compared(Path(name), chosen, usual, given.repeats)
    yield ""
    yield caption(given, run, os.getloadavg()[0])


def written(text: str, lines: list[str]) -> str:
    """The page with its table renewed."""
    begin, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    return text[:begin] + "\n" + "\n".join(lines) + "\n\n" + text[end:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--write", action="store_true", help="renew the table of accelerate.md")
    given = parser.parse_args()
    least = 4 * EVERY  # two reports between the validations
    if given.iters < least or given.repeats < 1:
        parser.error(
            f"too few: got --iters {given.iters} --repeats {given.repeats}, allowed {least} or "
            "more and 1 or more"
        )
    lines = []
    for line in lines_of(given):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        PAGE.write_text(written(PAGE.read_text(), lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
