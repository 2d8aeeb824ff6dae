"""Draws the pictures of docs/schedules.md, as SVG: `make schedules-docs`.

Each picture is a schedule written as text, as on the command line. The files depend on the
values alone, to a tenth of a pixel, so a test can compare them byte for byte.
"""

from __future__ import annotations

from pathlib import Path

from mlx_fused_optim import parse_schedule
from mlx_fused_optim.schedules.drawing import sampled

HERE = Path(__file__).parent

# Name of the picture: (the schedules in it, steps).
PICTURES: dict[str, tuple[list[str], int]] = {
    "constant": (["constant(0.1)"], 101),
    "linear_schedule": (["linear_schedule(0.1, 0.01, 80)"], 101),
    "cosine_decay": (["cosine_decay(0.1, 80)", "cosine_decay(0.1, 80, exponent=2)"], 101),
    "polynomial_decay": (
        ["polynomial_decay(0.1, 0.01, 2, 70, 10)", "polynomial_decay(0.1, 0.01, 0.5, 70, 10)"],
        101,
    ),
    "exponential_decay": (
        [
            "exponential_decay(0.1, 0.97)",
            "exponential_decay(0.1, 0.5, transition_steps=20, transition_begin=10, end=0.01)",
        ],
        101,
    ),
    "step_decay": (["step_decay(0.1, 0.5, 25)"], 101),
    "multi_step": (["multi_step(0.1, [30, 60, 80], [0.5, 0.5, 0.1])"], 101),
    "inverse_sqrt": (["inverse_sqrt(0.1, warmup_steps=10)"], 101),
    "one_cycle": (
        [
            "one_cycle(90, 0.1, 0.3)",
            "one_cycle(90, 0.1, 0.3, 0.85, anneal='linear')",
        ],
        101,
    ),
    "warmup_stable_decay": (
        [
            "warmup_stable_decay(0.1, 10, 50, 30, decay_type='linear')",
            "warmup_stable_decay(0.1, 10, 50, 30, decay_type='cosine')",
            "warmup_stable_decay(0.1, 10, 50, 30, decay_type='1-sqrt')",
        ],
        101,
    ),
    "cosine_restarts": (
        ["cosine_restarts(0.1, 20)", "cosine_restarts(0.1, 20, 0.01, cycle_multiplier=2)"],
        141,
    ),
    "triangular": (
        [
            "triangular(0.01, 0.1, 20, decay_rate=0.5)",
            "triangular(0.01, 0.1, 10, 20, decay_rate=0.99, decay_every='step')",
        ],
        141,
    ),
    "warmup": (["warmup(cosine_decay(0.1, 80), 20)"], 111),
    "scaled": (["cosine_decay(0.1, 80)", "scaled(cosine_decay(0.1, 80), 0.5)"], 101),
    "join_schedules": (
        [
            "join_schedules([constant(0.1), cosine_decay(0.1, 30), linear_schedule(0.03, 0, 30)], "
            "[20, 50])"
        ],
        101,
    ),
}

WIDTH, HEIGHT, LEFT, RIGHT, TOP, LINE = 720, 220, 52, 14, 12, 17
COLOURS = ("#0b62a4", "#c8553d", "#3a7d44")


def picture(texts: list[str], steps: int) -> str:
    """An SVG document: one curve for each schedule, with its text under them."""
    curves = [sampled(parse_schedule(text), steps, 4000) for text in texts]
    high = max(value for _, values in curves for value in values)
    bottom = HEIGHT - 28
    across = (WIDTH - LEFT - RIGHT) / (steps - 1)
    up = (bottom - TOP) / high

    def at(step: float, value: float) -> str:
        return f"{LEFT + step * across:.1f},{bottom - value * up:.1f}"

    height = HEIGHT + LINE * len(texts) + 4
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="11" fill="#444">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for part in range(5):
        value, step = high * part / 4, (steps - 1) * part / 4
        (_, y), (x, _) = at(0, value).split(","), at(step, 0).split(",")
        lines.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        lines.append(
            f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
        lines.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{step:g}</text>')
    for number, (text, (at_steps, values)) in enumerate(zip(texts, curves, strict=True)):
        points = " ".join(at(s, v) for s, v in zip(at_steps, values, strict=True))
        colour = COLOURS[number]
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        y = HEIGHT + 8 + LINE * number
        shown = text.replace("&", "&amp;").replace("<", "&lt;")
        lines.append(
            f'<text x="{LEFT}" y="{y}" fill="{colour}" font-family="monospace">{shown}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    for name, (texts, steps) in PICTURES.items():
        (HERE / f"{name}.svg").write_text(picture(texts, steps))
        print(f"docs/schedules/{name}.svg")


if __name__ == "__main__":
    main()
