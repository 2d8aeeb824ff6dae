"""What a full step must give, in NumPy: from the mathematics, not from the kernels.

``full_step_float32`` is the arithmetic that is promised, bit for bit: float32, each
operation rounded, rounded once more at the store. ``full_step_float64`` is the mathematics
with a bound, carried through every operation, on how far such arithmetic may be from it.
``norm_float32`` has the sums of squares in the promised order; ``round_at_random`` and
``random_words`` are the rounding and its random bits, ``arena_of`` says where an element is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import rules
from bits import EPSILON, TINIEST, narrowed, widened
from byte_references import BYTE_FORMATS, GROUP, ByteMistake, as_rows, coding_error
from full_step import FRAME_SLOTS, Full
from rules import RULES, RuleMistake

# ---- Where a tensor is ---------------------------------------------------------------


class Arena(NamedTuple):
    dtype: str
    tensors: list[int]
    offsets: list[int]
    size: int
    fingerprint: int


def arenas_of(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]) -> list[Arena]:
    """One arena a dtype (these tests stay below 2 MiB), tensors at multiples of 256 bytes,
    named by the 64-bit FNV-1a hash of what they are, with a byte before each key of a path."""
    arenas = []
    for dtype in dict.fromkeys(dtypes):
        tensors = [i for i, name in enumerate(dtypes) if name == dtype]
        granule = 256 // (4 if dtype == "float32" else 2)
        offsets, size, text = [], 0, b""
        for i in tensors:
            offsets.append(size)
            size += -(-math.prod(shapes[i]) // granule) * granule
            number = 1 + ["float32", "float16", "bfloat16"].index(dtype)
            lengths = b"".join(length.to_bytes(4, "little") for length in shapes[i])
            text += b"\xf8w\xfa%d" % i + bytes([0xFF, number]) + lengths + b"\xfe"
        hashed = 0xCBF29CE484222325
        for byte in text:
            hashed = (hashed ^ byte) * 0x100000001B3 % 2**64
        arenas.append(Arena(dtype, tensors, offsets, size, hashed))
    return arenas


Element = dict[str, np.ndarray]
"""Of one tensor: 'parameter' and its slots, as bits."""


def part_of(whole: np.ndarray, dtype: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """The bits of a tensor in those of an arena; of rows of bytes its own rows."""
    size = math.prod(shape)
    if dtype in BYTE_FORMATS:
        return whole[offset // GROUP : offset // GROUP + -(-size // GROUP)]
    return whole[offset : offset + size].reshape(shape)


def numbers_in(
    element: Element, options: Full, dtype: str, out: str | None = None
) -> dict[str, np.ndarray]:
    """The float32 numbers of a tensor, of everything that is kept of it."""
    shape = element["parameter"].shape
    found = {}
    for name, bits in element.items():
        kind = (out or dtype) if name == "parameter" else options.slot_dtype(name, dtype)
        values = widened(bits, kind)
        found[name] = values[: math.prod(shape)].reshape(shape) if kind in BYTE_FORMATS else values
    return found


# ---- Rounding ------------------------------------------------------------------------


def mix32(x: np.ndarray) -> np.ndarray:
    """In 64 bits: a product of two 32-bit numbers fits."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def random_words(seed: int, step: int, fingerprint: int, positions: np.ndarray) -> np.ndarray:
    """32 random bits for each position: SplitMix64's finaliser makes a key of seed, step and
    arena; MurmurHash3's, twice, spreads the position over it."""

    def mix64(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    key = mix64((seed + 0x9E3779B97F4A7C15) % 2**64)
    key = mix64(mix64(key ^ step) ^ fingerprint)
    position = positions.astype(np.uint64)
    low, high = np.uint64(key % 2**32), np.uint64(key >> 32)
    return mix32(mix32((position + low) % 2**32) ^ high).astype(np.uint32)


class Format(NamedTuple):
    digits: int  # behind the point
    least: int  # exponent of the smallest normal number
    most: int  # exponent of the largest numbers
    random_digits: int  # bits that decide about a normal number


FORMATS = {"float16": Format(10, -14, 15, 13), "bfloat16": Format(7, -126, 127, 16)}


def neighbours(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of finite float32 numbers: the largest number of ``dtype`` that is not above |x|, the
    next one after it (both in float64), and how far |x| is between them, all exact."""
    form = FORMATS[dtype]
    magnitude = np.abs(x.astype(np.float64))
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, form.least)
    unit = np.ldexp(1.0, exponent - form.digits)
    lower = np.floor(magnitude / unit)
    return lower * unit, (lower + 1) * unit, magnitude / unit - lower


def round_at_random(x: np.ndarray, dtype: str, random: np.ndarray) -> np.ndarray:
    """float32 numbers to those of ``dtype`` (as float32), away from zero with the probability
    of the part that is cut off, by the low bits of ``random``."""
    if dtype == "float32":
        return x
    form = FORMATS[dtype]
    finite = np.where(np.isfinite(x), x, 0).astype(np.float32)
    lower, upper, part = neighbours(finite, dtype)
    normal = np.abs(finite.astype(np.float64)) >= 2.0**form.least
    fraction = (random % 2**form.random_digits) / 2.0**form.random_digits
    up = part + fraction >= 1
    if dtype == "float16":  # below the normal numbers float32 has bits to spare
        up = np.where(normal, up, part > (random % 2**16) / 2.0**16)
    magnitude = np.where(up, upper, lower)
    largest = (2 - 2.0**-form.digits) * 2.0**form.most
    magnitude = np.where(magnitude > largest, np.inf, magnitude)
    return np.where(np.isfinite(x), np.copysign(magnitude, finite), x).astype(np.float32)


def round_to_nearest(x: np.ndarray, dtype: str) -> np.ndarray:
    return widened(narrowed(x, dtype), dtype)


# ---- Masters in 24 bits ----------------------------------------------------------------
#
# In float64, where all of it is exact. Infinity counts as 2^128.


def _unit24(magnitude: np.ndarray) -> np.ndarray:
    """The distance of two numbers of 24 bits in the binade of a float32."""
    exponent = np.frexp(np.minimum(magnitude, 2.0**127))[1] - 1
    return 2.0 ** (np.maximum(exponent, -126) - 15)


def as_master24(x: np.ndarray, random: np.ndarray | None) -> np.ndarray:
    """float32 numbers to those with 15 digits, to nearest even or by 8 random bits."""
    magnitude = np.abs(x.astype(np.float64))
    finite = np.where(np.isfinite(magnitude), magnitude, 1)
    units = finite / _unit24(finite)
    units = np.rint(units) if random is None else np.floor(units + random % 256 / 256)
    rounded = np.copysign(units * _unit24(finite), x).astype(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def parts_of_master24(
    master: np.ndarray, ties_to_even: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Its bfloat16 parameter, of two the larger one, and its byte."""
    magnitude = np.minimum(np.abs(master.astype(np.float64)), 2.0**128)
    unit = _unit24(magnitude)
    of_parameter = magnitude / (256 * unit)
    nearest = np.rint(of_parameter) if ties_to_even else np.floor(of_parameter + 0.5)
    parameter = nearest * (256 * unit)
    byte = np.nan_to_num((magnitude - parameter) / unit).clip(-128, 127)
    rounded = np.copysign(parameter, master).astype(np.float32)
    return np.where(np.isnan(master), master, rounded), byte.astype(np.float32)


def master24_of(parameter: np.ndarray, byte: np.ndarray, same_units: bool = False) -> np.ndarray:
    """The master of a bfloat16 parameter (as float32) and its byte."""
    magnitude = np.minimum(np.abs(parameter.astype(np.float64)), 2.0**128)
    is_power = (np.frexp(magnitude)[0] == 0.5) & (magnitude > 2.0**-126)
    below = is_power & (byte < 0) & (not same_units)
    unit = np.where(np.isinf(parameter), 2.0**113, _unit24(magnitude))
    master = magnitude + byte * np.where(below, unit / 2, unit)
    own = np.isfinite(master) & (master >= 0) & (master <= 2.0**128)
    return np.where(own, np.copysign(master, parameter), parameter).astype(np.float32)


# ---- Norms ---------------------------------------------------------------------------


class Sum(NamedTuple):
    """Sums of squares in two float32, at a scale: an integer e stands for 2^(2 (e - 127))."""

    high: np.ndarray
    low: np.ndarray
    scale: np.ndarray

    def at(self, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Twice, as float32 has no number for the square of it.
        factor = np.ldexp(np.float32(1), np.maximum(self.scale - scale, -126)).astype(np.float32)
        return self.high * factor * factor, self.low * factor * factor

    def __add__(self, other: Sum) -> Sum:  # type: ignore[override]
        scale = np.maximum(self.scale, other.scale)
        (a, a_low), (b, b_low) = self.at(scale), other.at(scale)
        # Knuth's sum: `total` and its rounding error.
        total = a + b
        there = total - a
        error = (a - (total - there)) + (b - there)
        return Sum(total, (a_low + b_low) + error, scale)

    def part(self, index: Any) -> Sum:
        return Sum(*(field[index] for field in self))

    @property
    def norm(self) -> np.float32:
        high, low, scale = (field.reshape(-1)[0] for field in self)
        root = np.sqrt(high + low if np.isfinite(high) else high)
        return np.ldexp(root, int(scale) - 127).astype(np.float32)


def fold(sums: Sum) -> Sum:
    """Rows of 1024 lanes one after another, then halves of the lanes."""
    rows = max(1, -(-sums.high.size // 1024))
    sums = Sum(*(np.pad(f, (0, rows * 1024 - f.size)).reshape(rows, 1024) for f in sums))
    lanes = Sum(np.zeros(1024, np.float32), np.zeros(1024, np.float32), np.zeros(1024, np.int64))
    for row in range(rows):
        lanes = lanes + sums.part(row)
    half = 512
    while half:
        lanes = lanes.part(slice(half)) + lanes.part(slice(half, None))
        half //= 2
    return lanes


def sum_of_squares(x: np.ndarray) -> Sum:
    """Of float32 numbers in order: chunks of 2048 in 128 lanes, each chunk at the scale of its
    largest magnitude if that is not within 2^-40 to 2^41, and their sums folded."""
    chunks = max(1, -(-x.size // 2048))
    x = np.pad(x, (0, chunks * 2048 - x.size)).reshape(chunks, 2048)
    exponent = np.abs(x).max(axis=1).view(np.int32).astype(np.int64) >> 23
    ordinary = (exponent >= 127 - 40) & (exponent <= 127 + 40)
    scale = np.where(ordinary, 127, np.minimum(exponent, 253))
    squares = (x * np.ldexp(np.float32(1), 127 - scale)[:, None]).reshape(chunks, 16, 128)
    squares = squares * squares
    lanes = np.zeros((chunks, 128), np.float32)
    for row in range(16):
        lanes = lanes + squares[:, row]
    half = 64
    while half:
        lanes = lanes[:, :half] + lanes[:, half:]
        half //= 2
    return fold(Sum(lanes[:, 0], np.zeros(chunks, np.float32), scale))


def measured_float32(
    options: Full, gradients: Sequence[np.ndarray], parameters: Sequence[np.ndarray], scale: Any
) -> np.ndarray:
    """The norm of all gradients, whether to do the step, and the norms of every tensor: of
    float32 numbers in the order in which they are summed."""
    with np.errstate(all="ignore"):
        unscaled = [_unscaled(g, options, scale) for g in gradients]
        sums = [sum_of_squares(_clipped_by_value(g, options)) for g in unscaled]
        norm = fold(
            Sum(*(np.concatenate([f[:1] for f in part]) for part in zip(*sums, strict=True)))
        ).norm
        apply = True
        if options.skip_nonfinite:
            apply = all(np.isfinite(g).all() for g in unscaled)
            if options.clip_norm is not None:
                apply = apply and bool(np.isfinite(norm))
        numbers = [norm, np.float32(apply)]
        if options.trust_coefficient is not None:
            for own, parameter in zip(sums, parameters, strict=True):
                numbers += [own.norm, sum_of_squares(parameter).norm]
    return np.array(numbers, np.float32)


def _unscaled(g: np.ndarray, options: Full, scale: Any) -> np.ndarray:
    if options.grad_scale is None:
        return g
    scale = np.float32(scale)
    inverts = 2.0**-126 <= scale < np.inf
    return g * (np.float32(1) / scale if inverts else np.float32(np.nan))


def _clipped_by_value(g: np.ndarray, options: Full) -> np.ndarray:
    if options.clip_value is None:
        return g
    limit = np.float32(options.clip_value)
    return np.clip(g, -limit, limit)  # NaN stays


# ---- The step in float32 -------------------------------------------------------------


@dataclass(frozen=True)
class Mistake(RuleMistake, ByteMistake):
    """And of the frame."""

    gradient_not_negated: bool = False
    gradient_not_unscaled: bool = False
    scaled_by_division: bool = False
    not_clipped_by_value: bool = False
    clipped_before_unscaling: bool = False
    not_clipped_by_norm: bool = False
    norm_without_epsilon: bool = False
    skipped_step_taken: bool = False
    trust_ratio_left_out: bool = False
    trust_ratio_without_decay: bool = False
    groups_ignored: bool = False
    flags_of_groups_ignored: bool = False
    decay_coupled: bool = False
    decay_of_the_parameter: bool = False  # not of the master
    master_always_wins: bool = False
    master_rounded: bool = False
    byte_forgotten: bool = False
    byte_in_units_of_the_parameter: bool = False  # also below a power of two
    ties_of_24_bits_to_even: bool = False
    compensation_forgotten: bool = False
    compensation_of_the_exact: bool = False
    rounded_to_nearest: bool = False
    same_bits_for_slots: bool = False
    position_in_the_tensor: bool = False
    one_key_for_every_step: bool = False
    one_key_for_every_arena: bool = False
    average_of_the_old: bool = False
    average_of_the_exact: bool = False
    slots_in_the_parameters_dtype: bool = False
    decay_after_the_change: bool = False
    groups_own_scalars_ignored: bool = False


RIGHT = Mistake()


class Used(NamedTuple):
    """The scalars of a step by their names, and those of them that are not constant."""

    values: dict[str, np.float32]
    varying: frozenset[str] = frozenset()

    @property
    def grad_scale(self) -> np.float32:
        return self.values["grad_scale"]


class Numbers(NamedTuple):
    """Of one tensor: what it has, the scalars, and those of the rule."""

    weight_decay: Any
    flags: set[str]
    trust_coefficient: Any
    rule: rules.Numbers


def numbers_of(
    options: Full,
    tensor: int,
    used: Used,
    t: int,
    wrong: Mistake = RIGHT,
    cast: Any = np.float32,
    nudged: tuple[int, int] = (0, 0),
) -> Numbers:
    """``t`` counts the steps from 1; the numbers of a bias correction are ``nudged`` by ulps
    of float32 from the nearest ones to those of float64."""

    def kept(x: float) -> Any:
        return cast(np.float32(x))

    rate, weight_decay = (kept(used.values[k]) for k in ("learning_rate", "weight_decay"))
    flags, trust = set(options.flags), kept(options.trust_coefficient or 0)
    group = None
    if options.groups is not None and not wrong.groups_ignored:
        group = options.groups[tensor % len(options.groups)]

        def own(value: Any, pair: tuple[float, float]) -> Any:
            times, plus = map(kept, pair)
            return times * value + plus

        rate, weight_decay = own(rate, group.rate), own(weight_decay, group.weight_decay)
        trust = kept(group.trust_coefficient)
        if not wrong.flags_of_groups_ignored:
            flags -= set(group.without)

    scalars, rest, precise = {}, {}, []
    for number, name in enumerate(RULES[options.rule].scalars):
        value = used.values[name]
        constant = None if name in used.varying else options.scalars[name]
        scalars[name] = kept(value)
        rest[name] = kept(1) - kept(value) if constant is None else kept(1 - constant)
        if wrong.rest_of_the_rounded:
            rest[name] = np.float32(1) - np.float32(value)
        # What is known of a constant beyond float32 goes into a power of it.
        more = 0.0 if constant is None else float(np.float32(constant - float(value)))
        if group is not None and not wrong.groups_own_scalars_ignored:
            times, plus = group.own(number)
            scalars[name] = own(scalars[name], (times, plus))
            rest[name] = own(rest[name], (times, 1 - times - plus))
            more = float(np.float32(times) * np.float32(more)) + plus - float(np.float32(plus))
            value = np.float32(times) * np.float32(value) + np.float32(plus)
        precise.append(float(value) + more)

    rates = [kept(1)] * 2
    if "bias_correction" in flags:
        last = t - 1 if wrong.corrected_by_the_step_before else t
        single = np.float32(rate.value if isinstance(rate, Bounded) else rate)
        exact = rules.corrections(float(single), precise, last)
        rates = []
        for value, ulps in zip(exact, nudged, strict=True):
            nearest = np.float32(value)
            away = np.float32(nearest + ulps * np.spacing(nearest))
            rates.append(Bounded(value, np.spacing(nearest)) if cast is not np.float32 else away)
    return Numbers(
        weight_decay, flags, trust, rules.Numbers(rate, scalars, rest, *rates, flags, wrong)
    )


class Place(NamedTuple):
    """Where a tensor and its state are, and when."""

    tensor: int
    offset: int
    step: int
    fingerprint: int


def full_step_float32(
    options: Full,
    dtype: str,
    old: Element,
    gradient: np.ndarray,
    place: Place,
    used: Used,
    measured: np.ndarray | None,
    wrong: Mistake = RIGHT,
    nudged: tuple[int, int] = (0, 0),
) -> Element:
    """One tensor: bits in, bits out; the gradient is in float32 numbers. ``used`` are the
    scalars of the step, ``measured`` what was measured before it; ``nudged`` of numbers_of."""
    if options.skip_nonfinite and not measured[1] and not wrong.skipped_step_taken:
        return dict(old)
    own = numbers_of(options, place.tensor, used, place.step + 1, wrong, nudged=nudged)
    has = own.flags.__contains__
    with np.errstate(all="ignore"):
        numbers = numbers_in(old, options, dtype)
        before = numbers["parameter"]
        w = before
        if options.has_master24 and "master" in old:
            byte = np.float32(0) if wrong.byte_forgotten else numbers["master"]
            w = master24_of(before, byte, wrong.byte_in_units_of_the_parameter)
        elif "master" in old:
            kept = round_to_nearest(numbers["master"], dtype) == before
            w = np.where(kept | wrong.master_always_wins, numbers["master"], before)

        g = gradient if not has("maximize") or wrong.gradient_not_negated else -gradient
        if wrong.clipped_before_unscaling:
            g = _clipped_by_value(g, options)
        if not wrong.gradient_not_unscaled:
            scaled = g / used.grad_scale if wrong.scaled_by_division else None
            g = _unscaled(g, options, used.grad_scale) if scaled is None else scaled
        if not wrong.not_clipped_by_value and not wrong.clipped_before_unscaling:
            g = _clipped_by_value(g, options)
        factor = np.float32(1)
        if has("clip_norm") and not wrong.not_clipped_by_norm:
            epsilon = np.float32(0 if wrong.norm_without_epsilon else 1e-6)
            factor = np.float32(options.clip_norm) / (measured[0] + epsilon)
            factor = np.minimum(factor, np.float32(1))
            g = g * factor
        decay = own.weight_decay * (before if wrong.decay_of_the_parameter else w)
        coupled = not has("decoupled") or wrong.decay_coupled
        if has("weight_decay") and coupled:
            g = g + decay
        if has("trust_ratio") and not wrong.trust_ratio_left_out:
            of_gradient, of_parameter = measured[2 + 2 * place.tensor : 4 + 2 * place.tensor]
            if of_gradient * factor > 0 and of_parameter > 0:
                below = of_gradient * factor
                if has("weight_decay") and coupled and not wrong.trust_ratio_without_decay:
                    below = below + own.weight_decay * of_parameter
                ratio = (own.trust_coefficient * of_parameter) / below
                g = g * ratio if np.isfinite(ratio) else g

        new: Element = {}
        random = None
        if has("stochastic") and not wrong.rounded_to_nearest:
            first = 0 if wrong.position_in_the_tensor else place.offset
            step = 0 if wrong.one_key_for_every_step else place.step
            fingerprint = 0 if wrong.one_key_for_every_arena else place.fingerprint
            positions = first + np.arange(w.size, dtype=np.uint64)
            random = random_words(options.seed, step, fingerprint, positions).reshape(w.shape)

        def stored(x: np.ndarray, name: str, bits: np.ndarray | None) -> np.ndarray:
            if bits is None:
                return round_to_nearest(x, name)
            return round_at_random(x, name, bits)

        rule = own.rule._replace(learning_rate=np.float32(1)) if options.direction else own.rule
        change, after = RULES[options.rule].change(g, numbers, rule)
        for place_of, slot in enumerate(RULES[options.rule].slots):
            if slot not in old:
                continue
            name = options.slot_dtype(slot, dtype)
            bits = random
            if random is not None and not wrong.same_bits_for_slots:
                # 16 bits of the slot's own, of the parameter's word and of one made of it.
                word = random if place_of == 0 else mix32(random.astype(np.uint64))
                bits = (word if place_of == 2 else word >> 16).astype(np.uint32)
            value = after.get(slot, numbers[slot])  # a group may be without
            if wrong.slots_in_the_parameters_dtype and name not in BYTE_FORMATS:
                value = round_to_nearest(value, dtype)
            if slot not in after:
                new[slot] = old[slot]
            elif name in BYTE_FORMATS:
                new[slot] = as_rows(value, name, bits, wrong)
            else:
                new[slot] = narrowed(stored(value, name, bits), name)
        if options.direction:  # no case has anything of the frame's
            new["parameter"] = narrowed(change, options.out_dtype(dtype))
            return {name: bits.reshape(old[name].shape) for name, bits in new.items()}
        decays = has("weight_decay") and not coupled
        kept = np.float32(1) - own.rule.learning_rate * own.weight_decay
        if decays and not wrong.decay_after_the_change:
            w = w * kept
        if "compensation" in old:
            lost = np.float32(0) if wrong.compensation_forgotten else numbers["compensation"]
            change = lost - change
            exact = w + change
            parameter = round_to_nearest(exact, dtype)
            left = exact - parameter
            if not wrong.compensation_of_the_exact:
                left = change - (parameter - w)
            new["compensation"] = narrowed(left, dtype)
        elif options.has_master24 and "master" in old:
            exact = w - change
            if decays and wrong.decay_after_the_change:
                exact = exact * kept
            exact = as_master24(exact, random)
            parameter, byte = parts_of_master24(exact, wrong.ties_of_24_bits_to_even)
            new["master"] = narrowed(byte, "int8")
        else:
            exact = w - change
            if decays and wrong.decay_after_the_change:
                exact = exact * kept
            at_random = random if "master" not in old else None
            parameter = stored(exact, dtype, at_random)
        new["parameter"] = narrowed(parameter, dtype)
        if "master" in old and "master" not in new:
            new["master"] = narrowed(parameter if wrong.master_rounded else exact, "float32")
        if "average" in old:
            of = exact if "master" in old or "compensation" in old else parameter
            of = exact if wrong.average_of_the_exact else of
            of = before if wrong.average_of_the_old else of
            weight = np.float32(1 - options.ema_decay)
            average = numbers["average"]
            new["average"] = narrowed(average + weight * (of - average), "float32")
    return {name: bits.reshape(old[name].shape) for name, bits in new.items()}


# ---- The step in float64, with bounds ------------------------------------------------


class Bounded:
    """A number in float64, and how far float32 arithmetic may be from it.

    Each operation errs by half an ulp of its result, at most 2^-24 of it or 2^-150, and hands
    on the errors of its operands.
    """

    def __init__(self, value: Any, error: Any = 0.0):
        self.value, self.error = np.asarray(value, np.float64), np.asarray(error, np.float64)

    @staticmethod
    def of(x: Any) -> Bounded:
        return x if isinstance(x, Bounded) else Bounded(np.float64(x))

    def rounded(self, unit: float = 2.0**-24, least: float = 2.0**-150) -> Bounded:
        more = (np.abs(self.value) + self.error) * unit + least
        # float64 itself errs by 2^-53 of these.
        return Bounded(self.value, (self.error + more) * (1 + 2.0**-20))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any) -> Bounded:
        """NumPy's numbers leave their operations to us, and its functions."""
        own = {
            np.add: Bounded.__add__, np.subtract: Bounded.__sub__, np.negative: Bounded.__neg__,
            np.multiply: Bounded.__mul__, np.true_divide: Bounded.__truediv__,
            np.sqrt: Bounded.root, np.absolute: Bounded.magnitude, np.sign: Bounded.sign,
            np.maximum: Bounded.larger,
        }  # fmt: skip
        return own[ufunc](*map(Bounded.of, inputs))

    def __add__(self, other: Any) -> Bounded:
        other = Bounded.of(other)
        return Bounded(self.value + other.value, self.error + other.error).rounded()

    __radd__ = __add__

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error)

    def __sub__(self, other: Any) -> Bounded:
        return self + -Bounded.of(other)

    def __mul__(self, other: Any) -> Bounded:
        other = Bounded.of(other)
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        return Bounded(self.value * other.value, error + self.error * other.error).rounded()

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Bounded:
        other = Bounded.of(other)
        value = self.value / other.value
        least = np.abs(other.value) - other.error
        error = self.error + np.abs(value) * other.error
        error = np.where(least > 0, error / np.where(least > 0, least, 1), np.inf)
        return Bounded(value, error).rounded()

    def root(self) -> Bounded:
        value = np.sqrt(self.value)
        least = np.sqrt(np.maximum(self.value - self.error, 0))
        return Bounded(value, value - least).rounded()

    def magnitude(self) -> Bounded:
        return Bounded(np.abs(self.value), self.error)

    def larger(self, other: Bounded) -> Bounded:
        return Bounded(np.maximum(self.value, other.value), np.maximum(self.error, other.error))

    def sign(self) -> Bounded:
        known = np.abs(self.value) > self.error
        return Bounded(np.sign(self.value), np.where(known, 0.0, 2.0))

    def clipped(self, low: float, high: float) -> Bounded:
        ends = (np.clip(self.value + sign * self.error, low, high) for sign in (-1, 1))
        value = np.clip(self.value, low, high)
        return Bounded(value, np.maximum(*(np.abs(end - value) for end in ends)))

    def stored(self, dtype: str, at_random: bool) -> Bounded:
        """To nearest within half of the distance of two numbers, at random within it."""
        if dtype == "float32":
            return self
        if dtype in BYTE_FORMATS:
            return Bounded(
                self.value, self.error + coding_error(self.value, self.error, dtype, at_random)
            )
        part = 1.0 if at_random else 0.5
        epsilon, tiniest = {**EPSILON, "float24": 2.0**-15}, {**TINIEST, "float24": 2.0**-141}
        return self.rounded(part * epsilon[dtype], part * tiniest[dtype])


def full_step_float64(
    options: Full,
    dtype: str,
    old: Element,
    gradient: np.ndarray,
    place: Place,
    used: Used,
    measured: np.ndarray | None,
) -> dict[str, Bounded]:
    """Of one tensor: 'parameter' and its slots; 'sum' instead of a compensation or the byte of
    a master, what the parameter is together with it."""
    numbers = {name: Bounded(x) for name, x in numbers_in(old, options, dtype).items()}
    if options.skip_nonfinite and not measured[1]:
        if "compensation" in numbers:
            left = numbers.pop("compensation")
            numbers["sum"] = Bounded(numbers["parameter"].value + left.value)
        if options.has_master24 and "master" in numbers:
            byte = numbers.pop("master").value.astype(np.float32)
            w = numbers["parameter"].value.astype(np.float32)
            numbers["sum"] = Bounded(master24_of(w, byte))
        return numbers
    own = numbers_of(
        options, place.tensor, used, place.step + 1, cast=lambda x: Bounded(np.float64(x))
    )
    has = own.flags.__contains__
    w = numbers["parameter"]
    if options.has_master24 and "master" in old:
        byte = numbers["master"].value.astype(np.float32)
        w = Bounded(master24_of(w.value.astype(np.float32), byte))
    elif "master" in old:
        kept = narrowed(widened(old["master"], "float32"), dtype)
        same = widened(kept, dtype) == widened(old["parameter"], dtype)
        w = Bounded(np.where(same, numbers["master"].value, w.value))

    g = Bounded(gradient) if not has("maximize") else Bounded(-gradient)
    if has("grad_scale"):
        g = g * (Bounded(1.0) / used.grad_scale)
    if has("clip_value"):
        limit = np.float64(np.float32(options.clip_value))
        g = g.clipped(-limit, limit)
    factor = Bounded(1.0)
    if has("clip_norm"):
        norm = Bounded(measured[0]) + np.float32(1e-6)
        factor = (Bounded(np.float32(options.clip_norm)) / norm).clipped(0, 1)
        g = g * factor
    decays, decoupled = has("weight_decay"), has("decoupled")
    if decays and not decoupled:
        g = g + own.weight_decay * w
    if has("trust_ratio"):
        # trust_coefficient |w| / (|g| + weight_decay |w|), You, Gitman and Ginsburg, 2017.
        of_gradient, of_parameter = measured[2 + 2 * place.tensor : 4 + 2 * place.tensor]
        below = Bounded(of_gradient) * factor
        if decays and not decoupled:
            below = below + own.weight_decay * np.float64(of_parameter)
        if of_gradient * factor.value > 0 and of_parameter > 0:
            ratio = own.trust_coefficient * np.float64(of_parameter) / below
            if ratio.value <= np.finfo(np.float32).max:
                g = g * ratio

    rule = own.rule._replace(learning_rate=np.float64(1)) if options.direction else own.rule
    change, after = RULES[options.rule].change(g, numbers, rule)
    new: dict[str, Bounded] = {}
    for slot in old.keys() - {"parameter", *FRAME_SLOTS}:
        name = options.slot_dtype(slot, dtype)
        value = after[slot].stored(name, has("stochastic")) if slot in after else numbers[slot]
        new[slot] = value
    if options.direction:
        return {**new, "parameter": change.stored(dtype, False) if options.pack else change}
    if decays and decoupled:
        w = w * (Bounded(1.0) - own.rule.learning_rate * own.weight_decay)

    if "compensation" in old:
        change = numbers["compensation"] - change
        exact = w + change
        new["parameter"] = exact.stored(dtype, False)
        # What is left is at most a rounding of the parameter, and has its own.
        largest = new["parameter"].error + 2.0**-22 * (np.abs(w.value) + np.abs(change.value))
        error = change.error + 2.0**-24 * (np.abs(change.value) + largest)
        error = error + (2.0**-24 + EPSILON[dtype] / 2) * largest + TINIEST[dtype]
        total = w.value + change.value
        new["sum"] = Bounded(total, error)
    else:
        exact = w - change
        if options.has_master24 and "master" in old:
            exact = exact.stored("float24", has("stochastic"))
            new["sum"] = exact
        at_random = has("stochastic") and "master" not in old
        new["parameter"] = exact.stored(dtype, at_random)
    if "master" in old and not options.has_master24:
        new["master"] = exact
    if "average" in old:
        of = exact if "master" in old or "compensation" in old else new["parameter"]
        average = numbers["average"]
        new["average"] = average + np.float32(1 - options.ema_decay) * (of - average)
    return new
