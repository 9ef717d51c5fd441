/* The functions of triplet_attention.c for one type of elements: STORED in memory, REAL in registers
   and in the maps. No include guard: it is included once for each type. */

/* ------------------------------------------------------------------------------ maximum and mean */

/* Arrays of one map: maximum, its first index along the axis, and sum. */
typedef struct {
    REAL *restrict max;
    int32_t *restrict index;
    REAL *restrict sum;
} NAME(Pool);

/* Part `at` of a map whose sum lies `plane` elements behind its maximum. */
INLINE NAME(Pool) NAME(pool_at)(REAL *map, int32_t *index, int64_t plane, int64_t at) {
    NAME(Pool) pool = {map + at, index ? index + at : 0, map + plane + at};
    return pool;
}

INLINE void NAME(clear)(NAME(Pool) map, int64_t length, int indices) {
    for (int64_t i = 0; i < length; i++) map.max[i] = -INFINITY;
    memset(map.sum, 0, (size_t)length * sizeof(REAL));
    if (indices) memset(map.index, 0, (size_t)length * sizeof(int32_t));
}

INLINE void NAME(pool_row)(const STORED *restrict x, int64_t length, int32_t p, int32_t q,
                           NAME(Pool) pq, NAME(Pool) pr, NAME(Pool) qr, int indices) {
    REAL sum = 0, max = -INFINITY;
#pragma omp simd reduction(+ : sum) reduction(max : max)
    for (int64_t r = 0; r < length; r++) {
        REAL value = LOAD(x[r]);
        sum += value;
        max = value > max ? value : max;
        REAL before = pr.max[r];
        pr.max[r] = value > before ? value : before;
        if (indices) pr.index[r] = value > before ? q : pr.index[r];
        pr.sum[r] += value;
        before = qr.max[r];
        qr.max[r] = value > before ? value : before;
        if (indices) qr.index[r] = value > before ? p : qr.index[r];
        qr.sum[r] += value;
    }
    *pq.max = max;
    *pq.sum = sum / (REAL)length;
    if (indices) {
        int32_t first = INT32_MAX;
#pragma omp simd reduction(min : first)
        for (int64_t r = 0; r < length; r++) {
            int32_t here = LOAD(x[r]) == max ? (int32_t)r : INT32_MAX;
            first = here < first ? here : first;
        }
        *pq.index = first == INT32_MAX ? 0 : first; /* of nothing but NaN any index will do */
    }
}

/* Of one image, planes p0 to p1. */
INLINE void NAME(pool_part)(const STORED *x, Shape s, int64_t p0, int64_t p1, REAL *const maps[3],
                            int32_t *const at[3], int indices) {
    int64_t n_pq = s.p * s.q, n_pr = s.p * s.r, n_qr = s.q * s.r;
    int64_t tile = rows_of_tile(s.r, 2 * sizeof(REAL) + sizeof(int32_t));
    NAME(clear)(NAME(pool_at)(maps[1], at[1], n_pr, p0 * s.r), (p1 - p0) * s.r, indices);
    NAME(clear)(NAME(pool_at)(maps[2], at[2], n_qr, 0), n_qr, indices);
    for (int64_t q0 = 0; q0 < s.q; q0 += tile) {
        int64_t q1 = q0 + tile < s.q ? q0 + tile : s.q;
        for (int64_t p = p0; p < p1; p++)
            for (int64_t q = q0; q < q1; q++)
                NAME(pool_row)(x + (p * s.q + q) * s.r, s.r, (int32_t)p, (int32_t)q,
                               NAME(pool_at)(maps[0], at[0], n_pq, p * s.q + q),
                               NAME(pool_at)(maps[1], at[1], n_pr, p * s.r),
                               NAME(pool_at)(maps[2], at[2], n_qr, q * s.r), indices);
    }
    REAL *pr_mean = maps[1] + n_pr, *qr_mean = maps[2] + n_qr;
    for (int64_t i = p0 * s.r; i < p1 * s.r; i++) pr_mean[i] /= (REAL)s.q;
    for (int64_t i = 0; i < n_qr; i++) qr_mean[i] /= (REAL)s.p;
}

CLONES static void NAME(pool_with_indices)(const STORED *x, Shape s, int64_t p0, int64_t p1,
                                           REAL *const maps[3], int32_t *const at[3]) {
    NAME(pool_part)(x, s, p0, p1, maps, at, 1);
}

