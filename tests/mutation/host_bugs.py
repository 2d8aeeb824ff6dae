# ruff: noqa: E501 (a row a bug)
"""Bugs in what runs on the host: the Python layer, the shared C++, the CPU's kernels, and the
arithmetic of csrc/math. Each names the tests that should catch it."""

from mutant import Mutant

PACKING = "python/mlx_fused_optim/_packing.py"
LAYOUT_PY = "python/mlx_fused_optim/_layout.py"
OPTIONS = "python/mlx_fused_optim/_options.py"
GROUPS = "python/mlx_fused_optim/_groups.py"
SCALER = "python/mlx_fused_optim/scaler.py"
STEP_PY = "python/mlx_fused_optim/_step.py"
FUNCTIONS = "python/mlx_fused_optim/functional.py"
CHECKS = "python/mlx_fused_optim/_checks.py"
SCHEDULE_PY = "python/mlx_fused_optim/schedules/_schedule.py"
TEXT = "python/mlx_fused_optim/schedules/text.py"
LAYOUT = "csrc/layout.cpp"
VIEW = "csrc/view.cpp"
DONATION = "csrc/donation.cpp"
TREE = "csrc/tree.cpp"
PREPARED = "csrc/prepared.cpp"
MEASURE = "csrc/measure.cpp"
SCHEDULE = "csrc/schedule.cpp"
STEP = "csrc/sgd.cpp"
COMPOSED = "csrc/sgd_composed.cpp"
TRANSFORMS = "csrc/composed_transforms.cpp"
ROUNDING = "csrc/rounding_composed.cpp"
CPU = "csrc/cpu/sgd.cpp"
CPU_MEASURE = "csrc/cpu/measure.cpp"

