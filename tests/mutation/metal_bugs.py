# ruff: noqa: E501 (a row a bug)
"""Bugs in the Metal backend: its kernels, its host code, and the arithmetic and the memory
that it rests on. On Linux, through the double of Metal (docs/metal.md)."""

from mutant import Mutant

KERNEL = "metal/sgd.metal"
QUADS = "metal/quads.h"
FULL = "metal/full.metal"
MEASURE = "metal/measure.metal"
HOST = "csrc/metal/sgd.cpp"
PACKING = "csrc/metal/dispatch.cpp"
LIBRARY = "csrc/metal/library.cpp"
SOURCES = "csrc/metal/sources.cpp"
MEASURING = "csrc/metal/measure.cpp"
STEP = "csrc/math/frame.h"
NORM = "csrc/math/norm.h"
DONATION = "csrc/donation.cpp"

MUTANTS = [
    # ---- The kernels: where a thread works
    Mutant("search_excludes_first_block", QUADS, "first_block <= block", "first_block < block"),
    Mutant("search_too_short", QUADS, "stride = 32; stride", "stride = 16; stride"),
    Mutant("row_of_tile", QUADS, "+ lane / tile_lanes;", "+ lane % tile_lanes;"),
    Mutant("rows_of_a_pass", QUADS, "(lanes / tile_lanes) +", "(lanes / tile_columns) +"),
    Mutant("last_pass_left_out", KERNEL, "pass < kPasses;", "pass < kPasses - 1;"),
    Mutant("tail_overruns", QUADS, "left < kQuad ? uint32_t(left) : uint32_t(kQuad)", "left < 1 ? uint32_t(left) : uint32_t(kQuad)"),
    Mutant("tile_overruns", QUADS, "left < kQuad ? left : uint32_t(kQuad)", "left < 1 ? left : uint32_t(kQuad)"),
    Mutant("wide_without_alignment", KERNEL, "full && (tensor.wide & kWideGradient)", "full"),
    Mutant("never_wide", KERNEL, "full && (tensor.wide & kWideArena)", "false"),
    Mutant("tile_of_another_width", PACKING, "tensor.columns, groups.tile_columns)", "tensor.columns, kTileColumns)"),
    Mutant("tile_not_in_the_name", LIBRARY, 'specialised += "_" + std::to_string(size_t(tile_columns));', ""),
    Mutant("count_bounds_the_loop", QUADS, "i < kQuad; ++i) {\n      if (i < count) {", "i < count; ++i) {\n      {"),
    Mutant("scalars_without_a_barrier", QUADS, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n  return", "  return"),
    Mutant("scalars_of_three_threads", QUADS, "lane < kScalars)", "lane < kScalars - 1)"),
    # ---- The kernels: memory
    Mutant("velocity_of_another_tensor", KERNEL, "velocities + tensor.offset", "velocities"),
    Mutant("gap_left_as_it_was", KERNEL, "if (block == 0) {", "if (block == 1) {"),
    Mutant("gap_by_every_thread", KERNEL, "i += lanes) {", "i += 1) {"),
    Mutant("pack_with_other_strides", KERNEL, "* strides[d];", "* strides[dimensions - 1 - d];"),
    Mutant("pack_once_a_thread", KERNEL, "    to[i] = from[at];", "    to[i] = from[at];\n    break;"),
    Mutant("narrowed_twice", QUADS, "quad[i] = T(values[i]);", "quad[i] = T(float(half(values[i])));"),
    Mutant("counter_stands_still", STEP, "step + hyper.apply", "step"),
    Mutant("another_rate_reported", STEP, "used_out[i] = scalars.of[i];", "used_out[i] = scalars.of[kLearningRate];"),
    # ---- The kernel of the full step
    Mutant("full_gap_left_as_it_was", FULL, "if (block == 0) {", "if (block == 1) {"),
    Mutant("full_gap_of_one_slot", FULL, "store_quad_of(kFloat32, averages_out, at, zero, 1, false);", ""),
    Mutant("full_last_pass_left_out", FULL, "pass < kPasses;", "pass < kPasses - 1;"),
    Mutant("full_wide_without_alignment", FULL, "count == kQuad && (tensor.wide & kWideGradient)", "count == kQuad"),
    Mutant("full_random_by_tensor", FULL, "uint32_t(at) + i", "uint32_t(piece.first) + i"),
    Mutant("full_one_number_a_quad", FULL, "uint32_t(at) + i", "uint32_t(at)"),
    Mutant("full_flags_of_the_step", FULL, "full_flags & kGroups ? uint32_t(tensor.flags) : full_flags", "full_flags"),
    Mutant("full_row_of_another_group", FULL, "uint64_t(tensor.group) * kGroupNumbers", "uint64_t(tensor.group)"),
    Mutant("full_norms_of_another_tensor", FULL, "uint64_t(tensor.number) * 2", "uint64_t(tensor.number)"),
    Mutant("full_velocity_read_as_parameter", FULL, "load_quad_of(velocity_format,", "load_quad_of(parameter_format,"),
    Mutant("full_master_not_stored", FULL, "store_quad_of(kFloat32, masters_out, at, m, count, wide);", ""),
    Mutant("full_average_of_velocity", FULL, "a[i] = e.average;", "a[i] = e.velocity;"),
    Mutant("full_derived_from_another_bit", FULL, "(full_flags & kCompensated) != 0", "(full_flags & kMaster) != 0"),
    # ---- The kernels of the measurement
    Mutant("chunks_without_a_barrier", MEASURE, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n\n  if", "  if"),
    Mutant("folds_without_a_barrier", MEASURE, "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    for", "    for"),
    Mutant("barrier_for_some", MEASURE, "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    for", "    if (thread_number < width) threadgroup_barrier(mem_flags::mem_threadgroup);\n    for"),
    Mutant("lanes_in_another_order", MEASURE, "(sums[0] + sums[2]) + (sums[1] + sums[3])", "(sums[0] + sums[1]) + (sums[2] + sums[3])"),
    Mutant("last_lanes_in_another_order", MEASURE, "(sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3])", "(sums[0][0] + sums[0][1]) + (sums[0][2] + sums[0][3])"),
    Mutant("parameters_clipped", MEASURE, "array.is_gradient ? control.flags : 0", "control.flags"),
    Mutant("peak_of_some_threads", MEASURE, "peaks[first_lane + i]", "peaks[first_lane + i / 2]"),
    Mutant("peaks_without_a_barrier", MEASURE, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n\n  uint32_t peak", "  uint32_t peak"),
    Mutant("peak_before_unscaling", MEASURE, "peak_of(peak, unscaled)", "peak_of(peak, x[i])"),
    Mutant("chunk_never_read_again", MEASURE, "if (factor != 1.0f) {", "if (false) {"),
    Mutant("scale_of_the_unclipped", MEASURE, "sgd_clipped_peak(peak, hyper, flags)", "peak"),
    Mutant("scale_of_no_small_chunk", NORM, "exponent >= kLeastExponent && ", ""),
    Mutant("scale_of_no_large_chunk", NORM, " && exponent <= kMostExponent", ""),
    Mutant("scaled_down_once", NORM, "x.sum.hi * factor * factor", "x.sum.hi * factor"),
    Mutant("fold_at_the_first_scale", NORM, "sum.scale > more.scale ? sum.scale : more.scale", "sum.scale"),
    Mutant("norm_without_its_scale", NORM, "power_of_two(int(x.scale) - int(kNoScale) + 1)", "2.0f"),
    Mutant("scale_that_cannot_be_inverted", STEP, "inverts ? divide_float(1.0f, scale) : bits_to_float(0x7fc00000u)", "divide_float(1.0f, scale)"),
    Mutant("ratio_beyond_float32", STEP, " && is_finite_peak(peak_of(0, ratio))", ""),
    Mutant("fold_one_value_a_lane", MEASURE, "i < count; i += kFoldLanes", "i < width; i += kFoldLanes"),
    Mutant("fold_of_narrow_lanes", MEASURE, "width < kFoldLanes &&", "width < kFoldLanes / 2 &&"),
    Mutant("fold_in_one_part", NORM, "(a.lo + b.lo) + high.lo", "0.0f"),
    Mutant("skipped_not_counted", MEASURE, "(applies ? 0 : 1)", "0"),
    Mutant("norms_not_in_pairs", MEASURE, "i % 2 * gradient_count + i / 2", "i"),
    # ---- The kernels: language and names
    Mutant("constants_swapped", KERNEL, "has_nesterov [[function_constant(1)]]", "has_nesterov [[function_constant(2)]]"),
    Mutant("name_of_another_type", KERNEL, "_bfloat16\", sgd_step<T, bfloat>", "_bfloat16\", sgd_step<T, half>"),
    Mutant("kernel_without_a_name", KERNEL, 'INSTANTIATE("pack_2"', 'INSTANTIATE("pack_8"'),
    Mutant("double_literal", KERNEL, "parameter_out[tensor.size + i] = T(0.0f)", "parameter_out[tensor.size + i] = T(0.0)"),
    Mutant("no_address_space", KERNEL, "constant SgdTensor& tensor = ", "const SgdTensor& tensor = "),
    Mutant("not_ascii", KERNEL, "// The step on the GPU", "// The st\u00e9p on the GPU"),
    Mutant("division_as_it_comes", "csrc/math/portability.h", "return precise::divide(a, b);", "return a / b;"),
    Mutant("given_is_constant", KERNEL, "device const float* given", "constant float* given"),
    Mutant("slot_given_twice", "metal/sources.h", "X(5, 12)", "X(5, 11)"),
    # ---- The host: bindings
    Mutant("source_at_its_own_offset", SOURCES, "-source.offset()", "0"),
    Mutant("empty_slots_unbound", SOURCES, "i < count; ++i", "i < arrays_.size(); ++i"),
    Mutant("output_bound_as_input", HOST, "encoder.set_output_array(*out.slots[kVelocity]", "encoder.set_input_array(*out.slots[kVelocity]"),
    Mutant("value_of_another_size", HOST, "uint64_t(output.size())", "uint32_t(output.size())"),
    Mutant("copies_freed_early", "csrc/metal/pack.cpp", "  encoder_.add_temporary(copy);\n", ""),
    Mutant("too_many_sources", "metal/table.h", "kSources = 24", "kSources = 25"),
    # ---- The host: dispatches
    Mutant("one_after_another", HOST, "  auto together = encoder.start_concurrent();\n  for", "  for"),
    Mutant("packs_beside_the_step", HOST, "auto together = encoder.start_concurrent(); // the", "new CommandEncoder::ConcurrentContext(encoder); // the"),
    Mutant("one_block_too_few", PACKING, "return (a + b - 1) / b;", "return a / b;"),
    Mutant("tiles_wide_when_unaligned", PACKING, "view.row_stride % kQuad == 0 &&", ""),
    Mutant("rows_wide_when_unaligned", PACKING, "bool whole = view.columns % kQuad == 0", "bool whole = true"),
    Mutant("unaligned_gradient_wide", PACKING, "gradient.offset() % (kQuad * gradient.itemsize()) == 0", "true"),
    Mutant("strides_merged_wrongly", PACKING, "== stride * length", "== stride"),
    Mutant("gradients_read_as_one_dtype", PACKING, "gradient.dtype() != dtype ||", "dtype != mx::float32 ||"),
    Mutant("gaps_of_slots_forgotten", HOST, "      gaps |= is_fresh(*out.slots[slot], *in.slots[slot]);\n", ""),
    Mutant("source_slots_mixed_up", PACKING, "tensor.gradient_source = sources.of(gradient)", "tensor.gradient_source = sources.of(parameter)"),
    # ---- The host: the full step and the measurement
    Mutant("slot_read_as_another", HOST, "*readable.slots[slot], kFirstSlotBuffer", "*readable.slots[kVelocity], kFirstSlotBuffer"),
    Mutant("full_sources_of_plain", HOST, "plan.is_plain() ? kSources : kFullSources", "kSources"),
    Mutant("slots_not_looked_at_for_alignment", HOST, "aligned &= is_aligned(*out.slots[slot]) && is_aligned(*readable.slots[slot]);", ""),
    Mutant("flags_of_no_group", PACKING, "plan.tensor_flags(i)", "plan.flags()"),
    Mutant("number_in_the_arena", PACKING, "tensor.number = arena.tensors[i]", "tensor.number = i"),
    Mutant("first_tensor_of_a_whole_arena", PACKING, "plan.parameter_begin(i) * parameter.itemsize()", "0"),
    Mutant("formats_not_in_the_name", LIBRARY, 'specialised += "_" + std::to_string(size_t(values[i]));', ""),
    Mutant("step_beside_its_measure", HOST, "bind_optional(encoder, in.measured, kMeasuredBuffer);\n  bind_optional", "bind_optional(encoder, nullptr, kMeasuredBuffer);\n  bind_optional"),
    Mutant("chunks_of_the_first_array", MEASURING, "array.first_chunk = first_chunks[i]", "array.first_chunk = 0"),
    Mutant("pieces_summed_as_neighbours", MEASURING, "fills_memory(in.arrays[i])", "true"),
    Mutant("measured_wide_when_unaligned", MEASURING, "a.offset() % (kQuad * a.itemsize()) == 0", "true"),
    Mutant("sums_freed_early", MEASURING, "  encoder.add_temporary(sums);\n", ""),
    Mutant("chunks_one_after_another", MEASURING, "auto together = encoder.start_concurrent(); // they", "// they"),
    # ---- The host: the library
    Mutant("constants_not_in_the_name", LIBRARY, "specialised += values[i] ? '1' : '0';", ""),
    Mutant("fast_math", LIBRARY, "mx::MathMode::Safe", "mx::MathMode::Fast"),
    Mutant("compiler_message_lost", LIBRARY, "error.what() +", '"an error" +'),
    Mutant("another_kernel_name", HOST, '"sgd_finish"', '"sgd_end"'),
    # ---- Memory that may not be written
    Mutant("given_away_though_held", DONATION, "handle_count(parameters[i]) != 1", "false"),
    Mutant("given_away_though_shared", DONATION, "input.is_donatable() &&", ""),
    # ---- Maths
    Mutant("contraction_left_on", "csrc/math/portability.h", "#pragma METAL fp contract(off)", ""),
    Mutant("decay_after_momentum", "csrc/math/rules/sgd.h", "gradient + momentum * velocity", "gradient + momentum * gradient"),
    Mutant("logarithm_of_two", "csrc/math/elementary.h", "-1.904654299957767e-9f", "1.904654299957767e-9f"),
    Mutant("two_by_the_logarithm", "csrc/math/elementary.h", "3.851926067e-8f", "-3.851926067e-8f"),
    Mutant("third_of_the_logarithm", "csrc/math/elementary.h", "-9.934107758624577e-9f", "9.934107758624577e-9f"),
    Mutant("half_of_pi", "csrc/math/elementary.h", "-4.371139000186243e-8f", "4.371139000186243e-8f"),
    Mutant("sixth_of_the_sine", "csrc/math/elementary.h", "4.967053879312289e-9f", "-4.967053879312289e-9f"),
    Mutant("term_of_exp2", "csrc/math/elementary.h", "tail * z + 1.6666667e-1f", "tail * z + 1.6666e-1f"),
    Mutant("first_segment_for_ever", "csrc/math/schedule.h", "step < schedule.segments[i].start", "step <= schedule.segments[i].start"),
]  # fmt: skip
