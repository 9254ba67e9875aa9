// gemm of up to kGemmCodesTokens tokens on CPUs with AMX, code by code as in native_avx512_gemv.h: the rows in the tiles are
// codes, exact in bfloat16, and each group's sums are multiplied by its scales. Dequantizing would take longer than the
// products.

#pragma once

#include "native_amx_gemm.h"
#include "native_avx512_gemv.h"

namespace {

constexpr long kGemmCodesTokens = 32;  // more are as fast with dequantized weights (Granite Rapids)

#ifdef GAMMA_AMX

constexpr long kCodesColumns = 256;  // unpacked at a time, of 32 rows: a third of the first cache

// Activations as multiply_tiled_codes wants them.
struct TiledActivations {
    const uint16_t* tiles;    // as tile_activations orders them, but each step's columns as the step wants them
    const float *sums, *off;  // [tokens/16, groups, 16]: each group's sum, and what its products are too large by
};

// Within a parallel region, by all. `floats` has room for 2 * kGemmCodesTokens * groups.
template <typename Of>
TiledActivations tile_for_codes(const uint16_t* x, long tokens, const Weight& w, uint16_t* tiles, float* floats) {
    constexpr long kStride = 128;
    const long groups = w.groups(), all = (tokens + 15) / 16 * groups, blocks = w.columns / kBlock;
    float *const sums = floats, *const off = floats + 16 * all;
    const __m512 beyond = beyond_codes<Of>();
#pragma omp for schedule(static)
    for (long i = 0; i < all; i++) {
        const long token = i / groups * 16, group = i % groups, there = std::min(tokens - token, 16L);
        alignas(64) uint16_t ready[16 * kStride];
        alignas(64) float sum[16] = {0}, added[16] = {0};
        if (there < 16) std::memset(ready, 0, sizeof(ready));
        for (long m = 0; m < there; m++) {
            const uint16_t* const from = x + (token + m) * w.columns + group * w.group_size;
            for (long k = 0; k < w.group_size; k += Of::kColumns) prepare_step<Of>(from + k, ready + m * kStride + k);
            sum_group(from, w.group_size, beyond, sum[m], added[m]);
            added[m] += float(1 << (Of::kBits - 1)) * sum[m];
        }
        std::memcpy(sums + 16 * i, sum, sizeof(sum));
        std::memcpy(off + 16 * i, added, sizeof(added));
        uint16_t* const to = tiles + (token / 16 * blocks + group * w.group_size / kBlock) * kTile;
        for (long k = 0; k < w.group_size; k += kBlock) transpose(ready + k, kStride, to + k / kBlock * kTile, kBlock);
    }
    return {tiles, sums, off};
}

// Columns [begin, end) of 32 rows, as tiles of codes. Behind the last row the last one is repeated.
template <bool BOUNDED, typename Of>
inline void fill_codes(const Weight& w, const Of& step, long row, long begin, long end, uint16_t* to) {
    const long row_bytes = w.columns * Of::kBits / 8;
    for (long r = 0; r < kPairRows; r++, to += kBlock) {
        const uint8_t* const from = w.packed + std::min(row + r, w.rows - 1) * row_bytes;
        uint16_t* place = to;
        for (long k = begin; k < end; k += Of::kColumns) {
            const long at = k * Of::kBits / 8;
            _mm_prefetch((const char*)from + at + kPairRows * row_bytes, _MM_HINT_T0);
            const __m512i windows = step.template windows<BOUNDED>(from + at, row_bytes - at);
#pragma GCC unroll 8
            for (int code = 0; code < Of::kCodes; code++, place += kPair) {
                _mm512_store_si512(place, (__m512i)step.values(step.shifted(windows, code), code));
            }
        }
    }
}

// Adds a group's products [16 rows, 16 activations] to their totals; `shifts` null: the zero point is in the middle.
inline void add_group(const float* products, const float* scales, const float* shifts, long stride, const float* off,
                      const float* sums, float* totals) {
    const __m512 beyond = _mm512_load_ps(off), sum = _mm512_load_ps(sums);
#pragma GCC unroll 16
    for (long r = 0; r < 16; r++) {
        const __m512 product = _mm512_sub_ps(_mm512_load_ps(products + 16 * r), beyond);
        __m512 total = _mm512_fmadd_ps(_mm512_set1_ps(scales[r * stride]), product, _mm512_load_ps(totals + 16 * r));
        if (shifts) total = _mm512_fmadd_ps(_mm512_set1_ps(shifts[r * stride]), sum, total);
        _mm512_store_ps(totals + 16 * r, total);
    }
}

// `tokens` activations times the weight: out [tokens, rows]. Within a parallel region, by all.
template <typename Of>
GAMMA_AMX void multiply_tiled_codes(const Weight& w, const TiledActivations& x, long tokens, uint16_t* out, long out_stride,
                              AmxSpace& space) {
    static const Of made;
    const Of step = made;
    const long row_bytes = w.columns * Of::kBits / 8, groups = w.groups(), padded = (groups + 15) / 16 * 16;
    const long blocks = w.columns / kBlock, of_group = w.group_size / kBlock, token_tiles = (tokens + 15) / 16;
    uint16_t* const held = space.rows.of(kCodesColumns / kBlock * kPair);
    float* const products = space.sums.of(1024 + token_tiles * 512 + 2 * kPairRows * padded);
    float *const totals = products + 1024, *const scales = totals + token_tiles * 512;
    float* const shifts = scales + kPairRows * padded;
#pragma omp for schedule(static) nowait
    for (long row = 0; row < w.rows; row += kPairRows) {
        std::memset(totals, 0, token_tiles * 512 * sizeof(float));
        for (long r = 0; r < kPairRows; r++) {
            const long first = std::min(row + r, w.rows - 1) * groups;
            for (long group = 0; group < groups; group += 16) {
                float *const scale = scales + r * padded + group, *const shift = shifts + r * padded + group;
                read_groups(w, first + group, std::min(groups - group, 16L), scale, shift);
                _mm512_store_ps(shift, _mm512_mul_ps(_mm512_load_ps(shift), _mm512_load_ps(scale)));
            }
        }
        const bool bounded = (row + kPairRows) * row_bytes + 64 > w.rows * row_bytes;
        for (long begin = 0; begin < w.columns; begin += kCodesColumns) {
            const long end = std::min(begin + kCodesColumns, w.columns);
            if (bounded) {
                fill_codes<true>(w, step, row, begin, end, held);
            } else {
                fill_codes<false>(w, step, row, begin, end, held);
            }
            for (long group = begin / w.group_size; group < end / w.group_size; group++) {
                const uint16_t* const first = x.tiles + group * of_group * kTile;
                clear_sums();
                add_products(held + (group * of_group - begin / kBlock) * kPair, first,
                             token_tiles > 1 ? first + blocks * kTile : nullptr, of_group);
                store_sums(products);
                for (long tile = 0; tile < token_tiles; tile++) {
                    const long at = (tile * groups + group) * 16;
                    for (long half = 0; half < 2; half++) {
                        const long table = 16 * half * padded + group;
                        add_group(products + 512 * half + 256 * tile, scales + table, w.zero_point ? shifts + table : nullptr,
                                  padded, x.off + at, x.sums + at, totals + 512 * tile + 256 * half);
                    }
                }
            }
        }
        for (long tile = 0; tile < token_tiles; tile++) {
            put_rows(totals + 512 * tile, std::min(tokens - 16 * tile, 16L), w.rows - row,
                     out + 16 * tile * out_stride + row, out_stride);
        }
    }
}

// x [tokens, columns] times the weight: out [tokens, rows]. Within a parallel region, by all.
template <typename Of>
void gemm_amx_codes(const Weight& w, const uint16_t* x, long tokens, uint16_t* tiles, float* floats, uint16_t* out,
                   long out_stride, AmxSpace& space) {
    const TiledActivations ready = tile_for_codes<Of>(x, tokens, w, tiles, floats);
    multiply_tiled_codes<Of>(w, ready, tokens, out, out_stride, space);
#pragma omp barrier
}

// A step may not reach over the end of a group.
template <int BITS>
void gemm_amx_codes(const Weight& w, const uint16_t* x, long tokens, uint16_t* tiles, float* floats, uint16_t* out,
                   long out_stride, AmxSpace& space) {
    constexpr int kMost = most_codes(BITS);
    switch (w.group_size) {
        case 32: return gemm_amx_codes<Step<BITS, 1>>(w, x, tokens, tiles, floats, out, out_stride, space);
        case 64: return gemm_amx_codes<Step<BITS, std::min(kMost, 2)>>(w, x, tokens, tiles, floats, out, out_stride, space);
        case 128: return gemm_amx_codes<Step<BITS, std::min(kMost, 4)>>(w, x, tokens, tiles, floats, out, out_stride, space);
    }
}

// Of 2 to 6 bits.
inline void gemm_amx_codes(const Weight& w, const uint16_t* x, long tokens, uint16_t* tiles, float* floats, uint16_t* out,
                          long out_stride, AmxSpace& space) {
    switch (w.bits) {
        case 2: return gemm_amx_codes<2>(w, x, tokens, tiles, floats, out, out_stride, space);
        case 3: return gemm_amx_codes<3>(w, x, tokens, tiles, floats, out, out_stride, space);
        case 4: return gemm_amx_codes<4>(w, x, tokens, tiles, floats, out, out_stride, space);
        case 5: return gemm_amx_codes<5>(w, x, tokens, tiles, floats, out, out_stride, space);
        case 6: return gemm_amx_codes<6>(w, x, tokens, tiles, floats, out, out_stride, space);
    }
}

#else

inline void gemm_amx_codes(const Weight&, const uint16_t*, long, uint16_t*, float*, uint16_t*, long, AmxSpace&) {}

#endif

}  // namespace