CLONES static void NAME(pool_without_indices)(const STORED *x, Shape s, int64_t p0, int64_t p1,
                                              REAL *const maps[3], int32_t *const at[3]) {
    NAME(pool_part)(x, s, p0, p1, maps, at, 0);
}

/* Maximum and mean of x over each axis. `maps` are PQ and PR (batch, 2, rows, columns), the maximum
   first, and QR (parts, batch, 2, Q, R), whose means add up to the mean. `indices`, of the first
   maximum, have the same shapes without the 2; or all three are NULL. */
void NAME(pool)(const STORED *x, Shape s, REAL *const maps[3], int32_t *const indices[3],
                int threads) {
    int64_t n_pq = s.p * s.q, n_pr = s.p * s.r, n_qr = s.q * s.r;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < s.batch * s.parts; task++) {
        int64_t b = task / s.parts, part = task % s.parts, copy = part * s.batch + b;
        REAL *own[3] = {maps[0] + 2 * b * n_pq, maps[1] + 2 * b * n_pr, maps[2] + 2 * copy * n_qr};
        int32_t *own_indices[3] = {0, 0, 0};
        if (indices[0]) {
            own_indices[0] = indices[0] + b * n_pq;
            own_indices[1] = indices[1] + b * n_pr;
            own_indices[2] = indices[2] + copy * n_qr;
        }
        (indices[0] ? NAME(pool_with_indices) : NAME(pool_without_indices))(
            x + b * n_pq * s.r, s, part_start(s.p, s.parts, part),
            part_start(s.p, s.parts, part + 1), own, own_indices);
    }
}

/* -------------------------------------------------------------------------------------- product */

CLONES static void NAME(scale_plane)(const STORED *restrict x, STORED *restrict y, int64_t q,
                                     int64_t r, const REAL *restrict pq, const REAL *restrict pr,
                                     const REAL *restrict qr) {
    for (int64_t i = 0; i < q; i++) {
        REAL row = pq[i];
#pragma omp simd
        for (int64_t j = 0; j < r; j++)
            y[i * r + j] = STORE(LOAD(x[i * r + j]) * (qr[i * r + j] + pr[j] + row));
    }
}

/* y = x times the sum of three maps. */
void NAME(scale)(const STORED *x, STORED *y, Shape s, const REAL *const gates[3], int threads) {
    int64_t planes = s.batch * s.p, plane = s.q * s.r;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < planes; i++)
        NAME(scale_plane)(x + i * plane, y + i * plane, s.q, s.r, gates[0] + i * s.q,
                          gates[1] + i * s.r, gates[2] + i / s.p * plane);
}

/* ----------------------------------------------------------------------- gradient of the gates */

INLINE REAL NAME(product_row)(const STORED *restrict g, const STORED *restrict x, int64_t length,
                              REAL *restrict pr, REAL *restrict qr) {
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t r = 0; r < length; r++) {
        REAL value = LOAD(g[r]) * LOAD(x[r]);
        sum += value;
        pr[r] += value;
        qr[r] += value;
    }
    return sum;
}

CLONES static void NAME(product_part)(const STORED *g, const STORED *x, Shape s, int64_t p0,
                                      int64_t p1, REAL *pq, REAL *pr, REAL *qr) {
    int64_t tile = rows_of_tile(s.r, sizeof(REAL));
    memset(pr + p0 * s.r, 0, (size_t)((p1 - p0) * s.r) * sizeof(REAL));
    memset(qr, 0, (size_t)(s.q * s.r) * sizeof(REAL));
    for (int64_t q0 = 0; q0 < s.q; q0 += tile) {
        int64_t q1 = q0 + tile < s.q ? q0 + tile : s.q;
        for (int64_t p = p0; p < p1; p++)
            for (int64_t q = q0; q < q1; q++) {
                int64_t row = (p * s.q + q) * s.r;
                pq[p * s.q + q] =
                    NAME(product_row)(g + row, x + row, s.r, pr + p * s.r, qr + q * s.r);
            }
    }
}

/* Sums of g x over each axis: PQ and PR (batch, rows, columns), QR (parts, batch, Q, R). */
void NAME(product)(const STORED *g, const STORED *x, Shape s, REAL *const sums[3], int threads) {
    int64_t n_pq = s.p * s.q, n_pr = s.p * s.r, n_qr = s.q * s.r;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < s.batch * s.parts; task++) {
        int64_t b = task / s.parts, part = task % s.parts;
        NAME(product_part)(g + b * n_pq * s.r, x + b * n_pq * s.r, s,
                           part_start(s.p, s.parts, part), part_start(s.p, s.parts, part + 1),
                           sums[0] + b * n_pq, sums[1] + b * n_pr,
                           sums[2] + (part * s.batch + b) * n_qr);
    }
}

