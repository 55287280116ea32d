/* A libcuda.so.1 without a GPU: Triton's own CudaDriver and launcher run on it. What a GPU's driver would refuse is
   refused here, and said on stderr: tensor maps by the rules of cuTensorMapEncodeTiled, launches by the limits of a grid
   and of shared memory. STUB_ARCH is the compute capability, 90 for sm_90. A launch is handed to stub_launch where that
   is set; otherwise its name is printed, and nothing computes. Whoever calls stub_expect with the sizes of a function's
   parameters finds what the last launch handed over in stub_parameters. */
#define __CUDA_API_VERSION_INTERNAL
#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tensor_map.h"

static int arch(void) { return atoi(getenv("STUB_ARCH")); }

static unsigned shared_limit(void) {
  int a = arch();
  return a == 80 ? 166912 : a == 90 || a == 100 ? 232448 : 101376;
}

/* Grid and the addresses of the parameters; other than 0: it failed. */
int (*stub_launch)(unsigned x, unsigned y, unsigned z, void **parameters) = NULL;

static int context;

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = arch() / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = arch() % 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit(); break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  default: *value = 1000;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { *size = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) { *c = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)0x1000; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }

static const char *refusal = "refused by the stub driver";

CUresult cuGetErrorString(CUresult e, const char **s) { *s = refusal; return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
  for (unsigned i = 0; i < n; i++) *(CUdeviceptr *)data[i] = pointer;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
  *n = 1;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const char *why = NULL;
  unsigned size = TENSOR_MAP_BYTES[type & 15];
  unsigned inner = box[0] * size;
  unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 128;
  if ((uintptr_t)base % 16) why = "base not aligned to 16 bytes";
  if (rank < 1 || rank > 5) why = "rank not 1 to 5";
  for (unsigned i = 0; i < rank && !why; i++) {
    if (dims[i] == 0 || dims[i] > 1ull << 32) why = "a dimension not 1 to 2^32";
    if (box[i] == 0 || box[i] > 256) why = "a side of the box not 1 to 256";
    if (steps[i] < 1 || steps[i] > 8) why = "a step not 1 to 8";
  }
  for (unsigned i = 0; i + 1 < rank && !why; i++)
    if (strides[i] == 0 || strides[i] % 16 || strides[i] >= 1ull << 40) why = "a stride not a multiple of 16 below 2^40";
  if (inner % 16) why = "the inner side of the box not a multiple of 16 bytes";
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && inner > span) why = "the inner side of the box larger than the swizzle";
  if (why) fprintf(stderr, "cuTensorMapEncodeTiled: %s\n", why), refusal = why;
  memset(map, 0, sizeof(*map));
  if (!why) {
    TensorMap *held = (TensorMap *)map;
    held->base = (uint64_t)base, held->magic = TENSOR_MAP_MAGIC;
    held->rank = rank, held->type = type, held->swizzle = swizzle, held->nan_fill = fill;
    for (unsigned i = 0; i < rank; i++) held->dim[i] = dims[i], held->box[i] = box[i];
    for (unsigned i = 0; i + 1 < rank; i++) held->stride[i] = strides[i];
  }
  return why ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static struct { CUfunction function; int count, sizes[256]; } expected[4096];
static int num_expected;
unsigned char stub_parameters[65536];

void stub_expect(CUfunction function, int count, const int *sizes) {
  expected[num_expected].function = function;
  expected[num_expected].count = count;
  memcpy(expected[num_expected++].sizes, sizes, count * sizeof(int));
}

static void keep_parameters(CUfunction function, void **parameters) {
  unsigned char *end = stub_parameters;
  memset(stub_parameters, 0xFF, sizeof(stub_parameters));
  for (int i = 0; i < num_expected; i++) {
    if (expected[i].function != function) continue;
    for (int j = 0; j < expected[i].count; end += expected[i].sizes[j++])
      memcpy(end, parameters[j], expected[i].sizes[j]);
    return;
  }
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const char *why = NULL;
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) why = "an empty grid";
  if (config->gridDimX > 2147483647u || config->gridDimY > 65535 || config->gridDimZ > 65535) why = "too large a grid";
  if (config->blockDimX * config->blockDimY * config->blockDimZ > 1024) why = "more than 1024 threads";
  keep_parameters(function, parameters);
  if (config->sharedMemBytes > shared_limit()) why = "too much shared memory";
  if (!why && stub_launch)
    return stub_launch(config->gridDimX, config->gridDimY, config->gridDimZ, parameters) ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
  if (why) fprintf(stderr, "cuLaunchKernelEx of %s: %s\n", (const char *)function, why), refusal = why;
  else printf("launch %s %u\n", (const char *)function, config->gridDimX), fflush(stdout);
  return why ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
