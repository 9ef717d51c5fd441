/* Triplet attention's passes over memory, for CPUs; triplet_cpu.py calls them.

A tensor of B x P x Q x R elements, R contiguous, has three maps: PQ, PR and QR, each over the axis
that its name leaves out. (B, C, H, W) is P Q R = C H W in contiguous memory and H W C in
channels_last: the same code serves both. Each function reads or writes a tensor once.

Where the batch has fewer images than there are threads, P is cut into parts. Each part then has a QR
map of its own, and the caller joins them.

No function allocates, and none knows Python or PyTorch: there is no ABI to keep up with.
*/

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
/* One library for all processors: the loader takes the widest vectors that there are. */
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef CLONES
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

/* Where part `i` of `parts` of `n` starts. */
INLINE int64_t part_start(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

/* library.py expects this number; raise both when a signature in this file changes. */
int detection_plugins_version(void) { return 1; }

/* Rows that are worked on at once, so that a QR map's share of them stays in the nearest cache. */
#define TILE_BYTES 24576

typedef struct {
    int64_t batch, p, q, r, parts;
} Shape;

INLINE int64_t rows_of_tile(int64_t r, int64_t bytes_of_element) {
    int64_t rows = TILE_BYTES / (r * bytes_of_element + 1);
    return rows < 1 ? 1 : rows;
}

INLINE float from_bfloat16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value == value ? rounded : 0x7fc0);
}

#define NAME(base) base##_float32
#define CONVOLVE
#define STORED float
#define REAL float
#define LOAD(x) (x)
#define STORE(x) (x)
#include "triplet_attention_of_type.h"

#define NAME(base) base##_float64
#define CONVOLVE
#define STORED double
#define REAL double
#define LOAD(x) (x)
#define STORE(x) (x)
#include "triplet_attention_of_type.h"

#define NAME(base) base##_bfloat16
#define STORED uint16_t
#define REAL float
#define LOAD(x) from_bfloat16(x)
#define STORE(x) to_bfloat16(x)
#include "triplet_attention_of_type.h"