/* ------------------------------------------------------------------------- gradient of the input */

/* Of one map: the gate, the gradients of its maximum and mean, and where the maximum was. */
typedef struct {
    const REAL *restrict gate;
    const REAL *restrict max;
    const REAL *restrict mean;
    const int32_t *restrict index;
} NAME(Grads);

CLONES static void NAME(grad_plane)(const STORED *restrict g, STORED *restrict gx, Shape s,
                                    int32_t p, NAME(Grads) pq, NAME(Grads) pr, NAME(Grads) qr) {
    REAL share_p = 1 / (REAL)s.p, share_q = 1 / (REAL)s.q, share_r = 1 / (REAL)s.r;
    for (int64_t i = 0; i < s.q; i++) {
        REAL gate = pq.gate[i], mean = pq.mean[i] * share_r, max = pq.max[i];
        int32_t index = pq.index[i], row = (int32_t)i;
        const STORED *restrict from = g + i * s.r;
        STORED *restrict to = gx + i * s.r;
        const REAL *restrict qr_gate = qr.gate + i * s.r, *restrict qr_max = qr.max + i * s.r,
                             *restrict qr_mean = qr.mean + i * s.r;
        const int32_t *restrict qr_index = qr.index + i * s.r;
#pragma omp simd
        for (int64_t j = 0; j < s.r; j++) {
            REAL value = LOAD(from[j]) * (qr_gate[j] + pr.gate[j] + gate);
            value += qr_mean[j] * share_p + pr.mean[j] * share_q + mean;
            value += qr_index[j] == p ? qr_max[j] : 0;
            value += pr.index[j] == row ? pr.max[j] : 0;
            value += (int32_t)j == index ? max : 0;
            to[j] = STORE(value);
        }
    }
}

/* gx = g times the sum of the gates, and what the pooled maps' gradients hand back. Of PQ, PR and QR
   each: gate (batch, rows, columns), gradients (batch, 2, rows, columns) and indices. */
void NAME(grad)(const STORED *g, STORED *gx, Shape s, const REAL *const gates[3],
                const REAL *const pooled[3], const int32_t *const indices[3], int threads) {
    int64_t planes = s.batch * s.p, n_pq = s.p * s.q, n_pr = s.p * s.r, n_qr = s.q * s.r;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < planes; i++) {
        int64_t b = i / s.p, p = i % s.p;
        const REAL *max[3] = {pooled[0] + 2 * b * n_pq + p * s.q, pooled[1] + 2 * b * n_pr + p * s.r,
                              pooled[2] + 2 * b * n_qr};
        NAME(Grads) pq = {gates[0] + i * s.q, max[0], max[0] + n_pq, indices[0] + i * s.q};
        NAME(Grads) pr = {gates[1] + i * s.r, max[1], max[1] + n_pr, indices[1] + i * s.r};
        NAME(Grads) qr = {gates[2] + b * n_qr, max[2], max[2] + n_qr, indices[2] + b * n_qr};
        NAME(grad_plane)(g + i * n_qr, gx + i * n_qr, s, (int32_t)p, pq, pr, qr);
    }
}

/* ---------------------------------------------------------------------------- a gate's convolution */
#ifdef CONVOLVE

/* A vector's worth of columns, and how many vectors and weights of a window's row are worked on side
   by side: a sum would wait for the addition before it. Fewer columns than fill all vectors but one
   are worked on one vector at a time, as the rest would be padding. */
#define LANES 16
#define VECTORS 4
#define TAPS 7

/* Sums of `vectors` vectors of columns. */
INLINE void NAME(correlate_columns)(const REAL *restrict x, const REAL *restrict w, int64_t inputs,
                                    int64_t plane, int64_t stride, int64_t k, int64_t vectors,
                                    REAL *restrict sums) {
    REAL part[VECTORS * LANES] = {0};
    for (int64_t channel = 0; channel < inputs; channel++)
        for (int64_t i = 0; i < k; i++) {
            const REAL *row = x + channel * plane + i * stride;
            const REAL *weights = w + (channel * k + i) * k;
            for (int64_t j = 0; j < k; j++)
#pragma omp simd
                for (int64_t lane = 0; lane < vectors * LANES; lane++)
                    part[lane] += weights[j] * row[j + lane];
        }
    memcpy(sums, part, (size_t)(vectors * LANES) * sizeof(REAL));
}

