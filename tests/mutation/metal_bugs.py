# ruff: noqa: E501 (a row a bug)
"""Bugs in the Metal backend: its kernels, its host code, and the arithmetic and the memory
that it rests on. On Linux, through the double of Metal (docs/metal.md)."""

from mutant import Mutant

KERNEL = "metal/step.metal"
PACK = "metal/pack.metal"
TABLE = "metal/table.h"
QUADS = "metal/quads.h"
MEASURE = "metal/measure.metal"
HOST = "csrc/metal/step.cpp"
PACKING = "csrc/metal/dispatch.cpp"
LIBRARY = "csrc/metal/library.cpp"
SOURCES = "csrc/metal/sources.cpp"
MEASURING = "csrc/metal/measure.cpp"
STEP = "csrc/math/frame.h"
NORM = "csrc/math/norm.h"
DONATION = "csrc/graph/donation.cpp"
ROWS = "metal/byte_quads.h"

MUTANTS = [
    # ---- The kernels: where a thread works
    Mutant("search_excludes_first_block", QUADS, "first_block <= block", "first_block < block"),
    Mutant("search_too_short", QUADS, "stride = 32; stride", "stride = 16; stride"),
    Mutant("row_of_tile", QUADS, "+ lane / tile_lanes;", "+ lane % tile_lanes;"),
    Mutant("rows_of_a_pass", QUADS, "(lanes / tile_lanes) +", "(lanes / tile_columns) +"),
    Mutant("last_pass_left_out", KERNEL, "pass < kPasses;", "pass < kPasses - 1;"),
    Mutant("tail_overruns", QUADS, "left < kQuad ? uint32_t(left) : uint32_t(kQuad)", "left < 1 ? uint32_t(left) : uint32_t(kQuad)"),
    Mutant("tile_overruns", QUADS, "left < kQuad ? left : uint32_t(kQuad)", "left < 1 ? left : uint32_t(kQuad)"),
    Mutant("wide_without_alignment", KERNEL, "count == kQuad && (tensor.wide & kWideGradient)", "count == kQuad"),
    Mutant("never_wide", KERNEL, "count == kQuad && (tensor.wide & kWideArena)", "false"),
    Mutant("tile_of_another_width", PACKING, "tensor.columns, groups.tile_columns)", "tensor.columns, kTileColumns)"),
    Mutant("count_bounds_the_loop", QUADS, "i < kQuad; ++i) {\n      if (i < count) {\n        values", "i < count; ++i) {\n      {\n        values"),
    Mutant("scalars_without_a_barrier", QUADS, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n  StepScalars", "  StepScalars"),
    Mutant("scalars_of_three_threads", QUADS, "lane < kScalars)", "lane < kScalars - 1)"),
    # ---- The kernels: memory
    Mutant("gap_left_as_it_was", KERNEL, "if (block == 0) {", "if (block == 1) {"),
    Mutant("gap_by_every_thread", KERNEL, "i += lanes) {", "i += 1) {"),
    Mutant("pack_with_other_strides", PACK, "* strides[d];", "* strides[dimensions - 1 - d];"),
    Mutant("pack_once_a_thread", PACK, "    to[i] = from[at];", "    to[i] = from[at];\n    break;"),
    Mutant("narrowed_twice", QUADS, "quad[i] = T(values[i]);", "quad[i] = T(float(half(values[i])));"),
    Mutant("counter_stands_still", STEP, "step + hyper.apply", "step + 0 * hyper.apply"),
    Mutant("another_rate_reported", STEP, "used_out[i] = scalars.of[i]", "used_out[i] = scalars.of[0]"),
    # ---- The kernel of the step: what it has
    Mutant("gap_of_no_slot", KERNEL, "store_quad_of(format_of_slot(slot), to, at, zero, 1, false);", "store_quad_of(format_of_slot(slot), to, at, zero, 0, false);"),
    Mutant("random_by_tensor", KERNEL, "uint32_t(at) + i", "uint32_t(piece.first) + i"),
    Mutant("one_number_a_quad", KERNEL, "uint32_t(at) + i", "uint32_t(at)"),
    Mutant("flags_of_the_step", KERNEL, "(step_flags & ~uint32_t(kTensorFlags)) | (tensor.flags & uint32_t(kTensorFlags))", "step_flags"),
    Mutant("row_of_another_group", KERNEL, "uint64_t(tensor.group) * kGroupNumbers", "uint64_t(tensor.group)"),
    Mutant("norms_of_another_tensor", KERNEL, "uint64_t(tensor.number) * 2", "uint64_t(tensor.number)"),
    Mutant("state_read_as_parameter", KERNEL, "slot_format(step_rule, step_flags, slot, parameter_format, state_format)", "slot_format(step_rule, step_flags, slot, parameter_format, parameter_format)"),
    Mutant("slots_not_stored", KERNEL, "store_quad_of(format, to, at, kept[slot], count, wide);", "store_quad_of(format, to, at, kept[slot], 0, false);"),
    Mutant("average_of_the_first_slot", KERNEL, "kept[kMovingAverage][i] = e.average;", "kept[kMovingAverage][i] = e.slots.of[0];"),
    # ---- The kernel of the step: rules, places and numbers
    Mutant("rule_of_another_constant", KERNEL, "step_rule [[function_constant(0)]]", "step_rule [[function_constant(1)]]"),
    Mutant("rule_constants_swapped", KERNEL, "hyper,\n          step_rule,\n          flags,", "hyper,\n          uint32_t(0),\n          flags,"),
    Mutant("slots_swapped", KERNEL, "{{kept[0][i], kept[1][i], kept[2][i]}}", "{{kept[1][i], kept[0][i], kept[2][i]}}"),
    Mutant("third_slot_forgotten", KERNEL, "kept[2][i] = e.slots.of[2];", ""),
    Mutant("master_as_compensation", KERNEL, "kept[kMasterCopy][i],\n              kept[kCompensation][i],", "kept[kCompensation][i],\n              kept[kMasterCopy][i],"),
    Mutant("compensation_in_float32", KERNEL, "slot_format(step_rule, step_flags, slot, parameter_format, state_format)", "slot_format(step_rule, step_flags, slot, kFloat32, state_format)"),
    Mutant("bytes_not_stored", "metal/quads.h", "      return store_quad((device int8_t*)to + at, values, count, wide);", "      return;"),
    Mutant("slots_of_the_tensor", KERNEL, "if (keeps(slot)) {\n        device char* to = buffer_of(buffers, slot_place(step_rule, step_flags, slot) + 1);\n        const uint32_t format", "if (has_slot(step_rule, flags, slot)) {\n        device char* to = buffer_of(buffers, slot_place(step_rule, step_flags, slot) + 1);\n        const uint32_t format"),
    Mutant("corrected_by_nobody", KERNEL, "lane == 0 ? step_rule : uint32_t(Rules::kCount)", "uint32_t(Rules::kCount)"),
    Mutant("corrected_without_a_barrier", KERNEL, "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    hyper.rule", "    hyper.rule"),
    Mutant("corrections_swapped", KERNEL, "hyper.rule.corrected_root = corrected[1]", "hyper.rule.corrected_root = corrected[0]"),
    Mutant("place_of_all_slots", TABLE, "place += before < slot && fused_math::has_slot(rule, flags, before) ? 2 : 0;", "place += before < slot && (before < slot || fused_math::has_slot(rule, flags, before)) ? 2 : 0;"),
    Mutant("place_of_an_input_only", TABLE, "fused_math::has_slot(rule, flags, before) ? 2 : 0", "fused_math::has_slot(rule, flags, before) ? 1 : 0"),
    Mutant("groups_in_the_place_of_the_measure", TABLE, "(flags & fused_math::kMeasuredFlags ? 1 : 0)", "0"),
    Mutant("source_in_the_place_of_groups", TABLE, "(flags & fused_math::kGroups ? 1 : 0)", "0"),
    Mutant("buffer_of_the_next_number", "metal/sources.h", "case i: return buffers.of##i;", "case i + 1: return buffers.of##i;"),
    Mutant("measured_from_the_next_buffer", "metal/sources.h", "case i - 1: elements", "case i: elements"),
    # ---- The kernels of the measurement
    Mutant("chunks_without_a_barrier", MEASURE, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n\n  if", "  if"),
    Mutant("folds_without_a_barrier", MEASURE, "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    for", "    for"),
    Mutant("barrier_for_some", MEASURE, "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    for", "    if (thread_number < width) threadgroup_barrier(mem_flags::mem_threadgroup);\n    for"),
    Mutant("lanes_in_another_order", MEASURE, "(sums[0] + sums[2]) + (sums[1] + sums[3])", "(sums[0] + sums[1]) + (sums[2] + sums[3])"),
    Mutant("last_lanes_in_another_order", MEASURE, "(sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3])", "(sums[0][0] + sums[0][1]) + (sums[0][2] + sums[0][3])"),
    Mutant("clipped_parameters_measured", MEASURE, "array.is_gradient ? control.flags : 0", "control.flags"),
    Mutant("peak_of_some_threads", MEASURE, "peaks[first_lane + i]", "peaks[first_lane + i / 2]"),
    Mutant("peaks_without_a_barrier", MEASURE, "  threadgroup_barrier(mem_flags::mem_threadgroup);\n\n  uint32_t peak", "  uint32_t peak"),
    Mutant("peak_before_unscaling", MEASURE, "peak_of(peak, unscaled)", "peak_of(peak, x[i])"),
    Mutant("chunk_never_read_again", MEASURE, "if (factor != 1.0f) {", "if (false) {"),
    Mutant("scale_of_the_unclipped", MEASURE, "step_clipped_peak(peak, hyper, flags)", "peak"),
    Mutant("scale_of_no_small_chunk", NORM, "exponent >= kLeastExponent && ", ""),
    Mutant("scale_of_no_large_chunk", NORM, " && exponent <= kMostExponent", ""),
    Mutant("scaled_down_once", NORM, "x.sum.hi * factor * factor", "x.sum.hi * factor"),
    Mutant("fold_at_the_first_scale", NORM, "sum.scale > more.scale ? sum.scale : more.scale", "sum.scale"),
    Mutant("norm_without_its_scale", NORM, "power_of_two(int(x.scale) - int(kNoScale) + 1)", "2.0f"),
    Mutant("scale_that_cannot_be_inverted", STEP, "inverts ? divide_float(1.0f, scale) : bits_to_float(0x7fc00000u)", "divide_float(1.0f, inverts ? scale : scale)"),
    Mutant("ratio_beyond_float32", STEP, " && is_finite_peak(peak_of(0, ratio))", ""),
    Mutant("fold_one_value_a_lane", MEASURE, "i < count; i += kFoldLanes", "i < width; i += kFoldLanes"),
    Mutant("fold_of_narrow_lanes", MEASURE, "width < kFoldLanes &&", "width < kFoldLanes / 2 &&"),
    Mutant("fold_in_one_part", NORM, "(a.lo + b.lo) + high.lo", "0.0f"),
    Mutant("skipped_not_counted", MEASURE, "(applies ? 0 : 1)", "0"),
    Mutant("norms_not_in_pairs", MEASURE, "i % 2 * gradient_count + i / 2", "i"),
    # ---- The kernels: language and names
    Mutant("kernel_without_a_name", PACK, 'INSTANTIATE("pack_2"', 'INSTANTIATE("pack_8"'),
    Mutant("double_literal", KERNEL, "const float4 zero = float4(0.0f);", "const float4 zero = float4(0.0);"),
    Mutant("no_address_space", KERNEL, "constant StepTensor& tensor = ", "const StepTensor& tensor = "),
    Mutant("not_ascii", KERNEL, "// The step on the GPU", "// The st\u00e9p on the GPU"),
    Mutant("division_as_it_comes", "csrc/math/portability.h", "return precise::divide(a, b);", "return a / b;"),
    Mutant("given_is_constant", KERNEL, "device const float* given [[buffer(kGivenBuffer)]],\n    // clang-format off", "constant float* given [[buffer(kGivenBuffer)]],\n    // clang-format off"),
    Mutant("slot_given_twice", "metal/sources.h", "X(5, 9)", "X(5, 8)"),
    # ---- The host: bindings
    Mutant("source_at_its_own_offset", SOURCES, "-source.offset()", "0"),
    Mutant("empty_slots_unbound", SOURCES, "i < count; ++i", "i < arrays_.size(); ++i"),
    Mutant("output_bound_as_input", HOST, "encoder.set_output_array(*out.slots[slot], at + 1)", "encoder.set_input_array(*out.slots[slot], at + 1)"),
    Mutant("parameters_out_bound_as_input", HOST, "encoder.set_output_array(*out.parameters,", "encoder.set_input_array(*out.parameters,"),
    Mutant("too_many_buffers", TABLE, "kBuffers = 27", "kBuffers = 28"),
    Mutant("too_many_measured", "metal/measure_table.h", "kMeasuredSources = 26", "kMeasuredSources = 27"),
    Mutant("value_of_another_size", HOST, "uint64_t(output.size())", "uint32_t(output.size())"),
    Mutant("copies_freed_early", "csrc/metal/pack.cpp", "  encoder_.add_temporary(copy);\n", ""),
    # ---- The host: dispatches
    Mutant("one_after_another", HOST, "  auto together = encoder.start_concurrent();\n  for", "  for"),
    Mutant("packs_beside_the_step", HOST, "auto together = encoder.start_concurrent(); // the", "new CommandEncoder::ConcurrentContext(encoder); // the"),
    Mutant("one_block_too_few", PACKING, "return (a + b - 1) / b;", "return a / b;"),
    Mutant("tiles_wide_when_unaligned", PACKING, "view.row_stride % kQuad == 0 &&", ""),
    Mutant("rows_wide_when_unaligned", PACKING, "bool whole = view.columns % kQuad == 0", "bool whole = true"),
    Mutant("unaligned_gradient_wide", PACKING, "tensor.gradient % (kQuad * gradient.itemsize()) == 0", "true"),
    Mutant("strides_merged_wrongly", PACKING, "== stride * length", "== stride"),
    Mutant("gradients_read_as_one_dtype", PACKING, "gradient.dtype() != dtype ||", "dtype != mx::float32 ||"),
    Mutant("gaps_of_slots_forgotten", HOST, "      gaps |= is_fresh(*out.slots[slot], *in.slots[slot]);\n", ""),
    Mutant("source_slots_mixed_up", PACKING, "tensor.gradient_source = sources.of(gradient)", "tensor.gradient_source = sources.of(parameter)"),
    # ---- The host: the full step and the measurement
    Mutant("slot_read_as_another", HOST, "encoder.set_input_array(readable(*in.slots[slot]), at)", "encoder.set_input_array(*out.slots[slot], at)"),
    Mutant("slots_not_looked_at_for_alignment", HOST, "aligned &= is_aligned(*out.slots[slot]) && is_aligned(readable(*in.slots[slot]));", ""),
    Mutant("flags_of_no_group", PACKING, "plan.tensor_flags(i)", "plan.flags()"),
    Mutant("number_in_the_arena", PACKING, "tensor.number = arena.tensors[i]", "tensor.number = i"),
    Mutant("first_tensor_of_a_whole_arena", PACKING, "plan.parameter_begin(i) * parameter.itemsize()", "0"),
    Mutant("finish_beside_its_measure", HOST, "bind_optional(encoder, in.measured, kMeasuredBuffer);", "bind_optional(encoder, nullptr, kMeasuredBuffer);"),
    Mutant("chunks_of_the_first_array", MEASURING, "array.first_chunk = first_chunks[i]", "array.first_chunk = 0"),
    Mutant("pieces_summed_as_neighbours", MEASURING, "fills_memory(in.arrays[i])", "true"),
    Mutant("measured_wide_when_unaligned", MEASURING, "a.offset() % (kQuad * a.itemsize()) == 0", "true"),
    Mutant("sums_freed_early", MEASURING, "  encoder.add_temporary(sums);\n", ""),
    Mutant("chunks_one_after_another", MEASURING, "auto together = encoder.start_concurrent(); // they", "// they"),
    # ---- The host: the library
    Mutant("constants_not_in_the_name", LIBRARY, "    specialised += std::to_string(size_t(values[i]));", ""),
    Mutant("format_without_slots_in_the_name", LIBRARY, "has_slots ? kept.state_format : kept.parameter_format", "kept.state_format"),
    Mutant("formats_of_the_host_swapped", LIBRARY, "      kept.parameter_format,\n      format_of(gradient),", "      format_of(gradient),\n      kept.parameter_format,"),
    Mutant("fast_math", LIBRARY, "mx::MathMode::Safe", "mx::MathMode::Fast"),
    Mutant("compiler_message_lost", LIBRARY, "error.what() +", '"an error" +'),
    Mutant("another_kernel_name", HOST, '"step_finish"', '"step_end"'),
    # ---- Memory that may not be written
    Mutant("given_away_though_held", DONATION, "handle_count(parameters[i]) != 1", "false"),
    Mutant("given_away_though_shared", DONATION, "input.is_donatable() &&", ""),
    # ---- Maths
    Mutant("contraction_left_on", "csrc/math/portability.h", "#pragma METAL fp contract(off)", ""),
    Mutant("decay_after_momentum", "csrc/math/rules/sgd.h", "gradient + momentum * velocity", "gradient + momentum * gradient"),
    Mutant("logarithm_of_two", "csrc/math/elementary.h", "-1.904654299957767e-9f", "1.904654299957767e-9f", "schedules_exact"),
    Mutant("two_by_the_logarithm", "csrc/math/elementary.h", "3.851926067e-8f", "-3.851926067e-8f", "schedules_exact"),
    Mutant("third_of_the_logarithm", "csrc/math/elementary.h", "-9.934107758624577e-9f", "9.934107758624577e-9f", "schedules_exact"),
    Mutant("half_of_pi", "csrc/math/elementary.h", "-4.371139000186243e-8f", "4.371139000186243e-8f", "schedules_exact"),
    Mutant("sixth_of_the_sine", "csrc/math/elementary.h", "4.967053879312289e-9f", "-4.967053879312289e-9f", "schedules_exact"),
    Mutant("term_of_exp2", "csrc/math/elementary.h", "tail * z + 1.6666667e-1f", "tail * z + 1.6666e-1f", "schedules_exact"),
    Mutant("first_segment_for_ever", "csrc/math/schedule.h", "step < schedule.segments[i].start", "step <= schedule.segments[i].start", "schedules_exact"),
    # ---- Moments in bytes
    Mutant("peak_of_half_a_group", ROWS, "kGroupThreads = kByteGroup / kQuad", "kGroupThreads = kByteGroup / kQuad / 2", "bytes"),
    Mutant("peak_of_what_is_not_there", ROWS, "i < count ? byte_peak(values[i], format) : 0u", "byte_peak(values[i], format)", "bytes"),
    Mutant("dither_of_a_quad", ROWS, "slot_dither<float>(position + i, slot", "slot_dither<float>(position, slot"),
    Mutant("dither_of_the_first_slot", ROWS, "slot_dither<float>(position + i, slot", "slot_dither<float>(position + i, 0"),
    Mutant("scale_by_every_thread", ROWS, "return count > 0 && at % kByteGroup == 0;", "return count > 0 && at % 1 == 0;", "bytes"),
    Mutant("scale_of_the_simd_group", ROWS, "lane % kSimdWidth / kGroupThreads * kGroupThreads", "lane % 1", "bytes"),
    Mutant("scale_by_nobody", ROWS, "if (has_scale(at, count)) {", "if (has_scale(at, count) && count > kQuad) {", "bytes"),
    Mutant("scale_read_by_all", ROWS, "has_scale(at, count) ? *(device const uint32_t*)row : 0u", "*(device const uint32_t*)row", "bytes"),
    Mutant("squares_loaded_with_a_sign", ROWS, "load_quad((device const uint8_t*)codes, 1, count, wide)", "load_quad((device const int8_t*)codes, 1, count, wide)", "bytes"),
    Mutant("codes_at_the_scale", ROWS, "device const char* codes = row + kByteScale + at % kByteGroup;", "device const char* codes = row + at % kByteGroup;", "bytes"),
    Mutant("row_of_the_element", ROWS, "device const char* row = rows + at / kByteGroup * kByteRow;", "device const char* row = rows + at * kByteRow;", "bytes"),
    Mutant("gap_keeps_its_rows", ROWS, "ByteQuad{float4(0.0f), 0.0f}, 1, false)", "ByteQuad{float4(0.0f), 0.0f}, 0, false)", "bytes"),
    Mutant("idle_threads_leave", KERNEL, "state_format == kBytes ? piece_of_thread(tensor, block, pass, 0, lanes).count == 0", "false ? false", "bytes"),
    Mutant("skipped_rows_coded_anew", KERNEL, "if (hyper.apply && has_slot(step_rule, flags, slot)) { // else to the bit", "if (true) {", "bytes"),
]  # fmt: skip
