// Products with some tens of activations: a few rows of the weight are dequantized into a panel that stays in the first
// caches, and the panel is multiplied with all activations in tiles of registers. The panel is in bfloat16, which rounds
// each weight once, as a dequantized checkpoint in bfloat16 does.

#pragma once

#include "native_weight.h"

namespace {

constexpr int kPanelRows = 8;
constexpr long kPanelColumns = 2048;
constexpr int kTileRows = 4;    // of the weight
constexpr int kTileTokens = 6;  // 24 sums, 4 weights and an activation of the 32 registers

// The sums of four vectors.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// sums [M, kPanelRows] += x [M, columns] times panel [kTileRows, columns].
template <int M>
void multiply_tile(const uint16_t* panel, long panel_stride, const uint16_t* x, long x_stride, long columns, float* sums) {
    __m512 total[M][kTileRows];
    for (int m = 0; m < M; m++) {
        for (int r = 0; r < kTileRows; r++) total[m][r] = _mm512_setzero_ps();
    }
    for (long k = 0; k < columns; k += kBlock) {
        __m512bh weight[kTileRows];
        for (int r = 0; r < kTileRows; r++) weight[r] = as_bf16(_mm512_loadu_si512(panel + r * panel_stride + k));
        for (int m = 0; m < M; m++) {
            const __m512bh activation = as_bf16(_mm512_loadu_si512(x + m * x_stride + k));
            for (int r = 0; r < kTileRows; r++) total[m][r] = _mm512_dpbf16_ps(total[m][r], weight[r], activation);
        }
    }
    for (int m = 0; m < M; m++) {
        float* to = sums + m * kPanelRows;
        const __m128 here = sums_of(total[m][0], total[m][1], total[m][2], total[m][3]);
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), here));
    }
}

inline void multiply_tile(int tokens, const uint16_t* panel, long panel_stride, const uint16_t* x, long x_stride,
                          long columns, float* sums) {
    switch (tokens) {
        case 1: return multiply_tile<1>(panel, panel_stride, x, x_stride, columns, sums);
        case 2: return multiply_tile<2>(panel, panel_stride, x, x_stride, columns, sums);
        case 3: return multiply_tile<3>(panel, panel_stride, x, x_stride, columns, sums);
        case 4: return multiply_tile<4>(panel, panel_stride, x, x_stride, columns, sums);
        case 5: return multiply_tile<5>(panel, panel_stride, x, x_stride, columns, sums);
        default: return multiply_tile<6>(panel, panel_stride, x, x_stride, columns, sums);
    }
}

// x [tokens, columns] in bfloat16 times the weight: out [tokens, rows] in bfloat16. Within a parallel region, by all.
// fill(row, begin, end, to) gives columns [begin, end) of a row in bfloat16.
template <typename Fill>
void multiply_many(const Weight& w, const Fill& fill, const uint16_t* x, long tokens, uint16_t* out, long out_stride) {
    const long pieces = (w.columns + kPanelColumns - 1) / kPanelColumns;
    const long width = ((w.columns + pieces - 1) / pieces + 127) / 128 * 128;  // groups have at most 128
    const long tiles = (tokens + kTileTokens - 1) / kTileTokens;
    // An odd stride in cache lines, else the rows of a panel compete for the same places of the cache.
    const long stride = width + kBlock;
    std::vector<uint16_t> panel(kPanelRows * stride + kBlock);
    std::vector<float> sums(tokens * kPanelRows);
#pragma omp for schedule(static) nowait
    for (long row = 0; row < w.rows; row += kPanelRows) {
        const long rows = std::min<long>(kPanelRows, w.rows - row);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (long begin = 0; begin < w.columns; begin += width) {
            const long end = std::min(w.columns, begin + width);
            for (long r = 0; r < rows; r++) fill(row + r, begin, end, panel.data() + r * stride);
            for (long tile = 0; tile < tiles; tile++) {
                const long first = tile * tokens / tiles, count = (tile + 1) * tokens / tiles - first;
                for (long r = 0; r < rows; r += kTileRows) {
                    multiply_tile(int(count), panel.data() + r * stride, stride, x + first * w.columns + begin, w.columns,
                                  end - begin, sums.data() + first * kPanelRows + r);
                }
            }
        }
        for (long token = 0; token < tokens; token++) {
            const __m256 all = _mm256_loadu_ps(sums.data() + token * kPanelRows);
            const __m128i rounded = (__m128i)_mm256_cvtneps_pbh(all);
            _mm_mask_storeu_epi16(out + token * out_stride + row, __mmask8((1 << rows) - 1), rounded);
        }
    }
}

}  // namespace
