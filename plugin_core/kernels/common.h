/* What the C files of this folder share. */

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
