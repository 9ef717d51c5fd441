/* A transformer layer over the batch, but for its matrix products, for CPUs; batchformer_cpu.py calls
it.

Tokens are (B, L, C), one after the other in memory. Dropout needs no stored masks: whether an element
is dropped follows from its place and a seed, and is worked out again for the gradient.
*/

#include <math.h>

#include "common.h"

/* What library.py expects; it counts up with every change of a signature in this folder. */
int detection_plugins_version(void) { return 1; }

/* B x D that the attention has room for; batchformer_cpu.py checks it. */
#define MAX_SAMPLES_BY_CHANNELS 8192
#define MAX_SAMPLES 64

/* -------------------------------------------------------------------------------------- dropout */

typedef struct {
    int32_t threshold; /* dropped if the random number, 0 to 2^31 - 1, is below it */
    double scale;       /* of what is kept */
    uint64_t seed;
} Dropout;

/* Two random keys of a row: a step of SplitMix64 (Steele et al., OOPSLA 2014). */
INLINE uint64_t keys_of_row(Dropout dropout, uint64_t row) {
    uint64_t z = dropout.seed + (row + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* MurmurHash3's last step, in which every bit of the input reaches every bit of the output. */
INLINE uint32_t mixed(uint32_t h) {
    h = (h ^ (h >> 16)) * UINT32_C(0x85ebca6b);
    h = (h ^ (h >> 13)) * UINT32_C(0xc2b2ae35);
    return h ^ (h >> 16);
}

INLINE int32_t random_number(uint64_t keys, uint32_t column) {
    return (int32_t)(mixed(mixed(column ^ (uint32_t)keys) + (uint32_t)(keys >> 32)) >> 1);
}

#define NAME(base) base##_float32
#define REAL float
#define EXP expf
#define SQRT sqrtf
#include "batchformer_of_type.h"

#define NAME(base) base##_float64
#define REAL double
#define EXP exp
#define SQRT sqrt
#include "batchformer_of_type.h"
