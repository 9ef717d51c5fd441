/* The functions of batchformer.c for one type of elements. No include guard: it is included once for
   each type. */

/* 0 for what is dropped, and the scale of the others. */
INLINE REAL NAME(kept)(Dropout dropout, uint64_t keys, uint32_t column) {
    /* The sign says whether it is below. No condition, so that compilers make vectors of it. */
    int32_t is_kept = (int32_t)((uint32_t)(dropout.threshold - 1 - random_number(keys, column)) >> 31);
    return (REAL)is_kept * (REAL)dropout.scale;
}

/* ---------------------------------------------------------------------------- attention over B */

typedef struct {
    int64_t batch, length, heads, channels; /* channels of a head, D */
} NAME(Attention);

/* Query, key or value (`which` 0, 1, 2) of all samples at one position and head, with the bias. */
INLINE void NAME(gather)(const REAL *restrict qkv, const REAL *restrict bias, NAME(Attention) s,
                         int64_t position, int64_t head, int64_t which, REAL *restrict out) {
    int64_t all = s.heads * s.channels, at = which * all + head * s.channels;
    for (int64_t b = 0; b < s.batch; b++) {
        const REAL *from = qkv + (b * s.length + position) * 3 * all + at;
#pragma omp simd
        for (int64_t d = 0; d < s.channels; d++) out[b * s.channels + d] = from[d] + bias[at + d];
    }
}

INLINE REAL NAME(dot)(const REAL *restrict a, const REAL *restrict b, int64_t n) {
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

INLINE void NAME(add_scaled)(REAL *restrict to, REAL scale, const REAL *restrict from, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] += scale * from[i];
}

/* Softmax over the keys of sample i, before dropout. */
INLINE void NAME(weights_of)(const REAL *query, const REAL *keys, NAME(Attention) s,
                             const uint8_t *is_key, REAL *restrict weights) {
    REAL scale = 1 / SQRT((REAL)s.channels), max = -INFINITY, sum = 0;
    for (int64_t j = 0; j < s.batch; j++) {
        REAL score = scale * NAME(dot)(query, keys + j * s.channels, s.channels);
        weights[j] = is_key && !is_key[j] ? -INFINITY : score;
        max = weights[j] > max ? weights[j] : max;
    }
    for (int64_t j = 0; j < s.batch; j++) {
        weights[j] = EXP(weights[j] - max);
        sum += weights[j];
    }
    for (int64_t j = 0; j < s.batch; j++) weights[j] /= sum;
}

CLONES static void NAME(attend_at)(const REAL *qkv, const REAL *bias, const uint8_t *is_key,
                                   REAL *out, NAME(Attention) s, Dropout dropout, int64_t position) {
    REAL queries[MAX_SAMPLES_BY_CHANNELS], keys[MAX_SAMPLES_BY_CHANNELS];
    REAL values[MAX_SAMPLES_BY_CHANNELS], weights[MAX_SAMPLES];
    for (int64_t head = 0; head < s.heads; head++) {
        NAME(gather)(qkv, bias, s, position, head, 0, queries);
        NAME(gather)(qkv, bias, s, position, head, 1, keys);
        NAME(gather)(qkv, bias, s, position, head, 2, values);
        for (int64_t i = 0; i < s.batch; i++) {
            NAME(weights_of)(queries + i * s.channels, keys, s, is_key, weights);
            uint64_t row = keys_of_row(dropout, ((uint64_t)position * s.heads + head) * s.batch + i);
            REAL *to = out + ((i * s.length + position) * s.heads + head) * s.channels;
            memset(to, 0, (size_t)s.channels * sizeof(REAL));
            for (int64_t j = 0; j < s.batch; j++)
                NAME(add_scaled)(to, weights[j] * NAME(kept)(dropout, row, (uint32_t)j),
                                 values + j * s.channels, s.channels);
        }
    }
}

/* Attention of every position over the batch: qkv (B, L, 3, heads, D) without its bias to out
   (B, L, heads, D). `is_key` (L, B) may be NULL. */
void NAME(attend)(const REAL *qkv, const REAL *bias, const uint8_t *is_key, REAL *out,
                  NAME(Attention) s, Dropout dropout, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t position = 0; position < s.length; position++)
        NAME(attend_at)(qkv, bias, is_key ? is_key + position * s.batch : 0, out, s, dropout, position);
}

