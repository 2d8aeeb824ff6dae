"""Optimizers that read like ``mlx.optimizers``: ours, and beside them the others as they are."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import mlx.core as mx
import mlx.optimizers
from mlx.nn.layers.base import Module
from mlx.nn.layers.distributed import FullyShardedModule
from mlx.optimizers import (
    AdaDelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    MultiOptimizer,
    Muon,
    Optimizer,
    RMSprop,
    clip_grad_norm,
)

from . import _ext, _packing
from ._checks import Hyperparameter, LearningRate, checked_scalar
from ._groups import GroupList
from ._layout import layout_of
from ._options import Option, Options, checked_options
from ._step import (
    Hyperparameters,
    begun,
    checked_hyperparameters,
    never_changes,
    prepared_step,
    take_step,
    uses_of_state,
)
from .schedules import Schedule
from .schedules._of_mlx import as_ours

__all__ = [
    "SGD",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "MultiOptimizer",
    "Muon",
    "Optimizer",
    "RMSprop",
    "clip_grad_norm",
]


class _Prepared:
    """What a step was prepared for, and the step. Copied and pickled as nothing: it is made
    again."""

    __slots__ = ("key", "step")

    def __init__(self, key: tuple[Any, ...] = (), step: _ext.PreparedStep | None = None):
        self.key, self.step = key, step

    def __reduce__(self) -> tuple[Any, ...]:
        return _Prepared, ()


def _shown(value: Any) -> str:
    if callable(value) and not isinstance(value, Schedule):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"<{name}, called by Python before each step>"
    return repr(value)


# What a compiled step has as it was when it was traced.
_NOT_IN_THE_STATE = frozenset(
    {"momentum", "weight_decay", "dampening", "nesterov", *Options._fields}
)


class _Views(dict[Any, Any]):
    """What arenas hold of some tensors, to be read: writing here would change nothing."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "[SGD] views of the state are to be read: got a change, allowed a change of the state "
            "itself, such as optimizer.state.update({'layer': {'weight': {'v': array}}})."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


class _State(dict[str, Any]):
    """A state, which also answers for what its arenas hold: ``state["layer"]["weight"]["v"]``
    is a view, without being in the state. Copied and pickled as the dict that it is."""

    def __missing__(self, key: Any) -> Any:
        return _read_only(_packing.views(self, _packing.SGD, "SGD")[key])

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _read_only(tree: Any) -> Any:
    if isinstance(tree, dict):
        return _Views((key, _read_only(child)) for key, child in tree.items())
    return tuple(map(_read_only, tree)) if isinstance(tree, list) else tree


