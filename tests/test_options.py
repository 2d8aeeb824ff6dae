"""The options of a full step: what is refused, and when."""

import copy
import math
import pickle

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from ids import spelled
from mlx_fused_optim import cosine_decay
from test_bad_input import Untouched, assert_refused

NAN, INF = math.nan, math.inf


def any_tensor(path, array):
    return True


OUT_OF_RANGE = [
    ({"state_dtype": mx.int32}, "state_dtype", "int32"),
    ({"state_dtype": mx.float64}, "state_dtype", "float64"),
    ({"state_dtype": "float16"}, "state_dtype", "float16"),
    ({"state_dtype": np.float32}, "state_dtype"),
    ({"state_dtype": "4bit"}, "state_dtype", "'4bit'", "'8bit'"),
    ({"state_dtype": "8Bit"}, "state_dtype", "'8Bit'", "'8bit'"),
    ({"state_dtype": mx.uint8}, "state_dtype", "uint8", "'8bit'"),
    ({"state_dtype": mx.int8}, "state_dtype", "int8", "'8bit'"),
    ({"state_dtype": 8}, "state_dtype", "8", "'8bit'"),
    ({"min_8bit_size": -1}, "min_8bit_size", "-1"),
    ({"min_8bit_size": 2**63}, "min_8bit_size", str(2**63)),
    ({"min_8bit_size": 0.5}, "min_8bit_size", "0.5"),
    ({"rounding": "up"}, "rounding", "'up'", "'stochastic'"),
    ({"rounding": None}, "rounding", "None"),
    ({"master_weights": True, "compensated": True}, "master_weights", "compensated"),
    ({"master_weights": "24bit", "compensated": True}, "master_weights", "compensated"),
    ({"master_weights": "8bit"}, "master_weights", "'8bit'"),
    ({"seed": -1}, "seed", "-1"),
    ({"seed": 2**64}, "seed", str(2**64)),
    ({"seed": 1.5}, "seed", "1.5"),
    ({"clip_norm": 0.0}, "clip_norm", "0.0"),
    ({"clip_norm": -1.0}, "clip_norm", "-1.0"),
    ({"clip_norm": NAN}, "clip_norm", "nan"),
    ({"clip_norm": 1e39}, "clip_norm", "1e+39"),
    ({"clip_norm": 1e-50}, "clip_norm", "1e-50"),
    ({"clip_norm": 10**400}, "clip_norm", "e+308"),  # float() refuses it
    ({"clip_norm": -(10**400)}, "clip_norm", "-1.7"),
    ({"clip_value": 0.0}, "clip_value", "0.0"),
    ({"clip_value": -1.0}, "clip_value", "-1.0"),
    ({"clip_value": NAN}, "clip_value", "nan"),
    ({"clip_value": -(10**400)}, "clip_value", "-1.7"),
    ({"grad_scale": 0.0}, "grad_scale", "0.0"),
    ({"grad_scale": -2.0}, "grad_scale", "-2.0"),
    ({"grad_scale": NAN}, "grad_scale", "nan"),
    ({"grad_scale": INF}, "grad_scale", "inf"),
    ({"grad_scale": 1e-40}, "grad_scale", "1e-40"),
    ({"grad_scale": mx.ones(2)}, "grad_scale", "(2,)"),
    ({"grad_scale": mx.array(True)}, "grad_scale", "bool"),
    ({"trust_coefficient": 0.0}, "trust_coefficient", "0.0"),
    ({"trust_coefficient": -0.1}, "trust_coefficient", "-0.1"),
    ({"trust_coefficient": INF}, "trust_coefficient", "inf"),
    ({"trust_coefficient": NAN}, "trust_coefficient", "nan"),
    ({"ema_decay": 1.0}, "ema_decay", "1.0"),
    ({"ema_decay": 1.5}, "ema_decay", "1.5", "0 to <1"),
    ({"ema_decay": -0.1}, "ema_decay", "-0.1"),
    ({"ema_decay": NAN}, "ema_decay", "nan"),
    ({"groups": [(any_tensor, {"lr": 0.1})]}, "group 0", "'lr'", "learning_rate_factor"),
    ({"groups": [(any_tensor, {1: 0.1})]}, "group 0", "1", "learning_rate_factor"),
    (
        {"groups": [(any_tensor, {"learning_rate": 0.1, "learning_rate_factor": 2.0})]},
        "group 0",
        "two learning rates",
    ),
    (
        {"groups": [(any_tensor, {}), (any_tensor, {"learning_rate": -1e39})]},
        "learning_rate of group 1",
        "-1e+39",
    ),
    ({"groups": [(any_tensor, {"learning_rate": mx.ones(2)})]}, "of group 0", "(2,)"),
    ({"groups": [(any_tensor, {"learning_rate_factor": NAN})]}, "of group 0", "nan"),
    ({"groups": [(any_tensor, {"momentum": -0.5})]}, "momentum of group 0", "-0.5"),
    ({"groups": [(any_tensor, {"weight_decay": INF})]}, "weight_decay of group 0", "inf"),
    ({"groups": [(any_tensor, {"trust_coefficient": 0.0})]}, "of group 0", "0.0"),
]
WRONG_TYPES = [
    ({"master_weights": 1}, "master_weights", "int"),
    ({"compensated": "yes"}, "compensated", "str"),
    ({"skip_nonfinite": None}, "skip_nonfinite", "NoneType"),
    ({"decoupled": 0.0}, "decoupled", "float"),
    ({"maximize": mx.array(True)}, "maximize", "array"),
    ({"seed": "1"}, "seed", "str"),
    ({"seed": True}, "seed", "bool"),
    ({"min_8bit_size": "4096"}, "min_8bit_size", "str"),
    ({"min_8bit_size": True}, "min_8bit_size", "bool"),
    ({"min_8bit_size": None}, "min_8bit_size", "NoneType"),
    ({"clip_norm": "1"}, "clip_norm", "str"),
    ({"clip_norm": True}, "clip_norm", "bool"),
    ({"clip_value": [1.0]}, "clip_value", "list"),
    ({"grad_scale": "2"}, "grad_scale", "str"),
    ({"grad_scale": None}, "grad_scale", "NoneType"),
    ({"trust_coefficient": "1"}, "trust_coefficient", "str"),
    ({"ema_decay": "0.9"}, "ema_decay", "str"),
    ({"ema_decay": True}, "ema_decay", "bool"),
    ({"groups": any_tensor}, "groups", "function"),
    ({"groups": {"a": {}}}, "groups", "dict"),
    ({"groups": [any_tensor]}, "group 0"),
    ({"groups": [(any_tensor, {}), (any_tensor,)]}, "group 1"),
    ({"groups": [("bias", {})]}, "group 0", "str"),
    ({"groups": [(any_tensor, [("momentum", 0.0)])]}, "group 0", "list"),
    ({"groups": [(any_tensor, {"momentum": "0.9"})]}, "momentum of group 0", "str"),
    ({"groups": [(any_tensor, {"learning_rate_factor": cosine_decay(1.0, 9)})]}, "of group 0"),
    ({"groups": [(any_tensor, {"trust_coefficient": "1"})]}, "of group 0", "str"),
]
CASES = [(o, w, ValueError) for o, *w in OUT_OF_RANGE] + [
    (o, w, TypeError) for o, *w in WRONG_TYPES
]


