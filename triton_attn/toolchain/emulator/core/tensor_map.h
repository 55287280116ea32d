/* What a CUtensorMap of the stub driver and the emulator holds; the real one is opaque. 128 bytes, aligned to 64. */
#ifndef TENSOR_MAP_H
#define TENSOR_MAP_H
#include <stdint.h>

#define TENSOR_MAP_MAGIC 0x54414d50u

/* Numbers of CUtensorMapDataType. */
enum { TM_U8, TM_U16, TM_U32, TM_S32, TM_U64, TM_S64, TM_F16, TM_F32, TM_F64, TM_BF16, TM_F32_FTZ, TM_TF32, TM_TYPES };

/* Bytes of an element of each. */
static const uint32_t TENSOR_MAP_BYTES[16] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4, 1, 1, 1};

typedef struct {
  uint64_t base;
  uint64_t unused; /* Triton 3.9's launcher clears a bit of this word, where it takes the tensor for a small one */
  uint64_t stride[4]; /* bytes from one element to the next, from the second dimension on */
  uint32_t dim[5];    /* elements, the innermost dimension first, as all that follows */
  uint32_t box[5];
  uint32_t magic;
  uint8_t rank, type, swizzle, nan_fill; /* swizzle: 0 none, 1, 2, 3: 32, 64, 128 bytes */
} TensorMap;

#endif
