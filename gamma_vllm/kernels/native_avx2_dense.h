// Products with segments at 16 bits that lie beside narrower ones in a layer, in float32, for CPUs with AVX2.

#pragma once

#include "native_avx2_gemv.h"

namespace {

// 16 of bfloat16 as floats: those at even places, and those at odd ones.
GAMMA_INNER void split(const uint16_t* from, __m256& even, __m256& odd) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i*)from);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xFFFF0000)));
}

// R rows from `row` on times M activations [M, columns]: out [M, rows].
template <int R, int M>
void multiply_dense_rows(const uint16_t* weight, long columns, const uint16_t* x, uint16_t* out, long out_stride) {
    __m256 sums[R][M];
    for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) sums[r][m] = _mm256_setzero_ps();
    }
    for (long k = 0; k < columns; k += kLanes) {
        __m256 even[R], odd[R];
        for (int r = 0; r < R; r++) split(weight + r * columns + k, even[r], odd[r]);
        for (int m = 0; m < M; m++) {
            __m256 even_x, odd_x;
            split(x + m * columns + k, even_x, odd_x);
            for (int r = 0; r < R; r++) {
                sums[r][m] = _mm256_fmadd_ps(even[r], even_x, _mm256_fmadd_ps(odd[r], odd_x, sums[r][m]));
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) put(out + m * out_stride + r, sum_of_lanes(sums[r][m]));
    }
}

template <int R>
void multiply_dense_tokens(const uint16_t* weight, long columns, const uint16_t* x, long tokens, uint16_t* out,
                           long out_stride) {
    long token = 0;
    for (; token + 4 <= tokens; token += 4) {
        multiply_dense_rows<R, 4>(weight, columns, x + token * columns, out + token * out_stride, out_stride);
    }
    for (; token < tokens; token++) {
        multiply_dense_rows<R, 1>(weight, columns, x + token * columns, out + token * out_stride, out_stride);
    }
}

// x [tokens, columns] times the weight: out [tokens, rows], all in bfloat16. Within a parallel region, by all.
inline void multiply_dense(const Weight& w, const uint16_t* x, long tokens, uint16_t* out, long out_stride) {
    const uint16_t* const weight = (const uint16_t*)w.packed;
#pragma omp for schedule(static) nowait
    for (long row = 0; row < w.rows; row += 2) {
        const uint16_t* const from = weight + row * w.columns;
        if (row + 1 < w.rows) {
            multiply_dense_tokens<2>(from, w.columns, x, tokens, out + row, out_stride);
        } else {
            multiply_dense_tokens<1>(from, w.columns, x, tokens, out + row, out_stride);
        }
    }
}

}  // namespace
