// NVRTC without a GPU: compiles variants as the backend would.
//
// `machine` reads from its standard input, a line each, a compute capability and the members of
// a Variant, all as numbers. It prints, with | between them, the capability, registers, bytes of
// stack, bytes of spilled registers, milliseconds of CPU time, and the variant's description.
//
// `ptx` reads the same, and compiles for a GPU that NVRTC does not know. It prints the fused
// multiply-adds, and the description.
//
// `broken` prints the words about a kernel that does not compile.
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/compiler.h"
#include "cuda/variants.h"

using namespace mlx_fused_optim::cuda;

namespace {

/// The number before `words` in what ptxas says.
long number_before(const std::string& log, const std::string& words) {
  const auto at = log.find(words);
  if (at == std::string::npos) {
    return -1;
  }
  auto begin = at;
  while (begin > 0 && std::isdigit(log[begin - 1])) {
    --begin;
  }
  return std::stol(log.substr(begin, at - begin));
}

size_t count_of(const std::string& text, const std::string& word) {
  size_t count = 0;
  for (auto at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) {
    ++count;
  }
  return count;
}

Variant read_variant(std::istream& numbers) {
  uint32_t kind, parameter, state;
  Variant v{};
  numbers >> kind >> v.rule >> parameter >> state >> v.gradients >> v.flags >> v.schedules.kinds >>
      v.schedules.flags >> v.capacity;
  v.kind = static_cast<Kind>(kind);
  v.parameter = static_cast<Type>(parameter);
  v.state = static_cast<Type>(state);
  return v;
}

void compile(const Variant& variant, int capability) {
  Compiler compiler(capability);
  compiler.options.push_back("--ptxas-options=-v");
  std::string log;
  const auto begin = std::clock();
  const auto code = compiler.compile(variant.text(), &log);
  const double milliseconds = 1e3 * (std::clock() - begin) / CLOCKS_PER_SEC;
  if (!compiler.makes_machine_code || code.compare(0, 4, "\177ELF") != 0) {
    throw std::runtime_error("no machine code for " + std::to_string(capability));
  }
  std::printf(
      "%d|%ld|%ld|%ld|%.0f|%s\n",
      capability,
      number_before(log, " registers"),
      number_before(log, " bytes stack frame"),
      number_before(log, " bytes spill stores"),
      milliseconds,
      variant.description().c_str());
}

/// As for a GPU that comes after NVRTC.
void compile_ptx(const Variant& variant) {
  const Compiler compiler(999);
  if (compiler.makes_machine_code) {
    throw std::runtime_error("machine code for an unknown GPU");
  }
  const auto ptx = compiler.compile(variant.text());
  std::printf("%zu|%s\n", count_of(ptx, "fma."), variant.description().c_str());
}

} // namespace

int main(int, char** arguments) {
  const std::string what = arguments[1];
  try {
    if (what == "broken") {
      Compiler(90).compile(Variant{Kind::tiled}.text() + "int x = no_such_thing;\n");
    }
    for (std::string line; std::getline(std::cin, line);) {
      std::istringstream numbers(line);
      int capability;
      numbers >> capability;
      const auto variant = read_variant(numbers);
      what == "ptx" ? compile_ptx(variant) : compile(variant, capability);
      std::fflush(stdout);
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
