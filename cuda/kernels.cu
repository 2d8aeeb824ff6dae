// All kernels. Of an entry point, `run<Known<...>>(launch)`, csrc/cuda/variants.cpp writes the
// one that is asked for behind this.
#include "measure.cu"
#include "schedule.cu"
#include "step.cu"
