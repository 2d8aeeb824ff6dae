"""mx.export_function of a step: through MLX's own operations, or a clear refusal."""

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import pytest
from bits import same
from mlx.utils import tree_flatten, tree_unflatten

PARAMETERS = {"w": mx.arange(12.0).reshape(3, 4), "b": mx.ones(5)}


# The options that the state depends on.
KEPT = ("momentum", "clip_norm", "skip_nonfinite", "ema_decay", "trust_coefficient")


class Exported:
    """A step as a function of flat arrays, which is what MLX exports."""

    def __init__(self, learning_rate, **options):
        self.options = {"momentum": 0.9, **options}
        self.learning_rate = learning_rate
        kept = {name: self.options[name] for name in KEPT if name in self.options}
        state = optim.fused_sgd_init(PARAMETERS, **kept)
        self.names, self.arrays = zip(*tree_flatten([PARAMETERS, state]), strict=True)

    def __call__(self, *arrays):
        parameters, state = tree_unflatten(list(zip(self.names, arrays, strict=True)))
        gradients = {name: 0.5 * p + 0.1 for name, p in parameters.items()}
        result = optim.fused_sgd_step(
            parameters, gradients, state, learning_rate=self.learning_rate, **self.options
        )
        return [array for _, array in tree_flatten(list(result))]


@pytest.fixture
def composed(monkeypatch):
    monkeypatch.setenv("MLX_FUSED_OPTIM_COMPOSED", "1")


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "nesterov": True},
        {"trust_coefficient": 0.01, "weight_decay": 0.1, "decoupled": True},
    ],
)
def test_a_composed_step_is_exported(composed, tmp_path, options, scheduled):
    schedule = mlx.optimizers.exponential_decay(0.1, 0.9)
    step = Exported((lambda count: schedule(count)) if scheduled else 0.1, **options)
    path = str(tmp_path / "step.mlxfn")
    mx.export_function(path, step, *step.arrays)
    got = mx.import_function(path)(*step.arrays)
    want = step(*step.arrays)
    assert len(got) == len(want)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert not same(got[0], step.arrays[0])


def test_the_kernels_are_refused_by_name(tmp_path):
    step = Exported(0.1)
    with pytest.raises(ValueError, match="Unable to serialize primitive FusedStep"):
        mx.export_function(str(tmp_path / "step.mlxfn"), step, *step.arrays)


@pytest.mark.parametrize("made_by", [optim, mlx.optimizers], ids=["ours", "mlx"])
def test_a_schedule_in_the_kernel_is_refused_by_name(composed, tmp_path, made_by):
    """One that MLX made, too, unless a function of the step hides it."""
    step = Exported(made_by.exponential_decay(0.1, 0.9))
    with pytest.raises(ValueError, match="Unable to serialize primitive EvaluateSchedule"):
        mx.export_function(str(tmp_path / "step.mlxfn"), step, *step.arrays)
