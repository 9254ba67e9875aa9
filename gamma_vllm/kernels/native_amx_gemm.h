// gemm on CPUs with AMX (Intel from Sapphire Rapids): tiles of 16 rows of the weight times 16
// activations, 32 columns at a time. Rows are dequantized straight into tiles, without the transposing that registers
// need (native_avx512_gemm.h); activations are put into the order of tiles once a layer.

#pragma once

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native_avx512_gemm.h"

namespace {

#if defined(__GNUC__) && __has_include(<amxbf16intrin.h>)

#define GAMMA_AMX __attribute__((target("amx-tile,amx-bf16")))

constexpr long kTile = 512;                // bfloat16 values in a tile: 16 times 32 columns, or 16 pairs of columns times 16
constexpr long kPair = 2 * kTile;          // two tiles of rows, side by side
constexpr long kPairRows = 32;
constexpr long kSlabTokens = 512;          // activations in the order of tiles at a time; each calling thread keeps a slab
constexpr long kSumsBytes = 4 * 1024;      // of 32 rows and 32 activations
constexpr long kPieceColumns = 1024;       // dequantized at a time, of as many rows as stay in a second cache of 2 MiB
constexpr long kPiecePairs = 8;            // beside activations and sums

// The CPU has tiles, and the system gives this process room for them.
inline bool has_amx() {
    static const bool found = [] {
        constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, from Linux 5.16 on
        uint32_t a, b, c, d;
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        const bool tiles = (d >> 24 & 1) && (d >> 22 & 1);  // AMX-TILE, AMX-BF16
        return tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return found;
}

// All that was stored is in memory: gcc 12 does not know what the instructions for tiles read.
inline void written() { __asm__ volatile("" ::: "memory"); }

// All eight tiles whole: 0 to 3 are sums, 4 and 5 rows of the weight, 6 and 7 activations.
GAMMA_AMX inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("" : : "r"(&config) : "memory");  // without its address it would seem to be read by nobody
    _tile_loadconfig(&config);
}

GAMMA_AMX inline void release_tiles() { _tile_release(); }

GAMMA_AMX inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

GAMMA_AMX inline void load_sums(const float* from) {
    written();
    _tile_loadd(0, from, 64);
    _tile_loadd(1, from + 256, 64);
    _tile_loadd(2, from + 512, 64);
    _tile_loadd(3, from + 768, 64);
}

GAMMA_AMX inline void store_sums(float* to) {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    _tile_stored(2, to + 512, 64);
    _tile_stored(3, to + 768, 64);
}

// Adds `blocks` times 32 columns of 32 rows times 16 or 32 activations, which lie in `first` and `second`.
GAMMA_AMX inline void add_products(const uint16_t* rows, const uint16_t* first, const uint16_t* second, long blocks) {
    written();
    if (second) {
        for (long k = 0; k < blocks; k++) {
            _tile_loadd(4, rows + k * kPair, 64);
            _tile_loadd(6, first + k * kTile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, second + k * kTile, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, rows + k * kPair + kTile, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    } else {
        for (long k = 0; k < blocks; k++) {
            _tile_loadd(4, rows + k * kPair, 64);
            _tile_loadd(6, first + k * kTile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, rows + k * kPair + kTile, 64);
            _tile_dpbf16ps(2, 5, 6);
        }
    }
    written();  // what is stored from here on must not be there yet
}

// Sums [32 rows, 16] of `tokens` (at most 16) activations to out [tokens, rows], of which `rows` are wanted.
inline void put_rows(const float* sums, long tokens, long rows, uint16_t* out, long out_stride) {
    alignas(64) uint16_t pairs[32 * 16], turned[16 * 32], order[32];
    const __mmask32 wanted = rows >= kPairRows ? ~__mmask32(0) : (__mmask32(1) << rows) - 1;
    for (int i = 0; i < 32; i++) order[i] = uint16_t(i / 2 + i % 2 * 16);
    const __m512i side_by_side = _mm512_load_si512(order);
    for (int r = 0; r < 32; r += 2) {  // two rows side by side are a word of 32 bits for each token
        const __m512 even = _mm512_load_ps(sums + 16 * r), odd = _mm512_load_ps(sums + 16 * r + 16);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_store_si512(pairs + 16 * r, _mm512_permutexvar_epi16(side_by_side, both));
    }
    transpose(pairs, 32, turned, 32);
    for (long m = 0; m < tokens; m++) {
        _mm512_mask_storeu_epi16(out + m * out_stride, wanted, _mm512_load_si512(turned + 32 * m));
    }
}

// The tiles' sums of 32 rows and `tokens` (at most 32) activations to out [tokens, rows], of which `rows` are wanted.
GAMMA_AMX inline void put_sums(long tokens, long rows, uint16_t* out, long out_stride) {
    alignas(64) float sums[32 * 16];
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 256, 64);
    put_rows(sums, std::min(tokens, 16L), rows, out, out_stride);
    if (tokens > 16) {
        _tile_stored(1, sums, 64);
        _tile_stored(3, sums + 256, 64);
        put_rows(sums, tokens - 16, rows, out + 16 * out_stride, out_stride);
    }
}

// x [tokens, columns] to tiles [tokens/16, columns/32, 16 pairs of columns, 16 tokens, 2]; absent tokens are zeros. Within
// a parallel region, by all.
inline void tile_activations(const uint16_t* x, long tokens, long columns, uint16_t* tiles) {
    const long blocks = columns / kBlock, all = (tokens + 15) / 16 * blocks;
#pragma omp for schedule(static)
    for (long i = 0; i < all; i++) {
        const long token = i / blocks * 16, k = i % blocks * kBlock, there = std::min(tokens - token, 16L);
        alignas(64) uint16_t padded[kTile];
        const uint16_t* from = x + token * columns + k;
        long stride = columns;
        if (there < 16) {
            std::memset(padded, 0, sizeof(padded));
            for (long m = 0; m < there; m++) std::memcpy(padded + m * kBlock, from + m * columns, 2 * kBlock);
            from = padded;
            stride = kBlock;
        }
        transpose(from, stride, tiles + i * kTile, kBlock);
    }
}

// Columns [begin, end) of 32 rows as tiles: [columns/32, 32 rows, 32]. Behind the last row the last one is repeated.
template <typename Fill>
inline void fill_tiles(const Weight& w, const Fill& fill, long row, long begin, long end, uint16_t* to) {
    const long row_bytes = w.columns * w.bits / 8, step_bytes = (end - begin) * w.bits / 8;
    const uint8_t* next = w.packed + (end < w.columns ? row : row + kPairRows) * row_bytes;
    next += end < w.columns ? end * w.bits / 8 : 0;
    for (long r = 0; r < kPairRows; r++, next += row_bytes) {
        for (long at = 0; at < step_bytes; at += 64) _mm_prefetch((const char*)next + at, _MM_HINT_T0);
        fill(std::min(row + r, w.rows - 1), begin, end, to + r * kBlock, kPair);
    }
}

// What a thread dequantizes into, and its sums.
struct AmxSpace {
    AlignedSpace<uint16_t> rows;
    AlignedSpace<float> sums;
};

// Tiles of `tokens` activations times the weight: out [tokens, rows]. Within a parallel region, by all.
// fill(row, begin, end, to, step) gives columns [begin, end) of a row in bfloat16, each 32 of them `step` after the last.
template <typename Fill>
GAMMA_AMX void gemm_amx(const Weight& w, const Fill& fill, const uint16_t* tiles, long tokens, uint16_t* out,
                            long out_stride, AmxSpace& space) {
    const long tile_size = w.columns / kBlock * kTile, token_tiles = (tokens + 15) / 16;
    const long pairs = (w.rows + kPairRows - 1) / kPairRows, threads = omp_get_num_threads();
    const long most = tokens <= 32 ? 1 : std::clamp(pairs / (2 * threads), 1L, kPiecePairs);  // two for each thread, or more
    const long piece_size = kPieceColumns / kBlock * kPair, pieces = (w.columns + kPieceColumns - 1) / kPieceColumns;
    uint16_t* const held = space.rows.of(most * piece_size);
    // Sums stay in their tiles where nothing comes between the pieces of their columns.
    const bool leave = most > 1 || token_tiles > 2;
    float* const sums =
        leave && pieces > 1 ? space.sums.of((token_tiles + 1) / 2 * most * kSumsBytes / sizeof(float)) : nullptr;
#pragma omp for schedule(static) nowait
    for (long first = 0; first < pairs; first += most) {
        const long count = std::min(pairs - first, most);
        for (long piece = 0; piece < pieces; piece++) {
            const long begin = piece * kPieceColumns, end = std::min(w.columns, begin + kPieceColumns);
            const long blocks = (end - begin) / kBlock;
            for (long p = 0; p < count; p++) {
                fill_tiles(w, fill, (first + p) * kPairRows, begin, end, held + p * piece_size);
            }
            for (long tile = 0; tile < token_tiles; tile += 2) {
                const uint16_t* here = tiles + tile * tile_size + begin / kBlock * kTile;
                for (long p = 0; p < count; p++) {
                    float* const kept = sums ? sums + (tile / 2 * most + p) * kSumsBytes / sizeof(float) : nullptr;
                    if (piece == 0) {
                        clear_sums();
                    } else if (leave) {
                        load_sums(kept);
                    }
                    add_products(held + p * piece_size, here, tile + 1 < token_tiles ? here + tile_size : nullptr, blocks);
                    if (piece + 1 == pieces) {
                        put_sums(std::min(tokens - 16 * tile, 32L), w.rows - (first + p) * kPairRows,
                                 out + 16 * tile * out_stride + (first + p) * kPairRows, out_stride);
                    } else if (leave) {
                        store_sums(kept);
                    }
                }
            }
        }
    }
}

#else  // an older compiler

constexpr long kSlabTokens = 1;
struct AmxSpace {};
inline bool has_amx() { return false; }
inline void configure_tiles() {}
inline void release_tiles() {}
inline void tile_activations(const uint16_t*, long, long, uint16_t*) {}
template <typename Fill>
void gemm_amx(const Weight&, const Fill&, const uint16_t*, long, uint16_t*, long, AmxSpace&) {}

#endif

}  // namespace
