// A module as the checkpoint stores it, and what the files for all instruction sets share.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// What stands in the innermost loops: by itself a compiler stops inlining when there are many widths.
#define GAMMA_INNER [[gnu::always_inline]] inline

namespace {

constexpr int kBlock = 32;  // codes in a vector of 16-bit lanes

inline bool is_packed_width(long bits) { return bits >= 2 && bits <= 8 && bits != 7; }

inline float from_bf16(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline uint16_t to_bf16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return uint16_t((word + 0x7FFF + ((word >> 16) & 1)) >> 16);  // round to nearest even
}

// Work space from the start of a line of the cache on. It is kept for the next call: fresh pages would cost more than
// filling them.
template <typename Value>
class AlignedSpace {
    std::vector<Value> all;

  public:
    Value* of(size_t size) {
        constexpr size_t kLine = 64;
        if (all.size() < size + kLine / sizeof(Value)) all.resize(size + kLine / sizeof(Value));
        return (Value*)((uintptr_t(all.data()) + kLine - 1) & ~uintptr_t(kLine - 1));
    }
};

// packed [rows, columns*bits/32], scale [rows, groups] (bfloat16 or float16), zero_point [rows, groups] or null for a symmetric
// module. At 16 bits packed is the weight itself in bfloat16, and the rest does not count. As native.py lays it out.
struct Weight {
    const uint8_t* packed;
    const uint16_t* scale;
    const uint8_t* zero_point;
    long scale_is_bf16, rows, columns, group_size, bits;

    long groups() const { return columns / group_size; }
    float scale_at(long row, long group) const {
        const uint16_t bits = scale[row * groups() + group];
        return scale_is_bf16 ? from_bf16(bits) : _cvtsh_ss(bits);
    }
    // What is added to code - 2^(bits-1).
    float shift_at(long row, long group) const {
        return zero_point ? float(1 << (bits - 1)) - float(zero_point[row * groups() + group]) : 0.0f;
    }
};

// A gemm within a parallel region, by all threads: fill(row, end) unpacks a chunk of at most `panels` panels of rows, and
// multiply(row, end, first, count) multiplies it with `count` activations from `first` on.
template <typename Fill, typename Multiply>
void for_each_chunk(long rows, long tokens, long panels, long panel_rows, long tile_tokens, const Fill& fill,
                    const Multiply& multiply) {
    const long chunk = panels * panel_rows, chunks = (rows + chunk - 1) / chunk;
    // More threads than chunks: each chunk is unpacked for a part of the tokens.
    const long tiles = (tokens + tile_tokens - 1) / tile_tokens;
    const long blocks = std::max(1L, std::min(omp_get_num_threads() / chunks, tiles / 4));
#pragma omp for schedule(static) nowait
    for (long item = 0; item < chunks * blocks; item++) {
        const long row = item / blocks * chunk, end = std::min(rows, row + chunk), block = item % blocks;
        fill(row, end);
        for (long tile = block * tiles / blocks; tile < (block + 1) * tiles / blocks; tile++) {
            const long first = tile * tokens / tiles;
            multiply(row, end, first, (tile + 1) * tokens / tiles - first);
        }
    }
}

// How many panels a chunk of it has: as many as stay in a cache (`fit`), for activations of a tile are read once a chunk; but
// each thread should have two chunks, or they finish apart.
inline long panels_of_chunk(long rows, long panel_rows, long fit) {
    const long share = (rows / (2L * omp_get_num_threads()) + panel_rows - 1) / panel_rows;
    return std::max(1L, std::min(fit, share));
}

}  // namespace
