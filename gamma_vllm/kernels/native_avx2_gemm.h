// gemm: products of many tokens' activations (prefill), for CPUs with AVX2. Rows of the weight are unpacked into
// panels of integers that stay in the second cache, and each panel is multiplied with all activations in tiles of
// registers.

#pragma once

#include "native_avx2_codes.h"

namespace {

constexpr int kPanelRows = 16;            // a panel is [columns/2, kPanelRows, 2]: neighbouring columns side by side
constexpr int kTileTokens = 6;            // 12 sums, 2 weights, an activation and a product are the 16 registers
constexpr long kChunkBytes = 160L << 10;  // of panels at a time, in a second cache of 256 KiB or more

// Activations as integers [tokens, columns], and what they are to be multiplied by [tokens, groups].
struct Quantized {
    const int16_t* values;
    const float* scales;
};

// Within a parallel region, by all.
inline void quantize(const uint16_t* x, long tokens, long columns, long group_size, int16_t* values, float* scales) {
    const long groups = columns / group_size;
#pragma omp for schedule(static)
    for (long i = 0; i < tokens * groups; i++) {
        scales[i] = quantize_group(x + i * group_size, group_size, values + i * group_size);
    }
}

// a[i] lane j to a[j] lane i, lanes of 32 bits.
GAMMA_INNER void transpose(__m256i (&a)[8]) {
    __m256i b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
        b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) a[i] = b[i];
}

// Rows [row, row + kPanelRows) as a panel, and their scales [groups, kPanelRows]. Behind the last row the last one is
// repeated, and nobody reads the result.
template <int BITS>
void fill_panel(const Weight& w, const Codes<BITS>& codes, long row, int16_t* panel, float* scales) {
    alignas(32) int16_t rows[8][128];  // groups have at most 128 columns
    const long groups = w.groups();
    for (int half = 0; half < kPanelRows; half += 8) {
        for (long group = 0; group < groups; group++) {
            const long begin = group * w.group_size, end = begin + w.group_size;
            for (int r = 0; r < 8; r++) {
                const long from = std::min(row + half + r, w.rows - 1);
                scales[group * kPanelRows + half + r] = w.scale_at(from, group);
                codes.read(w, from, begin, end, [&](long k, __m256i values) {
                    _mm256_store_si256((__m256i*)(rows[r] + k - begin), values);
                });
            }
            for (long k = begin; k < end; k += kLanes) {
                __m256i pairs[8];
                for (int r = 0; r < 8; r++) pairs[r] = _mm256_load_si256((const __m256i*)(rows[r] + k - begin));
                transpose(pairs);
                int16_t* const to = panel + k * kPanelRows + 2 * half;
                for (int i = 0; i < 8; i++) _mm256_store_si256((__m256i*)(to + 2 * i * kPanelRows), pairs[i]);
            }
        }
    }
}

// M activations times a panel: out [M, kPanelRows], of which `rows` are wanted.
template <int M>
void multiply_tile(const Weight& w, const int16_t* panel, const float* scales, const int16_t* x, const float* scales_of_x,
                   int rows, uint16_t* out, long out_stride) {
    const long columns = w.columns, groups = w.groups();
    alignas(32) float totals[M][kPanelRows] = {};
    for (long group = 0; group < groups; group++, scales += kPanelRows) {
        __m256i sums[M][2];
        for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
        const long end = (group + 1) * w.group_size;
        for (long k = group * w.group_size; k < end; k += 2) {
            const __m256i first = _mm256_load_si256((const __m256i*)(panel + k * kPanelRows));
            const __m256i second = _mm256_load_si256((const __m256i*)(panel + k * kPanelRows + kPanelRows));
#pragma GCC unroll 6
            for (int m = 0; m < M; m++) {
                int32_t pair;
                std::memcpy(&pair, x + m * columns + k, 4);
                const __m256i activation = _mm256_set1_epi32(pair);
                sums[m][0] = plus_products(sums[m][0], first, activation);
                sums[m][1] = plus_products(sums[m][1], second, activation);
            }
        }
        for (int m = 0; m < M; m++) {
            const __m256 scale = _mm256_set1_ps(scales_of_x[m * groups + group]);
            for (int half = 0; half < 2; half++) {
                float* const total = totals[m] + 8 * half;
                const __m256 both = _mm256_mul_ps(scale, _mm256_load_ps(scales + 8 * half));
                _mm256_store_ps(total, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m][half]), both, _mm256_load_ps(total)));
            }
        }
    }
    for (int m = 0; m < M; m++) {
        alignas(32) uint16_t rounded[kPanelRows];
        _mm256_store_si256((__m256i*)rounded, narrow(_mm256_load_ps(totals[m]), _mm256_load_ps(totals[m] + 8)));
        std::memcpy(out + m * out_stride, rounded, 2 * std::min(rows, kPanelRows));
    }
}

inline void multiply_tile(long tokens, const Weight& w, const int16_t* panel, const float* scales, const int16_t* x,
                          const float* scales_of_x, int rows, uint16_t* out, long out_stride) {
    constexpr decltype(&multiply_tile<1>) kTiles[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                                      multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};
    kTiles[tokens - 1](w, panel, scales, x, scales_of_x, rows, out, out_stride);
}

// x [tokens, columns] times the weight: out [tokens, rows] in bfloat16. Within a parallel region, by all.
template <int BITS>
void gemm(const Weight& w, const Quantized& x, long tokens, uint16_t* out, long out_stride) {
    const long panel_size = w.columns * kPanelRows, groups = w.groups();
    const long panels = panels_of_chunk(w.rows, kPanelRows, kChunkBytes / long(panel_size * sizeof(int16_t)));
    thread_local AlignedSpace<int16_t> values;
    thread_local AlignedSpace<float> numbers;
    int16_t* const held = values.of(panels * panel_size);
    float* const scales = numbers.of(panels * groups * kPanelRows);
    const Codes<BITS> codes;
    for_each_chunk(
        w.rows, tokens, panels, kPanelRows, kTileTokens,
        [&](long row, long end) {
            for (long r = row; r < end; r += kPanelRows) {
                fill_panel(w, codes, r, held + (r - row) * w.columns, scales + (r - row) * groups);
            }
        },
        [&](long row, long end, long first, long count) {
            for (long r = row; r < end; r += kPanelRows) {
                multiply_tile(count, w, held + (r - row) * w.columns, scales + (r - row) * groups,
                              x.values + first * w.columns, x.scales + first * groups, int(w.rows - r),
                              out + first * out_stride + r, out_stride);
            }
        });
}

}  // namespace
