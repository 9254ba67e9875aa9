// gemm: products of many tokens' activations (prefill). Rows of the weight are dequantized into panels that stay in
// the second cache, and each panel is multiplied with all activations in tiles of registers. Panels are in bfloat16,
// which rounds each weight once, as a dequantized checkpoint in bfloat16 does.

#pragma once

#include "native_avx512_codes.h"

namespace {

constexpr int kVector = 16;                // sums in a register, one for each row of the weight
constexpr int kPanelRows = 2 * kVector;    // a panel is [columns/2, kPanelRows, 2]: neighbouring columns side by side
constexpr int kTileTokens = 12;            // 24 sums, 2 weights and an activation of the 32 registers
constexpr int kGroup = 128;                // columns dequantized at a time; groups have at most so many
constexpr long kChunkBytes = 384L << 10;   // of panels at a time, in a second cache of 1 MiB or more
constexpr long kChunkPanels = 4;

// from [16 rows, 32 columns] to [16 pairs of columns, 16 rows, 2]; strides are in values of 16 bits.
inline void transpose(const uint16_t* from, long stride, uint16_t* to, long to_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4i+j] has pair 4l+j of rows 4i to 4i+3 in its lane l.
    const auto put = [=](int pair, __m512i value) { _mm512_storeu_si512(to + pair * to_stride, value); };
    for (int j = 0; j < 4; j++) {
        const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xDD);
        const __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xDD);
        put(j, _mm512_shuffle_i32x4(even, even2, 0x88));
        put(8 + j, _mm512_shuffle_i32x4(even, even2, 0xDD));
        put(4 + j, _mm512_shuffle_i32x4(odd, odd2, 0x88));
        put(12 + j, _mm512_shuffle_i32x4(odd, odd2, 0xDD));
    }
}

// Rows [row, row + kPanelRows) as a panel. Behind the last row the last one is repeated, and nobody reads the result.
template <typename Fill>
void fill_panel(const Weight& w, const Fill& fill, long row, uint16_t* panel) {
    constexpr long kStride = kGroup + kBlock;  // not all rows at the same places of the cache
    alignas(64) uint16_t rows[kVector * kStride];
    const long step = w.bits == 16 ? kGroup : w.group_size;
    const long row_bytes = w.columns * w.bits / 8, step_bytes = kVector * row_bytes * step / w.columns;
    for (int half = 0; half < kPanelRows; half += kVector) {
        const uint8_t* next = w.packed + (row + half + kVector) * row_bytes;
        for (long begin = 0; begin < w.columns; begin += step, next += step_bytes) {
            const long end = std::min(w.columns, begin + step);
            for (long at = 0; at < step_bytes; at += 64) _mm_prefetch((const char*)next + at, _MM_HINT_T0);
            for (long r = 0; r < kVector; r++) {
                fill(std::min(row + half + r, w.rows - 1), begin, end, rows + r * kStride, kBlock);
            }
            for (long k = begin; k < end; k += kBlock) {
                transpose(rows + k - begin, kStride, panel + k * kPanelRows + 2 * half, 2 * kPanelRows);
            }
        }
    }
}

// x [M, columns] times a panel: out [M, kPanelRows], of which `rows` are wanted.
template <int M>
void multiply_tile(const uint16_t* panel, const uint16_t* x, long columns, int rows, uint16_t* out, long out_stride) {
    __m512 sums[M][2];
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (long k = 0; k < columns; k += 2) {
        const __m512bh first = as_bf16(_mm512_loadu_si512(panel + k * kPanelRows));
        const __m512bh second = as_bf16(_mm512_loadu_si512(panel + k * kPanelRows + 2 * kVector));
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            int32_t pair;
            std::memcpy(&pair, x + m * columns + k, 4);
            const __m512bh activation = as_bf16(_mm512_set1_epi32(pair));
            sums[m][0] = _mm512_dpbf16_ps(sums[m][0], first, activation);
            sums[m][1] = _mm512_dpbf16_ps(sums[m][1], second, activation);
        }
    }
    const __mmask32 wanted = rows >= kPanelRows ? ~__mmask32(0) : (__mmask32(1) << rows) - 1;
    for (int m = 0; m < M; m++) {
        _mm512_mask_storeu_epi16(out + m * out_stride, wanted, (__m512i)_mm512_cvtne2ps_pbh(sums[m][1], sums[m][0]));
    }
}

inline void multiply_tile(int tokens, const uint16_t* panel, const uint16_t* x, long columns, int rows, uint16_t* out,
                          long out_stride) {
    constexpr decltype(&multiply_tile<1>) kTiles[] = {
        multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
        multiply_tile<7>, multiply_tile<8>, multiply_tile<9>, multiply_tile<10>, multiply_tile<11>, multiply_tile<12>,
    };
    kTiles[tokens - 1](panel, x, columns, rows, out, out_stride);
}

// x [tokens, columns] in bfloat16 times the weight: out [tokens, rows] in bfloat16. Within a parallel region, by all.
// fill(row, begin, end, to, step) gives columns [begin, end) of a row in bfloat16, each 32 of them `step` after the last.
template <typename Fill>
void gemm(const Weight& w, const Fill& fill, const uint16_t* x, long tokens, uint16_t* out, long out_stride) {
    const long panel_bytes = w.columns * kPanelRows * long(sizeof(uint16_t));
    const long panels = panels_of_chunk(w.rows, kPanelRows, std::min(kChunkPanels, kChunkBytes / panel_bytes));
    thread_local AlignedSpace<uint16_t> space;
    uint16_t* const held = space.of(panels * kPanelRows * w.columns);
    for_each_chunk(
        w.rows, tokens, panels, kPanelRows, kTileTokens,
        [&](long row, long end) {
            for (long r = row; r < end; r += kPanelRows) fill_panel(w, fill, r, held + (r - row) * w.columns);
        },
        [&](long row, long end, long first, long count) {
            for (long r = row; r < end; r += kPanelRows) {
                multiply_tile(int(count), held + (r - row) * w.columns, x + first * w.columns, w.columns, int(end - r),
                              out + first * out_stride + r, out_stride);
            }
        });
}

}  // namespace