CLONES static void NAME(correlate_row)(const REAL *restrict x, const REAL *restrict w, int64_t inputs,
                                       int64_t plane, int64_t stride, int64_t k, REAL *restrict out,
                                       int64_t columns) {
    REAL sums[VECTORS * LANES];
    for (int64_t c0 = 0; c0 < columns;) {
        int64_t left = columns - c0, vectors = left > (VECTORS - 1) * LANES ? VECTORS : 1;
        if (vectors == VECTORS)
            NAME(correlate_columns)(x + c0, w, inputs, plane, stride, k, VECTORS, sums);
        else
            NAME(correlate_columns)(x + c0, w, inputs, plane, stride, k, 1, sums);
        int64_t n = left < vectors * LANES ? left : vectors * LANES;
        memcpy(out + c0, sums, (size_t)n * sizeof(REAL));
        c0 += n;
    }
}

/* Cross-correlation of x (batch, inputs, rows + k - 1, stride) with w (outputs, inputs, k, k) to out
   (batch, outputs, rows, columns). x is padded already, and its rows to at least k - 1 more than
   the columns rounded up to LANES. */
void NAME(correlate)(const REAL *x, const REAL *w, REAL *out, int64_t batch, int64_t inputs,
                     int64_t outputs, int64_t rows, int64_t columns, int64_t stride, int64_t k,
                     int threads) {
    int64_t plane = (rows + k - 1) * stride, weights = inputs * k * k;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < batch * outputs * rows; task++) {
        int64_t row = task % rows, output = task / rows % outputs, b = task / rows / outputs;
        NAME(correlate_row)(x + b * inputs * plane + row * stride, w + output * weights, inputs, plane,
                            stride, k, out + task * columns, columns);
    }
}

/* Gradients of `taps` weights of a window's row. */
INLINE void NAME(correlate_taps)(const REAL *restrict x, const REAL *restrict g, int64_t columns,
                                 int64_t taps, REAL *restrict sums) {
    REAL part[TAPS * LANES];
    memcpy(part, sums, (size_t)(taps * LANES) * sizeof(REAL));
    for (int64_t c0 = 0; c0 < columns; c0 += LANES)
        for (int64_t j = 0; j < taps; j++)
#pragma omp simd
            for (int64_t lane = 0; lane < LANES; lane++)
                part[j * LANES + lane] += g[c0 + lane] * x[c0 + j + lane];
    memcpy(sums, part, (size_t)(taps * LANES) * sizeof(REAL));
}

CLONES static void NAME(correlate_weights_of_row)(const REAL *restrict x, const REAL *restrict g,
                                                  int64_t inputs, int64_t plane, int64_t stride,
                                                  int64_t k, int64_t columns, REAL *restrict sums) {
    for (int64_t channel = 0; channel < inputs; channel++)
        for (int64_t i = 0; i < k; i++) {
            const REAL *from = x + channel * plane + i * stride;
            REAL *to = sums + (channel * k + i) * k * LANES;
            if (k == TAPS)
                NAME(correlate_taps)(from, g, columns, TAPS, to);
            else if (k == 3)
                NAME(correlate_taps)(from, g, columns, 3, to);
            else
                for (int64_t j = 0; j < k; j++)
                    NAME(correlate_taps)(from + j, g, columns, 1, to + j * LANES);
        }
}

/* Gradient of the weights: g (batch, rows, columns), its rows filled with zeros up to a multiple of
   LANES, and x as above, with one output. `sums` (tasks, inputs, k, k, LANES) starts at zero; the
   caller adds up the tasks and lanes. */
void NAME(correlate_weights)(const REAL *x, const REAL *g, REAL *sums, int64_t batch, int64_t inputs,
                             int64_t rows, int64_t columns, int64_t stride, int64_t k, int64_t tasks,
                             int threads) {
    int64_t plane = (rows + k - 1) * stride, all = batch * rows;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t i = part_start(all, tasks, task); i < part_start(all, tasks, task + 1); i++)
            NAME(correlate_weights_of_row)(x + i / rows * inputs * plane + i % rows * stride,
                                           g + i * columns, inputs, plane, stride, k, columns,
                                           sums + task * inputs * k * k * LANES);
}

#undef LANES
#undef VECTORS
#undef TAPS
#undef CONVOLVE
#endif

#undef NAME
#undef STORED
#undef REAL
#undef LOAD
#undef STORE
