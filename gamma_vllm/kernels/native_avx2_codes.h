// Codes of a weight and activations as integers of 16 bits, for CPUs with AVX2, FMA and F16C.
//
// Products are pmaddwd: codes are exact, and activations are rounded to 15 bits below the largest of their group, by a power
// of two. A bfloat16 has 8 bits, so what is not smaller than a 128th of its group's largest is exact as well. In floats a
// vector would hold half as many.

#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "native_layout.h"

namespace {

constexpr int kLanes = 16;  // of 16 bits in a vector

#define GAMMA_LAMBDA __attribute__((always_inline))

// work(0), work(1), ... work(COUNT - 1): a loop that is unrolled before anything else, so that what it indexes is in registers.
template <int COUNT, typename Work>
GAMMA_INNER void each(const Work& work) {
    [&]<int... I>(std::integer_sequence<int, I...>) GAMMA_LAMBDA { (work(I), ...); }(std::make_integer_sequence<int, COUNT>());
}

GAMMA_INNER __m256i load_halves(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low)),
                                   _mm_loadu_si128((const __m128i*)high), 1);
}

// sums plus the products of neighbours, [8, 2] times [8, 2]. As one piece of assembly: compilers would rather make all
// products of a loop first, and have no registers left for the sums.
GAMMA_INNER __m256i plus_products(__m256i sums, __m256i a, __m256i b) {
    __m256i products;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(a), "x"(b));
    return sums;
}

// 8 floats of bfloat16 or float16.
GAMMA_INNER __m256 widen(__m128i halves, bool is_bf16) {
    if (!is_bf16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// 16 floats to bfloat16, to the nearest even; what is no number stays none.
GAMMA_INNER __m256i narrow(__m256 low, __m256 high) {
    const auto rounded = [](__m256 values) {
        const __m256i bits = _mm256_castps_si256(values);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256 none = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
        const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
        return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, none)), 16);
    };
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(low), rounded(high)), 0xD8);
}

GAMMA_INNER float sum_of_lanes(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// 16 codes in the order of memory: pshufb brings the two bytes of each into its lane, a product and a shift to the right
// move it to the lowest bits and cut off its neighbours (AVX2 cannot shift lanes of 16 bits by different amounts).
template <int BITS>
struct Codes {
    static constexpr int kBytes = kLanes * BITS / 8;
    __m256i bytes, factors;

    Codes() {
        alignas(32) uint8_t index[32];
        alignas(32) uint16_t factor[16];
        for (int lane = 0; lane < 16; lane++) {
            const int bit = lane % 8 * BITS, byte = lane / 8 * BITS + bit / 8;
            index[2 * lane] = uint8_t(byte);
            index[2 * lane + 1] = uint8_t(byte + 1 < 16 ? byte + 1 : 0x80);  // behind the last byte only bits that do not count
            factor[lane] = uint16_t(1 << (16 - BITS - bit % 8));
        }
        bytes = _mm256_load_si256((const __m256i*)index);
        factors = _mm256_load_si256((const __m256i*)factor);
    }

    // Reads 16 bytes.
    GAMMA_INNER __m256i of(const uint8_t* from) const {
        const __m256i raw = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
        return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(raw, bytes), factors), 16 - BITS);
    }

    // Columns [begin, end) of a row, in blocks of 32, less their zero points: put(column, values) gets 16 of them.
    template <typename Put>
    GAMMA_INNER void read(const Weight& w, long row, long begin, long end, const Put& put) const {
        const uint8_t* from = w.packed + (row * w.columns + begin) * BITS / 8;
        const uint8_t* const last = w.packed + w.rows * w.columns * BITS / 8 - 16;  // nothing behind the weight is read
        for (long k = begin; k < end;) {
            const long stop = std::min(end, (k / w.group_size + 1) * w.group_size);
            const int zero = w.zero_point ? w.zero_point[row * w.groups() + k / w.group_size] : 1 << (BITS - 1);
            const __m256i zeros = _mm256_set1_epi16(int16_t(zero));
            for (; k < stop; k += kLanes, from += kBytes) {
                if (from <= last) {
                    put(k, _mm256_sub_epi16(of(from), zeros));
                } else {
                    uint8_t bounded[16] = {0};
                    std::memcpy(bounded, from, kBytes);
                    put(k, _mm256_sub_epi16(of(bounded), zeros));
                }
            }
        }
    }

    // 16 values of a group as floats.
    GAMMA_INNER static void scaled(__m256i values, float scale, __m256& low, __m256& high) {
        const __m256 factor = _mm256_set1_ps(scale);
        const auto part = [factor](__m128i half) {
            return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half)), factor);
        };
        low = part(_mm256_castsi256_si128(values));
        high = part(_mm256_extracti128_si256(values, 1));
    }

    // A row as (code - zero) * scale in float32.
    void dequantize(const Weight& w, long row, float* to) const {
        read(w, row, 0, w.columns, [&](long k, __m256i values) {
            __m256 low, high;
            scaled(values, w.scale_at(row, k / w.group_size), low, high);
            _mm256_storeu_ps(to + k, low);
            _mm256_storeu_ps(to + k + 8, high);
        });
    }

    // The same in bfloat16.
    void dequantize(const Weight& w, long row, uint16_t* to) const {
        read(w, row, 0, w.columns, [&](long k, __m256i values) {
            __m256 low, high;
            scaled(values, w.scale_at(row, k / w.group_size), low, high);
            _mm256_storeu_si256((__m256i*)(to + k), narrow(low, high));
        });
    }
};

// Calls work(Codes<bits>). False for a width that nothing here unpacks.
template <typename Work>
bool with_codes(long bits, const Work& work) {
    switch (bits) {
        case 2: work(Codes<2>()); return true;
        case 3: work(Codes<3>()); return true;
        case 4: work(Codes<4>()); return true;
        case 5: work(Codes<5>()); return true;
        case 6: work(Codes<6>()); return true;
        case 8: work(Codes<8>()); return true;
        default: return false;
    }
}

// A group of activations in bfloat16 to integers: x is `to` times what is returned, which is no number where one of x is
// none or infinite. `size` is a multiple of 32.
inline float quantize_group(const uint16_t* x, long size, int16_t* to) {
    __m256i most = _mm256_setzero_si256();
    for (long k = 0; k < size; k += kLanes) {
        const __m256i bits = _mm256_loadu_si256((const __m256i*)(x + k));
        most = _mm256_max_epi16(most, _mm256_and_si256(bits, _mm256_set1_epi16(0x7FFF)));
    }
    // Its largest: the minimum of what lacks to 2^16 - 1 is what one instruction finds.
    const __m128i halves = _mm_max_epi16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    const __m128i lacks = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(-1), halves));
    const int largest = 0xFFFF - _mm_extract_epi16(lacks, 0);
    // The largest becomes 2^14 or more; powers of two whose inverse is one too.
    const int exponent = std::clamp(largest >> 7, 20, 254);
    const __m256 inverse = _mm256_castsi256_ps(_mm256_set1_epi32((254 + 14 - exponent) << 23));
    for (long k = 0; k < size; k += kLanes) {
        const auto part = [&](long at) {
            return _mm256_cvtps_epi32(_mm256_mul_ps(widen(_mm_loadu_si128((const __m128i*)(x + at)), true), inverse));
        };
        const __m256i both = _mm256_packs_epi32(part(k), part(k + 8));
        _mm256_storeu_si256((__m256i*)(to + k), _mm256_permute4x64_epi64(both, 0xD8));
    }
    return largest >= 0x7F80 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, exponent - 127 - 14);
}

}  // namespace