@pytest.mark.parametrize(("options", "words", "error"), CASES, ids=spelled)
def test_options_that_make_no_sense(options, words, error):
    assert_refused(lambda: optim.SGD(0.1, **options), "SGD", *words, error=error)
    w = {"a": mx.ones(3)}
    assert_refused(
        lambda: optim.fused_sgd_init(w, **options), "fused_sgd_init", *words, error=error
    )
    state = optim.fused_sgd_init(w)
    assert_refused(
        lambda: optim.fused_sgd_step(w, w, state, learning_rate=0.1, **options),
        "fused_sgd_step", *words,
        error=error,
    )  # fmt: skip
    assert state["step"].item() == 0


@pytest.mark.parametrize(("options", "words", "error"), CASES, ids=spelled)
def test_options_that_are_set_later(options, words, error):
    """Refused at once; the old ones stay."""
    check = Untouched(momentum=0.9)
    before = check.everything()
    options = dict(options)
    if len(options) == 2:  # a contradiction: one of them is fine
        check.optimizer.compensated = options.pop("compensated")
    ((name, value),) = options.items()
    kept = getattr(check.optimizer, name)
    assert_refused(lambda: setattr(check.optimizer, name, value), "SGD", *words, error=error)
    assert getattr(check.optimizer, name) == kept
    assert check.everything() == before


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": INF},
        {"clip_value": INF},
        {"clip_norm": np.float32(0.5)},
        {"clip_norm": 1},
        {"seed": 2**64 - 1},
        {"ema_decay": 0},
        {"grad_scale": 2},
        {"grad_scale": mx.array(2)},
        {"grad_scale": cosine_decay(2.0, 9)},
        {"grad_scale": lambda step: 2.0},
        {"rounding": "stochastic", "master_weights": True},
        {"decoupled": True},
        {"groups": []},
        {"groups": ((any_tensor, {}),)},
        {"groups": [(any_tensor, {"trust_coefficient": None, "momentum": lambda step: 0.5})]},
        {"groups": [(any_tensor, {"learning_rate": mx.array(0.5), "weight_decay": 0})]},
    ],
    ids=spelled,
)
def test_options_that_do(options):
    optimizer = optim.SGD(0.1, **options)
    w = {"a": mx.array([1.0, 2.0])}
    w = optimizer.apply_gradients({"a": mx.array([0.5, 0.25])}, w)
    assert np.isfinite(np.array(w["a"])).all()
    assert (w["a"] < mx.array([1.0, 2.0])).all()


