// See cuda.h. What MLX's headers name of the runtime: none of it is called here.
#pragma once

#include "cuda.h"

extern "C" {
typedef enum cudaError { cudaSuccess = 0 } cudaError_t;
typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphExec_st* cudaGraphExec_t;
typedef struct CUgraphNode_st* cudaGraphNode_t;
typedef struct CUmemPoolHandle_st* cudaMemPool_t;
typedef struct CUstream_st* cudaStream_t;
struct cudaKernelNodeParams;

cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
} // extern "C"

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