class SGD(Optimizer):
    r"""Stochastic gradient descent, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.SGD``: the same arguments, the same methods and,
    in float32 with a constant learning rate, the same bits as its eager step.

    .. math::

        g &\leftarrow g + \lambda w \\
        v &\leftarrow \mu v + (1 - \tau) g \\
        w &\leftarrow w - \eta_t \, (g + \mu v \text{ if nesterov else } v)

    With :math:`\mu = 0` there is no :math:`v`, and :math:`w \leftarrow w - \eta_t g`.
    Arithmetic is float32 and is rounded once, to the parameter's dtype (float32, float16
    or bfloat16), which a parameter always keeps. Momentum has the parameter's dtype.

    The options after ``nesterov`` add what training needs around that, in the same kernel.
    Before :math:`\lambda w` is added, the gradient is

    .. math::

        g \leftarrow c \, \mathrm{clip}(\pm g / s, -b, b), \quad
        c = \min\left(1, \frac{C}{\lVert g \rVert + 10^{-6}}\right)

    with ``maximize`` (:math:`-g`), ``grad_scale`` :math:`s`, ``clip_value`` :math:`b` and
    ``clip_norm`` :math:`C`, where :math:`\lVert g \rVert` is the norm of all unscaled and by
    value clipped gradients together. After it, ``trust_coefficient`` :math:`\kappa` multiplies
    the gradient of each tensor by :math:`\kappa \lVert w \rVert / (\lVert g \rVert + \lambda
    \lVert w \rVert)` of that tensor (LARS), or by 1 where a norm is 0 or the ratio beyond
    float32. With ``decoupled``, :math:`\lambda w` joins the update behind the momentum
    instead of the gradient. A norm is infinite only where it is beyond float32, whatever its
    squares are; its relative error is below :math:`7.5 \cdot 10^{-7}`.

    ``state`` is a tree of arrays for ``mx.compile`` and ``mx.save_safetensors``; a state
    of ``mlx.optimizers.SGD`` can be assigned to it or put into it with ``update``, and
    :meth:`unpacked_state` gives that layout back; :func:`describe` says what a state has.
    As for the learning rate, ``state["momentum"]`` and ``state["weight_decay"]`` are there
    when they are scheduled, with the value that the last step used.

    **Compiled steps.** A function that ``mx.compile`` traces keeps every option as it was
    at the trace: numbers, truth values, groups and arrays that an option is given. It sees
    what is in the captured ``state``, such as ``learning_rate``, which may be set between
    two steps. Setting another option after a trace warns: define and compile the function
    anew then (MLX knows a function that it has compiled once), or let the option be a
    function of the step that returns an array among the captured inputs. ``state`` has to be
    among the captured inputs and outputs of a step, unless the rate is a constant and
    nothing is kept: then, as with ``mlx.optimizers``, the model's is enough.

    Args:
        learning_rate (float, array, Schedule or callable): The learning rate
            :math:`\eta_t`; below 0 it climbs. An array has one element. A
            :class:`Schedule` is evaluated in the kernel; any other callable gets the step
            and returns a scalar.
        momentum (float, Schedule or callable): The momentum :math:`\mu`, 0 or more;
            scheduled like the learning rate, it may pass through 0. Default: ``0.0``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda` (L2
            penalty); scheduled likewise. Default: ``0.0``.
        dampening (float): The dampening :math:`\tau` of the momentum, 0 to 1.
            Default: ``0.0``.
        nesterov (bool): Nesterov momentum; needs momentum and no dampening.
            Default: ``False``.
        momentum_dtype (Dtype): float32, float16 or bfloat16, of the momentum.
            Default: each parameter's own.
        master_weights (bool): Keep a float32 copy of every parameter of a half type and
            update that; the parameter is its rounding. 4 bytes a parameter. A parameter that
            is set from outside replaces its master. Default: ``False``.
        rounding (str): ``"nearest"``, or ``"stochastic"``: up or down at random, with the
            right mean. It rounds what half types have no other record of: momentum, and the
            parameter unless it has a master or a compensation. Default: ``"nearest"``.
        compensated (bool): Keep what each rounding of a parameter of a half type has lost
            and add it to the next update (Kahan). 2 bytes a parameter. Default: ``False``.
        seed (int): Of the stochastic rounding, with the step and the place; 0 to
            :math:`2^{64} - 1`. Default: ``0``.
        clip_norm (float): The largest global norm :math:`C`, over the gradients of one call:
            in a ``MultiOptimizer``, each optimizer has the norm of its own. ``inf`` measures
            the norm and clips nothing. Not for parts of tensors, as ``mlx.nn.fully_shard``
            makes them: every process would clip by its own. Default: ``None``.
        clip_value (float): The largest magnitude :math:`b` of an element. Default: ``None``.
        grad_scale (float, array, Schedule or callable): What the loss, and so the gradients,
            were multiplied with: :math:`s`. An array that changes goes to :meth:`update`.
            Gradients of a scale that cannot be inverted (an array of less than
            :math:`2^{-126}`, infinite or NaN) are NaN.
            Default: ``1.0``.
        skip_nonfinite (bool): Leave the parameters and all that is kept of them as they are
            where a gradient, as given or unscaled, or the norm to be clipped, is infinite or
            NaN, also one that is then clipped by value; ``step`` does not
            count then, ``skipped`` does. ``grad_norm`` and scheduled values in the state are
            those of the step that was skipped. Default: ``False``.
        decoupled (bool): Weight decay apart from the gradient and its momentum:
            :math:`w \leftarrow w - \eta_t (u + \lambda w)`, with :math:`u` the update without
            it. Default: ``False``.
        maximize (bool): Climb instead of descending. Default: ``False``.
        groups (list): ``[(predicate, overrides), ...]``: tensors with other numbers. The
            first group whose ``predicate(path, array)`` is true for a parameter takes it.
            ``overrides`` is a dict of ``learning_rate`` (in place of the optimizer's),
            ``learning_rate_factor`` (times the optimizer's), ``momentum``,
            ``weight_decay`` (each a number or scheduled), ``trust_coefficient`` (a float or
            ``None``). A constant 0, or ``None``, leaves the term out. Predicates are called
            once for a set of tensors; each must take a tensor of the first tree of parameters.
            Default: ``()``.
        trust_coefficient (float): LARS's :math:`\kappa`; needs a weight decay of 0 or more.
            Default: ``None``, no ratio.
        ema_decay (float): Keep a moving average of the parameters in float32,
            :math:`a \leftarrow a + (1 - d)(w - a)`, from 0 to below 1;
            see :meth:`ema_parameters`. 4 bytes a parameter. Default: ``None``.

    Raises:
        ValueError, TypeError: An option makes no sense; at a step: trees, shapes, dtypes,
            groups or state do not fit, a compiled step lacks a state that it needs, or tensors
            in parts are to be measured. Nothing has been changed then.

    References:
        ``mlx.optimizers.SGD``, ``mlx.optimizers.clip_grad_norm``. LARS: You, Gitman and
        Ginsburg, 2017, https://arxiv.org/abs/1708.03888. Decoupled weight decay: Loshchilov
        and Hutter, 2019, https://arxiv.org/abs/1711.05101. Master weights: Micikevicius et
        al., 2018, https://arxiv.org/abs/1710.03740.

    Example:
        >>> optimizer = SGD(learning_rate=0.5, momentum=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> for _ in range(2):
        ...     parameters = optimizer.apply_gradients({"w": mx.array([1.0, 1.0])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([-0.25, 0.75], dtype=float32), array(2, dtype=uint64))

        bfloat16 has no number between 1 and 0.996; a master has:

        >>> parameters = {"w": mx.array([1.0], mx.bfloat16)}
        >>> optimizer = SGD(learning_rate=2**-10, master_weights=True, clip_norm=4.0)
        >>> for _ in range(8):
        ...     parameters = optimizer.apply_gradients({"w": mx.array([1.0])}, parameters)
        >>> parameters["w"], optimizer.grad_norm
        (array([0.992188], dtype=bfloat16), array(1, dtype=float32))

        Biases without weight decay, and at twice the learning rate:

        >>> bias = lambda path, array: array.ndim < 2
        >>> optimizer = SGD(
        ...     learning_rate=0.5,
        ...     weight_decay=0.5,
        ...     groups=[(bias, {"weight_decay": 0.0, "learning_rate_factor": 2.0})],
        ... )
        >>> parameters = {"weight": mx.ones((1, 2)), "bias": mx.ones(2)}
        >>> gradients = {"weight": mx.zeros((1, 2)), "bias": mx.ones(2)}
        >>> parameters = optimizer.apply_gradients(gradients, parameters)
        >>> parameters["weight"], parameters["bias"]
        (array([[0.75, 0.75]], dtype=float32), array([0, 0], dtype=float32))
    """

    _prepared = _Prepared()
    # Of a subclass with a step of one tensor of its own: as in MLX then, tensor by tensor.
    _is_single = False
    _compiled = False  # a step was traced by mx.compile
    _state_of_trace = False  # the state was made inside a function that is traced
    _whole: frozenset[str] = frozenset()  # sets of tensors of which none is a shard

    momentum_dtype = Option()
    master_weights = Option()
    rounding = Option()
    compensated = Option()
    seed = Option()
    clip_norm = Option()
    clip_value = Option()
    grad_scale = Option()
    skip_nonfinite = Option()
    decoupled = Option()
    maximize = Option()
    groups = Option()
    trust_coefficient = Option()
    ema_decay = Option()

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        *,
        momentum_dtype: mx.Dtype | None = None,
        master_weights: bool = False,
        rounding: str = "nearest",
        compensated: bool = False,
        seed: int = 0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        grad_scale: LearningRate = 1.0,
        skip_nonfinite: bool = False,
        decoupled: bool = False,
        maximize: bool = False,
        groups: GroupList = (),
        trust_coefficient: float | None = None,
        ema_decay: float | None = None,
    ):
        checked_hyperparameters("SGD", momentum, weight_decay, dampening, nesterov)
        self._options = checked_options(
            "SGD",
            momentum_dtype=momentum_dtype,
            master_weights=master_weights,
            rounding=rounding,
            compensated=compensated,
            seed=seed,
            clip_norm=clip_norm,
            clip_value=clip_value,
            grad_scale=grad_scale,
            skip_nonfinite=skip_nonfinite,
            decoupled=decoupled,
            maximize=maximize,
            groups=groups,
            trust_coefficient=trust_coefficient,
            ema_decay=ema_decay,
        )
        super().__init__()  # type: ignore[no-untyped-call]
        self._state_of_trace = _ext.is_tracing()
        self._state = _State(self._state)
        self._known: tuple[str, ...] = ()  # the arenas that this optimizer has made or checked
        self._constants: dict[str, Any] = {}
        self._checked: tuple[tuple[Any, ...], Hyperparameters] | None = None
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.dampening = dampening
        self.nesterov = nesterov

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        vars(self).update(attributes)
        self._state = _State(self._state)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._is_single = (cls.init_single, cls.apply_single) != (SGD.init_single, SGD.apply_single)

    def __setattr__(self, name: str, value: Any) -> None:
        is_stale = self._compiled and not _ext.is_tracing() and self._changes(name, value)
        super().__setattr__(name, value)
        if is_stale:
            warnings.warn(
                f"[SGD] {name} was set after a step was compiled: functions that mx.compile has "
                f"traced go on without it; got {value!r}, allowed before the trace, or as a "
                "function of the step where one is allowed. Define and compile the function anew "
                "(see SGD about compiled steps).",
                stacklevel=2,
            )

    def _changes(self, name: str, value: Any) -> bool:
        """Whether this value of an attribute changes what a step does, in a way that is not
        in the state."""
        if name == "learning_rate":
            return callable(value)
        if name not in _NOT_IN_THE_STATE:
            return False
        old, plain = getattr(self, name), (float, int, str)
        is_same = isinstance(old, plain) and isinstance(value, plain) and old == value
        return old is not value and not is_same

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state. One that is assigned is copied (not its arrays), so that
        whoever it came from keeps its own.

        Reading a tensor's path gives views of its arenas, as :meth:`unpacked_state` does. What
        is put in, for instance with ``optimizer.state.update(saved)``, counts as a state that is
        assigned: the next step checks it, and takes it for what the arenas have of these tensors.
        """
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._initialized = False
        self._state_of_trace = _ext.is_tracing()
        self._state = _State(state) if isinstance(state, dict) else state

    @property
    def learning_rate(self) -> Any:
        """The learning rate: the one to come, or of the last step when it is scheduled."""
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        if callable(learning_rate):
            learning_rate = as_ours(learning_rate)
            first = checked_scalar("SGD", "learning_rate", learning_rate(self.step))
            self._schedulers["learning_rate"] = learning_rate
            learning_rate = first
        # A schedule goes on, as in mlx.optimizers: the next step sets the rate again.
        self.state["learning_rate"] = checked_scalar("SGD", "learning_rate", learning_rate)

    @property
    def momentum(self) -> Any:
        """The momentum: the number that was given, or the value a schedule had last. Setting
        it after ``mx.compile``: see :class:`SGD` on compiled steps."""
        return self._hyperparameter("momentum")

    @momentum.setter
    def momentum(self, value: Hyperparameter) -> None:
        self._set_hyperparameter("momentum", value)

    @property
    def weight_decay(self) -> Any:
        """The weight decay: the number that was given, or the value a schedule had last.
        Setting it after ``mx.compile``: see :class:`SGD` on compiled steps."""
        return self._hyperparameter("weight_decay")

    @weight_decay.setter
    def weight_decay(self, value: Hyperparameter) -> None:
        self._set_hyperparameter("weight_decay", value)

    def init(self, parameters: Any) -> None:
        """Make the state for these parameters, keeping what it already knows of them.

        Optional: the first step does it. Useful to have the whole state before the first
        step, for instance to capture it in ``mx.compile``.

        Args:
            parameters (tree): A tree of the arrays that will be trained. Arrays of integers, as
                a quantized layer has, are nothing to train and are left out.
        """
        if self._is_single:
            # From our layout, if the state that was assigned has that.
            self._replace_state(self.unpacked_state())
            super().init(parameters)
            return
        tree = _ext.Tree(parameters, parameters, "SGD")
        self._check_loaded_state(parameters)
        self._take(
            begun("SGD", tree, parameters, self.state, self._hyperparameters(), self._options)
        )

    @property
    def grad_norm(self) -> mx.array | None:
        """The global norm of the last step's gradients, unscaled and clipped by value but not
        by norm: a float32 scalar, 0 before the first step. None where nothing measures it
        (``clip_norm``, ``skip_nonfinite`` and ``trust_coefficient`` do)."""
        # An earlier step, or a state from elsewhere, may have left one.
        return self.state.get("grad_norm") if self._options.is_measured else None

    @property
    def skipped(self) -> mx.array:
        """How many steps ``skip_nonfinite`` has skipped: a uint64 scalar."""
        skipped = self.state.get("skipped")
        return mx.array(0, mx.uint64) if skipped is None else skipped

    def update(self, model: Any, gradients: Any, *, grad_scale: LearningRate | None = None) -> None:
        """One step, of the model in place.

        Args:
            model (mlx.nn.Module): The model.
            gradients (tree): A tree of arrays, for instance of ``mlx.nn.value_and_grad``.
            grad_scale (float, array, Schedule or callable): What these gradients were
                multiplied with, in place of the optimizer's ``grad_scale``.
        """
        # A subclass may have an apply_gradients of two arguments.
        scale = {} if grad_scale is None else {"grad_scale": grad_scale}
        model.update(self.apply_gradients(gradients, model, **scale))

    def apply_gradients(
        self, gradients: Any, parameters: Any, *, grad_scale: LearningRate | None = None
    ) -> Any:
        """One step: the updated parameters, in the structure of ``gradients``.

        Args:
            gradients (tree): A tree of arrays. It may have a part of the parameters only.
            parameters (tree): A tree of parameters, or the model.
            grad_scale (float, array, Schedule or callable): What these gradients were
                multiplied with, in place of the optimizer's ``grad_scale``.

        Returns:
            The updated parameters; each keeps its shape and dtype.
        """
        if self._is_single:
            self._check_single(grad_scale)
            return super().apply_gradients(gradients, parameters)
        tree = _ext.Tree(gradients, parameters, "SGD")
        hyper = self._hyperparameters()
        learning_rate = self._schedulers.get("learning_rate")
        key = (hyper, self._options, learning_rate)
        prepared = self._prepared
        if (
            prepared.step is not None
            and grad_scale is None
            and self._initialized
            and len(self._schedulers) == (learning_rate is not None)
            and all(map(operator.is_, key, prepared.key))
        ):
            taken = prepared.step(tree, self._state, self._state.get("learning_rate"))
            if taken is not None:
                updated, state = taken
                self._replace_state(state)
                return updated

        state = self.state
        if self._check_loaded_state(parameters):
            state = begun("SGD", tree, parameters, state, hyper, self._options)
        if _ext.is_tracing():
            self._check_traced(tree, learning_rate, hyper, grad_scale)
        self._check_whole(tree, parameters)
        if learning_rate is None:
            rate = self.state.get("learning_rate")
            learning_rate = checked_scalar("SGD", "learning_rate", rate)
        # Of a subclass: whatever else it has put on a schedule.
        others = {
            name: schedule(self.step)
            for name, schedule in self._schedulers.items()
            if name not in ("learning_rate", "momentum", "weight_decay")
        }
        updated, state, used = take_step(
            "SGD",
            tree,
            parameters,
            state,
            learning_rate,
            hyper,
            self._options,
            grad_scale,
            None,
            packs=True,
        )
        self._take({**state, **used, **others})
        step = prepared_step(tree, state, learning_rate, hyper, self._options)
        self._prepared = _Prepared(key, step)
        return updated

    def ema_parameters(self, dtype: mx.Dtype | None = None) -> Any:
        """The moving average of the parameters, as a tree for ``model.update``.

        Its structure is that of ``mlx.utils.tree_unflatten``: dicts and lists by the
        parameters' paths. What it returns does not change with later steps. Tensors that are
        no longer trained are in it; of those that a model no longer has, such as ones that an
        adapter has wrapped since, ``model.update(..., strict=False)`` takes no notice.

        The average begins at the first step or at :meth:`init`, with the parameters of then.
        After weights were loaded, ``optimizer.forget("ema")`` begins it anew at the next step.

        Args:
            dtype (Dtype, optional): Of the arrays: float32, float16 or bfloat16. Default:
                each parameter's own (float32 where the state does not know it).

        Raises:
            ValueError: There is no average: no ``ema_decay``, or neither a step nor
                :meth:`init` yet. Or the dtype is none of these.

        Example:
            >>> optimizer = SGD(learning_rate=1.0, ema_decay=0.5)
            >>> parameters = {"w": mx.array([1.0, 2.0])}
            >>> parameters = optimizer.apply_gradients({"w": mx.ones(2)}, parameters)
            >>> parameters["w"], optimizer.ema_parameters()["w"]
            (array([0, 1], dtype=float32), array([0.5, 1.5], dtype=float32))
        """
        return _packing.averages(self.state, dtype, _packing.SGD, "SGD")

    def forget(self, *slots: str) -> None:
        """Drop what the state keeps under these names, of all tensors: it begins anew at the
        next step or :meth:`init`, the moving average with the parameters of then.

        Args:
            slots (str): Any of ``"momentum"``, ``"master"``, ``"compensation"``, ``"ema"``.

        Example:
            >>> optimizer = SGD(learning_rate=1.0, ema_decay=0.5)
            >>> optimizer.init({"w": mx.zeros(2)})
            >>> optimizer.forget("ema")
            >>> parameters = optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
            >>> optimizer.ema_parameters()["w"]
            array([0.5, 0.5], dtype=float32)
        """
        self._replace_state(_packing.without(self.state, slots, _packing.SGD, "SGD"))

    def keep_only(self, parameters: Any) -> None:
        """Drop what the state keeps of all other tensors, such as those that are frozen again.

        Args:
            parameters (tree): A tree of arrays, for instance ``model.trainable_parameters()``.

        Example:
            >>> optimizer = SGD(learning_rate=1.0, momentum=0.9)
            >>> optimizer.init({"a": mx.zeros(2), "b": mx.zeros(3)})
            >>> optimizer.keep_only({"a": mx.zeros(2)})
            >>> optimizer.unpacked_state().keys()
            dict_keys(['step', 'learning_rate', 'a'])
        """
        self._replace_state(_packing.of_parameters(self.state, parameters, _packing.SGD, "SGD"))

    def unpacked_state(self) -> dict[str, Any]:
        """The state as ``mlx.optimizers.SGD`` has it: ``state[...path...]["v"]`` an array, and
        beside it ``"master"``, ``"compensation"`` and ``"ema"`` where they are kept.

        Its arrays are views; while they live, the next step copies the momentum once
        instead of writing in place.

        Example:
            >>> optimizer = SGD(learning_rate=0.5, momentum=0.9)
            >>> optimizer.init({"w": mx.zeros(2)})
            >>> optimizer.unpacked_state()["w"]
            {'v': array([0, 0], dtype=float32)}
        """
        return _packing.unpacked(self.state, _packing.SGD, "SGD")

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Begin the state of one tensor as ``mlx.optimizers.SGD`` does: ``state["v"]``, zeros.

        Args:
            parameter (array): The parameter.
            state (dict): Of this tensor alone.
        """
        mlx.optimizers.SGD.init_single(self, parameter, state)  # type: ignore[arg-type]

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> Any:
        """The step of one tensor in plain MLX operations: what ``mlx.optimizers.SGD`` has under
        this name, with its roundings.

        For an optimizer that wraps this one and steps tensor by tensor, and for subclasses:
        one that overrides this or :meth:`init_single` takes all its steps so, without the
        kernel, and its state is that of MLX.

        Args:
            gradient (array): The gradient.
            parameter (array): The parameter.
            state (dict): Of this tensor alone; ``state["v"]`` is replaced.

        Returns:
            array: The updated parameter.

        Raises:
            ValueError: An option is set that ``mlx.optimizers.SGD`` does not have, or momentum
                or weight decay is scheduled.

        Example:
            >>> optimizer, state = SGD(learning_rate=0.5, momentum=0.5), {}
            >>> optimizer.init_single(mx.array(1.0), state)
            >>> optimizer.apply_single(mx.array(1.0), mx.array(1.0), state), state
            (array(0.5, dtype=float32), {'v': array(1, dtype=float32)})
        """
        self._check_single()
        step = mlx.optimizers.SGD.apply_single
        return step(self, gradient, parameter, state)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        """The call that makes it, without what has its default."""
        numbers = {**self._constants, **self._schedulers}
        shown = {"learning_rate": numbers.pop("learning_rate", self.learning_rate)}
        numbers |= {"dampening": self.dampening, "nesterov": self.nesterov}
        shown |= {name: value for name, value in numbers.items() if callable(value) or value != 0}
        shown |= self._beyond_mlx()
        arguments = [f"{name}={_shown(value)}" for name, value in shown.items()]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def _beyond_mlx(self) -> dict[str, Any]:
        """The options that mlx.optimizers.SGD does not have, where not the default."""
        fields = zip(Options._fields, self._options, Options(), strict=True)
        return {name: getattr(self, name) for name, value, usual in fields if value != usual}

    def _check_single(self, grad_scale: Any = None) -> None:
        """Nothing is asked for that MLX's step of one tensor does not do."""
        beyond = list(self._beyond_mlx()) if grad_scale is None else ["grad_scale"]
        scheduled = [name for name in ("momentum", "weight_decay") if name in self._schedulers]
        beyond += [f"a scheduled {name}" for name in scheduled]
        if beyond:
            raise ValueError(
                f"[SGD] a step tensor by tensor is that of mlx.optimizers.SGD: got "
                f"{', '.join(beyond)}; allowed learning_rate, momentum, weight_decay, dampening "
                "and nesterov, of which the first may be scheduled."
            )

    def _hyperparameters(self) -> Hyperparameters:
        options: dict[str, Any] = {**self._constants, **self._schedulers}
        given = (options["momentum"], options["weight_decay"], self.dampening, self.nesterov)
        # Attributes are plain: checked at the next step, and then again where one has changed.
        if self._checked is None or not all(map(operator.is_, given, self._checked[0])):
            hyper = checked_hyperparameters("SGD", *given)
            if not all(map(never_changes, given)):
                return hyper
            self._checked = given, hyper
        return self._checked[1]

    def _hyperparameter(self, name: str) -> Any:
        schedule = self._schedulers.get(name)
        if schedule is None:
            return self._constants[name]
        # A state from elsewhere may lack it.
        return self.state[name] if name in self.state else schedule(self.step)

    def _set_hyperparameter(self, name: str, value: Hyperparameter) -> None:
        if callable(value):
            value = as_ours(value)
            first = checked_scalar("SGD", name, value(self.step))
            self._schedulers[name] = value
            self.state[name] = first
        else:
            if self._schedulers.pop(name, None) is not None:
                self.state.pop(name, None)
            self._constants[name] = value

    def _check_traced(
        self,
        tree: _ext.Tree,
        learning_rate: LearningRate | None,
        hyper: Hyperparameters,
        grad_scale: LearningRate | None,
    ) -> None:
        """Raise ValueError for a step inside mx.compile that needs the state and cannot have
        it: it would go on for ever with what the state was when it was traced."""
        if not tree.has_placeholders:
            return
        if not self._state_of_trace and not _ext.has_placeholders([self.state["step"]]):
            rate = self.state["learning_rate"] if learning_rate is None else learning_rate
            uses = uses_of_state(rate, hyper, self._options, grad_scale)
            if uses:
                raise ValueError(
                    "[SGD] a compiled step needs the optimizer's state: got a function that does "
                    f"not capture it, for steps with {', '.join(uses)}; allowed "
                    "mx.compile(function, inputs=state, outputs=state) with "
                    "state = [model.state, optimizer.state]."
                )
        self._compiled = True

    def _check_whole(self, tree: _ext.Tree, parameters: Any) -> None:
        """Raise ValueError where norms are needed and a model has shards of its tensors."""
        if not self._options.is_measured or not isinstance(parameters, Module):
            return
        key = layout_of(tree).key  # wrapped, a module has other paths
        if key in self._whole:
            return
        for path, module in parameters.named_modules():  # type: ignore[no-untyped-call]
            if isinstance(module, FullyShardedModule):
                raise ValueError(
                    "[SGD] clip_norm, skip_nonfinite and trust_coefficient see the gradients of "
                    f"this process alone: got shards, of mlx.nn.fully_shard, in '{path}'; allowed "
                    "mlx.nn.utils.clip_grad_norm_sharded before a step without these options."
                )
        self._whole |= {key}

    def _check_loaded_state(self, parameters: Any) -> bool:
        """Whether somebody has assigned or edited it since the last step."""
        _packing.check_scalars(self.state, "SGD")
        if self._initialized and not _packing.is_edited(self.state, self._known, _packing.SGD):
            return False
        _packing.check_state(self.state, parameters, _packing.SGD, "SGD")
        return True

    def _take(self, state: dict[str, Any]) -> None:
        """The state after init() or a step. What was on a schedule in another run is not the
        value of an option that is a constant here."""
        self._replace_state(
            {
                name: value
                for name, value in state.items()
                if name not in self._constants or name in self._schedulers
            }
        )
        self._known = tuple(state.get("arenas", ()))
        self._initialized = True

    def _replace_state(self, state: dict[str, Any]) -> None:
        # The dict itself stays: mx.compile captures it.
        if state is not self._state:
            self._state.clear()
            self._state.update(state)