CLONES static void NAME(attend_backward_at)(const REAL *qkv, const REAL *bias,
                                            const uint8_t *is_key, const REAL *g, REAL *dqkv,
                                            NAME(Attention) s, Dropout dropout, int64_t position) {
    REAL queries[MAX_SAMPLES_BY_CHANNELS], keys[MAX_SAMPLES_BY_CHANNELS];
    REAL values[MAX_SAMPLES_BY_CHANNELS], weights[MAX_SAMPLES], slopes[MAX_SAMPLES];
    int64_t all = s.heads * s.channels;
    REAL scale = 1 / SQRT((REAL)s.channels);
    for (int64_t head = 0; head < s.heads; head++) {
        NAME(gather)(qkv, bias, s, position, head, 0, queries);
        NAME(gather)(qkv, bias, s, position, head, 1, keys);
        NAME(gather)(qkv, bias, s, position, head, 2, values);
        for (int64_t b = 0; b < s.batch; b++)
            for (int64_t which = 0; which < 3; which++)
                memset(dqkv + ((b * s.length + position) * 3 + which) * all + head * s.channels, 0,
                       (size_t)s.channels * sizeof(REAL));
        for (int64_t i = 0; i < s.batch; i++) {
            NAME(weights_of)(queries + i * s.channels, keys, s, is_key, weights);
            uint64_t row = keys_of_row(dropout, ((uint64_t)position * s.heads + head) * s.batch + i);
            const REAL *from = g + (i * s.length + position) * all + head * s.channels;
            REAL mean = 0;
            for (int64_t j = 0; j < s.batch; j++) {
                REAL kept = NAME(kept)(dropout, row, (uint32_t)j);
                REAL *dv = dqkv + ((j * s.length + position) * 3 + 2) * all + head * s.channels;
                NAME(add_scaled)(dv, weights[j] * kept, from, s.channels);
                slopes[j] = kept * NAME(dot)(from, values + j * s.channels, s.channels);
                mean += slopes[j] * weights[j];
            }
            REAL *dq = dqkv + (i * s.length + position) * 3 * all + head * s.channels;
            for (int64_t j = 0; j < s.batch; j++) {
                REAL slope = scale * weights[j] * (slopes[j] - mean);
                REAL *dk = dqkv + ((j * s.length + position) * 3 + 1) * all + head * s.channels;
                NAME(add_scaled)(dq, slope, keys + j * s.channels, s.channels);
                NAME(add_scaled)(dk, slope, queries + i * s.channels, s.channels);
            }
        }
    }
}

/* Gradient of qkv, of g (B, L, heads, D). */
void NAME(attend_backward)(const REAL *qkv, const REAL *bias, const uint8_t *is_key, const REAL *g,
                           REAL *dqkv, NAME(Attention) s, Dropout dropout, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t position = 0; position < s.length; position++)
        NAME(attend_backward_at)(qkv, bias, is_key ? is_key + position * s.batch : 0, g, dqkv, s,
                                 dropout, position);
}

/* -------------------------------------------------------------------- shortcut, dropout and norm */

CLONES static void NAME(add_norm_row)(const REAL *restrict x, REAL *restrict y,
                                      const REAL *restrict y_bias, const REAL *restrict weight,
                                      const REAL *restrict bias, REAL *restrict out,
                                      REAL *restrict statistics, int64_t channels, double eps,
                                      Dropout dropout, uint64_t row) {
    uint64_t keys = keys_of_row(dropout, row);
    REAL sum = 0, squares = 0;
    if (dropout.threshold) {
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; c++) {
            y[c] = x[c] + (y[c] + y_bias[c]) * NAME(kept)(dropout, keys, (uint32_t)c);
            sum += y[c];
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; c++) {
            y[c] = x[c] + (y[c] + y_bias[c]);
            sum += y[c];
        }
    }
    REAL mean = sum / (REAL)channels;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < channels; c++) squares += (y[c] - mean) * (y[c] - mean);
    REAL scale = 1 / SQRT(squares / (REAL)channels + (REAL)eps);
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) out[c] = (y[c] - mean) * scale * weight[c] + bias[c];
    statistics[0] = mean;
    statistics[1] = scale;
}

/* Layer norm of s = x + dropout(y + y_bias), over rows of C channels. y becomes s; `statistics`
   (rows, 2) are its mean and 1 / standard deviation. */
void NAME(add_norm)(const REAL *x, REAL *y, const REAL *y_bias, const REAL *weight,
                    const REAL *bias, REAL *out, REAL *statistics, int64_t rows, int64_t channels,
                    double eps, Dropout dropout, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        NAME(add_norm_row)(x + row * channels, y + row * channels, y_bias, weight, bias,
                           out + row * channels, statistics + 2 * row, channels, eps, dropout,
                           (uint64_t)row);
}