@pytest.mark.parametrize(
    ("scale", "words", "error"),
    [
        (0.0, ("0.0",), ValueError),
        (NAN, ("nan",), ValueError),
        (mx.ones(2), ("(2,)",), ValueError),
        ("2", ("str",), TypeError),
        (lambda step: mx.ones(2), ("(2,)",), ValueError),
        (lambda step: "2", ("str",), TypeError),
    ],
    ids=spelled,
)
def test_a_scale_of_one_call(scale, words, error):
    check = Untouched(momentum=0.9, skip_nonfinite=True)
    before = check.everything()
    assert_refused(
        lambda: check.optimizer.apply_gradients(
            check.gradients, check.parameters, grad_scale=scale
        ),
        "SGD", "grad_scale", *words,
        error=error,
    )  # fmt: skip
    assert check.everything() == before


def test_a_group_without_a_tensor():
    """Most likely a misspelt path; but only of the first tree, and of the whole of it."""
    w = {"weight": mx.ones((2, 2)), "bias": mx.ones(2), "scale": mx.ones(1)}

    def named(name):
        return lambda path, array: path == name

    groups = [(named("weight"), {}), (named("biass"), {"weight_decay": 0.0})]
    optimizer = optim.SGD(0.1, momentum=0.9, groups=groups)
    before = dict(optimizer.state)
    assert_refused(lambda: optimizer.apply_gradients(w, w), "SGD", "group 1", "'weight'")
    assert optimizer.state == before
    state = optim.fused_sgd_init(w, momentum=0.9, groups=groups)
    assert_refused(
        lambda: optim.fused_sgd_step(
            w, w, state, learning_rate=0.1, momentum=0.9, groups=groups
        ),
        "fused_sgd_step", "group 1",
    )  # fmt: skip
    # All that it takes is another group's.
    shadowed = [(any_tensor, {}), (named("bias"), {"weight_decay": 0.0})]
    assert_refused(lambda: optim.SGD(0.1, groups=shadowed).apply_gradients(w, w), "SGD", "group 1")
    # A tensor that is not trained at first counts, and later trees may lack it.
    optimizer = optim.SGD(0.1, groups=[(named("bias"), {"learning_rate": 0.5})])
    optimizer.init({"weight": w["weight"]})
    result = optimizer.apply_gradients({"weight": w["weight"]}, w)
    w.update(result)
    w.update(optimizer.apply_gradients({"bias": w["bias"]}, w))
    assert w["bias"].tolist() == [0.5, 0.5]
    optimizer.apply_gradients({"weight": w["weight"]}, {"weight": w["weight"]})


def test_a_predicate_that_goes_wrong():
    check = Untouched()

    def broken(path, array):
        raise KeyError(path)

    check.optimizer.groups = [(broken, {})]
    before = check.everything()
    with pytest.raises(KeyError):
        check.optimizer.apply_gradients(check.gradients, check.parameters)
    assert check.everything() == before


