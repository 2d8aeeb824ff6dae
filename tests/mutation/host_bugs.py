# ruff: noqa: E501 (a row a bug)
"""Bugs in what runs on the host: the Python layer, the shared C++, the CPU's kernels, and the
arithmetic of csrc/math. Each names the tests that should catch it."""

from mutant import Mutant

PACKING = "python/mlx_fused_optim/_packing.py"
LAYOUT_PY = "python/mlx_fused_optim/_layout.py"
OPTIONS = "python/mlx_fused_optim/_options.py"
GROUPS = "python/mlx_fused_optim/_groups.py"
SCALER = "python/mlx_fused_optim/scaler.py"
DISTRIBUTED = "python/mlx_fused_optim/distributed.py"
STEP_PY = "python/mlx_fused_optim/_step.py"
FUNCTIONS = "python/mlx_fused_optim/functional.py"
CHECKS = "python/mlx_fused_optim/_checks.py"
SCHEDULE_PY = "python/mlx_fused_optim/schedules/_schedule.py"
TEXT = "python/mlx_fused_optim/schedules/text.py"
LAYOUT = "csrc/graph/layout.cpp"
VIEW = "csrc/graph/view.cpp"
DONATION = "csrc/graph/donation.cpp"
TREE = "csrc/binding/tree.cpp"
OUTLINE = "csrc/binding/outline.cpp"
PREPARED = "csrc/binding/prepared.cpp"
MEASURE = "csrc/graph/measure.cpp"
SCHEDULE = "csrc/graph/schedule.cpp"
STEP = "csrc/graph/step.cpp"
COMPOSED = "csrc/composed/step.cpp"
TRANSFORMS = "csrc/composed/transforms.cpp"
ROUNDING = "csrc/composed/rounding.cpp"
RULES_PY = "python/mlx_fused_optim/_rules.py"
FRAME = "csrc/math/frame.h"
ROUNDING_H = "csrc/math/rounding.h"
BYTES_H = "csrc/math/bytes.h"
CPU_BYTES = "csrc/cpu/bytes.h"
COMPOSED_BYTES = "csrc/composed/bytes.cpp"
BYTES_PY = "python/mlx_fused_optim/_bytes.py"
MASTERS_PY = "python/mlx_fused_optim/_masters.py"
OPERATORS = "csrc/composed/operators.h"
RULE, SGD, ADAM, ADAMAX, LION, RMSPROP, ADADELTA = (
    f"csrc/math/rules/{name}.h"
    for name in ("rule", "sgd", "adam", "adamax", "lion", "rmsprop", "adadelta")
)
MUON, MUON_PY = "csrc/math/rules/muon.h", "python/mlx_fused_optim/optimizers/muon.py"
NEWTON_SCHULZ = "python/mlx_fused_optim/_newton_schulz.py"
CPU = "csrc/cpu/step.cpp"
CPU_MEASURE = "csrc/cpu/measure.cpp"

