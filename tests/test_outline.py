"""Trees that are read along the outline of an earlier one, csrc/binding/outline.h: the same as by
a walk, and whatever is not like that one is left to the walk."""

import collections
import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_fused_optim import _ext

Pair = collections.namedtuple("Pair", "first second")


class Text(str):
    pass


class Liar(dict):
    def __len__(self):
        return 2


def leaf(value, shape=(2, 3), dtype=mx.float32):
    return mx.full(shape, value, dtype)


def usual(start=1.0):
    """Every container, nested, and a place without gradients."""
    return {
        "a": leaf(start),
        "layers": [
            {"weight": leaf(start + 1, (4,)), "bias": leaf(start + 2, ())},
            {},
            {"weight": leaf(start + 3, (0,)), "bias": leaf(start + 4, (1,), mx.float16)},
        ],
        "alike": {"x": leaf(start + 9), "y": leaf(start + 10)},
        "pair": (leaf(start + 5), [leaf(start + 6)]),
        "last": leaf(start + 7, dtype=mx.bfloat16),
    }


def outline_of(tree):
    outline = _ext.Tree(tree, tree_map(mx.ones_like, tree), "op").outline
    assert outline is not None
    return outline


def shown(tree):
    """Types, keys and values, in their order."""
    if isinstance(tree, dict):
        return type(tree), [(type(key), key, shown(value)) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return type(tree), [shown(value) for value in tree]
    return tree.shape, tree.dtype, tree.tolist()


def outcome(gradients, parameters, exact, like):
    try:
        tree = _ext.Tree(gradients, parameters, "op", exact, like)
    except Exception as error:
        return type(error), str(error)
    leaves = [mx.array(float(i)) for i in range(len(tree))]
    return (
        tree.fingerprint,
        shown(tree.gradients),
        shown(tree.parameters),
        shown(tree.unflatten(leaves)),
        _ext.Layout(tree).tensors,
    )


def changed(change):
    tree = usual()
    change(tree)
    return tree


CHANGES = {
    "nothing": lambda t: None,
    "another order of keys": lambda t: t.update({"a": t.pop("a")}),
    "of two alike the second first": lambda t: t.update(alike=dict(reversed(t["alike"].items()))),
    "of two alike one of another key": lambda t: t.update(alike={"x": leaf(0), "z": leaf(0)}),
    "another key": lambda t: t.update({"b": t.pop("a")}),
    "one more": lambda t: t.update(more=leaf(0)),
    "one less": lambda t: t.pop("a"),
    "more in a list": lambda t: t["layers"].append({"weight": leaf(0)}),
    "less in a list": lambda t: t["layers"].pop(),
    "an empty place is filled": lambda t: t["layers"][1].update(weight=leaf(0)),
    "a place is emptied": lambda t: t["layers"][0].clear(),
    "a list for a dict": lambda t: t.update(layers=[[leaf(0)], {}, []]),
    "a dict for a list": lambda t: t.update(pair={"0": leaf(0)}),
    "a list for a tuple": lambda t: t.update(pair=list(t["pair"])),
    "a tuple of more": lambda t: t.update(pair=(*t["pair"], leaf(0))),
    "a named one for a tuple": lambda t: t.update(pair=Pair(*t["pair"])),
    "a leaf for a tree": lambda t: t.update(layers=leaf(0)),
    "a tree for a leaf": lambda t: t.update(a={"a": leaf(0)}),
    "another shape": lambda t: t.update(a=leaf(0, (3, 2))),
    "another rank": lambda t: t.update(a=leaf(0, (6,))),
    "another dtype": lambda t: t.update(a=leaf(0, dtype=mx.float16)),
    "integers": lambda t: t.update(a=leaf(0, dtype=mx.int32)),
    "a number": lambda t: t.update(a=1.0),
    "nothing for a leaf": lambda t: t.update(a=None),
    "nothing for a tree": lambda t: t.update(layers=None),
    "a key of another type": lambda t: t.update({Text("a"): t.pop("a")}),
    "a number as key": lambda t: t.update({0: t.pop("a")}),
    "a dict that says that it is shorter": lambda t: t.update(alike=Liar(z=leaf(0), **t["alike"])),
    "an ordered dict": lambda t: t.update(layers=[collections.OrderedDict(t["layers"][0]), {}, {}]),
    "itself": lambda t: t.update(a=t),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("of", ["gradients", "parameters", "both"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_same_as_a_walk(change, of, exact):
    like = outline_of(usual())
    gradients = changed(CHANGES[change]) if of != "parameters" else usual(20.0)
    parameters = changed(CHANGES[change]) if of != "gradients" else usual(20.0)
    want = outcome(gradients, parameters, exact, None)
    assert outcome(gradients, parameters, exact, like) == want


def test_parameters_of_a_module():
    """It is a dict of more, in another order, with gradients for what is trained."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4), nn.Linear(4, 2))
    model.layers[2].freeze(keys="bias")
    gradients = tree_map(mx.ones_like, model.trainable_parameters())
    optimizer = optim.SGD(optim.exponential_decay(0.1, 0.9))
    optimizer.update(model, gradients)
    like = optimizer._prepared.outline
    want = outcome(gradients, model, False, None)
    assert len(want[1][1]) == 5
    assert outcome(gradients, model, False, like) == want


def test_keys_are_those_of_the_outline():
    """So a tree was read along it: a walk would have the keys of the tree itself."""
    key, same = "".join(["ke", "y"]), "".join(["k", "ey"])
    assert key is not same
    like = outline_of({key: leaf(1)})
    other = {same: leaf(2)}
    for known, want in ((like, key), (None, same)):
        tree = _ext.Tree(other, other, "op", True, known).unflatten([leaf(3)])
        assert next(iter(tree)) is want


def test_what_a_later_tree_was_made_like_can_go():
    outline = outline_of(usual())
    tree = _ext.Tree(usual(5.0), usual(), "op", True, outline)
    assert tree.outline is outline
    del outline
    gc.collect()
    assert shown(tree.unflatten(tree.gradients)) == shown(usual(5.0))


def test_integers_of_parameters_alone_stay():
    """Data of a quantized layer, which nobody trains."""
    tree = {"w": leaf(1), "data": [leaf(2, dtype=mx.uint32), leaf(3)], "last": leaf(4)}
    read = _ext.Tree(tree, tree, "op")
    assert len(read) == 3 and read.outline is None
    made = read.unflatten([leaf(10), leaf(30), leaf(40)])
    assert shown(made) == shown(
        {"w": leaf(10), "data": [leaf(2, dtype=mx.uint32), leaf(30)], "last": leaf(40)}
    )
    optimizer = optim.SGD(optim.exponential_decay(0.1, 0.9))
    for _ in range(2):
        assert optimizer.apply_gradients(tree, tree)["data"][0] is tree["data"][0]


@pytest.mark.parametrize(
    "tree",
    [
        {0: leaf(1)},
        {Text("a"): leaf(1)},
        {"a": Pair(leaf(1), leaf(2))},
        {"a": type("Mine", (list,), {})([leaf(1)])},
    ],
    ids=["number", "text of another type", "named tuple", "list of another type"],
)
def test_some_trees_are_always_walked(tree):
    """An outline of theirs would refer to what the collector of cycles has to see."""
    walked = _ext.Tree(tree, tree_map(mx.ones_like, tree), "op")
    assert walked.outline is None
    assert shown(walked.unflatten(walked.gradients)) == shown(tree)


@pytest.mark.parametrize("of", ["a list", "a key"])
def test_an_optimizer_in_what_it_trains_can_go(of):
    def begin():
        class Mine(list):
            pass

        class Key:
            pass

        optimizer, key = optim.SGD(optim.exponential_decay(0.1, 0.9)), Key()
        if of == "a list":
            Mine.optimizer, tree = optimizer, Mine([leaf(1)])
        else:
            key.optimizer, tree = optimizer, {key: leaf(1)}
        for _ in range(2):
            optimizer.apply_gradients(tree, tree_map(mx.ones_like, tree))
        return weakref.ref(optimizer)

    optimizer = begin()
    gc.collect()
    assert optimizer() is None


def test_no_array_is_kept():
    def trees():
        made = {"a": [mx.ones((1 << 18,)) + i for i in range(4)], "b": mx.ones((1 << 18,)) * 2}
        mx.eval(made)
        return made

    optimizer = optim.SGD(optim.exponential_decay(0.1, 0.9))
    mx.synchronize()
    before = mx.get_active_memory()
    for _ in range(3):
        gradients, parameters = trees(), trees()
        updated = optimizer.apply_gradients(gradients, parameters)
        mx.eval(updated, optimizer.state)
        assert mx.get_active_memory() - before > 4 << 20
        del gradients, parameters, updated
    gc.collect()
    mx.synchronize()
    assert optimizer._prepared.outline is not None
    assert mx.get_active_memory() - before < 1 << 16


def test_the_gradient_of_a_leaf_is_told_first():
    with pytest.raises(ValueError, match="the gradient at 'a' has a dtype"):
        _ext.Tree({"a": mx.array([1])}, {"a": None}, "op")
    with pytest.raises(ValueError, match="the parameter at 'a' is not an array"):
        _ext.Tree({"a": mx.array([1.0])}, {"a": None}, "op")


@pytest.mark.parametrize("where", ["gradients", "parameters"])
@pytest.mark.parametrize("action", ["clear", "grow", "replace"])
def test_keys_that_change_the_trees(where, action):
    """Code of a key in the parameters runs while a tree is read along an outline: an error or a
    tree of what was there, and no crash."""
    like = outline_of({f"k{i}": [leaf(i)] for i in range(4)})
    trees, calls = {}, []

    class Key:
        def __hash__(self):
            return hash("k2")

        def __eq__(self, other):
            if trees and not calls:
                calls.append(other)
                tree = trees[where]
                if action == "clear":
                    tree.clear()
                elif action == "grow":
                    tree.update({f"new{i}": [leaf(0)] for i in range(100)})
                else:
                    tree.update(dict.fromkeys(tree))
            return False

    gradients = {f"k{i}": [leaf(i)] for i in range(4)}
    parameters = {Key(): leaf(0), **{f"k{i}": [leaf(i)] for i in range(4)}}
    trees.update(gradients=gradients, parameters=parameters)
    found = outcome(gradients, parameters, False, like)
    assert calls == ["k2"]
    if found[0] is not ValueError:
        assert [value[2] for value in found[1][1]] in ([], [leaf(i).tolist() for i in range(4)])
    gc.collect()


def test_depth():
    """As deep as a walk goes, an outline is followed."""

    def nested(depth):
        tree = leaf(1)
        for _ in range(depth):
            tree = [tree]
        return tree

    like = outline_of(nested(200))
    for depth in (199, 200, 201):
        tree = nested(depth)
        assert outcome(tree, tree, True, like) == outcome(tree, tree, True, None)


def test_random_trees():
    """Trees of one kind, read along outlines of another: always as a walk has it."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    shapes = st.sampled_from([(), (1,), (2, 2), (4,)])
    dtypes = st.sampled_from([mx.float32, mx.float16, mx.bfloat16])
    leaves = st.builds(lambda s, d: mx.ones(s, d), shapes, dtypes)
    trees = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.lists(inner, min_size=1, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, min_size=1, max_size=3)
        ),
        max_leaves=6,
    )

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
    @hypothesis.given(trees, trees, trees, st.booleans())
    def check(known, gradients, parameters, exact):
        like = outline_of(known)
        for g, p in ((gradients, parameters), (gradients, gradients), (known, known)):
            assert outcome(g, p, exact, like) == outcome(g, p, exact, None)
            other = tree_map(lambda a: a + 1, p) if tree_flatten(p) else p
            assert outcome(g, other, exact, like) == outcome(g, other, exact, None)

    check()
