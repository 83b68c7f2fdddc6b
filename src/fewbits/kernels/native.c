/* Products with packed weights on a CPU, in vectors of eight floats (GCC and Clang vector extensions).

   A row of codes is one string of bits, lowest first: eight codes of b bits are b bytes, which one load fetches, one
   shift per lane spreads and one mask cuts out. Rows of the output are dealt out to threads in fixed runs, and every
   sum has a fixed order, so the same bits come out whatever the number of threads. */

#include <stdint.h>
#include <string.h>

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *at) {
    vf v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE float total(vf v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

INLINE float dot(const float *a, const float *b, int64_t count) {
    vf sum = {0};
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) sum += load(a + k) * load(b + k);
    float rest = total(sum);
    for (; k < count; k++) rest += a[k] * b[k];
    return rest;
}

/* Codes 8j .. 8j+7 of a row. Reads up to eight bytes from where they start. */
INLINE vi codes8(const uint8_t *row, int64_t j, const int bits) {
    const uint8_t *at = row + bits * j;
    if (bits == 8) {
        uint32_t w[2];
        memcpy(w, at, sizeof w);
        const vu lane = {0, 8, 16, 24, 0, 8, 16, 24};
        vu v = (vu){w[0], w[0], w[0], w[0], w[1], w[1], w[1], w[1]};
        return (vi)((v >> lane) & 255u);
    }
    if (bits <= 4) {
        uint32_t w;
        memcpy(&w, at, sizeof w);
        const vu lane = {0, 1, 2, 3, 4, 5, 6, 7};
        vu v = (vu){w, w, w, w, w, w, w, w};
        return (vi)((v >> (lane * (uint32_t)bits)) & (uint32_t)((1 << bits) - 1));
    }
    uint64_t w;
    memcpy(&w, at, sizeof w);
    vi v;
    for (int k = 0; k < 8; k++) v[k] = (int32_t)((w >> (bits * k)) & (uint64_t)((1 << bits) - 1));
    return v;
}

/* Levels of eight codes; `levels` holds 2^bits of them. */
INLINE vf level8(const float *levels, vi code, const int bits) {
#if defined(__GNUC__) && !defined(__clang__)
    if (bits == 3) return __builtin_shuffle(load(levels), code);
    if (bits == 4) return __builtin_shuffle(load(levels), load(levels + 8), code);
#endif
    vf v;
    for (int k = 0; k < 8; k++) v[k] = levels[code[k]];
    return v;
}

INLINE vf value8(const uint8_t *row, int64_t j, const float *levels, const int bits, const int tabled) {
    const vi code = codes8(row, j, bits);
    return tabled ? level8(levels, code, bits) : __builtin_convertvector(code, vf);
}

typedef struct {
    const float *x;              /* [rows, runs * 32], zero past the inputs */
    const float *sums;           /* [rows, groups]: of x over the columns of each group */
    const uint8_t *words;        /* [outputs, runs * bits * 4 bytes] and eight bytes to spare */
    const float *scale, *offset; /* [outputs, groups]: weight = code * scale - offset; or */
    const float *table;          /* [outputs, 2^bits] */
    const float *bias;           /* [outputs], may be absent, as may all below */
    const int64_t *index;        /* [kept]: inputs that `columns` [kept, outputs] add to */
    const float *columns;
    const int32_t *starts, *places; /* compressed sparse rows */
    const float *entries;
    float *out; /* [rows, outputs] */
    int64_t rows, outputs, runs, group_runs, kept;
    int32_t bits, threads;
} Product;

/* One output for `m` rows of x, from row `first`. */
INLINE void one(const Product *p, int64_t n, int64_t first, const int m, const int bits, const int tabled) {
    const int64_t stride = p->runs * 32, groups = (p->runs + p->group_runs - 1) / p->group_runs;
    const uint8_t *row = p->words + n * p->runs * bits * 4;
    const float *x = p->x + first * stride;
    const float *levels = tabled ? p->table + (n << bits) : 0;
    vf sum[4] = {{0}, {0}, {0}, {0}};
    for (int64_t g = 0; g < groups; g++) {
        const int64_t start = g * p->group_runs;
        const int64_t stop = start + p->group_runs < p->runs ? start + p->group_runs : p->runs;
        const float s = tabled ? 1.0f : p->scale[n * groups + g];
        for (int64_t j = start * 4; j < stop * 4; j += 4) { /* a run; the next does not wait for its sum */
            const vf v0 = value8(row, j, levels, bits, tabled), v1 = value8(row, j + 1, levels, bits, tabled);
            const vf v2 = value8(row, j + 2, levels, bits, tabled), v3 = value8(row, j + 3, levels, bits, tabled);
            for (int i = 0; i < m; i++) {
                const float *at = x + i * stride + 8 * j;
                vf part = v0 * load(at);
                part += v1 * load(at + 8);
                part += v2 * load(at + 16);
                part += v3 * load(at + 24);
                sum[i] += tabled ? part : s * part;
            }
        }
    }
    for (int i = 0; i < m; i++) {
        float y = total(sum[i]);
        if (!tabled) y -= dot(p->offset + n * groups, p->sums + (first + i) * groups, groups);
        for (int64_t k = 0; k < p->kept; k++) y += x[i * stride + p->index[k]] * p->columns[k * p->outputs + n];
        if (p->starts)
            for (int64_t e = p->starts[n]; e < p->starts[n + 1]; e++) y += x[i * stride + p->places[e]] * p->entries[e];
        p->out[(first + i) * p->outputs + n] = p->bias ? y + p->bias[n] : y;
    }
}

INLINE void all(const Product *p, const int bits, const int tabled) {
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t n = 0; n < p->outputs; n++) {
        int64_t row = 0;
        for (; row + 4 <= p->rows; row += 4) one(p, n, row, 4, bits, tabled);
        for (; row < p->rows; row++) one(p, n, row, 1, bits, tabled);
    }
}

