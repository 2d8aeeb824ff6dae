"""Learn the learning rate: gradient descent on it, through the steps that use it.

    python examples/meta_learning_rate.py

A regression is trained for a few steps with SGD and momentum. The loss after the last step
is a function of the learning rate, and `fused_sgd_step` is differentiable: `mx.grad` gives
the slope of that loss with respect to the (logarithm of the) rate, and an outer loop walks
down it. The rate it finds is far better than the one it starts from.
"""

from __future__ import annotations

import mlx.core as mx
import mlx_fused_optim as optim

MOMENTUM = 0.5
STEPS = 20
ROUNDS = 40


def make_data() -> tuple[mx.array, mx.array]:
    """256 points of a linear map whose inputs have very unequal scales, with noise."""
    scales = mx.array([3.0, 1.0, 1.0, 0.3])
    x = mx.random.normal((256, 4), key=mx.random.key(0)) * scales
    w = mx.array([[1.0], [-2.0], [0.5], [3.0]])
    return x, x @ w + 0.1 * mx.random.normal((256, 1), key=mx.random.key(1))


X, Y = make_data()


def loss(parameters: dict[str, mx.array]) -> mx.array:
    return mx.mean(mx.square(X @ parameters["w"] + parameters["b"] - Y))


def loss_after_training(log_rate: mx.array) -> mx.array:
    """The loss after STEPS steps at the learning rate exp(log_rate)."""
    parameters = {"w": mx.zeros((4, 1)), "b": mx.zeros(1)}
    state = optim.fused_sgd_init(parameters, momentum=MOMENTUM)
    for _ in range(STEPS):
        gradients = mx.grad(loss)(parameters)
        parameters, state = optim.fused_sgd_step(
            parameters, gradients, state, learning_rate=mx.exp(log_rate), momentum=MOMENTUM
        )
    return loss(parameters)


def main() -> tuple[float, float]:
    """The loss after training at the first rate, and at the one that was learnt."""
    log_rate = mx.log(mx.array(1e-3))
    slope_of = mx.value_and_grad(loss_after_training)
    first = best = loss_after_training(log_rate).item()
    state = optim.fused_sgd_init(log_rate, momentum=0.5)
    for number in range(ROUNDS):
        value, slope = slope_of(log_rate)
        print(f"round {number:2}: rate {mx.exp(log_rate).item():.5f}, loss {value.item():.5f}")
        best = min(best, value.item())
        # A slope of a logarithm can be steep: clipped, a round changes the rate by 20 %.
        slope = mx.clip(slope, -1.0, 1.0)
        log_rate, state = optim.fused_sgd_step(
            log_rate, slope, state, learning_rate=0.2, momentum=0.5
        )
    print(f"loss after {STEPS} steps: {first:.5f} at the first rate, {best:.5f} at the best")
    return first, best


if __name__ == "__main__":
    main()