MUTANTS = [
    # ---- Python: the state
    Mutant("momentum_forgotten", PACKING, "if slot.lasts and name in old}", "if name not in old}", "optimizer full_step"),
    Mutant("kept_by_another_path", PACKING, "candidates[0] if is_clear else path", "path", "optimizer bad_input full_step"),
    Mutant("average_of_no_master", PACKING, 'kept[t].get("master") if "master" in wanted.slots else None', "None", "full_step"),
    Mutant("edits_overlooked", PACKING, "or not entries.keys() <= set(known)", "or False", "optimizer bad_input full_step"),
    Mutant("shapes_of_one_rank", PACKING, "if own != shape:", "if len(own) != len(shape):", "bad_input optimizer"),
    Mutant("another_table", LAYOUT_PY, "if layout.key != key:", "if False:", "bad_input optimizer"),
    Mutant("arenas_of_all_types", PACKING, "return layout.halves if self.of_halves else range(len(layout.arenas))", "return range(len(layout.arenas))", "full_step"),
    # ---- Python: options and groups
    Mutant("infinite_norm_clips", OPTIONS, "self.clip_norm not in (None, math.inf)", "self.clip_norm is not None", "norm full_step options"),
    Mutant("average_never_moves", OPTIONS, "if not 0 <= number < 1:", "if not 0 <= number <= 1:", "options"),
    Mutant("last_group_wins", GROUPS, "in enumerate(groups.members):\n        if member.predicate", "in reversed(list(enumerate(groups.members))):\n        if member.predicate", "groups options"),
    Mutant("factor_of_a_group", GROUPS, 'row[0] = overrides.get("learning_rate_factor", 1.0)', "row[0] = 1.0", "groups"),
    Mutant("term_of_a_group_stays", GROUPS, "row &= ~_ext.FLAGS[term]", "row &= ~0", "groups"),
    Mutant("zero_is_a_term", GROUPS, "or callable(value) or value != 0)", "or callable(value) or True)", "groups"),
    Mutant("groups_mistaken", GROUPS, "isinstance(value, float) else id(value))", "isinstance(value, float) else 0)", "groups"),
    Mutant("no_group_left_out", GROUPS, "if number + 1 not in taken:", "if False:", "options groups"),
    Mutant("truth_is_a_number", CHECKS, "(bool, str, bytes)", "(str, bytes)", "bad_input"),
    Mutant("scale_of_one_array", STEP_PY, "if not isinstance(scale, float) or scale != 1:", "if isinstance(scale, float) and scale != 1:", "full_step scaler"),
    # ---- Python: steps that are taken again
    Mutant("measured_step_prepared", STEP_PY, "        or options.is_measured\n", "", "prepared full_step"),
    Mutant("groups_prepared", STEP_PY, "        or options.groups.members\n", "", "prepared groups", same="a prepared step without its groups is refused, and Python's way is taken"),
    Mutant("lists_never_change", STEP_PY, "or (type(value) is tuple and not value)", "or type(value) in (tuple, list)", "prepared"),
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
    Mutant("arenas_without_a_cap", LAYOUT, "(arena->size + size) * spec.dtype.size() > kArenaBytes", "arena->size * spec.dtype.size() > 2 * kArenaBytes", "optimizer full_step"),
    Mutant("shapes_run_together", LAYOUT, 'add_bytes("\\xfe", 1);', "", "optimizer"),
    Mutant("order_of_bytes", LAYOUT, ">> (8 * b)", ">> (24 - 8 * b)", "optimizer"),
    Mutant("views_of_one_shape", VIEW, "shape(i) == that.shape(i) && offset(i) == that.offset(i)", "shape(i) == that.shape(i)", "modes optimizer"),
    Mutant("batch_axis_first", VIEW, "mx::moveaxis(inputs[0], axes[0], 0, stream())", "inputs[0]", "transforms_full modes"),
    Mutant("every_view_a_vector", VIEW, "is_vector || view.size() == 0", "is_vector || true", "optimizer holding"),
    Mutant("cotangents_without_gaps", VIEW, "    skip_to(offsets[i]);\n", "", "modes transforms_full"),
    # ---- C++: donation
    Mutant("tensors_in_any_place", DONATION, "p.offset() != begin + int64_t(arena.offsets[i]) * itemsize ||", "", "holding"),
    Mutant("strides_overlooked", DONATION, "!p.flags().row_contiguous) {", "false) {", "holding modes optimizer"),
    Mutant("tracers_seen_as_memory", DONATION, "p.is_tracer() || !p.is_available()", "!p.is_available()", "modes transforms_full"),
    Mutant("one_use_too_many", DONATION, "data.use_count() != static_cast<long>(n)", "data.use_count() > static_cast<long>(n) + 1", "holding"),
    # ---- C++: trees and prepared steps
    Mutant("parameters_left_out", TREE, "  if (exact_) {\n", "  if (false) {\n", "bad_input optimizer"),
    Mutant("paths_grow", TREE, "~Descend() { path_.resize(length_); }", "~Descend() {}", "optimizer"),
    Mutant("shapes_of_one_size", TREE, "g.shape() != p.shape()", "g.size() != p.size()", "bad_input"),
    Mutant("named_tuples", TREE, 'nb::hasattr(type, "_fields") ? type(*nb::tuple(items)) : type(items)', "type(items)", "optimizer modes"),
    Mutant("prepared_for_other_tensors", PREPARED, "if (!tree.fits(layout_) || !step", "if (!step", "prepared"),
    Mutant("leftovers_are_nothing", PREPARED, "nb::len(state) == 3 && nb::len(entries) == entries_ : nb::len(state) == 2;", "true : true;", "prepared"),
    Mutant("rate_of_any_type", PREPARED, "if (!given || !is_real(given->dtype())) {", "if (!given) {", "prepared bad_input"),
    Mutant("counter_of_the_first_step", PREPARED, "  next[names().step] = nb::cast(*taken.next);\n", "", "prepared"),
    # ---- C++: measurement, schedules, the step
    Mutant("applied_when_finite", MEASURE, "flags & kSkipNonfinite ? finite : mx::array(true)", "finite", "norm transforms_full full_conformance"),
    Mutant("joined_without_a_shift", SCHEDULE, "      segment.start += begin;\n", "", "schedules"),
    Mutant("one_segment_more", SCHEDULE, "joined.count == kMaxSegments", "joined.count == kMaxSegments - 1", "schedules"),
    Mutant("all_schedules_equal", SCHEDULE, "std::memcmp(&schedule_, &that.schedule_, sizeof(Schedule)) == 0", "&that != nullptr", "schedules_step schedules modes"),
    Mutant("ends_not_scaled", SCHEDULE, "    segment.zero = times_factor(segment.zero);\n", "", "schedules"),
    Mutant("scalars_side_by_side", STEP, "      values.resize(i, mx::array(0.0f)); // those before it that are not given\n", "", "schedules_step groups"),
    Mutant("gradients_of_other_shapes", STEP, "    check(plan_.parameter_inputs() + i, i);\n", "", "modes"),
    Mutant("float32_has_a_master", STEP, "flags &= ~(kMaster | kCompensated);", "flags &= ~kCompensated;", "full_step"),
    Mutant("composed_group", COMPOSED, "int(plan_.group(i))", "0", "transforms_full full_conformance"),
    Mutant("derivatives_side_by_side", TRANSFORMS, "result[function.positions[i]] = found[i];", "result[i] = found[i];", "transforms_full modes"),
    Mutant("composed_position", ROUNDING, "word(static_cast<uint32_t>(first))", "word(0u)", "full_conformance"),
    # ---- The CPU's kernels
    Mutant("position_in_the_tensor", CPU, "tensor.position = offset;", "tensor.position = 0;", "rounding full_step full_conformance"),
    Mutant("gaps_stay", CPU, "if (next > end) {", "if (false) {", "optimizer holding conformance"),
    Mutant("parameters_clipped", CPU_MEASURE, "a < plan.gradient_count ? control.flags : 0", "control.flags", "norm full_step full_conformance"),
    Mutant("each_step_skipped", CPU_MEASURE, "*skipped + !apply", "*skipped + 1", "full_step"),
    Mutant("rows_run_over", "csrc/cpu/blocks.h", "d == last && length - index < run", "d == last && length < run", "modes optimizer conformance"),
    Mutant("tail_begins_late", "csrc/cpu/kernel.cpp", "  for (; i < n; ++i) {\n    update_at<float, flags>", "  for (++i; i < n; ++i) {\n    update_at<float, flags>", "optimizer"),
    Mutant("one_position_a_vector", "csrc/cpu/full_kernel.cpp", "result[i] = first + i;", "result[i] = first;", "rounding full_step"),
    Mutant("half_to_infinity_late", "csrc/cpu/half.h", "magnitude >= 0x477ff000 ? 0x7c00", "magnitude > 0x477ff000 ? 0x7c00", "conformance"),
    # ---- Arithmetic
    Mutant("fold_loses_the_rest", "csrc/math/norm.h", "(a.lo + b.lo) + high.lo", "a.lo + b.lo", "norm"),
    Mutant("scale_of_the_last", "csrc/math/norm.h", "sum.scale > more.scale ? sum.scale : more.scale", "more.scale", "norm"),
    Mutant("master_of_another_parameter", "csrc/math/sgd.h", "round_nearest(e.master, parameter_format) == e.parameter ? e.master : e.parameter", "e.master", "full_step"),
    Mutant("random_bits_of_both", "csrc/math/sgd.h", "round_random(next.velocity, velocity_format, random >> 16)", "round_random(next.velocity, velocity_format, random)", "rounding full_step full_conformance"),
    Mutant("half_of_a_product", "csrc/math/real.h", "p.lo + (a.hi * b.lo + a.lo * b.hi)", "p.lo + a.hi * b.lo", "schedules_exact exponential_decay"),
]  # fmt: skip