MUTANTS = [
    # ---- Python: the state
    Mutant("momentum_forgotten", PACKING, "if slot.lasts and name in old}", "if name not in old}", "optimizer full_step"),
    Mutant("kept_by_another_path", PACKING, "candidates[0] if is_clear else path", "path", "optimizer bad_input full_step"),
    Mutant("average_of_no_master", PACKING, 'kept[t].get("master") if with_master else None', "None", "full_step"),
    Mutant("edits_overlooked", PACKING, "or not entries.keys() <= set(known)", "or False", "state"),
    Mutant("shapes_of_one_rank", PACKING, "if own != shape:", "if len(own) != len(shape):", "bad_input optimizer"),
    Mutant("another_table", LAYOUT_PY, "if layout.key != key:", "if False:", "bad_input optimizer"),
    Mutant("arenas_of_all_types", PACKING, "return layout.halves if slot.of_halves else range(len(layout.arenas))", "return range(len(layout.arenas))", "full_step"),
    # ---- Python: many batches and processes
    Mutant("sum_for_a_mean", DISTRIBUTED, "/ group.size()\n", "/ 1\n", "distributed"),
    Mutant("a_total_begins_at_zero", DISTRIBUTED, "mx.full(arena.shape, -0.0", "mx.full(arena.shape, 0.0", "accumulation"),
    Mutant("scale_of_a_total", DISTRIBUTED, "scalars=[-scale, *_NO_NUMBERS]", "scalars=[-1.0, *_NO_NUMBERS]", "accumulation"),
    Mutant("each_for_itself", DISTRIBUTED, "None if _ext.is_tracing() else Sharded._last", "None", "distributed"),
    Mutant("gone_but_held", DISTRIBUTED, "if Sharded._last is not None and _ext.is_available(Sharded._last):", "if False:", "distributed"),
    Mutant("stream_of_averages", DISTRIBUTED, "all_sum(packed, group=group, stream=communication_stream)", "all_sum(packed, group=group, stream=None)", "distributed"),
    Mutant("verdict_of_a_part", DISTRIBUTED, "updated = inner._take_step(part, parameters, options, grad_scale, measured)", "updated = inner._take_step(part, parameters, options, grad_scale, None)", "distributed"),
    Mutant("slice_of_another", DISTRIBUTED, "rank * math.prod(row[1])", "0 * math.prod(row[1])", "distributed"),
    Mutant("norms_of_the_first_tensors", DISTRIBUTED, "for number in shards.own for i in", "for number in range(len(shards.own)) for i in", "distributed"),
    Mutant("a_state_of_all", DISTRIBUTED, "inner._replace_state(_packing.of_parameters(state, own, slots, _OP))", "pass", "distributed"),
    Mutant("nobody_is_asked", DISTRIBUTED, "if other != everything[0] or not other[0]:", "if False:", "distributed"),
    Mutant("a_part_begins_anew", LAYOUT_PY, "                    begin + first,", "                    begin,", "distributed"),
    # ---- Python: options and groups
    Mutant("infinite_norm_clips", OPTIONS, "self.clip_norm not in (None, math.inf)", "self.clip_norm is not None", "norm full_step options"),
    Mutant("average_never_moves", OPTIONS, "if not 0 <= number < 1:", "if not 0 <= number <= 1:", "options"),
    Mutant("last_group_wins", GROUPS, "in enumerate(groups.members):\n        if member.predicate", "in reversed(list(enumerate(groups.members))):\n        if member.predicate", "groups options"),
    Mutant("factor_of_a_group", GROUPS, 'row[0] = overrides.get("learning_rate_factor", 1.0)', "row[0] = 1.0", "groups"),
    Mutant("term_of_a_group_stays", GROUPS, "row &= ~term\n", "row &= ~0\n", "groups"),
    Mutant("zero_is_a_term", GROUPS, "or callable(value) or value != 0)", "or callable(value) or True)", "groups"),
    Mutant("groups_mistaken", GROUPS, "isinstance(value, float) else id(value))", "isinstance(value, float) else 0)", "groups"),
    Mutant("no_group_left_out", GROUPS, "if number + 1 not in taken:", "if False:", "options groups"),
    Mutant("truth_is_a_number", CHECKS, "(bool, str, bytes)", "(str, bytes)", "bad_input"),
    Mutant("huge_integers_are_infinite", CHECKS, "return sys.float_info.max if value > 0 else -sys.float_info.max", "return math.inf", "options"),
    Mutant("any_truth_value", CHECKS, "    return checked_flag(op, name, value)\n\n\ndef checked_scalar", "    return bool(value)\n\n\ndef checked_scalar", "rules"),
    Mutant("scale_of_one_array", STEP_PY, "if not isinstance(scale, float) or scale != 1:", "if isinstance(scale, float) and scale != 1:", "full_step scaler"),
    # ---- Python: steps that are taken again
    Mutant("prepared_groups_without_terms", GROUPS, '"groups": for_kernel(groups, key, rows, flags)', '"groups": for_kernel(groups, key, rows, 0)', "prepared"),
    Mutant("numbers_of_the_first_step", STEP_PY, "        or not all(isinstance(value, float) for value in hyper.scalars)\n", "", "prepared schedules_step"),
    Mutant("lists_never_change", STEP_PY, "or (type(value) is tuple and all(map(never_changes, value)))", "or type(value) in (tuple, list)", "prepared"),
    Mutant("default_stream", FUNCTIONS, "prepared.step(tree, state, learning_rate, stream)", "prepared.step(tree, state, learning_rate, None)", "prepared modes"),
    Mutant("prepared_for_ever", FUNCTIONS, "if len(_prepared) >= 16:", "if False:", "prepared"),
    # ---- Python: schedules and the scaler
    Mutant("equal_by_name", SCHEDULE_PY, "return self._name == other._name and self._arguments == other._arguments", "return self._name == other._name", "schedules"),
    Mutant("members_begin_late", SCHEDULE_PY, "zip([0, *boundaries], schedules, strict=True)", "zip([*boundaries, 0], schedules, strict=True)", "schedules schedules_step"),
    Mutant("defaults_shown", SCHEDULE_PY, "elif value != defaults[key]:", "else:", "schedules schedules_text"),
    Mutant("many_arguments_at_once", TEXT, "if keyword.arg is None:", "if False:", "schedules_text"),
    Mutant("grows_a_step_late", SCALER, "(steps == self._growth_interval)", "(steps > self._growth_interval)", "scaler"),
    Mutant("last_of_two_optimizers", SCALER, 'mx.maximum(self._state["found_inf"], found)', "found", "scaler"),
    # ---- C++: layout and views
    Mutant("arenas_as_large_as_a_model", LAYOUT, "bytes / kArenaShare", "bytes", "optimizer"),
    Mutant("arenas_without_a_cap", LAYOUT, "(arena->size + size) * spec.dtype.size() > limit", "arena->size * spec.dtype.size() > 2 * limit", "optimizer full_step"),
    Mutant("shapes_run_together", LAYOUT, "  *next = 0xfe;\n", "", "state"),
    Mutant("order_of_bytes", LAYOUT, ">> (8 * b)", ">> (24 - 8 * b)", "state"),
    Mutant("views_of_one_shape", VIEW, "shape(i) == that.shape(i) && offset(i) == that.offset(i)", "shape(i) == that.shape(i)", "modes"),
    Mutant("batch_axis_first", VIEW, "mx::moveaxis(inputs[0], axes[0], 0, stream())", "inputs[0]", "transforms_full modes"),
    Mutant("every_view_a_vector", VIEW, "is_vector || view.size() == 0", "is_vector || true", "optimizer holding"),
    Mutant("cotangents_without_gaps", VIEW, "    skip_to(offsets[i]);\n", "", "modes transforms_full"),
    # ---- C++: donation
    Mutant("tensors_in_any_place", DONATION, "p.offset() != begin + int64_t(arena.offsets[i]) * itemsize ||", "", "holding"),
    Mutant("strides_overlooked", DONATION, "!p.flags().row_contiguous) {", "false) {", "holding"),
    Mutant("tracers_seen_as_memory", DONATION, "p.is_tracer() || !p.is_available()", "!p.is_available()", "modes"),
    Mutant("one_use_too_many", DONATION, "data.use_count() != static_cast<long>(n)", "data.use_count() > static_cast<long>(n) + 1", "holding"),
    # ---- C++: trees and prepared steps
    Mutant("parameters_left_out", TREE, "  if (exact_) {\n", "  if (false) {\n", "bad_input optimizer"),
    Mutant("paths_grow", TREE, "~Descend() { path_.resize(length_); }", "~Descend() {}", "optimizer"),
    Mutant("shapes_of_one_size", TREE, "g.shape() != p.shape()", "g.size() != p.size()", "bad_input"),
    Mutant("named_tuples", OUTLINE, 'nb::hasattr(here.type, "_fields") ? here.type(*nb::tuple(items)) : here.type(items)', "here.type(items)", "optimizer modes"),
    Mutant("outline_of_any_keys", OUTLINE, "PyUnicode_Compare(key, known.ptr()) == 0", "true", "outline"),
    Mutant("outline_of_more_keys", OUTLINE, "PyDict_Size(gradient.ptr()) != length", "PyDict_Size(gradient.ptr()) < length", "outline"),
    Mutant("outline_of_other_gradients", OUTLINE, "g.shape() == shapes_[i]", "g.size() > 0", "outline bad_input"),
    Mutant("outline_of_other_parameters", OUTLINE, "p.shape() == shapes_[i]", "true", "outline prepared"),
    Mutant("outline_of_other_dtypes", OUTLINE, "p.dtype() == dtypes_[i]", "true", "outline prepared"),
    Mutant("outline_of_integers", OUTLINE, "is_like &= is_trainable(g.dtype()) && ", "is_like &= ", "outline bad_input"),
    Mutant("outline_of_any_sequence", OUTLINE, "!gradient.type().is(here.type)", "!is_sequence(gradient)", "outline"),
    Mutant("outline_of_more_parameters", OUTLINE, "(exact && PyDict_Size(parameter.ptr()) != length)", "false", "outline bad_input"),
    Mutant("outline_of_any_sequences", OUTLINE, "(!type || type == (PyObject*)&PyList_Type || type == (PyObject*)&PyTuple_Type)", "true", "outline"),
    Mutant("outline_with_any_keys", OUTLINE, "(!node.key || PyUnicode_CheckExact(node.key.ptr()))", "true", "outline"),
    Mutant("parameter_told_first", TREE, '      array(gradients, "gradient", walk.path); // which is told first\n', "", "outline"),
    Mutant("outline_with_a_leaf_more", TREE, "      walk.outline.add_kept(std::move(key), nb::borrow(gradients));\n", "", "optimizer bad_input outline"),
    Mutant("skipped_steps_not_counted", PREPARED, "nb::cast(taken.measured[1])", "nb::cast(*options.skipped)", "prepared"),
    Mutant("norm_of_the_last_step", PREPARED, "  if (is_measured) {\n", "  if (false) {\n", "prepared"),
    Mutant("prepared_for_other_tensors", PREPARED, "if (!tree.fits(layout_) || !step", "if (!step", "prepared"),
    Mutant("leftovers_are_nothing", PREPARED, "nb::len(state) == 2u + bool(entry) + has_norm + has_skipped", "nb::len(state) >= 2u", "prepared"),
    Mutant("rate_of_any_type", PREPARED, "if (!given || !is_real(given->dtype())) {", "if (!given) {", "prepared bad_input"),
    Mutant("counter_of_the_first_step", PREPARED, "  next[names().step] = nb::cast(*taken.next);\n", "", "prepared"),
    # ---- C++: measurement, schedules, the step
    Mutant("applied_when_finite", MEASURE, "flags & kSkipNonfinite ? finite : mx::array(true)", "finite", "norm"),
    Mutant("joined_without_a_shift", SCHEDULE, "      segment.start += begin;\n", "", "schedules"),
    Mutant("one_segment_more", SCHEDULE, "joined.count == kMaxSegments", "joined.count == kMaxSegments - 1", "schedules"),
    Mutant("all_schedules_equal", SCHEDULE, "std::memcmp(&schedule_, &that.schedule_, sizeof(Schedule)) == 0", "&that != nullptr", "modes"),
    Mutant("ends_not_scaled", SCHEDULE, "    segment.zero = times_factor(segment.zero);\n", "", "schedules"),
    Mutant("scalars_side_by_side", STEP, "      values.resize(i, mx::array(0.0f)); // those before it that are not given\n", "", "schedules_step groups"),
    Mutant("gradients_of_other_shapes", STEP, "      check(in[p].gradient(i), plan.arena->shapes[i]);\n", "", "modes"),
    # ---- C++: several arenas in a node and in a launch
    Mutant("any_number_of_arenas", STEP, "node.plans.size() < kMostArenas &&", "true &&", "nodes"),
    Mutant("arenas_of_any_size", STEP, "bytes + more <= kLargestArenaLimit", "more <= kLargestArenaLimit", "nodes"),
    Mutant("arenas_of_any_dtype", STEP, "node.plans[0].arena->dtype == arena.dtype &&", "true &&", "nodes"),
    Mutant("lazy_arenas_join", STEP, "own.waits = !is_eager || !are_available(arrays)", "own.waits = !is_eager", "nodes"),
    Mutant("traces_have_one_node", STEP, "!composed_is_asked_for() && !is_tracing()", "!composed_is_asked_for()", "nodes modes"),
    Mutant("gradients_of_the_first_arena", STEP, "    next += plan.array_inputs();\n", "", "nodes"),
    Mutant("views_of_one_place", VIEW, "views.offset(view.sibling_position())", "views.offset(0)", "nodes"),
    Mutant("views_of_the_first_flat_array", STEP, "places.push_back({*known, place->begin});", "places.push_back({0, place->begin});", "nodes"),
    Mutant("views_of_a_trace", STEP, "is_eager ? flat_place(gradients[t]) : std::nullopt", "flat_place(gradients[t])", "nodes"),
    Mutant("joins_what_waits_for_less", STEP, "(!own.waits || from.are_flat)", "true", "nodes"),
    Mutant("captured_and_given_away", DONATION, "outputs[0].primitive_ptr().use_count() == static_cast<long>(outputs.size())", "true", "nodes"),
    Mutant("totals_all_at_once", STEP, "gradient = last ? after(gradient, *last) : gradient;", "", "accumulation"),
    Mutant("gradients_let_go", CPU, "  each_left(node_, in, out, [&](const mx::array& array) { encoder.add_temporary(array); });\n", "", "nodes"),
    Mutant("tensors_of_the_first_arena", "csrc/cuda/batches.cpp", "arenas_ - 1};", "0};", "cuda_host"),
    Mutant("begin_of_every_arena", "cuda/step.cu", "tensor.arena == 0 ? control.begin : 0", "control.begin", "cuda_host"),
    Mutant("place_of_no_arena", "cuda/step.cu", "random_key(control.seed, step, arena.place, begin)", "random_key(control.seed, step, control.place, begin)", "cuda_host"),
    Mutant("all_aligned_as_the_first", "cuda/step.cu", "return (common.aligned >> tensor.arena & 1) &&", "return (common.aligned & 1) &&", "cuda_host"),
    Mutant("any_quad_is_usual", "cuda/quad.cuh", "least >= kLeastUsual && peak < 0x7f800000u", "peak < 0x7f800000u", "cuda_host"),
    Mutant("infinite_is_usual", "cuda/quad.cuh", "least >= kLeastUsual && peak < 0x7f800000u", "least >= kLeastUsual", "cuda_host"),
    Mutant("bytes_in_another_order", "cuda/quad.cuh", "bits[2], bits[3], 0x0040), 0x5410)", "bits[2], bits[3], 0x0040), 0x1054)", "cuda_host"),
    Mutant("bytes_have_fewer_passes", "csrc/cuda/batches.cpp", "tile_rows(has_bytes_)", "tile_rows(true)", "cuda_host"),
    Mutant("one_bias_for_both", "cuda/step.cu", "threadIdx.x % 2 ? second : first", "first", "cuda_host"),
    Mutant("any_group_is_usual", "csrc/cpu/bytes.h", "is_finite && ends.least >= 0x00800000u && scale.coder > 0", "is_finite && scale.coder > 0", "bytes"),
    Mutant("norms_out_of_order", "csrc/graph/measure.cpp", "for (size_t first : {0, 1})", "for (size_t first : {1, 0})", "norm muon"),
    Mutant("place_of_no_tensors", "csrc/graph/step.h", "    own.place = arena->fingerprint;\n", "", "rounding full_conformance"),
    Mutant("format_of_no_slot", "csrc/graph/step.h", "    own.state_format = kept.state_format;\n", "", "full_step full_conformance"),
    Mutant("tensors_of_one_number", "csrc/graph/layout.h", "bytes_ == other.bytes_ && ends_ == other.ends_", "bytes_ == other.bytes_", "state"),
    Mutant("declares_one_too_few", "csrc/cuda/launch.h", "if (count <= capacity &&", "if (count <= capacity + 1 &&", "cuda_host"),
    Mutant("declares_more_than_fits", "csrc/cuda/launch.h", " && capacity < kMost<T>)", ")", "cuda_host"),
    Mutant("float32_has_a_master", STEP, "flags &= ~(kMaster | kCompensated);", "flags &= ~kCompensated;", "full_step"),
    Mutant("composed_group", COMPOSED, "int(plan_.group(i))", "0", "transforms_full full_conformance"),
    Mutant("derivatives_side_by_side", TRANSFORMS, "result[function.positions[i]] = found[i];", "result[i] = found[i];", "transforms_full modes"),
    Mutant("composed_position", ROUNDING, "word(static_cast<uint32_t>(first))", "word(0u)", "full_conformance"),
    # ---- The CPU's kernels
    Mutant("position_in_the_tensor", CPU, "tensor.position = plan.arena->offsets[i];", "tensor.position = 0;", "full_step rounding full_conformance"),
    Mutant("first_arena_for_all", CPU, "tensor.arena = static_cast<uint32_t>(arenas.size() - 1);", "tensor.arena = 0;", "nodes"),
    Mutant("random_bits_of_the_first_arena", CPU, "hyper[tensors[t].arena]", "hyper[0]", "nodes rounding full_step"),
    Mutant("gaps_stay", CPU, "if (next > end) {", "if (false) {", "optimizer holding conformance"),
    Mutant("parameters_clipped", CPU_MEASURE, "a < plan.gradient_count ? control.flags : 0", "control.flags", "norm full_step full_conformance"),
    Mutant("each_step_skipped", CPU_MEASURE, "*skipped + !apply", "*skipped + 1", "full_step"),
    Mutant("rows_run_over", "csrc/cpu/blocks.h", "d == last && length - index < run", "d == last && length < run", "conformance"),
    Mutant("tail_begins_late", "csrc/cpu/kernel.cpp", "  for (; i < n; ++i) {\n    update_at<float>", "  for (++i; i < n; ++i) {\n    update_at<float>", "optimizer"),
    Mutant("one_position_a_vector", "csrc/cpu/blocks.h", "result[i] = first + i;", "result[i] = first;", "rounding full_step"),
    Mutant("half_to_infinity_late", "csrc/cpu/half.h", "magnitude >= 0x477ff000 ? 0x7c00", "magnitude >= 0x7f800000 ? 0x7c00", "conformance"),
    # ---- Arithmetic
    Mutant("fold_loses_the_rest", "csrc/math/norm.h", "(a.lo + b.lo) + high.lo", "a.lo + b.lo", "norm"),
    Mutant("scale_of_the_last", "csrc/math/norm.h", "sum.scale > more.scale ? sum.scale : more.scale", "more.scale", "norm"),
    Mutant("master_of_another_parameter", FRAME, "round_nearest(e.master, parameter_format) == e.parameter ? e.master : e.parameter", "e.master", "full_step"),
    # ---- Masters in 24 bits
    Mutant("byte_forgotten", FRAME, "w = master24_of(e.parameter, e.master);", "w = e.parameter;", "full_conformance"),
    Mutant("master24_never_at_random", FRAME, "flags & kStochastic ? random_master24(exact, random) : nearest_master24(exact)", "nearest_master24(exact)", "rounding"),
    Mutant("byte_of_the_unrounded", FRAME, "    exact = flags & kStochastic ? random_master24(exact, random) : nearest_master24(exact);\n", "", "rounding full_conformance"),
    Mutant("ties_of_24_bits_up", ROUNDING_H, "bits + 0x7fu + (bits >> 8 & 1u)", "bits + 0x80u", "rounding"),
    Mutant("parameter_of_ties_down", ROUNDING_H, "bits : bits + 0x8000u) & 0xffff0000u", "bits : bits + 0x7fffu) & 0xffff0000u", "rounding"),
    Mutant("byte_has_no_sign", ROUNDING_H, "(integer_base_bits() - 128u)) - integer_base()", "(integer_base_bits() - 127u)) - integer_base()", "rounding"),
    Mutant("zero_with_a_byte_is_nan", ROUNDING_H, "magnitude > 0x7f800000u ? bits : magnitude | (bits & 0x80000000u)", "magnitude | (bits & 0x80000000u)", "rounding"),
    Mutant("nan_has_a_byte", ROUNDING_H, "const U nan = (bits | 0x400000u) & 0xffff0000u;\n  return Bits<T>::to((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded & 0xffffff00u);", "return Bits<T>::to(rounded & 0xffffff00u);", "rounding full_conformance"),
    Mutant("bytes_are_cut", "csrc/cpu/half.h", "to[i] = int8_t(int32_t(from[i]));", "to[i] = int8_t(uint8_t(from[i]) & 0x7f);", "rounding"),
    Mutant("bytes_are_unsigned", "csrc/cpu/half.h", "    to[i] = from[i];\n  }\n}\n\n/// Of integers", "    to[i] = uint8_t(from[i]);\n  }\n}\n\n/// Of integers", "rounding"),
    Mutant("composed_byte_forgotten", COMPOSED, "of(master24_composed(w.array, old[kMasterCopy]->array, s))", "w", "full_conformance"),
    Mutant("composed_tie_down", ROUNDING, "const auto half = word(0x8000u);", "const auto half = word(0x7fffu);", "full_conformance"),
    Mutant("byte_of_anybody", MASTERS_PY, "mx.where(is_own, mx.minimum(units, 127), 0)", "mx.minimum(units, 127)", "rounding"),
    Mutant("tie_that_went_down", MASTERS_PY, "(units <= 128)", "(units <= 127)", "rounding"),
    Mutant("master_of_a_byte_alone", PACKING, "return master_of(master, parameter) if master.dtype == mx.int8 else master", "return master", "rounding"),
    Mutant("bytes_and_masters_together", PACKING, "x.dtype in (mx.int8, DTYPE)", "x.dtype == DTYPE", "state"),
    Mutant("any_half_has_24_bits", STEP_PY, "if mx.float16 in dtypes or (others and not is_mixed):", "if others and not is_mixed:", "options"),
    Mutant("half_of_a_product", "csrc/math/real.h", "p.lo + (a.hi * b.lo + a.lo * b.hi)", "p.lo + a.hi * b.lo", "schedules_exact exponential_decay"),
    # ---- The rules
    Mutant("momentum_of_the_step", SGD, "velocity = moved(slots.of[kVelocity], gradient, momentum,", "velocity = moved(gradient, gradient, momentum,", "conformance rules"),
    Mutant("dampening_forgotten", SGD, "momentum, n.rest[kDampening]);", "momentum, 1.0f);", "conformance"),
    Mutant("nesterov_of_the_old", SGD, "gradient + momentum * velocity", "gradient + momentum * slots.of[kVelocity]", "conformance"),
    Mutant("rates_swapped", ADAM, "kFirstMoment], gradient, n.scalar[kBeta1], n.rest[kBeta1]", "kFirstMoment], gradient, n.scalar[kBeta2], n.rest[kBeta2]", "rules"),
    Mutant("rest_of_the_other", ADAM, "gradient * gradient, n.scalar[kBeta2], n.rest[kBeta2]", "gradient * gradient, n.scalar[kBeta2], n.rest[kBeta1]", "rules"),
    Mutant("moment_not_squared", ADAM, "gradient * gradient, n.scalar[kBeta2]", "magnitude_of(gradient), n.scalar[kBeta2]", "rules"),
    Mutant("first_moment_not_kept", ADAM, "  slots.of[kFirstMoment] = m;\n", "", "rules"),
    Mutant("second_moment_not_kept", ADAM, "  slots.of[kSecondMoment] = v;\n", "", "rules"),
    Mutant("largest_not_kept", ADAM, "    slots.of[kLargestMoment] = second;\n", "", "rules full_conformance"),
    Mutant("largest_of_the_moment", ADAM, "larger(slots.of[kLargestMoment], v)", "larger(slots.of[kSecondMoment], v)", "rules full_conformance"),
    Mutant("eps_under_the_root", ADAM, "const T scale = corrected ? root(second) * n.corrected_root : root(second);", "const T scale = corrected ? root(second) * n.corrected_root : root(second + n.scalar[kEps]);", "rules"),
    Mutant("root_not_corrected", ADAM, "root(second) * n.corrected_root", "root(second)", "correction full_conformance"),
    Mutant("rate_not_corrected", ADAM, "corrected ? n.corrected_rate : n.learning_rate", "n.learning_rate", "correction full_conformance"),
    Mutant("eps_corrected_too", ADAM, "scale + n.scalar[kEps]), slots}", "scale + (corrected ? n.scalar[kEps] * n.corrected_root : n.scalar[kEps])), slots}", "full_conformance"),
    Mutant("sign_forgotten", ADAMAX, "magnitude_of(gradient)", "gradient", "rules"),
    Mutant("infinity_norm_never_falls", ADAMAX, "n.scalar[kBeta2] * slots.of[kInfinityNorm]", "slots.of[kInfinityNorm]", "rules"),
    Mutant("root_of_the_infinity_norm", ADAMAX, "v + n.scalar[kEps])", "root(v) + n.scalar[kEps])", "rules"),
    Mutant("direction_of_the_new", LION, "const T direction = moved(old,", "const T direction = moved(moved(old, gradient, n.scalar[kBeta2], n.rest[kBeta2]),", "rules"),
    Mutant("lions_rates_swapped", LION, "moved(old, gradient, n.scalar[kBeta1], n.rest[kBeta1])", "moved(old, gradient, n.scalar[kBeta2], n.rest[kBeta2])", "rules"),
    Mutant("zero_goes_down", RULE, "choose(x < zero, -one, zero)", "choose(x <= zero, -one, zero)", "rules"),
    Mutant("nan_has_a_direction", RULE, "choose(x > zero, one, choose(x < zero, -one, zero))", "choose(x <= zero, choose(x < zero, -one, zero), one)", "rules"),
    Mutant("no_average_of_squares", RMSPROP, "const T v = moved(slots.of[kSquares], gradient * gradient, n.scalar[kAlpha], n.rest[kAlpha]);", "const T v = slots.of[kSquares] + gradient * gradient;", "rules"),
    Mutant("squares_forgotten", RMSPROP, "slots.of[kSquares] + gradient * gradient", "gradient * gradient", "rules"),
    Mutant("squares_not_kept", RMSPROP, "  slots.of[kSquares] = squares;\n", "", "rules"),
    Mutant("eps_of_the_other", RMSPROP, "enum Scalar : int { kEps }", "enum Scalar : int { kEps = 1 }", "rules"),
    Mutant("divided_before_the_rate", RMSPROP, "quotient(rate * gradient, root(squares) + eps)", "rate * quotient(gradient, root(squares) + eps)", "rules"),
    Mutant("changes_of_this_step", ADADELTA, "root(old + eps)", "root(moved(old, gradient * gradient, rho, rest) + eps)", "rules"),
    Mutant("one_root_of_a_quotient", ADADELTA, "quotient(root(old + eps), root(v + eps))", "root(quotient(old + eps, v + eps))", "rules"),
    Mutant("changes_not_kept", ADADELTA, "  slots.of[kChangeSquares] = moved(old, change * change, rho, rest);\n", "", "rules"),
    Mutant("squares_of_the_gradient", ADADELTA, "change * change", "gradient * gradient", "rules"),
    Mutant("nan_is_not_larger", RULE, "choose((a > b) | (a != a), a, b)", "choose(a > b, a, b)", "rules full_conformance"),
    # ---- Muon: its rule, the two halves of its step, the batches, and the other optimizer
    Mutant("momentum_of_sgd", MUON, "gradient, momentum, rest);\n      gradient", "gradient, momentum, rest / rest);\n      gradient", "muon full_conformance"),
    Mutant("nesterov_of_sgd", MUON, "moved(v, gradient, momentum, rest) : v", "gradient + momentum * v : v", "muon full_conformance"),
    Mutant("directions_have_a_rate", FRAME, "    hyper.rule.learning_rate = 1.0f;\n", "", "muon full_conformance"),
    Mutant("directions_of_the_parameters_type", STEP.replace(".cpp", ".h"), "dtype_of(fused_math::parameter_out_format(flags(), kept.parameter_format))", "arena->dtype", "muon full_conformance"),
    Mutant("decay_in_both_halves", STEP_PY, "(decay if flags & decoupled else 0)", "decay", "muon"),
    Mutant("frame_in_the_first_half", STEP_PY, "first = flags & ~second | flags & _OF_BOTH", "first = flags & ~_OF_UPDATE", "muon"),
    Mutant("decay_of_the_parameter", STEP_PY, "if flags & master and first & decay:", "if False:", "muon"),
    Mutant("arranged_for_good", STEP_PY, "zip(self.numbers, updated, strict=True)", "zip(reversed(self.numbers), updated, strict=True)", "muon"),
    Mutant("pitch_of_no_gap", NEWTON_SCHULZ, "last._replace(pitch=offset - last.offset)", "last", "muon"),
    Mutant("nothing_is_normalized", NEWTON_SCHULZ, "return x / mx.where(norms < 2.0**-126, 1.0, norms)", "return x", "muon"),
    Mutant("derivative_by_the_square_of_a_norm", NEWTON_SCHULZ, "if _ext.is_tracing():", "if False:", "muon"),
    Mutant("norm_with_a_constant", NEWTON_SCHULZ, "mx.where(norms < 2.0**-126, 1.0, norms)", "(norms + 1e-7)", "muon"),
    Mutant("tall_matrices_are_wide", NEWTON_SCHULZ, "rows > columns, is_long", "False, is_long", "muon"),
    Mutant("gram_matrices_for_ever", NEWTON_SCHULZ, "or growth > _MOST_GROWTH", "or False", "muon"),
    Mutant("gram_matrix_of_the_first", NEWTON_SCHULZ, "            gram = factor @ gram @ factor\n", "", "muon"),
    Mutant("rows_over_columns_of_filters", NEWTON_SCHULZ, "max(1.0, shape[-2] / shape[-1])", "max(1.0, shape[0] / math.prod(shape[1:]))", "muon"),
    Mutant("last_triple_only", NEWTON_SCHULZ, "triples[min(i, len(triples) - 1)]", "triples[-1]", "muon"),
    Mutant("norm_of_its_own", MUON_PY, "self._op, tree, self.state, self._hyper(), options, scale)", "self._op, tree.part(parts.own, parts.own_layout.made), self.state, self._hyper(), options, scale)", "muon"),
    Mutant("others_with_their_own_options", MUON_PY, "others._options._replace(**shared)", "others._options", "muon"),
    Mutant("others_moved_before_a_refusal", MUON_PY, "            others._replace_state(before)\n", "", "muon"),
    Mutant("state_of_others_not_taken", MUON_PY, "                others.state = given\n", "                pass\n", "muon"),
    # ---- The frame
    Mutant("corrected_by_the_step_before", FRAME, "        low_part(control, kFirstRuleScalar + 1),\n        step + 1);", "        low_part(control, kFirstRuleScalar + 1),\n        step);", "correction"),
    Mutant("correction_in_float32", FRAME, "control.constants[i].lo : 0.0f", "0.0f : 0.0f", "correction"),
    Mutant("rest_of_float32", FRAME, "? control.rest[i] : 1.0f - scalar", "? 1.0f - scalar : 1.0f - scalar", "rules conformance"),
    Mutant("small_factors_not_corrected", FRAME, "if (factor.hi <= 0.0f) {", "if (factor.hi <= 0.5f) {", "correction"),
    Mutant("group_rest", FRAME, "times * n.rest[i] + group[kFirstScalarPlusRest + at]", "1.0f - n.scalar[i]", "rules groups"),
    Mutant("group_low_part", FRAME, "low_part(control, kFirstRuleScalar + i) + group[kFirstScalarPlusLow + at]", "low_part(control, kFirstRuleScalar + i)", "rules full_conformance"),
    Mutant("group_not_corrected", FRAME, "      n = bias_corrected<Biases>(n, low[0], low[1], step + 1);\n", "", "rules full_conformance"),
    Mutant("decay_after_the_change", FRAME, "T exact = w - next.change;", "T exact = e.parameter - next.change;", "rules"),
    Mutant("decoupled_without_the_rate", FRAME, "1.0f - hyper.rule.learning_rate * hyper.weight_decay", "1.0f - hyper.weight_decay", "rules"),
    Mutant("decay_twice", FRAME, "(flags & kWeightDecay) && (flags & kDecoupled)", "(flags & kWeightDecay)", "rules conformance"),
    Mutant("decay_of_the_rounding", FRAME, "gradient + hyper.weight_decay * w;", "gradient + hyper.weight_decay * e.parameter;", "full_conformance"),
    Mutant("slots_not_at_random", FRAME, "flags & kStochastic ? round_random(x, format", "false ? round_random(x, format", "rounding full_conformance"),
    Mutant("random_bits_of_both", FRAME, "slot == 2 ? more : more >> 16", "more", "rounding full_conformance"),
    Mutant("random_bits_of_one_slot", FRAME, "slot == 0 ? random : mix32(random)", "random", "full_conformance"),
    Mutant("slots_in_the_parameters_format", FRAME, "slot, random, flags, state_format)", "slot, random, flags, parameter_format)", "full_conformance rules"),
    Mutant("rates_of_the_frame_swapped", FRAME, "hyper.weight_decay = scalars.of[kWeightDecayFactor];", "hyper.weight_decay = scalars.of[kLearningRate];", "conformance rules"),
    Mutant("master_takes_the_rounding", FRAME, "    e.master = exact;\n", "    e.master = round_nearest(exact, parameter_format);\n", "full_conformance full_step"),
    Mutant("compensation_of_nothing", FRAME, "const T change = e.compensation - next.change;", "const T change = T() - next.change;", "full_conformance full_step"),
    Mutant("slots_of_amsgrad", ADAM, "flags & kAmsgrad ? 3 : 2", "3", "rules options"),
    # ---- The rules in MLX's operations, and their table
    Mutant("composed_rest", COMPOSED, "constant ? control_.rest[i] : 1.0f - n.rule.scalar[i]", "1.0f - n.rule.scalar[i]", "full_conformance"),
    Mutant("composed_slot", COMPOSED, "stored_slot(ruled.slots.of[slot], slot, random)", "stored_slot(ruled.slots.of[0], slot, random)", "transforms_full full_conformance"),
    Mutant("composed_correction", COMPOSED, "mx::rsqrt(bias(1).array, cpu)", "mx::rsqrt(bias(0).array, cpu)", "transforms_full full_conformance"),
    Mutant("composed_quotient", OPERATORS, "composed(mx::divide, a, b)", "composed(mx::divide, b, a)", "transforms_full full_conformance"),
    Mutant("composed_choice", OPERATORS, "mx::where(condition.array, a.array, b.array", "mx::where(condition.array, b.array, a.array", "transforms_full full_conformance"),
    Mutant("composed_magnitude", OPERATORS, "mx::abs(x.array, x.s)", "x.array", "transforms_full full_conformance"),
    Mutant("plain_flags_of_no_rule", "csrc/cpu/kernel.cpp", "(n & Rules::flags(rule))", "(n & 0)", "conformance rules"),
    Mutant("scalars_in_another_order", RMSPROP, '{"alpha", "eps"}', '{"eps", "alpha"}', "rules full_conformance"),
    # ---- Python: the rules
    Mutant("moments_in_half", RULES_PY, "state_dtype: mx.Dtype | None = mx.float32,", "state_dtype: mx.Dtype | None = None,", "rules"),
    Mutant("factors_of_one", RULES_PY, "BELOW_ONE = Range(0.0, 1.0, (False, True))", "BELOW_ONE = Range(0.0, 1.0, (False, False))", "rules"),
    Mutant("eps_of_nothing", RULES_PY, "ABOVE_ZERO = Range(is_open=(True, False))", "ABOVE_ZERO = Range(is_open=(False, False))", "rules"),
    Mutant("callables_of_any_number", RULES_PY, "if name in self.ranges and isinstance(value, (int, float)):", "if False:", "rules"),
    Mutant("coupled_adamw", "python/mlx_fused_optim/optimizers/adam.py", "    _usual = Options(decoupled=True)\n", "", "rules"),
    Mutant("coupled_lion", "python/mlx_fused_optim/optimizers/lion.py", "    _usual = Options(decoupled=True)\n", "", "rules"),
    Mutant("betas_swapped", GROUPS, 'return {"beta1": beta1, "beta2": beta2}', 'return {"beta1": beta2, "beta2": beta1}', "rules"),
    Mutant("numbers_checked_once", "python/mlx_fused_optim/optimizers/base.py", "not all(map(operator.is_, given, self._checked[0]))", "False", "rules optimizer"),
    Mutant("correction_without_a_state", STEP_PY, "    if hyper.flags & hyper.rule.flags.get(\"bias_correction\", 0):\n", "    if False:\n", "rules"),
    # ---- Moments in bytes: codes
    Mutant("peak_of_infinity", BYTES_H, "return magnitude < 0x7f800000u ? magnitude", "return magnitude <= 0x7f800000u ? magnitude", "bytes"),
    Mutant("peak_of_the_positive", BYTES_H, "format == kByteSquares ? bits : bits & 0x7fffffffu", "bits", "bytes"),
    Mutant("scale_of_almost_nothing", BYTES_H, "7.703719777548943e-34f", "1.17549435e-38f", "bytes"),
    Mutant("squares_of_255", BYTES_H, "kByteSquares ? 254.0f : 127.0f", "kByteSquares ? 255.0f : 127.0f", "bytes"),
    Mutant("dither_to_one_side", BYTES_H, "Bits<T>::to(bits) - 1.5f", "Bits<T>::to(bits) - 1.25f", "bytes"),
    Mutant("dither_of_three_bits", BYTES_H, "(random & 0x7fffu) << 8", "(random & 0x7000u) << 8", "bytes"),
    Mutant("squares_that_become_zero", BYTES_H, "integer_base() + 1.0f", "integer_base()", "bytes"),
    Mutant("codes_of_a_group_of_zeros", BYTES_H, "choose(is_normal & (T() + scale.coder > T()), usual", "choose(is_normal, usual", "bytes"),
    Mutant("subnormals_are_coded", BYTES_H, "magnitude >= 0x00800000u", "magnitude >= 1u", "bytes"),
    Mutant("nan_is_the_largest", BYTES_H, "usual, zero), zero - 128.0f)", "usual, zero), zero - 127.0f)", "bytes"),
    Mutant("nan_square_is_the_largest", BYTES_H, "code, zero + 255.0f)", "code, zero + 254.0f)", "bytes"),
    Mutant("code_of_nan_is_a_number", BYTES_H, "choose(code < -127.0f, nan", "choose(code < -128.0f, nan", "bytes"),
    Mutant("square_of_nan_is_a_number", BYTES_H, "choose(code > 254.0f, nan", "choose(code > 255.0f, nan", "bytes"),
    Mutant("moments_without_a_sign", BYTES_H, "part * magnitude_of(part)", "part * part", "bytes"),
    Mutant("codes_without_a_sign", BYTES_H, "Bits<T>::of(size) | (Bits<T>::of(x) & 0x80000000u)", "Bits<T>::of(size)", "bytes"),
    Mutant("square_of_a_255th", BYTES_H, "code * 0.003937007874015748f", "code * 0.003921568627450981f", "bytes"),
    Mutant("no_code_is_bounded", BYTES_H, "choose(size > most, T() + most, size)", "size", "", "15 random bits leave the largest code too: one of the two would do"),
    # ---- Moments in bytes: the CPU
    Mutant("peak_of_the_last_vector", CPU_BYTES, "largest = bits > largest ? bits : largest;", "largest = bits;", "bytes"),
    Mutant("peak_of_half_a_vector", CPU_BYTES, "for (size_t i = 0; i < kWidth; ++i) {\n    ends", "for (size_t i = 0; i < kWidth / 2; ++i) {\n    ends", "bytes"),
    Mutant("codes_behind_the_end", CPU_BYTES, "    values[i] = 0.0f;\n", "", "", "a group is read whole: what is behind the end are its zeros"),
    Mutant("same_dither_in_each_group", CPU_BYTES, "row_at(rows, at + i), uint32_t(at + i), slot", "row_at(rows, at + i), uint32_t(at), slot", "full_conformance"),
    Mutant("same_dither_in_each_slot", CPU_BYTES, "uint32_t(i)), slot, key, flags)", "uint32_t(i)), 0, key, flags)", "full_conformance"),
    Mutant("rows_not_copied", CPU_BYTES, "if (from != to) {", "if (false) {", "bytes"),
    Mutant("rows_coded_anew", "csrc/cpu/kernel.cpp", "hyper.apply && fused_math::has_slot(form.rule, form.flags, slot)", "hyper.apply || fused_math::has_slot(form.rule, form.flags, slot)", "bytes"),
    Mutant("threads_share_a_group", CPU, "const size_t from = rounded(begin - first);", "const size_t from = begin - first;", "bytes"),
    Mutant("threads_leave_a_group_out", CPU, "std::min(rounded(last - first), ends[t] - first)", "last - first", "bytes"),
    Mutant("gap_of_a_row_as_of_a_byte", CPU, "const size_t bytes = is_bytes ? size_t(kByteRow) : output->itemsize();", "const size_t bytes = output->itemsize();", "bytes"),
    # ---- Moments in bytes: the graph, MLX's operations, Python
    Mutant("rows_as_they_lie", STEP, "(is_known ? rows.flags().row_contiguous : is_own) ? rows", "(is_known || is_own) ? rows", "bytes"),
    Mutant("composed_squares_become_zero", COMPOSED_BYTES, "code = choose(code > least, code, least);", "", "bytes"),
    Mutant("composed_scale_of_almost_nothing", COMPOSED_BYTES, "largest < 0x1p-110f", "largest < 0x1p-126f", "bytes"),
    Mutant("squares_read_as_signed", PACKING, "split_rows(arena, layout, number, slot.is_unsigned)", "split_rows(arena, layout, number, False)", "bytes"),
    Mutant("squares_written_as_signed", PACKING, "joined_rows(values, layout, number, slot.is_unsigned)", "joined_rows(values, layout, number, False)", "bytes"),
    Mutant("bytes_and_floats_together", PACKING, "x.dtype in (mx.int8, DTYPE)", "x.dtype == mx.int8", "bytes"),
    Mutant("rows_of_another_shape", PACKING, "isinstance(value, (mx.array, Bytes)) else value", "isinstance(value, mx.array) else value", "bytes"),
    Mutant("rows_of_any_shape", PACKING, "rows_shape(row.elements) if arena.dtype == DTYPE else row.shape", "arena.shape if arena.dtype == DTYPE else row.shape", "bytes"),
    Mutant("small_tensors_wanted_in_bytes", PACKING, "if arena.is_small and chosen is not None and chosen == DTYPE:", "if False:", "bytes"),
    Mutant("one_layout_for_every_bound", LAYOUT_PY, '(f"_{least_of_bytes}" if least_of_bytes else "")', '""', "bytes"),
    Mutant("last_group_left_out", BYTES_PY, "first + -(-math.prod(shape) // _ext.BYTE_GROUP)", "first + math.prod(shape) // _ext.BYTE_GROUP", "bytes"),
]  # fmt: skip
