// All kernels. Of an entry point, `run<Known<...>>(launch)`, csrc/cuda/variants.cpp writes the
// one that is asked for behind this.
#include "full.cu"
#include "measure.cu"
#include "sgd.cu"
