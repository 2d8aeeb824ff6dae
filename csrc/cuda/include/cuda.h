// The part of NVIDIA's driver interface that MLX's headers and this backend name, so that a
// build needs no CUDA toolkit. It is stable; libmlx brings the libraries with it.
#pragma once

#include <cstddef>

extern "C" {
typedef int CUdevice;
typedef struct CUfunc_st* CUfunction;
typedef struct CUgraphNode_st* CUgraphNode;
typedef struct CUmod_st* CUmodule;
typedef struct CUstream_st* CUstream;
struct CUDA_KERNEL_NODE_PARAMS;

typedef enum cudaError_enum {
  CUDA_SUCCESS = 0,
} CUresult;
typedef enum CUdevice_attribute_enum {
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
} CUdevice_attribute;

CUresult cuCtxSynchronize();
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device);
CUresult cuDriverGetVersion(int* version);
CUresult cuGetErrorName(CUresult result, const char** name);
CUresult cuLaunchKernel(
    CUfunction function,
    unsigned grid_x,
    unsigned grid_y,
    unsigned grid_z,
    unsigned block_x,
    unsigned block_y,
    unsigned block_z,
    unsigned shared_bytes,
    CUstream stream,
    void** arguments,
    void** extra);
CUresult cuMemGetInfo_v2(size_t* free, size_t* total);
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name);
CUresult cuModuleLoadData(CUmodule* module, const void* image);
CUresult cuStreamQuery(CUstream stream);
} // extern "C"