BAD_SLOTS = {
    "no slot": (lambda e: {"table": e["table"]}, ("without slots", "'ema'")),
    "a slot of another rule": (lambda e: {**e, "m": e["ema"]}, ("'m'", "'ema'")),
    "a number for a slot": (lambda e: {**e, "ema": 3}, ("ema of 'a' and 1 more", "int")),
    "numbers in a slot": (lambda e: {**e, "master": [1.0]}, ("master of 'a'", "list")),
    "an arena too many": (lambda e: {**e, "master": e["master"] * 2}, ("master", "2")),
    "an arena too few": (lambda e: {**e, "ema": e["ema"][:1]}, ("ema", "1", "2")),
    "a master in bfloat16": (
        lambda e: {**e, "master": [a.astype(mx.bfloat16) for a in e["master"]]},
        ("master", "bfloat16"),
    ),
    "an average of another size": (
        lambda e: {**e, "ema": [a[:-1] for a in e["ema"]]}, ("ema", "float32")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SLOTS)
def test_states_with_bad_slots(name):
    change, words = BAD_SLOTS[name]
    options = {"momentum": 0.9, "master_weights": True, "ema_decay": 0.5}
    w = {"a": mx.ones(3, mx.bfloat16), "b": mx.ones(5)}
    optimizer = optim.SGD(0.1, **options)
    w = optimizer.apply_gradients(w, w)
    ((key, entry),) = optimizer.state["arenas"].items()
    bad = {**optimizer.state, "arenas": {key: change(entry)}}
    loaded = optim.SGD(0.1, **options)
    loaded.state = bad
    assert_refused(lambda: loaded.apply_gradients(w, w), "SGD", *words)
    assert_refused(
        lambda: optim.fused_sgd_step(w, w, bad, learning_rate=0.1, **options), "fused_sgd_step"
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("grad_norm", mx.ones(2), ("(2,)",)),
        ("grad_norm", mx.array(1, mx.int32), ("int32",)),
        ("skipped", mx.array(1.0), ("float32",)),
        ("skipped", mx.zeros(1, mx.uint64), ("(1,)",)),
    ],
    ids=spelled,
)
def test_states_with_bad_counters(name, value, words):
    options = {"clip_norm": 1.0, "skip_nonfinite": True}
    w = {"a": mx.ones(3)}
    optimizer = optim.SGD(0.1, **options)
    optimizer.apply_gradients(w, w)
    bad = {**optimizer.state, name: value}
    with pytest.raises(ValueError, match=rf"\[fused_sgd_step\] state\['{name}'\] is of the wrong"):
        optim.fused_sgd_step(w, w, bad, learning_rate=0.1, **options)
    loaded = optim.SGD(0.1, **options)
    loaded.state = bad
    assert_refused(lambda: loaded.apply_gradients(w, w), "SGD", name, *words)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("master", {"master_weights": True}),
        ("compensation", {"compensated": True}),
        ("ema", {"ema_decay": 0.5}),
        ("momentum", {"momentum": 0.9}),
    ],
)
def test_a_function_wants_its_options_from_the_beginning(name, options):
    w = {"a": mx.ones(3, mx.bfloat16)}
    state = optim.fused_sgd_init(w)
    assert_refused(
        lambda: optim.fused_sgd_step(w, w, state, learning_rate=0.1, **options),
        "fused_sgd_step", name, "fused_sgd_init",
    )  # fmt: skip
    state = optim.fused_sgd_init(w, state=state, **options)
    optim.fused_sgd_step(w, w, state, learning_rate=0.1, **options)


def test_momentum_of_another_dtype_for_a_function():
    w = {"a": mx.ones(3, mx.bfloat16)}
    state = optim.fused_sgd_init(w, momentum=0.9)
    options = {"momentum": 0.9, "state_dtype": mx.float32}
    assert_refused(
        lambda: optim.fused_sgd_step(w, w, state, learning_rate=0.1, **options),
        "fused_sgd_step", "momentum", "fused_sgd_init",
    )  # fmt: skip
    state = optim.fused_sgd_init(w, state=state, **options)
    optim.fused_sgd_step(w, w, state, learning_rate=0.1, **options)


def test_one_dict_of_options_for_both_functions():
    w = {"a": mx.ones(2)}
    options = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "ema_decay": 0.5}
    state = optim.fused_sgd_init(w, **options)
    assert state.keys() == optim.fused_sgd_init(w, momentum=0.9, ema_decay=0.5).keys()
    optim.fused_sgd_step(w, w, state, learning_rate=0.1, **options)
    assert_refused(lambda: optim.fused_sgd_init(w, nesterov=True), "fused_sgd_init", "nesterov")
    assert_refused(lambda: optim.fused_sgd_init(w, weight_decay=-1e39), "fused_sgd_init", "-1e+39")


def test_averages_that_nobody_keeps():
    optimizer, state = optim.SGD(0.1, momentum=0.9), optim.fused_sgd_init({"w": mx.ones(2)})
    assert_refused(optimizer.ema_parameters, "SGD", "average")
    assert_refused(lambda: optim.fused_ema(state), "fused_ema", "average")
    assert_refused(lambda: optim.fused_ema({}), "fused_ema", "step")
    optimizer = optim.SGD(0.1, ema_decay=0.5)
    assert_refused(optimizer.ema_parameters, "SGD", "init()")
    optimizer.init({"w": mx.ones(2)})
    assert optimizer.ema_parameters()["w"].tolist() == [1.0, 1.0]
    for dtype in (mx.int32, mx.float64, "float16"):
        assert_refused(lambda dtype=dtype: optimizer.ema_parameters(dtype), "SGD", "float16")