void fewbits_product(const Product *p) {
    if (p->table) {
        if (p->bits == 3) all(p, 3, 1);
        else if (p->bits == 4) all(p, 4, 1);
        else all(p, p->bits, 1);
    } else {
        if (p->bits == 2) all(p, 2, 0);
        else if (p->bits == 3) all(p, 3, 0);
        else if (p->bits == 4) all(p, 4, 0);
        else if (p->bits == 8) all(p, 8, 0);
        else all(p, p->bits, 0);
    }
}

INLINE void decode(const Product *p, const int bits) {
    const int64_t groups = (p->runs + p->group_runs - 1) / p->group_runs;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t n = 0; n < p->outputs; n++) {
        const uint8_t *row = p->words + n * p->runs * bits * 4;
        float *out = p->out + n * p->runs * 32;
        for (int64_t j = 0; j < p->runs * 4; j++) {
            const int64_t g = n * groups + j / 4 / p->group_runs;
            vi c = codes8(row, j, bits);
            vf v = p->table ? level8(p->table + (n << bits), c, bits)
                            : __builtin_convertvector(c, vf) * p->scale[g] - p->offset[g];
            memcpy(out + 8 * j, &v, sizeof v);
        }
    }
}

/* The weight [outputs, runs * 32] of the codes alone, into `out`. */
void fewbits_decode(const Product *p) {
    if (p->bits == 3) decode(p, 3);
    else if (p->bits == 4) decode(p, 4);
    else decode(p, p->bits);
}

/* out[m, n] = sum_k a[m, k] * b[n, k] of int8, in int32. */
void fewbits_int8(const int8_t *restrict a, const int8_t *restrict b, int32_t *restrict out, int64_t rows,
                  int64_t outputs, int64_t inputs, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < outputs; n++) {
        const int8_t *w = b + n * inputs;
        int64_t m = 0;
        for (; m + 4 <= rows; m += 4) {
            const int8_t *x0 = a + m * inputs, *x1 = x0 + inputs, *x2 = x1 + inputs, *x3 = x2 + inputs;
            int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int64_t k = 0; k < inputs; k++) {
                s0 += (int16_t)x0[k] * (int16_t)w[k];
                s1 += (int16_t)x1[k] * (int16_t)w[k];
                s2 += (int16_t)x2[k] * (int16_t)w[k];
                s3 += (int16_t)x3[k] * (int16_t)w[k];
            }
            out[m * outputs + n] = s0;
            out[(m + 1) * outputs + n] = s1;
            out[(m + 2) * outputs + n] = s2;
            out[(m + 3) * outputs + n] = s3;
        }
        for (; m < rows; m++) {
            int32_t s = 0;
            for (int64_t k = 0; k < inputs; k++) s += (int16_t)a[m * inputs + k] * (int16_t)w[k];
            out[m * outputs + n] = s;
        }
    }
}
