// A module as the checkpoint stores it, and what the files for all instruction sets share.

#pragma once

#include <immintrin.h>

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

// packed [rows, columns*bits/32], scale [rows, groups] (bfloat16 or float16), zeros [rows, groups] or null for a symmetric
// module. At 16 bits packed is the weight itself in bfloat16, and the rest does not count. As native.py lays it out.
struct Weight {
    const uint8_t* packed;
    const uint16_t* scale;
    const uint8_t* zeros;
    long scale_is_bf16, rows, columns, group_size, bits;

    long groups() const { return columns / group_size; }
    float scale_at(long row, long group) const {
        const uint16_t bits = scale[row * groups() + group];
        return scale_is_bf16 ? from_bf16(bits) : _cvtsh_ss(bits);
    }
    // What is added to code - 2^(bits-1).
    float shift_at(long row, long group) const {
        return zeros ? float(1 << (bits - 1)) - float(zeros[row * groups() + group]) : 0.0f;
    }
};

}  // namespace
