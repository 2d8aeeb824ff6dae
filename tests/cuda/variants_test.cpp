// NVRTC without a GPU: compiles what the backend would, and its files of compiled kernels.
// `variants_test compile CAPABILITY...` prints, for each variant that it is told of on its
// standard input (the members of Variant as numbers), one line: name, capability, registers,
// bytes of stack, spilled bytes, fused multiply-adds in PTX, milliseconds. `variants_test broken`
// prints the words about a kernel that does not compile.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

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

void compile(const Variant& variant, int capability) {
  Compiler compiler(capability);
  compiler.options.push_back("--ptxas-options=-v");
  std::string log;
  const auto begin = std::chrono::steady_clock::now();
  const auto code = compiler.compile(variant.text(), &log);
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
  if (!compiler.makes_machine_code || code.compare(0, 4, "\x7f" "ELF") != 0) {
    throw std::runtime_error("no machine code for " + std::to_string(capability));
  }
  std::printf(
      "%d|%ld|%ld|%ld|%.0f|%s\n",
      capability,
      number_before(log, " registers"),
      number_before(log, " bytes stack frame"),
      number_before(log, " bytes spill stores"),
      time.count(),
      variant.description().c_str());
  std::fflush(stdout);
}

} // namespace

int main(int count, char** arguments) {
  try {
    if (std::string(arguments[1]) == "broken") {
      Compiler(90).compile(Variant{Kind::flat}.text() + "\nint x = no_such_thing;\n");
      return 0;
    }
    for (std::string line; std::getline(std::cin, line);) {
      std::istringstream numbers(line);
      uint32_t kind, parameter, velocity;
      Variant v{};
      numbers >> kind >> parameter >> velocity >> v.gradients >> v.flags >> v.schedules.kinds >>
          v.schedules.flags;
      v.kind = static_cast<Kind>(kind);
      v.parameter = static_cast<Type>(parameter);
      v.velocity = static_cast<Type>(velocity);
      for (int i = 2; i < count; ++i) {
        compile(v, std::atoi(arguments[i]));
      }
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