CLONES static void NAME(add_norm_backward_row)(const REAL *restrict g, const REAL *restrict s,
                                               const REAL *restrict weight,
                                               const REAL *restrict statistics, REAL *restrict ds,
                                               REAL *restrict dy, REAL *restrict sums,
                                               int64_t channels, Dropout dropout, uint64_t row) {
    REAL mean = statistics[0], scale = statistics[1], slope = 0, slope_of_scale = 0;
    REAL *restrict d_weight = sums, *restrict d_bias = sums + channels,
                   *restrict d_y_bias = sums + 2 * channels;
#pragma omp simd reduction(+ : slope, slope_of_scale)
    for (int64_t c = 0; c < channels; c++) {
        REAL normal = (s[c] - mean) * scale;
        d_weight[c] += g[c] * normal;
        d_bias[c] += g[c];
        slope += g[c] * weight[c];
        slope_of_scale += g[c] * weight[c] * normal;
    }
    slope /= (REAL)channels;
    slope_of_scale /= (REAL)channels;
    uint64_t keys = keys_of_row(dropout, row);
    if (dropout.threshold) {
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            REAL normal = (s[c] - mean) * scale;
            ds[c] = scale * (g[c] * weight[c] - slope - normal * slope_of_scale);
            dy[c] = ds[c] * NAME(kept)(dropout, keys, (uint32_t)c);
            d_y_bias[c] += dy[c];
        }
    } else {
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            REAL normal = (s[c] - mean) * scale;
            ds[c] = scale * (g[c] * weight[c] - slope - normal * slope_of_scale);
            dy[c] = ds[c];
            d_y_bias[c] += dy[c];
        }
    }
}

/* Gradients of s (and so of x) and of y. `sums` (tasks, 3, C) starts at zero and takes those of
   weight, bias and y_bias; the caller adds up the tasks. */
void NAME(add_norm_backward)(const REAL *g, const REAL *s, const REAL *weight,
                             const REAL *statistics, REAL *ds, REAL *dy, REAL *sums, int64_t rows,
                             int64_t channels, int64_t tasks, Dropout dropout, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t row = part_start(rows, tasks, task); row < part_start(rows, tasks, task + 1);
             row++)
            NAME(add_norm_backward_row)(g + row * channels, s + row * channels, weight,
                                        statistics + 2 * row, ds + row * channels,
                                        dy + row * channels, sums + task * 3 * channels, channels,
                                        dropout, (uint64_t)row);
}

/* ------------------------------------------------------------------------------ feed-forward part */

CLONES static void NAME(relu_row)(REAL *restrict x, const REAL *restrict bias, int64_t channels,
                                  Dropout dropout, uint64_t row) {
    uint64_t keys = keys_of_row(dropout, row);
    if (dropout.threshold) {
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            REAL value = (x[c] + bias[c]) * NAME(kept)(dropout, keys, (uint32_t)c);
            x[c] = value < 0 ? 0 : value;
        }
    } else {
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            REAL value = x[c] + bias[c];
            x[c] = value < 0 ? 0 : value;
        }
    }
}

/* x becomes dropout(relu(x + bias)). */
void NAME(relu)(REAL *x, const REAL *bias, int64_t rows, int64_t channels, Dropout dropout,
                int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        NAME(relu_row)(x + row * channels, bias, channels, dropout, (uint64_t)row);
}

CLONES static void NAME(relu_backward_row)(REAL *restrict g, const REAL *restrict y,
                                           REAL *restrict sums, int64_t channels, REAL scale) {
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
        g[c] = y[c] > 0 ? g[c] * scale : 0;
        sums[c] += g[c];
    }
}

/* g becomes the gradient of x, whose output was y; `sums` (tasks, C) starts at zero and takes that of
   the bias. */
void NAME(relu_backward)(REAL *g, const REAL *y, REAL *sums, int64_t rows, int64_t channels,
                         int64_t tasks, Dropout dropout, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t row = part_start(rows, tasks, task); row < part_start(rows, tasks, task + 1);
             row++)
            NAME(relu_backward_row)(g + row * channels, y + row * channels, sums + task * channels,
                                    channels, (REAL)dropout.scale);
}

#undef NAME
#undef REAL
#undef EXP
#undef SQRT
