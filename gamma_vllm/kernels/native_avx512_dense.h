// Products of a few tokens with weights at 16 bits: experts, and segments that lie beside narrower ones in a layer. Panels
// (native_avx512_gemm.h) would be turned around for each of them.

#pragma once

#include "native_avx512_gemv.h"

namespace {

// R rows from `row` on times M activations [M, columns]: out [M, rows].
template <int R, int M>
void multiply_dense_rows(const uint16_t* weight, long columns, const uint16_t* x, uint16_t* out, long out_stride) {
    constexpr int kFours = (R * M + 3) / 4;
    __m512 sums[4 * kFours];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (long k = 0; k < columns; k += kBlock) {
        prefetch(weight + R * k + kPrefetchBytes / 2, 64 * R);  // in the order of memory
        __m512bh values[R];
        for (int r = 0; r < R; r++) values[r] = as_bf16(_mm512_loadu_si512(weight + r * columns + k));
        for (int m = 0; m < M; m++) {
            const __m512bh activation = as_bf16(_mm512_loadu_si512(x + m * columns + k));
            for (int r = 0; r < R; r++) sums[r * M + m] = _mm512_dpbf16_ps(sums[r * M + m], values[r], activation);
        }
    }
    alignas(16) float of_rows[4 * kFours];
    for (int i = 0; i < 4 * kFours; i += 4) _mm_store_ps(of_rows + i, sums_of_lanes(sums + i));
    for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) put(out + m * out_stride + r, of_rows[r * M + m]);
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
    for (long row = 0; row < w.rows; row += 4) {
        if (row + 4 <= w.rows) {
            multiply_dense_tokens<4>(weight + row * w.columns, w.columns, x, tokens, out + row, out_stride);
        } else {
            for (long r = row; r < w.rows; r++) {
                multiply_dense_tokens<1>(weight + r * w.columns, w.columns, x, tokens, out + r, out_stride);
            }
        }
    }
}

}  // namespace