def test_an_option_that_is_set_later_counts_from_then_on():
    optimizer = optim.SGD(1.0)
    w = {"a": mx.array([3.0, 4.0])}
    w = optimizer.apply_gradients(w, {"a": mx.zeros(2)})
    assert w["a"].tolist() == [-3.0, -4.0]
    optimizer.clip_value = 1.0
    optimizer.maximize = True
    assert optimizer.clip_value == 1.0
    w = optimizer.apply_gradients({"a": mx.array([3.0, 0.5])}, w)
    assert w["a"].tolist() == [-2.0, -3.5]
    assert optimizer.grad_norm is None
    optimizer.clip_norm = INF
    optimizer.clip_value = None
    optimizer.apply_gradients({"a": mx.array([3.0, 4.0])}, w)
    assert optimizer.grad_norm.item() == 5.0
    optimizer.clip_norm = None
    optimizer.apply_gradients({"a": mx.array([30.0, 40.0])}, w)
    assert optimizer.grad_norm is None  # and not that of the step before


@pytest.mark.parametrize("dtype", [None, mx.float32, mx.float16, mx.bfloat16])
def test_copies_of_an_optimizer(dtype):
    optimizer = optim.SGD(0.5, momentum=0.5, state_dtype=dtype, clip_norm=1.0, ema_decay=0.5)
    w = optimizer.apply_gradients({"a": mx.ones(2)}, {"a": mx.zeros(2)})
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    want = optimizer.apply_gradients({"a": mx.ones(2)}, w)["a"]
    for other in others:
        assert other.state_dtype == dtype
        assert same(other.apply_gradients({"a": mx.ones(2)}, w)["a"], want)


def test_without_options_a_step_is_the_plain_one():
    """The same state, and nothing beside it."""
    optimizer = optim.SGD(0.1, momentum=0.9, **{
        "state_dtype": None, "rounding": "nearest", "seed": 0, "grad_scale": 1.0, "groups": (),
    })  # fmt: skip
    w = {"a": mx.ones(3)}
    w = optimizer.apply_gradients(w, w)
    assert set(optimizer.state) == {"step", "learning_rate", "arenas"}
    (entry,) = optimizer.state["arenas"].values()
    assert set(entry) == {"table", "momentum"}
    other = optim.SGD(0.1, momentum=0.9)
    want = {"a": mx.ones(3)}
    want = other.apply_gradients(want, want)
    assert np.array_equal(of_mlx(w["a"]), of_mlx(want["a"]))


@pytest.mark.parametrize("how", ["init", "step", "fused_sgd_init", "later"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_masters_of_24_bits_are_those_of_bfloat16(dtype, how):
    """Also where one of the tensors is of float16; not where a float32 one stands beside."""
    wrong = {"w": mx.ones(3, dtype), "v": mx.ones(2, dtype)}
    if dtype == mx.float16:
        wrong["v"] = wrong["v"].astype(mx.bfloat16)
    optimizer = optim.SGD(0.1, master_weights=how != "later" and "24bit")
    if how == "later":
        wrong = optimizer.apply_gradients(wrong, wrong)
        optimizer.master_weights = "24bit"
    before = {k: v.tolist() for k, v in wrong.items()}
    call = {
        "init": lambda: optimizer.init(wrong),
        "fused_sgd_init": lambda: optim.fused_sgd_init(wrong, master_weights="24bit"),
    }.get(how, lambda: optimizer.apply_gradients(wrong, wrong))
    with pytest.raises(ValueError, match=r"24 bits.*got mlx.core.float(32|16) for '[vw]', allowed"):
        call()
    assert {k: v.tolist() for k, v in wrong.items()} == before
    assert optimizer.state["step"].item() == (how == "later")
    mixed = {"w": mx.ones(3), "v": mx.ones(2, mx.bfloat16)}
    optimizer = optim.SGD(2.0**-12, master_weights="24bit")
    mixed = optimizer.apply_gradients(mixed, mixed)
    assert set(optimizer.unpacked_state()) == {"step", "learning_rate", "v"}
    optimizer.apply_gradients({"w": mixed["w"]}, mixed)  # the others are frozen
